"""A small inner loop, for tests of what lies off the beaten track."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems import data

STEPS = 3
XS, YS = data(STEPS)
STRATEGIES = ({}, {"slots": 1}, {"strategy": "full_tape"})


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def leaf(value: Any) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def loss_of(net: Any, t: int) -> Tensor:
    return F.mse_loss(net(XS[t]), YS[t])
