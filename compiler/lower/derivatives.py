"""The graphs of a step, derived and lowered on first use."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..derive.choose import WORTH_SAVING, chosen, derivative
from ..derive.liveness import peak_bytes
from ..derive.mixed import why_not_mixed
from ..derive.residuals import split
from ..derive.reverse import cotangent_outputs, derived_by_running, loss_graph, replay_graph
from ..ir.step import EAGER, FlatGraph, Lowered, Lowering, Split, StepGraph
from ..ir.tensors import tensor_spec
from .ambient import default_dtype, with_default_dtype
from .compile_graph import compiled


def lowered(
    step: StepGraph, kind: str, inputs: Sequence[Tensor], lowering: Lowering = EAGER, at_once: bool = False
) -> Lowered:
    """The callable for one of a step's graphs, traced and compiled on first use.

    Args:
        step: the step.
        kind: "replay" or "vjp"; "loss", the VJP of its loss alone; or, where `residuals` has a split, "forward" or
            "backward".
        inputs: what it will be called with first.
        lowering: the backend and HVP mode of the step graphs.
        at_once: it will be called with ``inputs`` now, and with nothing else: a graph that is not there yet may then be
            found by running the step, and has its results.
    """
    program = step.derived.lowered.get((kind, lowering))
    if program is None:
        of, what = (loss_of(step, inputs[-1]), "vjp") if kind == "loss" else (step, kind)
        backend = lowering.backend_of(kind)
        results = _by_running(of, what, inputs, lowering.hvp) if at_once and backend == "eager" else None
        graph = _graph(of, what, lowering.hvp, inputs if step.dynamic else None)
        if backend == "eager":
            program = with_default_dtype(step.default_dtype, graph)
        else:
            cotangents = 0 if kind in ("replay", "forward") else len(cotangent_outputs(of))
            with default_dtype(step.default_dtype):
                program = compiled(graph.module, inputs, backend, cotangents, lowering.check)
            program = with_default_dtype(step.default_dtype, program)
        step.derived.lowered[kind, lowering] = program
        if results is not None:
            return lambda *_: results
    return program


def _graph(step: StepGraph, kind: str, hvp: str, example: Sequence[Tensor] | None) -> FlatGraph:
    if kind in ("forward", "backward"):
        divided = residuals(step, hvp)
        assert divided is not None
        return divided.forward if kind == "forward" else divided.backward
    return derived(step, hvp, example) if kind == "vjp" else replayed(step, example)


def _by_running(
    step: StepGraph, kind: str, inputs: Sequence[Tensor], hvp: str
) -> Sequence[Tensor | None] | None:
    """What a replay or VJP gives that has not been traced yet; None where it has been, or must be traced by itself."""
    if kind == "vjp":
        if hvp in step.derived.vjp or not _reverse_will_do(step, hvp):
            return None
    elif kind != "replay" or step.derived.replay is not None:
        return None
    with default_dtype(step.default_dtype):
        found = derived_by_running(step, kind, inputs)
    if found is None:
        return None
    graph, results = found
    if kind == "vjp":
        step.derived.vjp[hvp] = chosen(step, hvp, graph)
    else:
        step.derived.replay = graph
    return results


def _reverse_will_do(step: StepGraph, hvp: str) -> bool:
    """Whether reverse over reverse may run before it is known what it takes: where that is little, or all there is."""
    if hvp != "auto":
        return hvp == "reverse"
    replay = step.derived.replay
    small = replay is not None and 4 * peak_bytes(replay.graph) < WORTH_SAVING
    return small or why_not_mixed(step) is not None


def derived(step: StepGraph, hvp: str, example: Sequence[Tensor] | None = None) -> FlatGraph:
    """The flat graph of a step's VJP."""
    found = step.derived.vjp.get(hvp)
    if found is None:
        with default_dtype(step.default_dtype):
            found = step.derived.vjp[hvp] = derivative(step, hvp, example)
    return found


def loss_of(step: StepGraph, cotangent: Tensor) -> StepGraph:
    """A step's loss, whose ``cotangent`` looks like it, as a graph of its own."""
    if step.derived.loss is None:
        step.derived.loss = loss_graph(step, tensor_spec(cotangent))
    return step.derived.loss


def replayed(step: StepGraph, example: Sequence[Tensor] | None = None) -> FlatGraph:
    """The flat graph of a step's replay."""
    if step.derived.replay is None:
        with default_dtype(step.default_dtype):
            step.derived.replay = replay_graph(step, example)
    return step.derived.replay


def residuals(step: StepGraph, hvp: str) -> Split | None:
    """How a step and its derivative can share work; None if they cannot."""
    splits = step.derived.splits
    if hvp not in splits:
        learnt = any(p.differentiable for p in step.inputs) and bool(cotangent_outputs(step))
        shared = learnt and not step.dynamic
        splits[hvp] = split(step, replayed(step), derived(step, hvp)) if shared else None
    return splits[hvp]
