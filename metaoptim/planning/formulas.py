"""The cost model of a program: what the sizes in its formulas are, in numbers or by the size of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy

from ..compiler.cost.call_sizes import CallByBatch, CallSizes, call_sizes
from ..compiler.cost.model import SIZES, A, B, CostModel, D, E, F, H, K, R, S, V, number
from ..compiler.cost.polynomials import (
    TIMES,
    ZERO,
    Polynomial,
    added,
    difference,
    fitted,
    formula,
    largest,
    largest_difference,
)
from ..compiler.cost.step import step_cost
from ..compiler.ir.program import Program
from ..compiler.ir.step import Loop
from ..runtime.budget.planner import FEW_SLOTS, Planner
from .cost import Setting


def model_of(alone: Planner, tier: Planner | None, longest: Loop, step_bytes: int) -> CostModel:
    """The cost model of a program.

    Args:
        alone: planner of it, without a lower tier.
        tier: with one; None where there is none.
        longest: the loop that the formulas are of.
        step_bytes: gradients that each of its steps adds.
    """
    program, lowering = alone.program, alone.lowering
    known = {id(g): call_sizes(g, lowering) for g in program.step_graphs}
    found = _of_calls(program, longest, [known[id(call.step)] for call, _ in program.counted()])
    sizes = {s: number(x) for s, x in found.items()}
    few, per_slot = _few(alone), alone.alone.per_slot
    transient = max(step_cost(call.step, lowering).vjp_bytes for call in longest.calls)
    return CostModel(
        fixed_bytes=alone.peak(few) - few * per_slot - step_bytes * program.positions - transient,
        transient_bytes=transient,
        state_bytes=per_slot,
        step_bytes=step_bytes,
        forward_flops=sizes[F],
        vjp_flops=sizes[V],
        residual_bytes=sizes[R],
        residual_fixed_bytes=sizes[E],
        saved_flops=sizes[H],
        tier_bytes=0 if tier is None else tier.peak(few, True) - alone.peak(few),
        window=program.swept if program.swept < program.positions else None,
    )


def by_batch(settings: Sequence[Setting], size: int) -> Mapping[Any, Any]:
    """The sizes of the cost model as formulas in the size of a batch.

    Args:
        settings: of a function with so many times the batch as `polynomials.TIMES` says.
        size: of the batch.

    Raises:
        WindowError: where there are none.
    """
    given, planners = settings[0], [of.alone for of in settings]
    known: dict[tuple[int, ...], CallByBatch] = {}
    costs: list[CallByBatch] = []
    for calls in zip(*(of.program.counted() for of in settings), strict=True):
        steps = [call.step for call, _ in calls]
        key = tuple(map(id, steps))
        if key not in known:
            known[key] = CallByBatch(steps, size, given.alone.lowering, f"the call at {calls[0][0].location}")
        costs.append(known[key])
    found = _of_calls(given.program, given.longest, [c.sizes for c in costs])
    inner = costs[_inner(given.program, given.longest)]
    transient = largest(p for c in inner for p in c.vjp)
    found[A] = formula(transient)
    found[B] = formula([fitted([of.model.step_bytes for of in settings], size, f"B ({SIZES[B]})")])
    few = _few(given.alone)
    peaks = {c: _peak(planners, size, costs, c, False) for c in {few, *range(2, FEW_SLOTS + 1)}}
    changed = [fitted([p.alone.changed for p in planners], size, f"S ({SIZES[S]})")]
    pairs = [(changed, [ZERO]), *((peaks[c + 1], peaks[c]) for c in range(2, FEW_SLOTS))]
    found[S] = largest_difference(pairs)  # as of `Peaks`
    found[K] = difference(peaks[few], transient) - few * found[S] - given.program.positions * found[B]
    tiers = [of.tier for of in settings if of.tier is not None]
    found[D] = sympy.Integer(0)
    if tiers:
        found[D] = difference(_peak(tiers, size, costs, few, True), peaks[few])
    return {s: found[s] for s in SIZES}


def _few(planner: Planner) -> int:
    """As many slots as a peak is gone through for."""
    return min(FEW_SLOTS, planner.states)


def _peak(
    planners: Sequence[Planner], size: int, costs: Sequence[CallByBatch], slots: int, tiered: bool
) -> list[Polynomial]:
    """The polynomials of which the largest is the peak with so few slots."""
    allocated = {(0,) * len(TIMES): {ZERO}}
    for numbers, polynomials in (x for c in costs for x in c.allocated):
        allocated.setdefault(numbers, set()).update(polynomials)
    trails = [p.trail(slots, tiered) for p in planners]
    found = set()
    for moment in {*zip(*trails, strict=True)}:
        held, beside = zip(*moment, strict=True)
        polynomial = fitted(held, size, "bytes held")
        found |= {added(polynomial, p) for p in allocated[beside]}
    return largest(found)


def _inner(program: Program, longest: Loop) -> slice:
    """Where the calls of a loop are among `Program.counted`."""
    end = 1 + next(i for i, (call, _) in enumerate(program.counted()) if call is longest.calls[-1])
    return slice(end - len(longest.calls), end)


def _of_calls(program: Program, longest: Loop, costs: Sequence[CallSizes]) -> dict[Any, Any]:
    """What follows from each call of the program, in the order of `Program.counted`."""
    inner = _inner(program, longest)
    steps = costs[inner]
    kept = sympy.Max(*(c.kept for c in steps))
    after = list(zip(program.counted(), costs, strict=True))[inner.stop :]
    others = sum(count * (c.kept - kept) for (_, count), c in after)
    flops = (sympy.Add(*of) / len(steps) for of in zip(*(c.flops for c in steps), strict=True))
    return {
        R: kept,
        E: others + sympy.Max(*(c.more for c in costs)) if kept else sympy.Integer(0),
        **dict(zip((F, V, H), flops, strict=True)),  # of a round of several, their mean
    }
