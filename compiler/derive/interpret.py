"""Run a StepGraph under autograd, exactly as eager would: the one definition of what a step means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.step import StepGraph, gradient, show


class _Interpreter(fx.Interpreter):
    def __init__(self, step: StepGraph, create_graph: bool, cotangent_hook: Callable | None) -> None:
        super().__init__(torch.nn.Module(), graph=step.graph)
        self.extra_traceback = False  # a user's error is hers, without the names of our nodes
        self.create_graph, self.cotangent_hook = create_graph, cotangent_hook
        self.first_order = step.first_order
        self.several = step.steps > 1

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
            n.meta.get("grad", True) and (self.create_graph or not n.meta.get("update", False))
        ):
            return n.target(*args, **kwargs)  # type: ignore[operator]

    def gradient(self, loss: Tensor, thetas: Sequence[Tensor]) -> tuple[Tensor, ...]:
        create = self.create_graph and not self.first_order
        grads = torch.autograd.grad(
            loss, list(thetas), create_graph=create, retain_graph=create or self.create_graph or self.several
        )
        if self.cotangent_hook is not None and create:
            grads = tuple(_HookCotangent.apply(g, self.cotangent_hook) for g in grads)
        return tuple(grads)


class _HookCotangent(torch.autograd.Function):
    """Identity whose backward passes the cotangent through a function."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, hook: Callable) -> Tensor:  # type: ignore[override]
        ctx.hook = hook
        return g.view_as(g)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.hook(cotangent), None


def interpret(
    step: StepGraph, inputs: Sequence[Tensor], *, create_graph: bool, cotangent_hook: Callable | None = None
) -> tuple[Any, ...]:
    """The outputs of ``step``.

    Args:
        step: the graph to run.
        inputs: one tensor per `step.inputs`; those of role theta must require grad.
        create_graph: whether the outputs can be differentiated with respect to the inputs.
        cotangent_hook: applied to the cotangent of each inner gradient when they are.
    """
    return _Interpreter(step, create_graph, cotangent_hook).run(*inputs)
