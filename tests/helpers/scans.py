"""Data for scans in tests, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import metaoptim


def batches(steps: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(steps)
    return torch.randn(steps, 5, 3, generator=g), torch.randn(steps, 5, 2, generator=g)


def query(net: Any) -> Tensor:
    return F.mse_loss(net(torch.linspace(-1, 1, 15).view(5, 3)), torch.ones(5, 2))


def compiled(fn: Callable, **options: Any) -> Callable:
    return metaoptim.compile(fn, **{"backend": "eager", **options})
