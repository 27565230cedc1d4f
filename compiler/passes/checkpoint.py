"""checkpoint: which states of the inner loop are kept for its derivative, and over which calls residuals are."""

from __future__ import annotations

from ..ir.program import Program
from ..lower.derivatives import residuals
from .options import Options


def checkpoint(program: Program, options: Options) -> tuple[Program, str]:
    """State in a program what it keeps, as a planner has found it to fit.

    The steps of the last ``kept.saved`` calls are divided anew: into a forward that gives residuals and a backward that
    goes on from them, in the place of a replay and a derivative that runs it again.
    """
    assert options.kept is not None
    program.kept = options.kept
    left, divided = options.kept.saved, set[int]()
    for call, count in reversed(list(program.counted())):
        if left > 0 and residuals(call.step, options.lowering.hvp) is not None:
            divided.add(id(call.step))
        left -= count
    note = f"; {len(divided)} of {len(program.step_graphs)} step graphs divided" if divided else ""
    return program, f"{program.kept}{note}"
