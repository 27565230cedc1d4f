"""lower: which step graphs go through the compiler; what runs once or twice a call does not pay for it."""

from __future__ import annotations

from collections import Counter

from ..ir.program import Program, plural
from ..ir.step import Lowering

#: A step graph that a call runs no more often than this runs as it is.
FEW = 2


def lower(program: Program, lowering: Lowering) -> str:
    """State in a program which of its step graphs are compiled: those that repeat, or all where none does."""
    graphs = len(program.step_graphs)
    if lowering.backend == "eager":
        return f"{plural(graphs, 'step graph')}, all run as they are"
    counts: Counter[int] = Counter()
    for call, count in program.counted():
        counts[id(call.step)] += count
    repeated = frozenset(step for step, count in counts.items() if count > FEW)
    program.compiled = repeated or None
    compiled = len(repeated) or graphs
    rest = f"; the others run at most {FEW} times a call, as they are" if compiled < graphs else ""
    return f"{compiled} of {plural(graphs, 'step graph')} compiled by {lowering.backend}{rest}"
