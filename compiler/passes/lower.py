"""lower: which step graphs go through the compiler; what runs once or twice a call does not pay for it."""

from __future__ import annotations

from collections import Counter

from ..ir.program import Program
from ..ir.text import plural
from .options import Options

#: A step graph that a call runs no more often than this runs as it is.
FEW = 2


def lower(program: Program, options: Options) -> tuple[Program, str]:
    """State in a program which of its step graphs are compiled: those that repeat, or all where none does."""
    graphs, backend = len(program.step_graphs), options.lowering.backend
    if backend == "eager":
        return program, f"{plural(graphs, 'step graph')}, all run as they are"
    counts: Counter[int] = Counter()
    for call, count in program.counted():
        counts[id(call.step)] += count
    repeated = frozenset(step for step, count in counts.items() if count > FEW)
    program.compiled = repeated or None
    compiled = len(repeated) or graphs
    rest = f"; the others run at most {FEW} times a call, as they are" if compiled < graphs else ""
    return program, f"{compiled} of {plural(graphs, 'step graph')} compiled by {backend}{rest}"
