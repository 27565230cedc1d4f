"""Run a StepGraph under autograd, exactly as eager would: the one definition of what a step means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.step import StepGraph, gradient, show
from ..ir.update import UpdatePlan


def interpret(step: StepGraph, inputs: Sequence[Tensor], *, create_graph: bool) -> tuple[Any, ...]:
    """The outputs of ``step``, differentiable with ``create_graph``, for its inputs, of which thetas require grad."""
    return _Interpreter(step, create_graph).run(*inputs)


class _Interpreter(fx.Interpreter):
    def __init__(self, step: StepGraph, create_graph: bool) -> None:
        super().__init__(torch.nn.Module(), graph=step.graph)
        self.extra_traceback = False  # a user's error is hers, without the names of our nodes
        self.step, self.create_graph = step, create_graph

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is gradient:
            return self.gradient(*args)
        if n.target is show:
            (theta,) = args
            with torch.enable_grad():
                return (
                    theta.view_as(theta)
                    if self.create_graph and theta.requires_grad
                    else theta.detach().requires_grad_()
                )
        # after the gradient nothing but its derivative needs a graph
        with torch.set_grad_enabled(
            n.meta.get("grad", True) and (self.create_graph or not isinstance(n.target, UpdatePlan))
        ):
            return n.target(*args, **kwargs)  # type: ignore[operator]

    def gradient(self, loss: Tensor, thetas: Sequence[Tensor]) -> tuple[Tensor, ...]:
        create = self.create_graph and not self.step.first_order
        retain = self.create_graph or self.step.steps > 1
        grads = torch.autograd.grad(loss, list(thetas), create_graph=create, retain_graph=retain)
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
