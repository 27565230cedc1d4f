"""differentiate: every distinct part gets its derivative as a graph, in the mode that legality and cost allow."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.step import StepGraph
from ..lower.derivatives import derived


def differentiate(graphs: Sequence[StepGraph], hvp: str) -> str:
    """Derive those of a program's step graphs that a gradient can flow through, and say which mode each got."""
    chosen: dict[str, int] = {}
    for step in graphs:
        if any(p.differentiable for p in step.inputs) and any(p.differentiable for p in step.outputs):
            derived(step, hvp)
            what = step.derivatives[hvp]
            chosen[what] = chosen.get(what, 0) + 1
    return "; ".join(f"{count} × {what}" for what, count in chosen.items()) or "no part carries a gradient"
