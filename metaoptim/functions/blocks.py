"""When a compiled function's loops run in blocks of steps: once the graphs of these are compiled, and have room."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..compiler.cost.step import check_bytes
from ..compiler.ir.programs.program import Kept, Program
from ..compiler.ir.retention import Retention
from ..compiler.ir.step import Lowering
from ..compiler.ir.values import Input
from ..compiler.lower.ambient import unaffected
from ..compiler.lower.derivatives import compiled_in_time
from ..compiler.lower.processes.handover import elsewhere
from ..compiler.passes.block import block
from ..errors import BudgetError
from ..runtime.budget.planner import Plan, decide
from ..runtime.budget.simulate import predict

_plans = logging.getLogger("metaoptim.plans")


def have_blocks(program: Program, lowering: Lowering, retention: Retention) -> bool:
    """Whether a function's loops may run in blocks: where graphs are compiled meanwhile, and nobody counts states.

    Nor where a call must give what the one before it gave to the bit: they add up in another order.
    """
    if lowering.backend != "inductor" or torch.are_deterministic_algorithms_enabled():
        return False
    counted = retention.slots is not None or retention.offload is not None
    return not counted and elsewhere(x.spec for x in program.inputs)


def may_check(program: Program, lowering: Lowering, budget: int) -> bool:
    """Whether a budget has room to compare compiled graphs with what they are compiled from."""
    graphs = [g for g in program.step_graphs if program.lowering_of(g, lowering) == lowering]
    needed = max(check_bytes(g, lowering) for g in graphs) + 4 * program.state_bytes
    return not lowering.check or needed <= budget


class Blocks:
    """A function's program in blocks of steps.

    Args:
        program: the one that it runs by so far, which says what is kept.
        lowering: the backend and HVP mode of its graphs.
        retention: what was asked to be kept.
        plan: how the program keeps to a budget, if there is one.
        name: of the function.
    """

    def __init__(
        self, program: Program, lowering: Lowering, retention: Retention, plan: Plan | None, name: str
    ) -> None:
        self._of, self._lowering, self._retention, self._name = program, lowering, retention, name
        self._made: Program | None = None
        if have_blocks(program, lowering, retention):
            with unaffected():
                made = block(program, lowering.hvp)
            if made is not None and (plan is None or may_check(made, lowering, plan.budget)):
                self._made = made

    def program(self, tensors: dict[Input, Tensor]) -> Program | None:
        """The program, with a plan of what is kept; None as long as calls run by the other one."""
        made, lowering = self._made, self._lowering
        if made is None or made.kept is not None:
            return made
        assert self._of.kept is not None
        budgeted, saving = self._retention.memory_budget is not None, self._of.kept.saved > 0
        kinds = [True] * saving + [False] * budgeted  # graphs with residuals, and without
        new = [step for step in made.step_graphs if step not in self._of.step_graphs]
        there = [compiled_in_time(step, lowering, kind) for step in new for kind in kinds]
        if not all(there):  # each is begun
            return None
        if budgeted:
            self._plan(made, saving, tensors)
        else:
            made.kept = Kept(None, made.positions)
        return self._made

    def _plan(self, made: Program, saving: bool, tensors: dict[Input, Tensor]) -> None:
        """Keep to the budget; where that would run more steps again than before, there are no blocks."""
        assert self._of.kept is not None
        before = predict(self._of, self._of.kept.slots, self._lowering).extra_forwards
        try:
            kept, plan = decide(made, self._lowering, self._retention, self._name, tensors, saving)
        except BudgetError:
            self._made = None
            return
        again = predict(made, kept.slots, self._lowering).extra_forwards
        if again * self._of.positions > before * made.positions:
            self._made = None
            return
        made.kept = kept
        _plans.info("%s, in blocks: %s", self._name, plan)
