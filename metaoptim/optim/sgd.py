"""MetaSGD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .base.hyper import Number, active, check_non_negative
from .optimizer import MetaOptimizer, Params, Transforms


class MetaSGD(MetaOptimizer):
    """Stochastic gradient descent inside a window, as `torch.optim.SGD`.

    b' = μ b + (1 - d) g (first step: b' = g);  θ' = θ - η b', with g the inner gradient plus λ θ, and g + μ b' instead
    of b' under Nesterov momentum.

    Args:
        params: list of `nn.Module` (one parameter group each), or of dicts ``{"params": module, "lr": ...}``; with
            ``networks``, dicts may list some of their parameters. The others are meta-parameters.
        lr: learning rate η. Like every number here it may be a tensor, which receives a meta-gradient, or a schedule
            (`metaoptim.schedules`).
        momentum: μ.
        dampening: d.
        weight_decay: λ.
        nesterov: use Nesterov momentum.
        maximize: ascend instead of descend.
        networks: modules that the parameters belong to; alone, all of their parameters, one group each.
        first_order: take the inner gradient as a constant in the meta-backward (FOMAML; Nichol et al. 2018,
            arXiv 1803.02999, section 2).
        transforms: what is done to the inner gradients before the update, in order: see `metaoptim.transforms`.

    Raises:
        ValueError: for negative lr, momentum or weight_decay, or overlapping parameters.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.9)
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> net.weight.grad.shape
        torch.Size([1, 2])
    """

    torch_class = torch.optim.SGD

    def __init__(
        self,
        params: Params = None,
        lr: Number = 1e-3,
        momentum: Number = 0,
        dampening: Number = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        networks: Iterable[nn.Module] | None = None,
        maximize: bool = False,
        first_order: bool = False,
        transforms: Transforms = (),
    ) -> None:
        check_non_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (not active(momentum) or active(dampening)):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening)
        defaults |= dict(weight_decay=weight_decay, nesterov=nesterov, maximize=maximize)
        super().__init__(params, defaults, networks=networks, first_order=first_order, transforms=transforms)

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        """No state: the momentum buffer begins as the first gradient."""
        return {}

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step for one parameter."""
        if hyper["maximize"]:
            grad = -grad
        if active(hyper["weight_decay"]):
            grad = grad + hyper["weight_decay"] * param
        if active(hyper["momentum"]):
            previous = state.get("momentum_buffer")
            buffer = (
                grad if previous is None else hyper["momentum"] * previous + (1 - hyper["dampening"]) * grad
            )
            state = {"momentum_buffer": buffer}
            grad = grad + hyper["momentum"] * buffer if hyper["nesterov"] else buffer
        return param - hyper["lr"] * grad, state
