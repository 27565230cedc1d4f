"""A small network and its losses, for tests of what an ordinary window means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRATEGIES = pytest.mark.parametrize(
    "options", [{}, {"slots": 2}, {"strategy": "full_tape"}], ids=["all", "slots", "tape"]
)


def network(seed: int = 0, bn: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(4)] if bn else []
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 2)).double()


def batch(t: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + t)
    return torch.randn(6, 3, generator=g, dtype=torch.float64), torch.randn(
        6, 2, generator=g, dtype=torch.float64
    )


def loss_of(net: Any, t: int) -> Tensor:
    x, y = batch(t)
    return F.mse_loss(net(x), y)


def params(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def grads(net: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]
