"""Inner steps on parameters or optimizer state of few bits: which they are, and the same steps in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from metaoptim.compiler.compat import tree_leaves

from ..ir.step import Derived, FewBits, StepGraph, show
from ..ir.update import UpdatePlan
from .flat import tracing
from .reverse import run

FEW = (torch.bfloat16, torch.float16)


def few_bits(step: StepGraph) -> FewBits:
    """What a step's updates are given in few bits; found once."""
    if step.derived.few_bits is None:
        step.derived.few_bits = _found(step)
    return step.derived.few_bits


def _found(step: StepGraph) -> FewBits:
    if not any(port.spec.dtype in FEW for port in step.inputs):
        return FewBits((), frozenset())
    at = {node: i for i, node in enumerate(step.graph.find_nodes(op="placeholder"))}
    parameters: list[int] = []
    dtypes: set[tuple[str, torch.dtype]] = set()
    for update in step.graph.nodes:
        if not isinstance(update.target, UpdatePlan):
            continue
        thetas, _, states, _ = update.args
        for what, nodes in (("parameters", thetas), ("optimizer state", states)):
            found = [at[root] for root in map(_root, tree_leaves(nodes)) if root in at]
            dtypes |= {(what, step.inputs[i].spec.dtype) for i in found if step.inputs[i].spec.dtype in FEW}
            parameters += found if nodes is thetas else []
    return FewBits(tuple(dict.fromkeys(parameters)), frozenset(dtypes))


def _root(node: Any) -> Any:
    """Whose value a parameter has, which is shown under other names."""
    while isinstance(node, fx.Node) and node.target in (show, torch.ops.aten.alias.default):
        node = node.args[0]
    return node


def cosine_with_float32(step: StepGraph, operands: Sequence[Tensor]) -> float | None:
    """How alike the second derivatives of a step are to those in float32: 1 for the same, None where there are none.

    ``operands`` are those of its VJP. Most of a cotangent of the parameters passes a step as it is (θ' = θ - ...); what
    the step adds to it is compared.
    """
    wide = _second_order(_widened(step), [t.float() if t.dtype in FEW else t for t in operands])
    few = _second_order(step, operands)
    a, b = (torch.cat([t.double().flatten() for t in added]) for added in (few, wide))
    size = float(a.norm() * b.norm())
    if not b.any():
        return None
    return float(a @ b) / size if size else 0.0


def _second_order(step: StepGraph, operands: Sequence[Tensor]) -> list[Tensor]:
    """The gradients by the parameters, but for those that a step with a constant inner gradient has too."""
    parameters = few_bits(step).parameters
    step = replace(step, hooked=False)  # the user's own hook may count, or log
    with tracing(step.default_dtype):
        found = [run(each, "vjp", *operands) for each in (step, replace(step, first_order=True))]
    pairs = ((found[0][i], found[1][i]) for i in parameters)
    added = [(g if d is None else g - d).detach() for g, d in pairs if g is not None]
    return [torch.view_as_real(t) if t.is_complex() else t for t in added]


def _wide(a: Any) -> Any:
    return torch.float32 if isinstance(a, torch.dtype) and a in FEW else a


def _widened(step: StepGraph) -> StepGraph:
    """A step that has float32 wherever it names a type of few bits."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in step.graph.nodes:
        env[node] = copy = graph.node_copy(node, env.__getitem__)
        copy.args, copy.kwargs = map_aggregate((copy.args, copy.kwargs), _wide)  # type: ignore[assignment]
    return replace(step, graph=graph, derived=Derived(few_bits=few_bits(step)))
