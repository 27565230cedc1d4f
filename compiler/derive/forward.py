"""A step's derivative in a direction: the transpose of its VJP.

A VJP is linear in its cotangents: c ↦ Jᵀc. So Jt is the gradient of ⟨Jᵀc, t⟩ by c, wherever c is, and autograd takes it
through the very graph that reverse mode runs: what that differentiates, and how, is the same here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.step import FlatGraph, StepGraph
from .flat import default_dtype
from .graphs import copied

aten = torch.ops.aten


def transposable(vjp: FlatGraph) -> FlatGraph:
    """The graph of a VJP with others in the place of operators that autograd cannot differentiate as they are."""
    if not any(node.target in _INSTEAD for node in vjp.graph.nodes):
        return vjp
    graph = copied(vjp.graph)
    for node in graph.nodes:
        node.target = _INSTEAD.get(node.target, node.target)
    return FlatGraph(graph, vjp.constants)


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return torch.empty_like(x).copy_(source)  # which autograd knows in place only


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = x.sigmoid()
    return grad * s * (1 + x * (1 - s))


def _mish_backward(grad: Tensor, x: Tensor) -> Tensor:
    t = torch.nn.functional.softplus(x).tanh()
    return grad * (t + x * x.sigmoid() * (1 - t * t))


_INSTEAD: dict[Any, Callable[..., Tensor]] = {
    aten.copy.default: _copy,
    aten.silu_backward.default: _silu_backward,
    aten.mish_backward.default: _mish_backward,
}


def pushed_forward(
    step: StepGraph, vjp: FlatGraph, inputs: Sequence[Tensor], directions: Sequence[Mapping[int, Tensor]]
) -> list[dict[int, Tensor]]:
    """What the outputs change by, in each of several directions.

    Args:
        step: not ``hooked`` or ``opaque``: the user's Python need not be linear in a cotangent.
        vjp: its graph, made `transposable`.
        inputs: of the step.
        directions: for each, by number of an input, what that changes by; nothing for no change.

    Returns:
        For each direction, by number of an output, what that changes by.
    """
    with torch.enable_grad(), default_dtype(step.default_dtype):
        given = [c.requires_grad_() for c in zero_cotangents(step)]
        pulled = dict(enumerate(vjp(*inputs, *given)))
    linear = {i: g for i, g in pulled.items() if g is not None and g.requires_grad}
    found: list[dict[int, Tensor]] = []
    for direction in directions:
        pairs = [(linear[i], t) for i, t in direction.items() if i in linear]
        results: Sequence[Tensor | None] = [None] * len(given)
        if pairs:
            outs, tangents = zip(*pairs, strict=True)
            results = torch.autograd.grad(outs, given, tangents, retain_graph=True, allow_unused=True)
        found.append({i: t for i, t in zip(step.cotangents, results, strict=True) if t is not None})
    return found


def zero_cotangents(step: StepGraph) -> list[Tensor]:
    """A cotangent for each output of ``step`` that takes one."""
    return [step.outputs[i].spec.empty().zero_() for i in step.cotangents]
