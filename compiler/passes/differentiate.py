"""differentiate: every distinct part gets its derivative as a graph, in the mode that legality and cost allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..ir.program import Program
from ..ir.step import StepGraph
from ..lower.derivatives import derived
from .options import Options


def differentiate(program: Program, options: Options) -> tuple[Program, str]:
    """Derive the step graphs that a gradient can flow through."""
    learnt = any(x.grad for x in program.inputs)
    return program, derive_all(program.step_graphs if learnt else (), options.lowering.hvp)


def derive_all(graphs: Iterable[StepGraph], hvp: str) -> str:
    """Derive those of the step graphs that a gradient can flow through, and say which mode each got."""
    chosen: Counter[str] = Counter()
    for step in graphs:
        if any(p.differentiable for p in step.inputs) and any(p.differentiable for p in step.outputs):
            derived(step, hvp)
            chosen[step.derivatives[hvp]] += 1
    return "; ".join(f"{count} × {what}" for what, count in chosen.items()) or "no part carries a gradient"
