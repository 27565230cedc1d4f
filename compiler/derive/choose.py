"""Which derivative a step gets: reverse over reverse, or mixed mode with rematerialisation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metaoptim.errors import CaptureError

from ..ir.step import FlatGraph, StepGraph
from ..ir.text import readable_bytes
from .liveness import peak_bytes
from .mixed import NotMixed, mixed_vjp_graph
from .reverse import cotangent_outputs, vjp_graph

#: Below this many live bytes of reverse over reverse there is nothing worth saving: mixed mode takes a third more work.
WORTH_SAVING = 64 << 20


def derivative(step: StepGraph, hvp: str, example: Sequence[Tensor] | None = None) -> FlatGraph:
    """The VJP of a step, by the mode ``hvp`` asks for; what was chosen and why is noted in ``step.derivatives``.

    Args:
        step: the step.
        hvp: "reverse", "mixed", or "auto": mixed where it is legal and takes much less memory than a reverse over
            reverse that takes a lot.
        example: real inputs, for a step whose shapes depend on values.

    Raises:
        CaptureError: where "mixed" is asked for and impossible.
    """
    if hvp == "mixed" and step.steps:
        try:
            graph = mixed_vjp_graph(step, cotangent_outputs(step))
        except NotMixed as error:
            raise CaptureError(
                f"hvp='mixed': a step has no mixed-mode derivative: {error}. Use hvp='auto' or 'reverse'"
            ) from error
        step.derivatives[hvp] = f"mixed, {readable_bytes(peak_bytes(graph.graph))} alive"
        return graph
    return chosen(step, hvp, vjp_graph(step, example))


def chosen(step: StepGraph, hvp: str, graph: FlatGraph) -> FlatGraph:
    """What `derivative` takes, given reverse over reverse."""
    peak = peak_bytes(graph.graph)
    step.derivatives[hvp] = f"reverse, {readable_bytes(peak)} alive"
    if hvp == "auto" and step.steps and peak > WORTH_SAVING:
        try:
            mixed = mixed_vjp_graph(step, cotangent_outputs(step))
        except NotMixed as error:
            step.derivatives[hvp] += f" (not mixed: {error})"
            return graph
        less = peak_bytes(mixed.graph)
        if less < 0.6 * peak:
            step.derivatives[hvp] = f"mixed, {readable_bytes(less)} alive instead of {readable_bytes(peak)}"
            return mixed
    return graph
