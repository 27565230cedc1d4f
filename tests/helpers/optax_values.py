"""Values of optax for `tests/optim/test_optax_values.py`: what is compared, and the table of them beside this file.

To make the table anew, where optax is installed: ``python tests/helpers/optax_values.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")
STEPS = [0, 1, 3, 4, 7, 10, 13, 14, 40]
#: name -> the schedule here, the one in optax, arguments of both
SCHEDULES: dict[str, tuple[str, str, tuple, dict[str, Any]]] = {
    "constant": ("constant", "constant_schedule", (0.3,), {}),
    "linear": ("linear", "linear_schedule", (0.3, 0.01, 10), {}),
    "linear later": ("linear", "linear_schedule", (0.1, 0.7, 10, 3), {}),
    "polynomial": ("polynomial", "polynomial_schedule", (0.3, 0.01, 2.5, 10, 4), {}),
    "cosine": ("cosine", "cosine_decay_schedule", (0.3, 10), {}),
    "cosine alpha": ("cosine", "cosine_decay_schedule", (0.3, 13, 0.1, 1.7), {}),
    "exponential": ("exponential", "exponential_decay", (0.3, 4, 0.5), {}),
    "exponential later": ("exponential", "exponential_decay", (0.3, 4, 0.5, 3), {"end_value": 0.1}),
    "exponential growth": ("exponential", "exponential_decay", (0.3, 4, 1.5), {"end_value": 0.9}),
    "exponential stairs": ("exponential", "exponential_decay", (0.3, 4, 0.5, 1), {"staircase": True}),
    "piecewise": ("piecewise", "piecewise_constant_schedule", (0.3, {4: 0.5, 10: 0.2}), {}),
}
GRADIENTS = {
    "a": [[[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]], [0.7, -0.2]],
    "b": [[[0.01, 0.02, -0.05], [0.03, -0.04, 0.06]], [0.0, 0.08]],
}
PARAMETERS = [[[1.0, -2.0, 0.5], [0.25, 3.0, -1.5]], [0.4, -0.6]]  # weight and bias
#: name -> the transform here, the one in optax, arguments of both
TRANSFORMS: dict[str, tuple[str, str, tuple]] = {
    "clip": ("clip_value", "clip", (0.45,)),
    "clip_by_global_norm": ("clip_global_norm", "clip_by_global_norm", (0.6,)),
    "add_decayed_weights": ("weight_decay", "add_decayed_weights", (0.1,)),
    "centralize": ("centralize", "centralize", ()),
    "scale": ("scale", "scale", (-0.3,)),
}


def computed() -> dict[str, dict[str, Any]]:
    """The values that optax gives."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    found: dict[str, dict[str, Any]] = {"optax": optax.__version__, "schedules": {}, "transforms": {}}
    for name, (_, theirs, args, options) in SCHEDULES.items():
        schedule = getattr(optax, theirs)(*args, **options)
        found["schedules"][name] = [float(schedule(t)) for t in STEPS]
    parts = [optax.linear_schedule(0.0, 0.3, 4), optax.cosine_decay_schedule(0.3, 9, 0.2)]
    found["schedules"]["join"] = [float(optax.join_schedules(parts, [4])(t)) for t in STEPS]
    warm = optax.warmup_cosine_decay_schedule(0.05, 0.3, 4, 13, 0.06)
    found["schedules"]["warmup"] = [float(warm(t)) for t in STEPS]

    def as_arrays(lists: list) -> list:
        return [jax.numpy.array(x) for x in lists]

    params = as_arrays(PARAMETERS)
    masks = {"add_decayed_weights": {"mask": [True, False]}}
    for name, (_, theirs, args) in TRANSFORMS.items():
        transform = getattr(optax, theirs)(*args, **masks.get(name, {}))
        for which, grads in GRADIENTS.items():
            new, _ = transform.update(as_arrays(grads), transform.init(params), params)
            found["transforms"][f"{name} {which}"] = [g.tolist() for g in new]
    return found


if __name__ == "__main__":
    TABLE.write_text(json.dumps(computed(), indent=1) + "\n", encoding="utf-8")
