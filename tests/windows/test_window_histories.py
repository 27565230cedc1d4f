"""Which history the parameters of a window have: several optimizers, loads in place, networks that join late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metaoptim
from forms import leaf
from window_cases import STRATEGIES, batch, grads, loss_of, network


@STRATEGIES
def test_actor_and_critic_losses_before_both_steps(options: dict) -> None:
    """Losses of one version of theta, then two steps: shared trunk, each loss at the parameters it read."""

    def run(window: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        trunk, actor, critic = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), nn.Linear(3, 1).double()
        gamma = leaf(0.7)
        modules = [trunk, actor, critic]

        def losses(t: int, f: Any) -> tuple[Tensor, Tensor]:
            x, y = batch(t)
            h = f[0](x).tanh()
            value = f[2](h)
            return (value - gamma * y[:, :1]).square().mean(), (f[1](h) * (y - value)).mean()

        if window:
            a, c = metaoptim.MetaSGD([trunk, actor], lr=0.1), metaoptim.MetaSGD([critic, trunk], lr=0.2)
            with metaoptim.SlidingWindow(offline=True, **options):
                for t in range(3):
                    critic_loss, actor_loss = losses(t, modules)
                    c.step(critic_loss)
                    a.step(actor_loss)
                sum(losses(9, modules)).backward()
            return [p.grad for m in modules for p in m.parameters()], gamma.grad
        theta = [[p.clone() for p in m.parameters()] for m in modules]
        for t in range(3):
            f = [lambda x, w=w: F.linear(x, *w) for w in theta]
            critic_loss, actor_loss = losses(t, f)
            gc_ = torch.autograd.grad(critic_loss, [*theta[2], *theta[0]], create_graph=True)
            ga = torch.autograd.grad(actor_loss, [*theta[0], *theta[1]], create_graph=True)
            theta = [
                [w - 0.2 * g - 0.1 * h for w, g, h in zip(theta[0], gc_[2:], ga[:2], strict=True)],
                [w - 0.1 * h for w, h in zip(theta[1], ga[2:], strict=True)],
                [w - 0.2 * g for w, g in zip(theta[2], gc_[:2], strict=True)],
            ]
        f = [lambda x, w=w: F.linear(x, *w) for w in theta]
        own = [p for m in modules for p in m.parameters()]
        found = torch.autograd.grad(sum(losses(9, f)), [*own, gamma])
        return list(found[:-1]), found[-1]

    (got, got_gamma), (expected, expected_gamma) = run(True), run(False)
    torch.testing.assert_close(got_gamma, expected_gamma, rtol=1e-10, atol=1e-13)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-13)


@STRATEGIES
def test_loss_finished_after_the_other_step(options: dict) -> None:
    """`actor.step(-(logp * adv).mean())` after `critic.step`, with logp computed before."""
    actor, critic, gamma = network(1), network(2), leaf(0.7)
    a, c = metaoptim.MetaSGD([actor], lr=0.3), metaoptim.MetaSGD([critic], lr=0.2)
    with metaoptim.SlidingWindow(**options):
        for t in range(3):
            x, y = batch(t)
            logp, value = actor(x), critic(x)
            c.step((value - gamma * y).square().mean())
            a.step((logp * (y - value.detach()) * gamma).mean() + logp.square().mean())
        (actor(batch(9)[0]) * critic(batch(9)[0])).sum().backward()
    first = gamma.grad.clone()
    actor, critic, gamma = network(1), network(2), leaf(0.7)
    theta = [dict(actor.named_parameters()), dict(critic.named_parameters())]
    theta = [{k: v.detach().requires_grad_() for k, v in th.items()} for th in theta]
    call = torch.func.functional_call
    for t in range(3):
        x, y = batch(t)
        logp, value = call(actor, theta[0], (x,)), call(critic, theta[1], (x,))
        g = torch.autograd.grad(
            (value - gamma * y).square().mean(), list(theta[1].values()), create_graph=True
        )
        h = torch.autograd.grad(
            (logp * (y - value.detach()) * gamma).mean() + logp.square().mean(),
            list(theta[0].values()),
            create_graph=True,
        )
        theta = [
            {k: v - 0.3 * d for (k, v), d in zip(theta[0].items(), h, strict=True)},
            {k: v - 0.2 * d for (k, v), d in zip(theta[1].items(), g, strict=True)},
        ]
    x = batch(9)[0]
    (expected,) = torch.autograd.grad(
        (call(actor, theta[0], (x,)) * call(critic, theta[1], (x,))).sum(), gamma
    )
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-13)


@STRATEGIES
@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "data"])
def test_in_place_load_is_a_history_cut(options: dict, how: str) -> None:
    """After the load the past is constant: θ_0 and the steps before receive nothing, the steps after do."""
    net, donor = network(), network(7)
    early, late = leaf(0.1), leaf(0.2)
    first = metaoptim.MetaSGD([net], lr=0.1, momentum=0.5)
    with metaoptim.SlidingWindow(offline=True, **options):
        first.step(loss_of(net, 0) * early)
        read_before = loss_of(net, 3)
        if how == "load_state_dict":
            net.load_state_dict(donor.state_dict())
        for p, q in zip(net.parameters(), donor.parameters(), strict=True):
            if how == "copy_":
                with torch.no_grad():
                    p.mul_(0.0)
                    p.copy_(q)
            elif how == "data":
                p.data.copy_(q.data)
        first.step(loss_of(net, 1) * late)
        outer = loss_of(net, 2)
    outer.backward(retain_graph=True)
    after = [p.grad for p in net.parameters()]
    # the momentum buffer still remembers the first step: that path is not overwritten
    assert late.grad is not None and late.grad.abs() > 1e-6
    momentum_path = early.grad.clone()
    early.grad = None
    theta = {n: p.detach().clone().requires_grad_() for n, p in donor.named_parameters()}
    start = dict(network().named_parameters())
    e, late_leaf = leaf(0.1), leaf(0.2)
    call = torch.func.functional_call
    g0 = torch.autograd.grad(
        loss_of(lambda x: call(net, start, (x,)), 0) * e, list(start.values()), create_graph=True
    )
    g1 = torch.autograd.grad(
        loss_of(lambda x: call(net, theta, (x,)), 1) * late_leaf, list(theta.values()), create_graph=True
    )
    final = {n: v - 0.1 * (0.5 * b + g) for (n, v), b, g in zip(theta.items(), g0, g1, strict=True)}
    wanted = torch.autograd.grad(
        loss_of(lambda x: call(net, final, (x,)), 2), [e, late_leaf, *start.values()]
    )
    torch.testing.assert_close(momentum_path, wanted[0])
    torch.testing.assert_close(late.grad, wanted[1])
    for g, h in zip(after, wanted[2:], strict=True):
        torch.testing.assert_close(g, h)
    assert read_before.requires_grad


@STRATEGIES
def test_captured_initial_parameters_are_a_constant_meta_parameter(options: dict) -> None:
    """A proximal term towards theta_0, captured before the window, offline: both paths reach theta_0."""
    net = network()
    anchors = list(net.parameters())
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, **options):
        for t in range(3):
            prox = sum((p * a.tanh()).sum() for p, a in zip(net.parameters(), anchors, strict=True))
            inner.step(loss_of(net, t) + 0.3 * prox)
        loss_of(net, 9).backward()
    got = grads(net)
    start = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    theta = {n: p * 1 for n, p in start.items()}
    for t in range(3):
        value = loss_of(lambda x, th=theta: torch.func.functional_call(net, th, (x,)), t)
        value = value + 0.3 * sum(
            (p * a.tanh()).sum() for p, a in zip(theta.values(), start.values(), strict=True)
        )
        g = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {n: p - 0.1 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    outer = loss_of(lambda x: torch.func.functional_call(net, theta, (x,)), 9)
    for g, h in zip(got, torch.autograd.grad(outer, list(start.values())), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-13)


@STRATEGIES
def test_optimizer_made_inside_and_networks_joining_late(options: dict) -> None:
    net, other, lr = network(), network(4), leaf(0.1)
    x = batch(5)[0]
    with metaoptim.SlidingWindow(offline=True, **options):
        inner = metaoptim.MetaSGD([net], lr=lr)
        inner.step(loss_of(net, 0))
        second = metaoptim.MetaSGD([other], lr=lr)
        for t in range(1, 3):
            inner.step(loss_of(net, t) + (net(x) * other(x)).mean())
            second.step(loss_of(other, t) + (net(x) * other(x)).mean())
        (net(x) * other(x)).sum().backward()
    got = [*grads(net), *grads(other), lr.grad]
    a = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    b = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    rate, call = leaf(0.1), torch.func.functional_call

    def f(th: dict) -> Any:
        return lambda x: call(net, th, (x,))

    def descend(th: dict, value: Any) -> dict:
        th = {
            n: p * 1 for n, p in th.items()
        }  # the gradient at this state, not through how the others came about
        g = torch.autograd.grad(value(f(th)), list(th.values()), create_graph=True)
        return {n: p - rate * d for (n, p), d in zip(th.items(), g, strict=True)}

    p, q = descend(a, lambda h: loss_of(h, 0)), b
    for t in range(1, 3):
        p = descend(p, lambda h, t=t, q=q: loss_of(h, t) + (h(x) * f(q)(x)).mean())
        q = descend(q, lambda h, t=t, p=p: loss_of(h, t) + (f(p)(x) * h(x)).mean())
    expected = torch.autograd.grad((f(p)(x) * f(q)(x)).sum(), [*a.values(), *b.values(), rate])
    for g, h in zip(got, expected, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-13)


def test_checkpointed_outer_loss_after_the_block_sees_theta_T() -> None:
    got = []
    for use in (False, True):
        net = network()
        inner = metaoptim.MetaSGD([net], lr=0.3)
        with metaoptim.SlidingWindow(offline=True):
            inner.step(loss_of(net, 0))
            x, y = batch(1)
            out = checkpoint(net, x, use_reentrant=False) if use else net(x)
            outer = F.mse_loss(out, y)
        outer.backward()
        got.append(grads(net))
    for g, h in zip(*got, strict=True):
        torch.testing.assert_close(g, h)
