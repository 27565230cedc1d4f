"""Inner loops whose losses are kept after their steps, and used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import metaoptim
from forms import leaf, mlp

STEPS = 6
XS = torch.randn(STEPS, 5, 3, generator=torch.Generator().manual_seed(2))
OPTIONS = (
    {},
    {"slots": 2},
    {"window": 50},
    {"offline": False, "slots": 2},
    {"offline": False, "window": 50},
)


class World:
    """Two networks and some meta-parameters."""

    def __init__(self) -> None:
        self.net, self.head = mlp(), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.rate, self.weight = leaf(-1.0), leaf(0.3)
        self.shift = torch.tensor([0.2, -0.4], requires_grad=True)
        self.kept: list[Tensor] = []  # losses that must have left eager's graph when the window ends

    def sgd(self, *networks: nn.Module, **options: Any) -> metaoptim.MetaSGD:
        networks = networks or (self.net,)
        return metaoptim.MetaSGD(list(networks), lr=self.rate.exp(), **{"momentum": 0.5, **options})

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x) - self.shift * self.weight).square().mean()

    def outer(self) -> Tensor:
        return self.head(self.net(XS[0])).square().mean()

    def leaves(self) -> dict[str, Tensor]:
        named = {**dict(self.net.named_parameters("net")), **dict(self.head.named_parameters("head"))}
        return {**named, "rate": self.rate, "weight": self.weight, "shift": self.shift}


def weighted(losses: list[Tensor]) -> Tensor:
    total: Any = 0.0
    for k, loss in enumerate(losses):
        total = total + (1 + 0.5 * k) * loss.sum()
    return total
