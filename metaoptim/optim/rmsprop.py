"""MetaRMSprop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .base.hyper import Number, active, check_non_negative, safe_sqrt
from .base.parts import by_parts
from .optimizer import MetaOptimizer, Params, Transforms


class MetaRMSprop(MetaOptimizer):
    """RMSprop inside a window, as `torch.optim.RMSprop`.

    v' = α v + (1-α) g²;  θ' = θ - η g / (sqrt(v') + eps); centered: v' - (running mean of g)² under the root; with
    momentum μ the quotient goes through a buffer b' = μ b + g / (sqrt(v') + eps). The derivative of the square root at
    exactly 0 is taken as 0.

    Args:
        params: list of `nn.Module` (one parameter group each), or of dicts ``{"params": module, "lr": ...}``; with
            ``networks``, dicts may list some of their parameters. The others are meta-parameters.
        lr: learning rate η. Like every number here it may be a tensor, which receives a meta-gradient, or a schedule
            (`metaoptim.schedules`).
        alpha: smoothing constant α.
        eps: added to the denominator.
        weight_decay: λ; λ θ is added to the gradient.
        momentum: μ.
        centered: normalise by an estimate of the variance.
        maximize: ascend instead of descend.
        networks: modules that the parameters belong to; alone, all of their parameters, one group each.
        first_order: take the inner gradient as a constant in the meta-backward.
        transforms: what is done to the inner gradients before the update, in order: see `metaoptim.transforms`.

    Raises:
        ValueError: for a negative lr, alpha, eps, weight_decay or momentum, or overlapping parameters.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> inner = metaoptim.MetaRMSprop([net], centered=True)
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> bool(net.weight.grad.isfinite().all())
        True
    """

    torch_class = torch.optim.RMSprop

    def __init__(
        self,
        params: Params = None,
        lr: Number = 1e-2,
        alpha: Number = 0.99,
        eps: Number = 1e-8,
        weight_decay: Number = 0,
        momentum: Number = 0,
        centered: bool = False,
        *,
        networks: Iterable[nn.Module] | None = None,
        maximize: bool = False,
        first_order: bool = False,
        transforms: Transforms = (),
    ) -> None:
        check_non_negative(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
        defaults = dict(lr=lr, alpha=alpha, eps=eps)
        defaults |= dict(weight_decay=weight_decay, momentum=momentum, centered=centered, maximize=maximize)
        super().__init__(params, defaults, networks=networks, first_order=first_order, transforms=transforms)

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        """Zero averages and step count, by the names `torch.optim.RMSprop` gives them."""
        state = {"step": torch.zeros((), dtype=torch.float32), "square_avg": torch.zeros_like(param)}
        if active(hyper["momentum"]):
            state["momentum_buffer"] = torch.zeros_like(param)
        if hyper["centered"]:
            state["grad_avg"] = torch.zeros_like(param)
        return state

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step for one parameter."""
        if param.is_complex():
            return by_parts(MetaRMSprop.update, param, grad, state, hyper)
        alpha = hyper["alpha"]
        if hyper["maximize"]:
            grad = -grad
        if active(hyper["weight_decay"]):
            grad = grad + hyper["weight_decay"] * param
        square = alpha * state["square_avg"] + (1 - alpha) * grad * grad
        # what else a loaded state has stays, as in torch.optim
        new = {**state, "step": state["step"] + 1, "square_avg": square}
        if hyper["centered"]:
            mean = new["grad_avg"] = alpha * state["grad_avg"] + (1 - alpha) * grad
            square = square - mean * mean
        direction = grad / (safe_sqrt(square) + hyper["eps"])
        if active(hyper["momentum"]):
            direction = new["momentum_buffer"] = hyper["momentum"] * state["momentum_buffer"] + direction
        return param - hyper["lr"] * direction, new
