"""LAMB (You et al. 2020, arXiv 1904.00962, Algorithm 2), with φ the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import metaoptim
from metaoptim import safe_sqrt


class MetaLamb(metaoptim.MetaOptimizer):
    """r = m̂ / (√v̂ + ε) + λ θ;  θ' = θ - η (‖θ‖ / ‖r‖) r, norms being those of one parameter tensor.

    Where one of the norms is 0, the step is η r.
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: Any = 1e-6,
        weight_decay: Any = 0,
        *,
        networks: Any = None,
    ) -> None:
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), networks=networks
        )

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        """Zero moments, and a count, which is a tensor too."""
        zeros = torch.zeros_like(param)
        return {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of one parameter."""
        beta1, beta2 = hyper["betas"]
        step = state["step"] + 1
        count = step.detach()
        mean = beta1 * state["exp_avg"] + (1 - beta1) * grad
        square = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad.square()
        adam = mean / (1 - beta1**count) / (safe_sqrt(square / (1 - beta2**count)) + hyper["eps"])
        ratio = adam + hyper["weight_decay"] * param
        # values decide by torch.where, and where a norm is 0 its derivative must not be infinite: safe_sqrt
        norm, norm_of_step = safe_sqrt(param.square().sum()), safe_sqrt(ratio.square().sum())
        usual = (norm > 0) & (norm_of_step > 0)
        trust = torch.where(usual, norm / torch.where(usual, norm_of_step, 1.0), 1.0)
        return param - hyper["lr"] * trust * ratio, {"step": step, "exp_avg": mean, "exp_avg_sq": square}
