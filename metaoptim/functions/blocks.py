"""When a compiled function's loops run in blocks of steps: once the graphs of these are compiled, and have room."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from ..compiler.ir.programs.program import Kept, Program
from ..compiler.ir.retention import Retention
from ..compiler.ir.step import Lowering
from ..compiler.ir.values import Input
from ..compiler.lower.ambient import unaffected
from ..compiler.lower.derivatives import compiled_in_time
from ..compiler.lower.processes.handover import elsewhere
from ..compiler.passes.block import block
from ..errors import BudgetError
from ..runtime.budget.planner import decide
from ..runtime.budget.simulate import predict

_plans = logging.getLogger("metaoptim.plans")


def have_blocks(program: Program, lowering: Lowering, retention: Retention) -> bool:
    """Whether a function's loops may run in blocks: where graphs are compiled meanwhile, and nobody counts states."""
    counted = retention.slots is not None or retention.offload is not None
    return lowering.backend == "inductor" and not counted and elsewhere(x.spec for x in program.inputs)


class Blocks:
    """A function's program in blocks of steps.

    Args:
        program: the one that it runs by so far, with a plan of what is kept.
        lowering: the backend and HVP mode of its graphs.
        retention: what was asked to be kept.
        name: of the function.
    """

    def __init__(self, program: Program, lowering: Lowering, retention: Retention, name: str) -> None:
        self._of, self._lowering, self._retention, self._name = program, lowering, retention, name
        with unaffected():
            self._made = block(program, lowering.hvp)

    def program(self, tensors: Mapping[Input, Tensor]) -> Program | None:
        """The program, with a plan of what is kept; None as long as calls run by the other one."""
        made, lowering = self._made, self._lowering
        if made is None or made.kept is not None:
            return made
        saving = self._retention.memory_budget is None
        steps = [(step, made.lowering_of(step, lowering)) for step in made.step_graphs]
        there = [compiled_in_time(step, how, saving) for step, how in steps if how.backend == "inductor"]
        if not all(there):  # each is begun
            return None
        if saving:
            made.kept = Kept(None, made.positions)
        else:
            self._plan(made, tensors)
        return self._made

    def _plan(self, made: Program, tensors: Mapping[Input, Tensor]) -> None:
        """Keep to the budget; where that would run more steps again than before, there are no blocks."""
        assert self._of.kept is not None
        before = predict(self._of, self._of.kept.slots, self._lowering).extra_forwards
        try:
            kept, plan = decide(made, self._lowering, self._retention, self._name, dict(tensors))
        except BudgetError:
            self._made = None
            return
        made.kept = kept
        again = predict(made, kept.slots, self._lowering).extra_forwards
        if again * self._of.positions > before * made.positions:
            self._made = None
        _plans.info("%s, in blocks: %s", self._name, plan)
