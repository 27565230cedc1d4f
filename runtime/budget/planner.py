"""Which states a compiled function keeps under a memory budget: as many as fit, since each saves recomputation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import comb

import torch
from torch import Tensor

from metaoptim.compiler.cost.step import measured, residual_cost, step_cost
from metaoptim.compiler.ir.calls import Loop, StepCall
from metaoptim.compiler.ir.program import Kept, Program
from metaoptim.compiler.ir.retention import Retention
from metaoptim.compiler.ir.step import Lowering
from metaoptim.compiler.ir.tensors import nbytes
from metaoptim.compiler.ir.text import readable_bytes
from metaoptim.compiler.ir.values import Input
from metaoptim.errors import BudgetError

from ..states.schedule import with_tier
from .amounts import budget_bytes, default_budget
from .measure import rehearse, shortened
from .simulate import predict

_FEW = 4  # iterations of a loop in which all that happens in it has happened
SCALARS = 1024  # bytes of losses, rates and the like that come and go
FEW_SLOTS = 5  # the most for which a program is gone through


@dataclass(frozen=True)
class Plan:
    """How a compiled function keeps to its budget.

    Attributes:
        budget: bytes.
        slots: how many states are kept; None for all.
        peak_bytes: predicted, beyond the caller's own tensors.
        minimum: the smallest budget that there is a plan for.
        saved: over how many of the last calls residuals are saved, of which their derivatives make use.
        offload: whether states without a slot go to a lower tier.
    """

    budget: int
    slots: int | None
    peak_bytes: int
    minimum: int
    saved: int = 0
    offload: bool = False


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


def peaks_of(program: Program, lowering: Lowering, offload: bool = False) -> Peaks:
    """Peaks of a compiled function's program; ``offload``: states without a slot go to a lower tier."""

    def exact(slots: int) -> int:
        short = _cut_short(program, slots, offload)
        return max(predict(p, slots, lowering, offload).peak_bytes + _left_out(program, p) for p in short)

    return Peaks(
        exact, max((changed_bytes(x.calls) for x in program.calls if isinstance(x, Loop)), default=0)
    )


def changed_bytes(calls: Sequence[StepCall]) -> int:
    """Bytes of the state that ``calls`` change, each entry once; a view counts with all that it keeps alive."""
    sizes: dict[int, int] = {}
    for call in calls:
        outputs = step_cost(call.step, call.lowering).outputs
        counted: set[int] = set()  # results whose memory has been: others may lie in it
        for (k, index), made in zip(enumerate(call.writes), outputs, strict=False):
            of = k if made.of_result < 0 else made.of_result
            if index >= 0:
                sizes[index] = 0 if of in counted else outputs[of].size
                counted.add(of)
    return sum(sizes.values())


def _cut_short(program: Program, slots: int, offload: bool) -> list[Program]:
    """Programs of which the peaks are those of ``program``.

    A peak does not depend on how often a loop runs once it runs several times per slot. Where states of several loops
    differ in size, the largest may be the ones that are kept.
    """
    more = program.window or 0
    loops = [c for c in program.calls if isinstance(c, Loop)] or [None]
    return [
        shortened(program, _FEW + more, x, length + more) for x in loops for length in lengths(slots, offload)
    ]


def lengths(slots: int, offload: bool = False) -> Sequence[int]:
    """Iterations of a loop in which so many slots are as full as they will ever be.

    With fewer than C(slots + 4, 4) no sweep has come to replay anything four times, with all slots taken on the way.
    """
    many = comb((FEW_SLOTS if offload else slots) + 4, 4) + _FEW
    # with a tier, it is a matter of how many steps there are after the last state that went there
    return range(many, many + (slots if offload else 0) + 1)


def _left_out(program: Program, short: Program) -> int:
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
        for g in (g for call in item.calls for g in call.inputs if g.kind == "each"):
            read |= {g.after(k).chosen.of for k in range(item.count)}
    return sum(nbytes(x.spec) for x in listed - read)


class Planner:
    """Finds the plan with the least work for any budget.

    Args:
        program: of the compiled function.
        lowering: the backend and HVP mode of the step graphs.
        name: of the function, for errors.
        offload: whether states without a slot may go to a lower tier.
        beside: bytes that a call holds besides what going through ``program`` shows.
    """

    def __init__(
        self, program: Program, lowering: Lowering, name: str, offload: bool = False, beside: int = 0
    ) -> None:
        self.program, self.lowering, self.name, self.offload, self.beside = (
            program,
            lowering,
            name,
            offload,
            beside,
        )
        self.states = max(program.swept, 1)
        self.alone = peaks_of(program, lowering)
        self.tier = peaks_of(program, lowering, offload) if offload else self.alone

    def plan(self, budget: int) -> Plan:
        """The plan for a call and its backward that may hold ``budget`` bytes beyond the caller's own tensors.

        Raises:
            BudgetError: if not even a single state can be kept.
        """
        room, tiered = budget - self.beside, False
        slots = self.alone.fitting(room, self.states)
        if self.offload:
            most = self.tier.fitting(room, self.states)
            choices = [k for k in range(1, most + 1) if self.tier(k) <= room]
            slots, tiered = with_tier(self.states, slots, choices)
        least, minimum = self.least(tiered), self.minimum(tiered)
        if budget < minimum:
            checked = minimum > least
            raise BudgetError(
                f"memory_budget: {readable_bytes(budget)} ({budget} bytes) is too small for {self.name}: the smallest "
                f"feasible budget is {minimum} bytes ({readable_bytes(minimum)}); a state takes "
                f"{readable_bytes(self.program.state_bytes)}"
                + (
                    f"; without the first-use check (self_check=False) it is {least} bytes" if checked else ""
                ),
                minimum,
            )
        if budget >= self.every:
            return Plan(budget, None, self.every, minimum)
        return Plan(budget, slots, self.peak(slots, tiered), minimum, offload=tiered)

    def least(self, tiered: bool = False) -> int:
        """The fewest bytes, without what compiling and checking take."""
        return min((self.tier if tiered else self.alone).least + self.beside, self.every)

    def minimum(self, tiered: bool = False) -> int:
        """The smallest budget that there is a plan for."""
        return self.least(tiered) + _first_use(self.program, self.lowering)

    @cached_property
    def every(self) -> int:
        """Predicted bytes where every state stays until the end: as many slots give them up on the way back."""
        short = shortened(self.program, lengths(FEW_SLOTS)[0] + (self.program.window or 0))
        more = (self.states - max(short.swept, 1)) * self.alone.per_slot + _left_out(self.program, short)
        return SCALARS + predict(short, None, self.lowering).peak_bytes + more + self.beside

    def peak(self, slots: int, tiered: bool = False) -> int:
        """Predicted bytes with so many slots."""
        return (self.tier if tiered else self.alone)(slots) + self.beside


def _nothing() -> None:
    """In place of a rehearsal, to believe the sizes of the graphs."""


def decide(
    program: Program,
    lowering: Lowering,
    retention: Retention,
    name: str,
    tensors: dict[Input, Tensor] | None = None,
) -> tuple[Kept, Plan | None]:
    """What a compiled function keeps, and the plan behind it where a budget decides.

    Args:
        program: of the function.
        lowering: the backend and HVP mode of the step graphs.
        retention: what the user asks to keep.
        name: of the function, for errors.
        tensors: behind the program's inputs, to measure a few of its steps with; None to believe the graphs' sizes.

    Raises:
        BudgetError: for a budget in which not even one state can be kept.
    """
    if retention.memory_budget is None:
        plan = None if retention.slots is not None else default_plan(Planner(program, lowering, name))
        return Kept(retention.slots if plan is None else plan.slots, 0, retention.offload), plan
    rehearsal = _nothing
    if tensors is not None:
        rehearse(program, tensors, lowering)
        rehearsal = partial(rehearse, program, tensors, lowering, saving=True)
    budget = budget_bytes(retention.memory_budget, device_of(program))
    plan = with_residuals(
        plan_for(program, lowering, budget, name, retention.offload is not None), program, lowering, rehearsal
    )
    return Kept(plan.slots, plan.saved, retention.offload if plan.offload else None), plan


def default_plan(planner: Planner) -> Plan | None:
    """The plan where neither slots nor a budget is stated: None, which keeps every state, as a rule.

    Where that takes more than half of the free memory, as many as fit into it; one if none does.
    """
    budget = default_budget(device_of(planner.program))
    if 2 * planner.states * planner.program.state_bytes <= budget or planner.every <= budget:
        return None
    return planner.plan(max(budget, planner.minimum()))


def device_of(program: Program) -> torch.device:
    """Where the inner state lives."""
    return next((x.spec.device for x in program.inputs if x.spec.device.type != "cpu"), torch.device("cpu"))


def plan_for(program: Program, lowering: Lowering, budget: int, name: str, offload: bool = False) -> Plan:
    """The plan for a budget of so many bytes; see `Planner`."""
    return Planner(program, lowering, name, offload).plan(budget)


def with_residuals(
    plan: Plan, program: Program, lowering: Lowering, rehearsal: Callable[[], None] = _nothing
) -> Plan:
    """A plan that keeps every state, with residuals saved over as many of the last calls as the rest allows.

    Args:
        plan: made by `plan_for`.
        program: of the compiled function.
        lowering: the backend and HVP mode of the step graphs.
        rehearsal: runs a few calls with residuals, so that `measured` knows what they take. The room that it needs is
            left where nothing is run as well: a prediction is what a call will do.
    """
    if plan.slots is not None:
        return plan
    room = plan.budget - plan.peak_bytes
    if not residuals_from(program, lowering) or room < residuals_from(program, lowering):
        return plan
    rehearsal()
    saved, bytes_ = saved_calls(program, lowering, room)
    return replace(plan, saved=saved, peak_bytes=plan.peak_bytes + bytes_)


def residuals_from(program: Program, lowering: Lowering) -> int:
    """The room that a rehearsal with residuals needs, and the check of their graphs; 0 where there are none."""
    _, few = saved_calls(shortened(program, _FEW), lowering)
    costs = [step_cost(g, program.lowering_of(g, lowering)) for g in program.step_graphs]
    return few + 4 * max(c.replay_bytes + c.vjp_bytes for c in costs) if few else 0


def saved_calls(program: Program, lowering: Lowering, room: int | None = None) -> tuple[int, int]:
    """Over how many of the last calls residuals can be saved in ``room`` bytes (None: endless), and what they take."""
    costs = {id(g): residual_cost(g, program.lowering_of(g, lowering)) for g in program.step_graphs}
    if not any(costs[id(g)][0] for g in program.step_graphs if g.steps):
        return 0, 0
    taken = max(more for _, more in costs.values())
    saved, left = 0, program.swept
    for call, count in reversed(list(program.counted())):
        kept, _ = costs[id(call.step)]
        count = min(count, left)
        fits = count if room is None or not kept else min(count, max(0, room - taken) // kept)
        saved, left, taken = saved + fits, left - fits, taken + fits * kept
        if fits < count:
            break
    return (saved, taken) if saved else (0, 0)


def _first_use(program: Program, lowering: Lowering) -> int:
    """Bytes that compiling and checking a graph takes beyond what running it does."""
    found = [
        measured(g, kind, program.lowering_of(g, lowering))
        for g in program.step_graphs
        for kind in ("replay", "vjp")
    ]
    return max([0, *(m.first_bytes - m.peak_bytes for m in found if m is not None)])
