"""checkpoint: which states of the inner loop are kept for its derivative, and over which calls residuals are."""

from __future__ import annotations

from ..ir.program import Kept, Program
from ..lower.derivatives import residuals


def checkpoint(program: Program, kept: Kept, hvp: str) -> str:
    """State in a program what it keeps, as a planner has found it to fit.

    The steps of the last ``kept.saved`` calls are divided anew: into a forward that gives residuals and a backward that
    goes on from them, in the place of a replay and a derivative that runs it again.
    """
    program.kept = kept
    left, divided = kept.saved, set[int]()
    for call, count in reversed(list(program.counted())):
        if left > 0 and residuals(call.step, hvp) is not None:
            divided.add(id(call.step))
        left -= count
    return str(kept) + (
        f"; {len(divided)} of {len(program.step_graphs)} step graphs divided" if divided else ""
    )
