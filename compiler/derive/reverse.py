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
from metaoptim.errors import CaptureError, MetaOptimError, ProgramError

from ..ir.operators import op_info, written
from ..ir.step import FlatGraph, Port, Role, StepGraph, gradient
from ..ir.tensors import TensorSpec, in_the_layout, nbytes, tensor_spec
from ..ir.update import UpdatePlan
from .flat import Traced, Unfollowed, flat_graph, tracing
from .graphs import distinct, drop_dead, merge_equal, mutates, results_of, undo_transposes
from .interpret import interpret

aten = torch.ops.aten
#: A step whose inputs take no more bytes is run on values made up for it: to trace it over fake tensors takes longer.
SMALL = 1 << 20
_SHARED = 1 << 14  # bytes of inputs that share memory, which are copied although nobody has planned for it
_DIFFERENTIATED = (Role.THETA, Role.THETA_NOW, Role.OPT_STATE, Role.CARRY, Role.META)


def ports_of(step: StepGraph, kind: str) -> list[Port]:
    """What a "replay" takes: the inputs; and a "vjp": the inputs, then the cotangents."""
    return [*step.inputs, *(step.outputs[i] for i in step.cotangents if kind == "vjp")]


def derived_by_tracing(step: StepGraph, kind: str, example: Sequence[Tensor] | None = None) -> FlatGraph:
    """The flat graph of a step's "replay", inputs -> outputs, or "vjp", `ports_of` it -> a cotangent or None per input.

    It is traced over fake tensors. With ``example`` it is found by a run on these, where that will do; a step whose
    shapes depend on values takes one.
    """
    if example is not None and not step.dynamic:
        found = derived_by_running(step, kind, example)
        if found is not None:
            return found[0]
    fn = functools.partial(run, step, kind)
    with tracing(step.default_dtype):
        try:
            if step.dynamic:
                if example is None:
                    raise ValueError("a step whose shapes depend on values is traced over real inputs")
                return cleaned(kind, flat_graph(fn, [t.detach().clone() for t in example]), step.chunked)
            with FakeTensorMode(allow_non_fake_inputs=True):
                found = flat_graph(fn, [p.spec.empty() for p in ports_of(step, kind)], in_formulas(step))
            return cleaned(kind, found, step.chunked)
        except (MetaOptimError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise CaptureError(_without_derivative(error)) from error


def derived_by_running(
    step: StepGraph, kind: str, inputs: Sequence[Tensor]
) -> tuple[FlatGraph, Sequence[Tensor | None]] | None:
    """The flat graph of a step's "replay" or "vjp", and what it gives for ``inputs``, by one run of the step.

    None where the graph might not hold for other values, and where the user's own Python is part of the step: there it
    takes a trace over fake tensors.
    """
    users = any(isinstance(n.target, UpdatePlan) and n.target.is_users for n in step.graph.nodes)
    if step.opaque or step.dynamic or step.hooked or users:
        return None
    given = _apart(inputs)
    if given is None or any(
        tensor_spec(t) != p.spec for t, p in zip(given, ports_of(step, kind), strict=True)
    ):
        return None
    with tracing(step.default_dtype):
        try:
            found = flat_graph(functools.partial(run, step, kind), given, in_formulas(step), real=True)
        except (ProgramError, torch.OutOfMemoryError):
            raise
        except (Unfollowed, RuntimeError):
            return None
        results, seen = [], set()
        for t, node in zip(found.results, results_of(found.graph), strict=True):
            again = isinstance(node, fx.Node) and node in seen
            seen.add(node)
            results.append(t if t is None else t.detach().clone() if again else t.detach())
        return cleaned(kind, found, step.chunked), results


def _apart(inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """``inputs`` that share no memory: copies, where these are small; None for other ones, and for sparse ones."""
    found, known, copied = list[Tensor](), set[int](), 0
    for t in inputs:
        if t.layout is not torch.strided:
            return None
        storage = t.untyped_storage()._cdata
        copied += nbytes(tensor_spec(t)) if storage in known else 0
        if copied > _SHARED:
            return None
        found.append(in_the_layout(t) if storage in known else t.detach())
        known.add(storage)
    return found


def made_up(step: StepGraph, kind: str) -> list[Tensor] | None:
    """Inputs for a run of a small step, from which what it gives is found; None for other steps."""
    specs = [p.spec for p in ports_of(step, kind)]
    if sum(map(nbytes, specs)) > SMALL or any(len(s.stride) != len(s.shape) for s in specs):
        return None
    return [_made_up(spec) for spec in specs]


def _made_up(spec: TensorSpec) -> Tensor:
    """Numbers that differ, between 0 and 1; zeros for whole numbers, which may be indices."""
    size = nbytes(spec) // spec.dtype.itemsize
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        memory = torch.linspace(0.2, 0.8, size, device=spec.device).to(spec.dtype)
    else:
        memory = torch.zeros(size, dtype=spec.dtype, device=spec.device)
    return memory.as_strided(spec.shape, spec.stride)


def run(step: StepGraph, kind: str, *args: Tensor) -> tuple:
    """What the flat graph of this kind is to give, by eager autograd; `ports_of` says what it takes."""
    inputs, cotangents = args[: len(step.inputs)], args[len(step.inputs) :]
    if kind == "replay":
        return interpret(step, _as_leaves(step, inputs, (Role.THETA,)), create_graph=False)
    held = _as_leaves(step, inputs, _DIFFERENTIATED)
    results = interpret(step, held, create_graph=True)
    wanted = [i for i, p in enumerate(step.inputs) if p.differentiable and held[i].requires_grad]
    outs = [results[i] for i in step.cotangents]
    grads = dict(zip(wanted, pulled_back(outs, cotangents, [held[i] for i in wanted]), strict=True))
    return tuple(grads.get(i) for i in range(len(held)))


def _as_leaves(step: StepGraph, inputs: Sequence[Tensor], roles: tuple[Role, ...]) -> list[Tensor]:
    return [
        t.detach().requires_grad_() if p.role in roles and (p.differentiable or p.role is Role.THETA) else t
        for t, p in zip(inputs, step.inputs, strict=True)
    ]


def pulled_back(
    results: Sequence[Tensor], cotangents: Sequence[Tensor], sources: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Cotangents of the sources, by those of the results, of which some may not require grad."""
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    if not pairs or not sources:
        return [None] * len(sources)
    return torch.autograd.grad([r for r, _ in pairs], sources, [c for _, c in pairs], allow_unused=True)


def loss_graph(step: StepGraph, spec: TensorSpec) -> StepGraph:
    """inputs -> loss, which has this ``spec``, for a step that takes one gradient."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in step.graph.nodes:
        if node.target is gradient:
            graph.output((env[node.args[0]],))
            break
        env[node] = graph.node_copy(node, env.__getitem__)
    outputs, dtype = (Port(Role.CARRY, spec, "loss"),), step.default_dtype
    return StepGraph(graph, step.inputs, outputs, step.opaque, step.dynamic, default_dtype=dtype)


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


def in_formulas(step: StepGraph) -> dict[Any, Callable]:
    """What stands in torch's own formulas for operators that a trace cannot do with.

    Immaterial zeros, on which some operators fail. And a check of values, that a loss does not depend on the phase of
    complex singular vectors: whoever wrote the loss's own backward may check others.
    """
    home = step.inputs[0].spec.device

    def zeros(size: Any, *, device: Any = None, dtype: Any = None, **options: Any) -> Tensor:
        on_meta = device is None or torch.device(device).type == "meta"  # as a fake tensor's formula asks
        return torch.zeros(size, device=home if on_meta else device, dtype=dtype)

    instead: dict[Any, Callable] = {aten._efficientzerotensor.default: zeros}
    if not step.opaque:
        instead[aten.allclose.default] = lambda *args, **kwargs: True
    return instead


def cleaned(kind: str, traced: Traced, chunked: bool = False) -> FlatGraph:
    """Without dead nodes and duplicates; of a step in chunks, but for what is computed again on purpose."""
    flat = checked(traced)
    if not any(map(mutates, flat.graph.nodes)):
        undo_transposes(flat.graph)
        merge_equal(flat.graph, held=chunked)
    if kind == "replay":
        distinct(flat.graph)
    return flat


def checked(traced: Traced) -> FlatGraph:
    """A traced graph without dead nodes, and its own constants.

    In-place operators may remain: they write into what the graph itself made, never into its inputs.
    """
    graph, constants = traced.graph, traced.constants
    drop_dead(graph)
    _check(graph, constants)
    used = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    return FlatGraph(graph, {name: constants[name].clone() for name in used})


def _check(graph: fx.Graph, constants: dict[str, Tensor]) -> None:
    """What the graph has picked up besides its inputs: nothing may be drawn, tensors are frozen as they are."""
    for node in graph.nodes:
        target: Any = node.target
        into: Any
        for into in written(target, node.args, node.kwargs, fx.Node):
            while into.op == "call_function" and getattr(into.target, "is_view", False):
                into = into.args[0]
            if into.op == "placeholder":
                raise CaptureError(
                    f"a hook, a custom Function or the optimizer's update changes its argument in place ({target}); "
                    "clone it there and return the clone"
                )
        if isinstance(target, OpOverload) and op_info(target).random:
            raise CaptureError(
                f"a hook, a custom Function or the optimizer's update draws random numbers ({target}), which a replay "
                "would draw anew; draw them in the loss, or pass them as a hyper-parameter of the step (a module with "
                "dropout must be in evaluation mode: module.eval())"
            )
        if node.op == "get_attr" and constants[str(target)].requires_grad:
            raise CaptureError(
                "a hook, a custom Function or the optimizer's update uses a tensor of shape "
                f"{tuple(constants[str(target)].shape)} that requires grad but is none of its arguments, so it would "
                "receive no gradient; pass it as an argument, or detach it"
            )
