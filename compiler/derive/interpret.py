"""Run a StepGraph under autograd, exactly as eager would: the one definition of what a step means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.step import StepGraph, gradient, show
from ..ir.update import UpdatePlan
from .chunks import Chunks, GradientOfChunks, dropped, in_order, is_chunked
from .graphs import results_of
from .norms import FORMULAS, check_norms


def interpret(step: StepGraph, inputs: Sequence[Tensor], *, create_graph: bool) -> tuple[Any, ...]:
    """The outputs of ``step``, differentiable with ``create_graph``, for its inputs, of which thetas require grad."""
    check_norms(step.graph)
    return _Interpreter(step, create_graph).run(inputs)


class _Interpreter:
    def __init__(self, step: StepGraph, create_graph: bool) -> None:
        self.step, self.create_graph = step, create_graph

    def run(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        graph = self.step.graph
        known = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
        if self.step.chunked:
            return tuple(self.evaluate(results_of(graph), known))
        calls = [
            n for n in graph.nodes if n.op == "call_function"
        ]  # all: one may write into memory of others
        return tuple(self.values(calls, results_of(graph), known))

    def evaluate(self, wanted: Sequence[fx.Node], known: Mapping[fx.Node, Any]) -> list[Any]:
        """The values of nodes, from those of ``known`` ones: only what they need is run."""
        return self.values(in_order(wanted, known), wanted, known)

    def values(
        self, nodes: Sequence[fx.Node], wanted: Sequence[fx.Node], known: Mapping[fx.Node, Any]
    ) -> list[Any]:
        """The values of ``wanted`` nodes, when all of ``nodes`` have run; none is held longer than it is needed."""
        env, done = dict(known), dropped(nodes, set(wanted))
        for node in nodes:
            env[node] = self.value(node, env)
            for gone in done.get(node, ()):
                del env[gone]
        return [env[n] for n in wanted]

    def value(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        if is_chunked(node):
            return self.gradient_of_chunks(Chunks(node), env)
        given: Any = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        args, kwargs = given
        if node.target is gradient:
            return self.gradient(*args)
        if node.target is show:
            (theta,) = args
            with torch.enable_grad():
                return (
                    theta.view_as(theta)
                    if self.create_graph and theta.requires_grad
                    else theta.detach().requires_grad_()
                )
        # after the gradient nothing but its derivative needs a graph
        grad = node.meta.get("grad", True) and (self.create_graph or not isinstance(node.target, UpdatePlan))
        function: Any = node.target
        if self.create_graph:
            function = FORMULAS.get(function, function)
        with torch.set_grad_enabled(grad):
            return function(*args, **kwargs)

    def gradient(self, loss: Tensor, thetas: Sequence[Tensor]) -> tuple[Tensor, ...]:
        create = self.create_graph and not self.step.first_order
        retain = self.create_graph or self.step.steps > 1
        return self.hooked(
            torch.autograd.grad(loss, list(thetas), create_graph=create, retain_graph=retain), create
        )

    def gradient_of_chunks(self, chunks: Chunks, env: Mapping[fx.Node, Any]) -> tuple[Tensor, ...]:
        given = [env[n] for n in chunks.given]
        if self.create_graph and not self.step.first_order:
            return self.hooked(GradientOfChunks.apply(chunks, self.evaluate, *given), True)
        return chunks.gradients(self.evaluate, given)

    def hooked(self, grads: tuple[Tensor, ...], create: bool) -> tuple[Tensor, ...]:
        return tuple(map(_HookCotangent.apply, grads)) if create and self.step.hooked else grads


# -- `backward_hook`: a call out of a VJP graph into the user's Python, with the cotangent of an inner gradient -------

Hook = Callable[[Tensor], Tensor | None]
_hook: ContextVar[Hook | None] = ContextVar("metaoptim_cotangent_hook", default=None)
_TAKEN = 4  # most tensors of the size of its argument that a hook is assumed to make at a time


class _HookCotangent(torch.autograd.Function):
    """Identity whose backward passes the cotangent through the hook."""

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g.view_as(g)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        return call_cotangent_hook(cotangent)


@torch.library.custom_op("metaoptim::cotangent_hook", mutates_args=())
def call_cotangent_hook(cotangent: Tensor) -> Tensor:
    """The active window's backward_hook, as an operator that tracing and compilers pass through."""
    hook = _hook.get()
    result = None if hook is None else hook(cotangent)
    if result is None:
        return cotangent.clone()
    if result.shape != cotangent.shape:
        raise ValueError(
            f"backward_hook: got a result of shape {tuple(result.shape)}, expected "
            f"{tuple(cotangent.shape)}; return a tensor like its argument, or None to keep it"
        )
    return result.to(cotangent.dtype).clone() if result is cotangent else result.to(cotangent.dtype)


@call_cotangent_hook.register_fake
def _(cotangent: Tensor) -> Tensor:
    return torch.empty_like(cotangent)


def measuring_hook(cotangent: Tensor) -> None:
    """Takes as much memory as a hook is assumed to: the user's own may count, log or raise, and does not run."""
    taken = [torch.empty_like(cotangent) for _ in range(_TAKEN)]
    del taken


@contextmanager
def hooking(hook: Hook | None) -> Iterator[None]:
    """VJP graphs that run inside the block call ``hook``."""
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)
