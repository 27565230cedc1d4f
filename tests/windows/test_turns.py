"""Optimizers that take turns: what a loss reads from before and from after another optimizer's step counts together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim
from problems import data

STEPS = 3
XS, YS = data(STEPS)
OPTIONS = ({}, {"slots": 1}, {"window": 99}, {"strategy": "full_tape"})


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return tuple(nn.Sequential(nn.Linear(i, 4), nn.Tanh(), nn.Linear(4, o)) for i, o in ((3, 2), (2, 1)))  # type: ignore[return-value]


def critic_loss(critic: Callable, made: Tensor, t: int, w: Tensor) -> Tensor:
    return F.softplus(-critic(YS[t])).mean() + F.softplus(critic(made)).mean() * w


def maker_loss(maker: Callable, critic: Callable, made: Tensor, t: int, mixed: bool) -> Tensor:
    loss = F.softplus(-critic(made)).mean()
    return loss + (maker(XS[t] * 0.5) - made).square().mean() if mixed else loss


def oracle(mixed: bool, detached: bool) -> list[Tensor]:
    """Gradients by explicit theta, each network's taken with the other's held fixed."""
    maker, critic = networks()
    w = torch.tensor(0.8, requires_grad=True)
    own = [*maker.parameters(), *critic.parameters()]
    m = {n: p * 1.0 for n, p in maker.named_parameters()}
    c = {n: p * 1.0 for n, p in critic.named_parameters()}

    def call(net: nn.Module, theta: dict) -> Callable:
        return lambda x: functional_call(net, theta, (x,))

    for t in range(STEPS):

        def of_critic(c: dict, m: dict, t: int = t) -> Tensor:
            made = call(maker, m)(XS[t])
            return critic_loss(call(critic, c), made.detach() if detached else made, t, w)

        def of_maker(m: dict, c: dict, t: int = t) -> Tensor:
            return maker_loss(call(maker, m), call(critic, c), call(maker, m)(XS[t]), t, mixed)

        grads = torch.func.grad(of_critic)(c, m)
        c = {n: p - 0.1 * grads[n] for n, p in c.items()}
        grads = torch.func.grad(of_maker)(m, c)
        m = {n: p - 0.2 * grads[n] for n, p in m.items()}
    outer = F.mse_loss(call(maker, m)(XS[STEPS]), YS[STEPS]) + call(critic, c)(YS[STEPS]).mean()
    return [outer, *torch.autograd.grad(outer, [w, *own])]


@pytest.mark.parametrize("options", OPTIONS, ids=["all", "slots", "window", "full_tape"])
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_adversarial_training(mixed: bool, detached: bool, options: dict) -> None:
    maker, critic = networks()
    w = torch.tensor(0.8, requires_grad=True)
    own = [*maker.parameters(), *critic.parameters()]
    of_maker, of_critic = metaoptim.MetaSGD([maker], lr=0.2), metaoptim.MetaSGD([critic], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, **options):
        for t in range(STEPS):
            made = maker(XS[t])
            of_critic.step(critic_loss(critic, made.detach() if detached else made, t, w))
            of_maker.step(maker_loss(maker, critic, made, t, mixed))
        outer = F.mse_loss(maker(XS[STEPS]), YS[STEPS]) + critic(YS[STEPS]).mean()
        got = [outer, *torch.autograd.grad(outer, [w, *own])]
    for a, b in zip(got, oracle(mixed, detached), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=["all", "slots", "window", "full_tape"])
def test_parameters_taken_before_another_optimizers_step(options: dict) -> None:
    """They are read directly after it, beside what the network shows by then; values as of plain training."""

    def run(optimizers: Any, step: Callable, maker: Any, critic: Any) -> list[Tensor]:
        for t in range(STEPS):
            kept = list(maker.parameters())
            step(optimizers[1], critic(YS[t]).square().mean())
            again = sum((p * p).sum() for p in kept) + sum(p.sin().sum() for p in maker.parameters())
            step(optimizers[0], F.mse_loss(maker(XS[t]), YS[t]) + 0.3 * again)
        return [p.detach().clone() for p in (*maker.parameters(), *critic.parameters())]

    def plain_step(optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    nets = networks()
    plain = [torch.optim.SGD(n.parameters(), lr=0.1) for n in nets]
    expected = run(plain, plain_step, *nets)
    nets = networks()
    inner = [metaoptim.MetaSGD([n], lr=0.1) for n in nets]
    with metaoptim.SlidingWindow(**options):
        got = run(inner, lambda optimizer, loss: optimizer.step(loss), *nets)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
