"""Adan (Xie et al. 2022, arXiv 2208.06677, Algorithm 1), without restarts and bias corrections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import metaoptim
from metaoptim import safe_sqrt


class MetaAdan(metaoptim.MetaOptimizer):
    """With d = g - (g of the step before), which is 0 at first:

    m' = (1-β₁) m + β₁ g;  v' = (1-β₂) v + β₂ d;  n' = (1-β₃) n + β₃ (g + (1-β₂) d)²;
    θ' = (θ - η (m' + (1-β₂) v') / (√n' + ε)) / (1 + λ η).
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: tuple[Any, Any, Any] = (0.02, 0.08, 0.01),
        eps: Any = 1e-8,
        weight_decay: Any = 0,
        *,
        networks: Any = None,
    ) -> None:
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), networks=networks
        )

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        """Zero moments. The last gradient is added by the first step."""
        names = ("exp_avg", "exp_avg_diff", "exp_avg_sq")
        return {name: torch.zeros_like(param) for name in names}

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of one parameter."""
        beta1, beta2, beta3 = hyper["betas"]
        change = grad - state.get("previous", grad)
        mean = (1 - beta1) * state["exp_avg"] + beta1 * grad
        diff = (1 - beta2) * state["exp_avg_diff"] + beta2 * change
        square = (1 - beta3) * state["exp_avg_sq"] + beta3 * (grad + (1 - beta2) * change).square()
        step = hyper["lr"] * (mean + (1 - beta2) * diff) / (safe_sqrt(square) + hyper["eps"])
        new = (param - step) / (1 + hyper["weight_decay"] * hyper["lr"])
        return new, {"exp_avg": mean, "exp_avg_diff": diff, "exp_avg_sq": square, "previous": grad}
