"""Options of a window that contradict each other, or what the process is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from .runtime.engine.estimators.evolution import Evolution
from .runtime.engine.estimators.implicit import Implicit


def check_gradient(gradient: Any, said: Mapping[str, Any]) -> None:
    """Raise for an unknown ``gradient``, and for other options of the window that contradict it."""
    if not isinstance(gradient, (Implicit, Evolution)) and gradient not in (
        "exact",
        "first_order",
        "forward",
    ):
        raise ValueError(
            f"gradient: got {gradient!r}, expected 'exact', 'first_order', 'forward', metaoptim.Implicit(...) or "
            "metaoptim.Evolution(...)"
        )
    if isinstance(gradient, Evolution) and gradient.persistent and said.get("offline"):
        raise ValueError(
            "offline=True with Evolution(persistent=True): an offline window goes back to where it began, so the next "
            "does not go on from it; use offline=False, or persistent=False"
        )
    what, why = _WITHOUT.get("forward" if gradient == "forward" else type(gradient), ("", {}))
    for name, value in said.items():
        if name in why:
            raise ValueError(f"{name}={value!r}: {what} {why[name]}; leave it out, or use gradient='exact'")


_NOTHING_KEPT = dict.fromkeys(
    ("slots", "memory_budget", "offload"), "keeps one state, so there is nothing to plan"
)
_TAPE = {"strategy": "is not taken from autograd's own tape"}
_NO_COTANGENTS = {
    "backward_hook": "has no cotangents of inner gradients",
    "backend": "compiles no derivative",
}
#: By the gradient asked for: what it is, and by option why that has no place there.
_WITHOUT: dict[Any, tuple[str, dict[str, str]]] = {
    "forward": (
        "a forward gradient",
        _NOTHING_KEPT | _TAPE | _NO_COTANGENTS | {"window": "goes through all steps"},
    ),
    Implicit: ("an implicit gradient", _NOTHING_KEPT | _TAPE | {"window": "is that of the last step alone"}),
    Evolution: (
        "an evolution gradient",
        _NOTHING_KEPT
        | _TAPE
        | _NO_COTANGENTS
        | {"window": "is one of whole runs", "hvp": "takes no derivative of a step"},
    ),
}


def check_sync(group: Any, offline: bool) -> None:
    """Raise unless ``sync=group`` names a process group of this rank; False is no group.

    Raises:
        TypeError: for something else than a process group.
        ValueError: where there is nothing to average, or nobody to average with.
    """
    if group is False:
        return
    if group is None or not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"sync={group!r}: torch.distributed is not initialised; call torch.distributed.init_process_group first "
            "(until then torch.distributed.group.WORLD is None), or leave sync out"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("sync: this rank is not in the process group; leave sync out on ranks outside of it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"sync: got {group!r}, expected a process group, such as torch.distributed.group.WORLD"
        )
    if offline:
        raise ValueError(
            "sync= with offline=True: offline, the networks return to where they began, so there is nothing to "
            "average; average the meta-gradients instead, or use offline=False"
        )
