"""Which states a compiled function keeps under a memory budget: as many as fit, since each saves recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from metaoptim.errors import BudgetError

from ..compiler.capture.tracer import Input
from ..compiler.ir import Loop, Lowering
from ..compiler.program import RolledProgram, nbytes, readable_bytes
from ..compiler.stepcost import measured, residual_cost, step_cost
from .dry_run import predict
from .rehearsal import shortened

_FEW = 4  # iterations of a loop in which all that happens in it has happened
SCALARS = 1024  # bytes of losses, rates and the like that come and go
FEW_SLOTS = 5  # the most for which a program is gone through
MANY = 6 * FEW_SLOTS  # iterations of a loop in which so many slots are as full as they will ever be


@dataclass(frozen=True)
class Plan:
    """How a compiled function keeps to its budget.

    Attributes:
        budget: bytes.
        slots: how many states are kept; None for all.
        peak_bytes: predicted, beyond the caller's own tensors.
        minimum: the smallest budget that there is a plan for.
        saved: over how many of the last calls residuals are saved, of which their derivatives make use.
    """

    budget: int
    slots: int | None
    peak_bytes: int
    minimum: int
    saved: int = 0


class Peaks:
    """Predicted peak by the number of slots: gone through for a few, from where on each costs the same.

    Args:
        exact: the peak, for so few slots.
    """

    def __init__(self, exact: Callable[[int], int]) -> None:
        self.exact = lru_cache(maxsize=None)(exact)

    def __call__(self, slots: int) -> int:
        """The peak with so many slots."""
        if slots <= FEW_SLOTS:
            return SCALARS + self.exact(slots)
        return self(FEW_SLOTS) + (slots - FEW_SLOTS) * self.per_slot

    @property
    def per_slot(self) -> int:
        """Bytes that a further slot costs."""
        return max(self.exact(k + 1) - self.exact(k) for k in range(2, FEW_SLOTS))

    def fitting(self, budget: int, most: int) -> int:
        """The most slots, up to ``most``, with which the peak is at most ``budget``; 0 if there is none."""
        if self(1) > budget:
            return 0
        more = budget - self(FEW_SLOTS)
        if more >= 0:
            return min(most, FEW_SLOTS + more // self.per_slot if self.per_slot else most)
        return min(most, max(k for k in range(1, FEW_SLOTS) if self(k) <= budget))


def peaks_of(program: RolledProgram, how: Lowering, offload: bool = False) -> Peaks:
    """Peaks of a compiled function's program; ``offload``: states without a slot go to a lower tier.

    A peak does not depend on how often a loop runs once it runs several times per slot, so it is found on a program cut
    short. Where states of several loops differ in size, the largest may be the ones that are kept.
    """

    def exact(slots: int) -> int:
        few, many = (n + (program.limit or 0) for n in (_FEW, MANY))
        loops = [c for c in program.calls if isinstance(c, Loop)] or [None]
        short = [shortened(program, few, x, many) for x in loops]
        return max(predict(p, slots, how, offload).peak_bytes + _left_out(program, p) for p in short)

    return Peaks(exact)


def _left_out(program: RolledProgram, short: RolledProgram) -> int:
    """Bytes of gradients of listed tensors that only iterations read which ``short`` leaves out."""
    listed = {
        x
        for call, _ in program.counted()
        for g in call.inputs
        if g.kind == "each"
        for x in g.sources
        if isinstance(x, Input) and x.grad
    }
    if not listed:
        return 0
    read = {x for call, _ in short.counted() for g in call.inputs if g.kind != "each" for x in g.sources}
    for item in (c for c in short.calls if isinstance(c, Loop)):
        for call, strides in zip(item.calls, item.strides, strict=True):
            for g, stride in zip(call.inputs, strides, strict=True):
                if g.kind == "each":
                    read |= {g.advanced(k * stride).chosen.of for k in range(item.count)}
    return sum(nbytes(x.spec) for x in listed - read)


def plan_for(program: RolledProgram, how: Lowering, budget: int, name: str, offload: bool = False) -> Plan:
    """The plan with the least recomputation within a budget.

    Args:
        program: of the compiled function.
        how: its graphs are run.
        budget: bytes that a call and its backward may hold at a time, beyond the caller's own tensors.
        name: of the function, for the error.
        offload: whether states without a slot go to a lower tier.

    Raises:
        BudgetError: if not even a single state can be kept.
    """
    peaks, states = peaks_of(program, how, offload), program.positions
    least = peaks(1)
    minimum = least + _first_use(program, how)
    if budget < minimum:
        checked = minimum > least
        raise BudgetError(
            f"memory_budget: {readable_bytes(budget)} ({budget} bytes) is too small for {name}: the smallest feasible "
            f"budget is {minimum} bytes ({readable_bytes(minimum)}), with one state of "
            f"{readable_bytes(program.state_bytes)} kept"
            + (f"; without the first-use check (self_check=False) it is {least} bytes" if checked else ""),
            minimum,
        )
    if offload:  # as long as every state fits, none is on its way down or up
        alone = peaks_of(program, how)
        peaks = alone if alone.fitting(budget, max(states, 1)) >= states else peaks
    slots = peaks.fitting(budget, max(states, 1))
    return Plan(budget, None if slots >= states else slots, peaks(slots), minimum)


def with_residuals(
    plan: Plan, program: RolledProgram, how: Lowering, rehearsal: Callable[[], None] | None = None
) -> Plan:
    """A plan that keeps every state, with residuals saved over as many of the last calls as the rest allows.

    Args:
        plan: as of `plan_for`.
        program: of the compiled function.
        how: its graphs are run.
        rehearsal: runs a few calls with residuals, so that `measured` knows what they take; None to believe the graphs.
    """
    if plan.slots is not None:
        return plan
    room = plan.budget - plan.peak_bytes
    bytes_, more = _most(program, how)
    if rehearsal is not None:
        few = shortened(program, _FEW).positions
        checking = 4 * max(
            c.replay_bytes + c.vjp_bytes for c in (step_cost(g, how) for g in program.step_graphs)
        )
        if not bytes_ or room < few * bytes_ + more + checking:
            return plan
        rehearsal()
        bytes_, more = _most(program, how)
    saved = min(program.positions, max(0, room - more) // bytes_) if bytes_ else 0
    return replace(plan, saved=saved, peak_bytes=plan.peak_bytes + (saved * bytes_ + more if saved else 0))


def _most(program: RolledProgram, how: Lowering) -> tuple[int, int]:
    """`residual_cost` of the step graph for which it is highest."""
    costs = [residual_cost(g, how) for g in program.step_graphs]
    return max((kept for kept, _ in costs), default=0), max((more for _, more in costs), default=0)


def _first_use(program: RolledProgram, how: Lowering) -> int:
    """Bytes that compiling and checking a graph takes beyond what running it does."""
    found = [measured(g, kind, how) for g in program.step_graphs for kind in ("replay", "vjp")]
    return max([0, *(m.first_bytes - m.peak_bytes for m in found if m is not None)])
