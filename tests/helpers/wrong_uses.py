"""Wrong uses of the library, each with what its user is told. `wrong_windows` and `wrong_settings` have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(net: nn.Module, x: Tensor = X) -> Tensor:
    return net(x).square().mean()


def rate() -> Tensor:
    return torch.tensor(-2.0, requires_grad=True)


USES: list[Any] = []


def wrong(kind: type, *parts: str) -> Callable:
    """The decorated function is a wrong use; its user gets ``kind``, with a text that holds ``parts`` in order."""

    def note(use: Callable[[], Any]) -> Callable[[], Any]:
        USES.append(pytest.param(use, kind, parts, id=use.__name__))
        return use

    return note
