"""Predicted peaks by the number of slots, of a compiled function and of an ordinary window that goes on as it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import comb
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.cost.step import measured, step_cost
from metaoptim.compiler.ir.programs.calls import Assign, Loop, StepCall
from metaoptim.compiler.ir.programs.program import Call, Program, super_steps
from metaoptim.compiler.ir.step import Lowering
from metaoptim.compiler.ir.tensors import memory_bytes, nbytes
from metaoptim.compiler.ir.values import Input

from .simulate import predict, predict_sweep

FEW = 4  # iterations of a loop in which all that happens in it has happened
FEW_SLOTS = 5  # the most for which a program is gone through
SCALARS = 1024  # bytes of losses, rates and the like that come and go
REPEATS = 2  # of each step and assignment of a window, before the last super-step repeats
_REMEMBERED = 64


class Peaks:
    """Predicted peak by the number of slots: gone through for a few, from where on each costs the same.

    Args:
        exact: the peak, for so few slots.
        changed: bytes of a state that steps change, which a further slot costs at least: where a few slots take less
            than a single large step beside them, peaks do not show it.
    """

    def __init__(self, exact: Callable[[int], int], changed: int) -> None:
        self.exact, self.changed = lru_cache(maxsize=None)(exact), changed

    def __call__(self, slots: int) -> int:
        """The peak with so many slots."""
        if slots <= FEW_SLOTS:
            return SCALARS + self.exact(slots)
        return self(FEW_SLOTS) + (slots - FEW_SLOTS) * self.per_slot

    @property
    def per_slot(self) -> int:
        """Bytes that a further slot costs."""
        return max(self.changed, *(self.exact(k + 1) - self.exact(k) for k in range(2, FEW_SLOTS)))

    def fitting(self, budget: int, most: int) -> int:
        """The most slots, up to ``most``, with which the peak is at most ``budget``; 0 if there is none."""
        more = budget - self(FEW_SLOTS)
        if more >= 0:
            return min(most, FEW_SLOTS + more // self.per_slot if self.per_slot else most)
        return max((k for k in range(1, min(most + 1, FEW_SLOTS)) if self(k) <= budget), default=0)

    @property
    def least(self) -> int:
        """The smallest peak there is; beside a tier, one slot may take more than two."""
        return min(map(self, range(1, FEW_SLOTS + 1)))


def larger(one: Peaks, other: Peaks) -> Peaks:
    """The larger of two peaks, for any number of slots."""
    return Peaks(lambda k: max(one.exact(k), other.exact(k)), max(one.changed, other.changed))


def changed_bytes(calls: Iterable[Call]) -> int:
    """Bytes of the state that ``calls`` change, each entry once; a view counts with all that it keeps alive."""
    sizes: dict[int, int] = {}
    for call in calls:
        if not isinstance(call, StepCall):
            continue
        outputs = step_cost(call.step, call.lowering).outputs
        counted: set[int] = set()  # results whose memory has been: others may lie in it
        for (k, index), made in zip(enumerate(call.writes), outputs, strict=False):
            of = k if made.of_result < 0 else made.of_result
            if index >= 0:
                sizes[index] = 0 if of in counted else outputs[of].size
                counted.add(of)
    return sum(sizes.values())


def lengths(slots: int, offload: bool = False) -> Sequence[int]:
    """Iterations of a loop from which on more of them do not fill these slots any further.

    With fewer than C(slots + 4, 4) no sweep has come to replay anything four times, with all slots taken on the way.
    """
    many = comb((FEW_SLOTS if offload else slots) + 4, 4) + FEW
    # with a tier, it is a matter of how many steps there are after the last state that went there
    return range(many, many + (slots if offload else 0) + 1)


# -- of a compiled function --------------------------------------------------------------------------------------------


def peaks_of(program: Program, lowering: Lowering, offload: bool = False) -> Peaks:
    """Peaks of a compiled function's program; ``offload``: states without a slot go to a lower tier.

    A peak does not depend on how often a loop runs once it runs several times per slot. Where states of several loops
    differ in size, the largest may be the ones that are kept.
    """
    loops = [c for c in program.calls if isinstance(c, Loop)]
    more = program.window or 0

    def exact(slots: int) -> int:
        short = [
            shortened(program, FEW + more, x, length + more)
            for x in loops or [None]
            for length in lengths(slots, offload)
        ]
        return max(predict(p, slots, lowering, offload).peak_bytes + left_out(program, p) for p in short)

    changed = (changed_bytes([replace(call, lowering=lowering) for call in x.calls]) for x in loops)
    return Peaks(exact, max(changed, default=0))


def shortened(program: Program, most: int, long: Loop | None = None, longest: int = 0) -> Program:
    """``program`` with at most ``most`` iterations of each loop, and ``longest`` of the loop ``long``."""
    calls = [
        replace(c, count=min(c.count, longest if c is long else most)) if isinstance(c, Loop) else c
        for c in program.calls
    ]
    return replace(program, calls=calls)


def left_out(program: Program, short: Program) -> int:
    """Bytes of gradients of listed tensors that only iterations read which ``short`` leaves out."""
    given = [g for call, _ in program.counted() for g in call.inputs if g.kind == "each"]
    listed = {x for g in given for x in g.sources if isinstance(x, Input) and x.grad}
    if not listed:
        return 0
    read = {x for call, _ in short.counted() for g in call.inputs if g.kind != "each" for x in g.sources}
    for item in (c for c in short.calls if isinstance(c, Loop)):
        for g in (g for call in item.calls for g in call.inputs if g.kind == "each"):
            read |= {g.after(k).chosen.of for k in range(item.count)}
    return sum(nbytes(x.spec) for x in listed - read)


# -- of an ordinary window ---------------------------------------------------------------------------------------------

_known: dict[Any, Peaks] = {}  # windows come alike; the peaks hold the steps: their ids stay their own


def window_peaks(calls: Sequence[Call], initial: Sequence[Tensor], offload: bool = False) -> Peaks:
    """Peaks of a sweep back over a window's ``calls``, from the state ``initial`` on, and what may follow them.

    A few calls of every kind count, and the last super-step repeats.
    """
    first, again = _few(calls)
    sizes = tuple(map(memory_bytes, initial))
    key = (*map(_key, (*first, *again)), len(again), sizes, offload)
    found = _known.get(key)
    if found is None:
        found = _known[key] = _peaks(list(map(_bare, first)), list(map(_bare, again)), sizes, offload)
        for oldest in list(_known)[:-_REMEMBERED]:
            _known.pop(oldest, None)
    return found


def _peaks(first: list[Call], again: list[Call], sizes: Sequence[int], offload: bool) -> Peaks:
    initial = list(map(_sized, sizes))

    def exact(slots: int) -> int:
        loops = (first + again * length for length in lengths(slots, offload))
        return max(predict_sweep(calls, slots, offload, initial).peak_bytes for calls in loops)

    return Peaks(exact, changed_bytes(again))


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
