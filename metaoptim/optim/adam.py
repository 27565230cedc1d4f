"""MetaAdam."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base.hyper import Number, Schedule, active, check_non_negative, has_values, safe_sqrt
from .base.parts import by_parts
from .optimizer import MetaOptimizer, Params, Transforms


class MetaAdam(MetaOptimizer):
    """Adam inside a window, as `torch.optim.Adam` (Kingma & Ba 2015, arXiv 1412.6980, Algorithm 1).

    m' = β₁ m + (1-β₁) g;  v' = β₂ v + (1-β₂) g²;  θ' = θ - η (m'/(1-β₁ᵗ)) / (sqrt(v'/(1-β₂ᵗ) + eps_root) + eps).
    The derivative of the square root at exactly 0 is taken as 0, so meta-gradients stay finite for parameters whose
    gradient has always been zero.

    Args:
        params: list of `nn.Module` (one parameter group each), or of dicts ``{"params": module, "lr": ...}``; with
            ``networks``, dicts may list some of their parameters. The others are meta-parameters.
        lr: learning rate η. Like every number here it may be a tensor, which receives a meta-gradient, or a schedule
            (`metaoptim.schedules`).
        betas: (β₁, β₂), each in [0, 1).
        eps: added to the denominator.
        weight_decay: λ; λ θ is added to the gradient.
        amsgrad: use the running maximum of v' (Reddi et al. 2018).
        maximize: ascend instead of descend.
        eps_root: added under the square root; 0 gives the trajectories of `torch.optim.Adam`.
        networks: modules that the parameters belong to; alone, all of their parameters, one group each.
        first_order: take the inner gradient as a constant in the meta-backward.
        transforms: what is done to the inner gradients before the update, in order: see `metaoptim.transforms`.

    Raises:
        ValueError: for a negative lr, eps, weight_decay or eps_root, betas outside [0, 1), or overlapping parameters.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> log_lr = torch.tensor(-2.0, requires_grad=True)
        >>> inner = metaoptim.MetaAdam([net])
        >>> inner.param_groups[0]["lr"] = log_lr.exp()  # anew for every window
        >>> with metaoptim.SlidingWindow():
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> log_lr.grad.shape
        torch.Size([])
    """

    torch_class = torch.optim.Adam
    extra: ClassVar[dict[str, Any]] = {"eps_root": 0.0}

    def __init__(
        self,
        params: Params = None,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0,
        amsgrad: bool = False,
        *,
        networks: Iterable[nn.Module] | None = None,
        maximize: bool = False,
        eps_root: Number = 0.0,
        first_order: bool = False,
        transforms: Transforms = (),
    ) -> None:
        check_non_negative(lr=lr, eps=eps, weight_decay=weight_decay, eps_root=eps_root)
        for i, beta in enumerate(betas):
            if isinstance(beta, Schedule) or (isinstance(beta, Tensor) and not has_values()):
                continue
            value = float(beta.detach()) if isinstance(beta, Tensor) else beta
            if not 0.0 <= value < 1.0:
                raise ValueError(f"betas[{i}]: got {value}, expected a number in [0, 1)")
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps)
        defaults |= dict(weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize, eps_root=eps_root)
        super().__init__(params, defaults, networks=networks, first_order=first_order, transforms=transforms)

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        """Zero moments and step count, by the names `torch.optim.Adam` gives them."""
        state = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
        if hyper["amsgrad"]:
            state["max_exp_avg_sq"] = torch.zeros_like(param)
        return state

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step for one parameter."""
        if param.is_complex():
            return by_parts(MetaAdam.update, param, grad, state, hyper)
        beta1, beta2 = hyper["betas"]
        if hyper["maximize"]:
            grad = -grad
        if active(hyper["weight_decay"]):
            grad = grad + hyper["weight_decay"] * param
        step = state["step"] + 1
        # Nothing is learnt through a count; its derivative would take two sums over every parameter in each step.
        count = step.detach().to(torch.float64)
        mean = beta1 * state["exp_avg"] + (1 - beta1) * grad
        square = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
        # what else a loaded state has stays, as in torch.optim
        new = {**state, "step": step, "exp_avg": mean, "exp_avg_sq": square}
        if hyper["amsgrad"]:
            square = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
        square = square / (1 - beta2**count)
        if active(hyper["eps_root"]):
            square = square + hyper["eps_root"]
        return param - hyper["lr"] * (mean / (1 - beta1**count)) / (safe_sqrt(square) + hyper["eps"]), new
