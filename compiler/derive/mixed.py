"""A step's VJP by mixed-mode differentiation: forward over reverse, with the layers of the step rematerialised.

With θ' = Υ(g, θ, s, η) and g = ∇_θ L(θ, η), cotangents of θ' and s' are first pulled back through Υ alone, which gives
u, the cotangent of g, and direct terms for θ, s, η. The rest of the gradient is
u·∂g/∂(θ, η) = ∂_t ∇_(θ,η) L(θ + t u, η) at t = 0, one forward-mode
derivative of a gradient (MixFlow-MG, arXiv 2505.00793): the second-order tape that reverse over reverse keeps is never
built. What remains alive are the activations of L and their tangents, and those are made
again layer by layer (`remat`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from metaoptim.compiler.compat import FakeTensorMode, OpOverload, fx_graph_cse

from ..ir.operators import op_info
from ..ir.step import FlatGraph, StepGraph, gradient, show
from ..ir.values import reached
from .remat import rematerialised
from .reverse import true_zeros
from .tracing import tracing

aten = torch.ops.aten


class NotMixed(Exception):
    """The step has no mixed-mode derivative; the message says why."""


def mixed_vjp_graph(step: StepGraph, cotangents: Sequence[int]) -> FlatGraph:
    """inputs, cotangents of the outputs at ``cotangents`` -> a cotangent, or None, per input.

    Raises:
        NotMixed: for several gradients in one step, hooks, custom Functions, in-place operators, random shapes, or an
            operator without a forward derivative.
    """
    if (reason := why_not_mixed(step)) is not None:
        raise NotMixed(reason)
    result: list[Any] = []

    def work() -> None:  # a trace through jvp that fails can poison autograd for its whole thread
        try:
            result.append(_traced(step, cotangents))
        except NotMixed as error:
            result.append(error)
        except Exception as error:  # whatever an operator without a forward derivative raises
            result.append(NotMixed(f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=work)
    with tracing(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own forward mode uses torch.jit.script
        thread.start()
        thread.join()
    if isinstance(result[0], NotMixed):
        raise result[0]
    return result[0]


def why_not_mixed(step: StepGraph) -> str | None:
    """Why a step has no mixed-mode derivative, as far as that is seen without a trace."""
    if step.steps != 1:
        return f"it takes {step.steps} inner gradients"
    if step.opaque or step.dynamic or step.hooked or step.first_order:
        return "it holds hooks, custom Functions, or shapes that depend on values"
    for node in step.graph.nodes:
        if isinstance(node.target, OpOverload) and op_info(node.target).writes:
            return f"it writes in place ({node.target})"
    return None


class _Parts:
    """A step graph on either side of its gradient."""

    def __init__(self, step: StepGraph) -> None:
        self.step = step
        graph = step.graph
        (self.taken,) = (n for n in graph.nodes if n.target is gradient)
        self.loss, self.thetas = self.taken.args
        self.inputs = list(graph.find_nodes(op="placeholder"))
        (output,) = graph.find_nodes(op="output")
        self.outputs = list(output.args[0])

    def loss_of(self, values: Sequence[Tensor], thetas: Sequence[Tensor]) -> Tensor:
        """L, from the step's inputs, with ``thetas`` in the place of what the gradient is taken by."""
        env = dict(zip(self.inputs, values, strict=True)) | dict(zip(self.thetas, thetas, strict=True))
        return _evaluate(self.loss, env)

    def thetas_of(self, values: Sequence[Tensor]) -> list[Tensor]:
        """What the gradient is taken by."""
        env = dict(zip(self.inputs, values, strict=True))
        return [_evaluate(t, env) for t in self.thetas]

    def after(self, values: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Any]:
        """The step's outputs, given the inner gradient."""
        env: dict[fx.Node, Any] = dict(zip(self.inputs, values, strict=True))
        env[self.taken] = tuple(grads)
        return [_evaluate(n, env) for n in self.outputs]


def _evaluate(wanted: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """The value of a node: only what it depends on is run."""
    needed = reached([wanted], lambda n: () if n in env else n.all_input_nodes)
    for node in sorted(n for n in needed if n not in env):
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        target: Any = (lambda t: t.view_as(t)) if node.target is show else node.target
        with torch.set_grad_enabled(node.meta.get("grad", True) and torch.is_grad_enabled()):
            env[node] = target(*args, **kwargs)
    return env[wanted]


def _traced(step: StepGraph, cotangents: Sequence[int]) -> FlatGraph:
    parts = _Parts(step)
    wanted = [i for i, p in enumerate(step.inputs) if p.differentiable]
    free = _is_linear(parts, cotangents)

    def vjp(*args: Tensor) -> tuple:
        values, given = list(args[: len(step.inputs)]), args[len(step.inputs) :]
        taken = parts.thetas_of(values)
        first = [torch.zeros_like(t) for t in taken] if free else _gradient(parts, values, taken)
        direct, u = _through_update(parts, values, first, cotangents, given, wanted)
        primal, tangent = _forward_over_reverse(parts, values, taken, u, wanted)
        if free:  # u did not need the gradient, but what the update gives for its other arguments may
            direct, _ = _through_update(parts, values, primal, cotangents, given, wanted)
        found: list[Tensor | None] = [None] * len(values)
        for i, a, b in zip(wanted, direct, tangent, strict=True):
            total = a if b is None else b if a is None else a + b
            # tangents of Python numbers are of the default dtype, and may widen those of scalars
            found[i] = None if total is None else total.to(values[i].dtype)
        return tuple(found)

    with FakeTensorMode(allow_non_fake_inputs=True):
        examples = [p.empty() for p in step.inputs] + [step.outputs[i].empty() for i in cotangents]
        module = make_fx(vjp, true_zeros(step))(*examples)
    for node in module.graph.find_nodes(op="call_function", target=aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    phases = {n.name: n.meta.get("phase") for n in module.graph.nodes}
    clean = fx_graph_cse(module.graph)
    for node in clean.nodes:
        node.meta["phase"] = phases.get(node.name)
    constants = {str(n.target): getattr(module, str(n.target)) for n in clean.find_nodes(op="get_attr")}
    return rematerialised(FlatGraph(clean, constants))


def _is_linear(parts: _Parts, cotangents: Sequence[int]) -> bool:
    """Whether u does not depend on the inner gradient itself."""
    step = parts.step
    count = len(step.inputs)
    thetas = len(parts.thetas)

    def pull(*args: Tensor) -> tuple:
        values, grads, given = args[:count], args[count : count + thetas], args[count + thetas :]
        return tuple(_through_update(parts, values, grads, cotangents, given, [])[1])

    with FakeTensorMode(allow_non_fake_inputs=True):
        examples = [p.empty() for p in step.inputs]
        grads = [torch.empty_like(t) for t in parts.thetas_of(examples)]
        module = make_fx(pull, true_zeros(step))(
            *examples, *grads, *(step.outputs[i].empty() for i in cotangents)
        )
    module.graph.eliminate_dead_code()
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    return not any(n.users for n in placeholders[count : count + thetas])


def _mark(phase: str) -> Callable[[], None]:
    """Note on the nodes traced until the returned function is called which phase they belong to."""
    mode: Any = get_proxy_mode()
    graph = mode.tracer.graph
    before = set(graph.nodes)

    def done() -> None:
        for node in graph.nodes:
            if node not in before:
                node.meta.setdefault("phase", phase)

    return done


def _gradient(parts: _Parts, values: Sequence[Tensor], taken: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in taken]
    with torch.enable_grad():
        done = _mark("first forward")
        loss = parts.loss_of([v.detach() for v in values], leaves)
        done()
        done = _mark("first backward")
        grads = torch.autograd.grad(loss, leaves)
        done()
    return list(grads)


def _through_update(
    parts: _Parts,
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    cotangents: Sequence[int],
    given: Sequence[Tensor],
    wanted: Sequence[int],
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Cotangents pulled back through what follows the gradient: for the inputs at ``wanted``, and for the gradient."""
    with torch.enable_grad():
        held = [
            v.detach().requires_grad_(p.differentiable)
            for v, p in zip(values, parts.step.inputs, strict=True)
        ]
        taken = [g.detach().requires_grad_() for g in grads]
        results = parts.after(held, taken)
        pairs = [(results[i], c) for i, c in zip(cotangents, given, strict=True) if results[i].requires_grad]
        sources = [held[i] for i in wanted] + taken
        found: Sequence[Tensor | None] = [None] * len(sources)
        if pairs:
            found = torch.autograd.grad(
                [r for r, _ in pairs],
                sources,
                [c for _, c in pairs],
                allow_unused=True,
                materialize_grads=False,
            )
    u = [torch.zeros_like(g) if f is None else f for f, g in zip(found[len(wanted) :], grads, strict=True)]
    return list(found[: len(wanted)]), u


def _forward_over_reverse(
    parts: _Parts,
    values: Sequence[Tensor],
    taken: Sequence[Tensor],
    u: Sequence[Tensor],
    wanted: Sequence[int],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """∇_θ L, and for the inputs at ``wanted`` the derivative of ∇L by θ in direction u."""
    count = len(taken)
    inputs = {id(n): i for i, n in enumerate(parts.inputs)}
    own = {inputs.get(id(t)) for t in parts.thetas}
    others = [i for i in wanted if i not in own]

    def loss(*arguments: Tensor) -> Tensor:
        inside = list(values)
        for i, argument in zip(others, arguments[count:], strict=True):
            inside[i] = argument
        done = _mark("forward")
        result = parts.loss_of(inside, arguments[:count])
        done()
        return result.reshape(())

    def gradients(*thetas: Tensor) -> tuple[Tensor, ...]:
        arguments = (*thetas, *(values[i] for i in others))
        return torch.func.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)

    done = _mark("backward")
    primal, tangent = torch.func.jvp(gradients, tuple(taken), tuple(u))  # pyright: ignore[reportAssignmentType]
    done()
    found: dict[int, Tensor] = dict(zip(others, tangent[count:], strict=True))
    with torch.enable_grad():  # theta may itself be made of inputs
        held = [
            v.detach().requires_grad_(p.differentiable)
            for v, p in zip(values, parts.step.inputs, strict=True)
        ]
        pairs = [(t, h) for t, h in zip(parts.thetas_of(held), tangent, strict=False) if t.requires_grad]
        if pairs and wanted:
            through = torch.autograd.grad(
                [t for t, _ in pairs], [held[i] for i in wanted], [h for _, h in pairs], allow_unused=True
            )
            for i, g in zip(wanted, through, strict=True):
                if g is not None:
                    found[i] = found[i] + g if i in found else g
    return list(primal[:count]), [found.get(i) for i in wanted]
