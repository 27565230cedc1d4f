"""loop: rounds of calls that differ by what advances from one to the next become Loops."""

from __future__ import annotations

from ..ir.calls import Loop, folded
from ..ir.program import Program
from ..ir.text import plural
from .options import Options


def loop(program: Program, options: Options) -> tuple[Program, str]:
    """Fold rounds of calls that leave their results where the next round looks for them.

    A plain ``for`` leaves many: of one call each, or of several where optimizers step by turns. What calls are given
    besides is the same in every round, or a row or a whole number that moves on by as much every time, or listed.
    """
    before = len(program.calls)
    program.calls = folded(program.calls)
    loops = sum(isinstance(item, Loop) for item in program.calls)
    return program, f"{plural(before, 'entry')} now {len(program.calls)}, {plural(loops, 'loop')} among them"
