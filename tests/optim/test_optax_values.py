"""Schedules and transforms have the values of optax, where it has the same ones."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import optax_values
from metaoptim import schedules, transforms
from metaoptim.optim.transforms import Transform
from optax_values import GRADIENTS, PARAMETERS, SCHEDULES, STEPS, TRANSFORMS

s = schedules
KNOWN: dict[str, Any] = json.loads(optax_values.TABLE.read_text(encoding="utf-8"))
OURS = {name: getattr(s, ours)(*args, **options) for name, (ours, _, args, options) in SCHEDULES.items()} | {
    "join": s.join([s.linear(0.0, 0.3, 4), s.cosine(0.3, 9, 0.2)], [4]),
    "warmup": s.warmup(s.cosine(0.3, 9, 0.2), 4, init_value=0.05),
}


def test_the_table_is_of_what_is_compared() -> None:
    assert KNOWN["schedules"].keys() == OURS.keys()
    assert KNOWN["transforms"].keys() == {f"{name} {which}" for name in TRANSFORMS for which in GRADIENTS}


@pytest.mark.parametrize("name", OURS)
def test_schedule(name: str) -> None:
    assert [float(OURS[name](t)) for t in STEPS] == pytest.approx(
        KNOWN["schedules"][name], rel=1e-12, abs=1e-15
    )


def transformed(transform: Transform, grads: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """What a transform makes of gradients of a weight and a bias."""
    at = [k for k, name in enumerate(("weight", "bias")) if transform.matches(name)]
    new = list(grads)
    for k, g in zip(
        at, transform.apply([grads[k] for k in at], [params[k] for k in at], transform.hyper), strict=True
    ):
        new[k] = g
    return new


@pytest.mark.parametrize("which", GRADIENTS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name: str, which: str) -> None:
    ours, _, args = TRANSFORMS[name]
    mask = {"mask": "weight"} if name == "add_decayed_weights" else {}
    tensors = [[torch.tensor(x, dtype=torch.float64) for x in of] for of in (GRADIENTS[which], PARAMETERS)]
    got = transformed(getattr(transforms, ours)(*args, **mask), *tensors)
    # clipping to a norm is torch's, which adds 1e-6 to the norm
    rtol = 2e-6 if name == "clip_by_global_norm" else 1e-12
    for g, expected in zip(got, KNOWN["transforms"][f"{name} {which}"], strict=True):
        torch.testing.assert_close(g, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-15)


@pytest.mark.skipif(importlib.util.find_spec("optax") is None, reason="optax is not installed")
def test_the_table_is_what_optax_gives() -> None:
    now = optax_values.computed()
    for kind in ("schedules", "transforms"):
        for name, values in KNOWN[kind].items():
            torch.testing.assert_close(_flat(now[kind][name]), _flat(values), rtol=1e-12, atol=1e-15)


def _flat(values: Any) -> Tensor:
    return torch.cat([torch.tensor(v, dtype=torch.float64).reshape(-1) for v in values])
