"""An inner loop inside an inner loop: its tasks, and the doubly nested tape that it is compared with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim

TASKS, SHOTS = 3, 2
Theta = dict[str, Tensor]


class Setting:
    """Tasks, a network, and learning rates of both levels."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.xs, self.ys = torch.randn(TASKS, SHOTS + 1, 6, 3), torch.randint(2, (TASKS, SHOTS + 1, 6))
        self.log_lr, self.log_meta_lr = (torch.tensor(v, requires_grad=True) for v in (-1.0, -2.0))

    def loss(self, t: int, k: int, theta: Theta | None = None) -> Tensor:
        out = self.net(self.xs[t, k]) if theta is None else functional_call(self.net, theta, (self.xs[t, k],))
        return F.cross_entropy(out, self.ys[t, k])

    def theta(self) -> Theta:
        return dict(self.net.named_parameters())

    def leaves(self) -> list[Tensor]:
        return [self.log_lr, self.log_meta_lr, *self.net.parameters()]


def by_hand(kind: Any, meta_kind: Any, **options: Any) -> list[Tensor]:
    """A doubly nested tape."""
    s = Setting()
    meta = metaoptim.functional(meta_kind, lr=s.log_meta_lr.exp())
    theta = s.theta()
    own = list(theta.values())
    meta_state = meta.init(theta)
    for t in range(TASKS):
        inner = metaoptim.functional(kind, lr=s.log_lr.exp(), **options)
        phi, state = theta, inner.init(theta)
        for k in range(SHOTS):
            grads = torch.autograd.grad(s.loss(t, k, phi), list(phi.values()), create_graph=True)
            phi, state = inner.update(dict(zip(phi, grads, strict=True)), state, phi)
        grads = torch.autograd.grad(s.loss(t, SHOTS, phi), list(theta.values()), create_graph=True)
        theta, meta_state = meta.update(dict(zip(theta, grads, strict=True)), meta_state, theta)
    outer = s.loss(0, 0, theta)
    return [outer.detach(), *torch.autograd.grad(outer, [s.log_lr, s.log_meta_lr, *own])]


def agree(got: list[Any], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
