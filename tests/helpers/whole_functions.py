"""Data and losses of whole functions in form C."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from problems import data

XS, YS = data(8)


def query(net: Any) -> Tensor:
    return F.mse_loss(net(XS[6]), YS[6])


def support(net: Any, t: int) -> Tensor:
    return F.mse_loss(net(XS[t]), YS[t])


def states(*optimizers: Any) -> list[Tensor]:
    return [v for o in optimizers for s in o.state.values() for v in s.values()]
