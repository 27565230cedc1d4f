"""Peaks of an ordinary window by its slots, if it goes on as it has; remembered, for windows come alike."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.cost.step import measured
from metaoptim.compiler.ir.calls import Assign, StepCall
from metaoptim.compiler.ir.program import Call, super_steps
from metaoptim.compiler.ir.tensors import memory_bytes

from .planner import Peaks, changed_bytes, lengths
from .simulate import predict_sweep

REPEATS = 2  # of each step and assignment, before the last super-step repeats
_REMEMBERED = 64
_known: OrderedDict[Any, Peaks] = OrderedDict()  # they hold the steps: their ids stay their own
_lock = RLock()


def window_peaks(calls: Sequence[Call], initial: Sequence[Tensor], offload: bool = False) -> Peaks:
    """Peaks of a sweep back over ``calls`` and what may follow them.

    A few calls of every kind count, and the last super-step repeats.

    Args:
        calls: of the window, from where it remembers.
        initial: the state there; empty if calls have made all of it.
        offload: whether states without a slot go to a lower tier.
    """
    first, again = _few(calls)
    sizes = tuple(map(memory_bytes, initial))
    key = (*map(_key, (*first, *again)), len(again), sizes, offload)
    with _lock:
        if key not in _known:
            _known[key] = _peaks(list(map(_bare, first)), list(map(_bare, again)), sizes, offload)
            if len(_known) > _REMEMBERED:
                _known.popitem(last=False)
        _known.move_to_end(key)
        return _known[key]


def _peaks(first: list[Call], again: list[Call], sizes: Sequence[int], offload: bool) -> Peaks:
    initial = list(map(_sized, sizes))

    def exact(slots: int) -> int:
        loops = (first + again * length for length in lengths(slots, offload))
        return max(predict_sweep(calls, slots, offload, initial).peak_bytes for calls in loops)

    return Peaks(exact, changed_bytes([c for c in again if isinstance(c, StepCall)]))


def _few(calls: Sequence[Call]) -> tuple[list[Call], list[Call]]:
    """A few super-steps, with what is assigned within them, of every kind; and the last one."""
    seen: Counter = Counter()
    chosen: list[Call] = []
    rounds = super_steps(calls)
    for calls_of_one in rounds:
        kinds = [call.indices if isinstance(call, Assign) else id(call.step) for call in calls_of_one]
        seen.update(kinds)
        if any(seen[kind] <= REPEATS for kind in kinds):
            chosen += calls_of_one
    return chosen, next(r for r in reversed(rounds) if any(isinstance(c, StepCall) for c in r))


def _key(call: Call) -> tuple:
    """What a call's part in a peak depends on."""
    if isinstance(call, Assign):
        return call.indices, tuple(map(memory_bytes, call.values)), call.adoption
    costs = measured(call.step, "replay", call.lowering), measured(call.step, "vjp", call.lowering)
    return id(call.step), call.lowering, costs, call.reads, call.writes, call.back, call.metas


def _bare(call: Call) -> Call:
    """The same without anything of the user's."""
    if isinstance(call, Assign):
        return replace(call, values=[_sized(memory_bytes(v)) for v in call.values])
    return replace(call, inputs=[None] * len(call.inputs), spies=())


def _sized(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")
