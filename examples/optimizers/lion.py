"""Lion (Chen et al. 2023, arXiv 2302.06675, Algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import metaoptim


class MetaLion(metaoptim.MetaOptimizer):
    """θ' = θ - η (sign(β₁ m + (1-β₁) g) + λ θ);  m' = β₂ m + (1-β₂) g.

    The derivative of the sign is 0: β₁ and β₂ get the meta-gradient 0, and nothing flows back through g.
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-4,
        betas: tuple[Any, Any] = (0.9, 0.99),
        weight_decay: Any = 0,
        *,
        networks: Any = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), networks=networks)

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        """No momentum."""
        return {"exp_avg": torch.zeros_like(param)}

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of one parameter."""
        beta1, beta2 = hyper["betas"]
        mean = state["exp_avg"]
        direction = torch.sign(beta1 * mean + (1 - beta1) * grad) + hyper["weight_decay"] * param
        return param - hyper["lr"] * direction, {"exp_avg": beta2 * mean + (1 - beta2) * grad}
