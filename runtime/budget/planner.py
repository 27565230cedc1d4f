"""Which states a compiled function keeps under a memory budget: as many as fit, since each saves recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from metaoptim.compiler.cost.step import measured, residual_cost, step_cost
from metaoptim.compiler.ir.programs.program import Kept, Program
from metaoptim.compiler.ir.retention import Retention
from metaoptim.compiler.ir.step import Lowering
from metaoptim.compiler.ir.text import readable_bytes
from metaoptim.compiler.ir.values import Input
from metaoptim.errors import BudgetError

from ..states.schedule import with_tier
from .amounts import budget_bytes, default_budget
from .measure import rehearse
from .peaks import FEW, FEW_SLOTS, SCALARS, left_out, lengths, peaks_of, shortened
from .simulate import predict


@dataclass(frozen=True)
class Plan:
    """How a compiled function keeps to its budget, in bytes."""

    budget: int
    slots: int | None  # how many states are kept; None for all
    peak_bytes: int  # predicted, beyond the caller's own tensors
    minimum: int  # the smallest budget that there is a plan for
    saved: int = 0  # over how many of the last calls residuals are saved, of which their derivatives make use
    offload: bool = False  # whether states without a slot go to a lower tier


class Planner:
    """Finds the plan with the least work for any budget; ``beside`` are bytes that going through the program hides."""

    def __init__(
        self, program: Program, lowering: Lowering, name: str, offload: bool = False, beside: int = 0
    ) -> None:
        self.program, self.lowering, self.name = program, lowering, name
        self.offload, self.beside = offload, beside
        self.states = max(program.swept, 1)
        self.alone = peaks_of(program, lowering)
        self.tier = peaks_of(program, lowering, offload) if offload else self.alone

    def plan(self, budget: int) -> Plan:
        """The plan for a call and its backward that may hold ``budget`` bytes beyond the caller's own tensors."""
        room, tiered = budget - self.beside, False
        slots = self.alone.fitting(room, self.states)
        if self.offload:
            most = self.tier.fitting(room, self.states)
            choices = [k for k in range(1, most + 1) if self.tier(k) <= room]
            slots, tiered = with_tier(self.states, slots, choices)
        least, minimum = self.least(tiered), self.minimum(tiered)
        if budget < minimum:
            unchecked = f"; without the first-use check (self_check=False) it is {least} bytes"
            unchecked = unchecked if minimum > least else ""
            raise BudgetError(
                f"memory_budget: {readable_bytes(budget)} ({budget} bytes) is too small for {self.name}: the smallest "
                f"feasible budget is {minimum} bytes ({readable_bytes(minimum)}); a state takes "
                f"{readable_bytes(self.program.state_bytes)}{unchecked}",
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
        more = (self.states - max(short.swept, 1)) * self.alone.per_slot + left_out(self.program, short)
        return SCALARS + predict(short, None, self.lowering).peak_bytes + more + self.beside

    def peak(self, slots: int, tiered: bool = False) -> int:
        """Predicted bytes with so many slots."""
        return (self.tier if tiered else self.alone)(slots) + self.beside


def decide(
    program: Program,
    lowering: Lowering,
    retention: Retention,
    name: str,
    tensors: dict[Input, Tensor] | None = None,
    saving: bool = True,
) -> tuple[Kept, Plan | None]:
    """What a compiled function keeps, and the plan behind it where a budget decides; residuals only if ``saving``.

    With ``tensors`` behind the program's inputs a few of its steps are measured; else the graphs' sizes are believed.

    Raises:
        BudgetError: for a budget in which not even one state can be kept.
    """
    if retention.memory_budget is None:
        plan = None if retention.slots is not None else default_plan(Planner(program, lowering, name))
        return Kept(retention.slots if plan is None else plan.slots, 0, retention.offload), plan
    rehearsal = None
    if tensors is not None:
        rehearse(program, tensors, lowering)
        rehearsal = partial(rehearse, program, tensors, lowering, saving=True)
    budget = budget_bytes(retention.memory_budget, device_of(program))
    plan = Planner(program, lowering, name, retention.offload is not None).plan(budget)
    if saving:
        plan = with_residuals(plan, program, lowering, rehearsal)
    return Kept(plan.slots, plan.saved, retention.offload if plan.offload else None), plan


def default_plan(planner: Planner) -> Plan | None:
    """The plan where neither slots nor a budget is stated: None, which keeps every state, as a rule.

    Where that takes more than half of the free memory, as many as fit into it; one if none does.
    """
    budget = default_budget(device_of(planner.program))
    if 2 * planner.states * planner.program.state_bytes <= budget or planner.every <= budget:
        return None
    return planner.plan(max(budget, planner.minimum()))


def with_default_residuals(kept: Kept, program: Program, lowering: Lowering) -> tuple[Kept, int]:
    """What a compiled function keeps that states no budget, with residuals over its calls, and the bytes of these.

    Where graphs are compiled, every state is kept, and states and residuals take half of the default budget at most.
    """
    if kept.slots is not None or lowering.backend != "inductor":
        return kept, 0
    saved, bytes_ = saved_calls(program, lowering)
    states = program.swept * program.state_bytes
    if 2 * (states + bytes_) > default_budget(device_of(program)):
        return kept, 0
    return replace(kept, saved=saved), bytes_


def device_of(program: Program) -> torch.device:
    """Where the inner state lives."""
    return next((x.spec.device for x in program.inputs if x.spec.device.type != "cpu"), torch.device("cpu"))


def with_residuals(
    plan: Plan, program: Program, lowering: Lowering, rehearsal: Callable[[], None] | None = None
) -> Plan:
    """A plan that keeps every state, with residuals saved over as many of the last calls as the rest allows.

    ``rehearsal`` runs a few calls with residuals, so that `measured` knows what they take. The room that it needs is
    left where nothing is run as well: a prediction is what a call will do.
    """
    if plan.slots is not None:
        return plan
    room, needed = plan.budget - plan.peak_bytes, residuals_from(program, lowering)
    if not needed or room < needed:
        return plan
    if rehearsal is not None:
        rehearsal()
    saved, bytes_ = saved_calls(program, lowering, room)
    return replace(plan, saved=saved, peak_bytes=plan.peak_bytes + bytes_)


def residuals_from(program: Program, lowering: Lowering) -> int:
    """The room that a rehearsal with residuals needs, and the check of their graphs; 0 where there are none."""
    _, few = saved_calls(shortened(program, FEW), lowering)
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
