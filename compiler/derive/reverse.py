"""StepGraph -> flat ATen graphs: the replay of the step, and its VJP by reverse-over-reverse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    OpOverload,
)
from metaoptim.errors import CaptureError, MetaOptimError

from ..ir.operators import op_info, written
from ..ir.step import FlatGraph, Port, Role, StepGraph, gradient
from ..ir.tensors import TensorSpec, tensor_spec
from .cotangent_hook import call_cotangent_hook
from .flat import Traced, Unfollowed, drop_dead, flat_graph, merge_equal
from .interpret import interpret
from .liveness import results_of, storages
from .tracing import tracing

aten = torch.ops.aten
_DIFFERENTIATED = (Role.THETA, Role.THETA_NOW, Role.OPT_STATE, Role.CARRY, Role.META)


def replay_graph(step: StepGraph, example: Sequence[Tensor] | None = None) -> FlatGraph:
    """inputs -> outputs, without autograd."""
    return _trace("replay", step, example)


def vjp_graph(step: StepGraph, example: Sequence[Tensor] | None = None) -> FlatGraph:
    """inputs, cotangents of (theta', float opt_state') -> a cotangent, or None, per input."""
    return _trace("vjp", step, example)


def derived_by_running(
    step: StepGraph, kind: str, inputs: Sequence[Tensor]
) -> tuple[FlatGraph, Sequence[Tensor | None]] | None:
    """The flat graph of a step's "replay" or "vjp", and what it gives for ``inputs``, by one run of the step.

    None where the graph might not hold for other values, and where the user's own Python is part of the step: there it
    takes a trace over fake tensors.
    """
    ports = step.inputs if kind == "replay" else _taken(step)
    strided = [t for t in inputs if t.layout is torch.strided]
    apart = len({t.untyped_storage()._cdata for t in strided}) == len(inputs)
    if step.opaque or step.dynamic or step.hooked or not apart:
        return None
    if any(tensor_spec(t) != p.spec for t, p in zip(inputs, ports, strict=True)):
        return None
    with tracing():
        try:
            found = flat_graph(
                _FUNCTIONS[kind](step), [t.detach() for t in inputs], true_zeros(step), real=True
            )
        except (Unfollowed, RuntimeError):
            return None
        results, seen = [], set()
        for t, node in zip(found.results, results_of(found.graph), strict=True):
            again = isinstance(node, fx.Node) and node in seen
            seen.add(node)
            results.append(t if t is None else t.detach().clone() if again else t.detach())
        return _cleaned(kind, found), results


def _replay(step: StepGraph) -> Callable[..., tuple]:
    def replay(*inputs: Tensor) -> tuple:
        held = _as_leaves(step, inputs, (Role.THETA,))
        return interpret(step, held, create_graph=False)

    return replay


def _vjp(step: StepGraph) -> Callable[..., tuple]:
    hook = call_cotangent_hook if step.hooked else None

    def vjp(*args: Tensor) -> tuple:
        inputs, cotangents = args[: len(step.inputs)], args[len(step.inputs) :]
        held = _as_leaves(step, inputs, _DIFFERENTIATED)
        results = interpret(step, held, create_graph=True, cotangent_hook=hook)
        outs = [results[i] for i in cotangent_outputs(step)]
        pairs = [(o, c) for o, c in zip(outs, cotangents, strict=True) if o.requires_grad]
        wanted = [i for i, p in enumerate(step.inputs) if p.differentiable and held[i].requires_grad]
        grads: list[Tensor | None] = [None] * len(held)
        if pairs and wanted:
            found = torch.autograd.grad(
                [o for o, _ in pairs], [held[i] for i in wanted], [c for _, c in pairs], allow_unused=True
            )
            for i, g in zip(wanted, found, strict=True):
                grads[i] = g
        return tuple(grads)

    return vjp


_FUNCTIONS = {"replay": _replay, "vjp": _vjp}


def _taken(step: StepGraph) -> list[Port]:
    """What the VJP takes: the inputs, then the cotangents."""
    return [*step.inputs, *(step.outputs[i] for i in cotangent_outputs(step))]


def distinct(graph: fx.Graph) -> None:
    """A tensor of its own for every result: equal ones have become one, and the user will see two states."""
    (output,) = graph.find_nodes(op="output")
    seen: set[fx.Node] = set()
    results = []
    with graph.inserting_before(output):
        for node in output.args[0]:  # type: ignore[union-attr]
            if node in seen:
                original, node = node, graph.call_function(aten.clone.default, (node,))
                node.meta = {
                    **original.meta,
                    "memory": tuple((("again", id(node)), n) for _, n in storages(original)),
                }
            seen.add(node)
            results.append(node)
    output.args = (tuple(results),)


def cotangent_outputs(step: StepGraph) -> list[int]:
    """Positions of the outputs that take a cotangent."""
    return [
        i
        for i, p in enumerate(step.outputs)
        if p.role in (Role.THETA, Role.OPT_STATE, Role.CARRY) and p.differentiable
    ]


def loss_graph(step: StepGraph, spec: TensorSpec) -> StepGraph:
    """inputs -> loss, which has this ``spec``, for a step that takes one gradient."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    (taken,) = (n for n in step.graph.nodes if n.target is gradient)
    for node in step.graph.nodes:
        if node is taken:
            break
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output((env[taken.args[0]],))
    outputs = (Port(Role.CARRY, spec, "loss"),)
    dtype = step.default_dtype
    return StepGraph(graph, step.inputs, outputs, step.opaque, step.dynamic, default_dtype=dtype)


def _as_leaves(step: StepGraph, inputs: Sequence[Tensor], roles: tuple[Role, ...]) -> list[Tensor]:
    return [
        t.detach().requires_grad_() if p.role in roles and (p.differentiable or p.role is Role.THETA) else t
        for t, p in zip(inputs, step.inputs, strict=True)
    ]


def _trace(kind: str, step: StepGraph, example: Sequence[Tensor] | None) -> FlatGraph:
    """The flat graph over fake tensors, or over ``example`` where shapes depend on values."""
    fn, ports = _FUNCTIONS[kind](step), step.inputs if kind == "replay" else _taken(step)
    with tracing():
        try:
            if step.dynamic:
                if example is None:
                    raise ValueError("a step whose shapes depend on values is traced over real inputs")
                return _cleaned(kind, flat_graph(fn, [t.detach().clone() for t in example]))
            with FakeTensorMode(allow_non_fake_inputs=True):
                found = flat_graph(fn, [p.empty() for p in ports], true_zeros(step))
            return _cleaned(kind, found)
        except (MetaOptimError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise CaptureError(_without_derivative(error)) from error


def _without_derivative(error: RuntimeError) -> str:
    """What to say where torch cannot differentiate a step, once or twice."""
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return (
            f"an inner step cannot be differentiated by a graph: a derivative in it looks at values ({error.func}). "
            "Use torch.where in place of selecting or counting, or a window with strategy='full_tape'"
        )
    reason = str(error).rstrip(".")
    return (
        f"an inner step cannot be differentiated: {reason}. Where plain PyTorch can, with create_graph=True, so can a "
        "window with strategy='full_tape'; where it cannot, write the loss with operators that have second "
        "derivatives, or give the inner optimizer first_order=True"
    )


def true_zeros(step: StepGraph) -> dict[Any, Callable]:
    """A decomposition of autograd's immaterial zeros, on which some operators fail."""
    return {aten._efficientzerotensor.default: functools.partial(_zeros, step.inputs[0].spec.device)}


def _zeros(home: torch.device, size: Any, *, device: Any = None, **options: Any) -> Tensor:
    """For autograd's immaterial zeros, which a fake tensor's formula asks for on the meta device."""
    device = torch.device(home if device is None else device)
    return torch.zeros(size, device=home if device.type == "meta" else device, dtype=options.get("dtype"))


def _cleaned(kind: str, traced: Traced) -> FlatGraph:
    """Without dead nodes and duplicates.

    In-place operators may remain: they write into what the graph itself made, never into its inputs.
    """
    graph, constants = traced.graph, traced.constants
    drop_dead(graph)
    _check(graph, constants)
    if not any(mutates(n) for n in graph.nodes):
        merge_equal(graph)
    if kind == "replay":
        distinct(graph)
    used = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    return FlatGraph(graph, {name: constants[name].clone() for name in used})


def _check(graph: fx.Graph, constants: dict[str, Tensor]) -> None:
    """What the graph has picked up besides its inputs: nothing may be drawn, tensors are frozen as they are."""
    for node in graph.nodes:
        target: Any = node.target
        into = written(target, node.args, node.kwargs, fx.Node)
        if any(_memory_of(n).op == "placeholder" for n in into):
            raise CaptureError(
                f"a hook, a custom Function or the optimizer's update changes its argument in place ({target}); clone "
                "it there and return the clone"
            )
        if isinstance(target, OpOverload) and op_info(target).random:
            raise CaptureError(
                f"a hook, a custom Function or the optimizer's update draws random numbers ({target}), which a replay "
                "would draw anew; draw them in the loss, or pass them as a hyper-parameter of the step"
            )
        if node.op == "get_attr" and constants[str(target)].requires_grad:
            raise CaptureError(
                "a hook, a custom Function or the optimizer's update uses a tensor of shape "
                f"{tuple(constants[str(target)].shape)} that requires grad but is none of its arguments, so it would "
                "receive no gradient; pass it as an argument, or detach it"
            )


def _memory_of(node: Any) -> fx.Node:
    """The node that made the memory ``node`` is a view of."""
    while node.op == "call_function" and getattr(node.target, "is_view", False):
        node = node.args[0]
    return node


def mutates(node: fx.Node) -> bool:
    """Whether it is an operator that changes an argument in place."""
    target: Any = node.target
    return isinstance(target, OpOverload) and target._schema.is_mutable
