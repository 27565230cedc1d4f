"""Values that pass between the parts of a compiled function: carried, kept, shared, active only at times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import Made, compare, leaf, mlp
from problems import data

XS, YS = data(8)
FUNCTIONS: dict[str, Callable[[], Made]] = {}


def function(make: Callable[[], Made]) -> Callable[[], Made]:
    FUNCTIONS[make.__name__] = make
    return make


def offline(body: Callable, **options: Any) -> Callable[[], Made]:
    """A function whose ``body(inner, net, w, window)`` is the inside of an offline window of SGD."""

    def make() -> Made:
        net, w = mlp(), leaf()

        def of(window: Any) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=0.1 * w.exp(), **options)
            with window(offline=True) as win:
                return body(inner, net, w, win)

        return Made(of, [w, *net.parameters()])

    FUNCTIONS[body.__name__] = make
    return make


def support(net: Any, t: int) -> Tensor:
    return F.mse_loss(net(XS[t]), YS[t])


def query(net: Any) -> Tensor:
    return F.mse_loss(net(XS[8]), YS[8])


@offline
def parameters_of_earlier_steps(inner: Any, net: Any, w: Tensor, _: Any) -> Tensor:
    """Read by later inner losses and by the outer loss."""
    old: list[list[Tensor]] = []
    for t in range(5):
        old.append(list(net.parameters()))
        loss = support(net, t) * w
        if t >= 2:
            pairs = zip(net.parameters(), old[t - 2], strict=True)
            loss = loss + 0.1 * sum((p - q).square().sum() for p, q in pairs)
        inner.step(loss)
    return query(net) + sum(p.square().sum() for p in old[1])


@offline
def bodies_that_alternate(inner: Any, net: Any, w: Tensor, _: Any) -> Tensor:
    """Registers are given back and taken again by steps of other kinds."""
    h, k = torch.zeros(5, 2), torch.ones(5, 2)
    for t in range(7):
        out = net(XS[t])
        if t % 2:
            loss, h = F.mse_loss(out + h, YS[t]) * w, out.tanh() * k
        else:
            loss, k = F.mse_loss(out * k, YS[t]), (out * w).cos()
        if t % 3 == 2:
            h = h * w
        inner.step(loss)
    return query(net) + h.sum() + k.prod()


@offline
def integers_and_masks_carried(inner: Any, net: Any, w: Tensor, _: Any) -> Tensor:
    count, known = torch.zeros((), dtype=torch.long), torch.zeros(5, dtype=torch.bool)
    for t in range(5):
        out = net(XS[t])
        row = F.mse_loss(out, YS[t], reduction="none").mean(1)
        inner.step(torch.where(known, row * w, row).mean() * (count.double() + 1))
        known, count = known | (out[:, 0] > 0), count + out.argmax(1).sum()
    return query(net) * (count + 1)


@offline
def views_kept_over_steps(inner: Any, net: Any, w: Tensor, _: Any) -> Tensor:
    kept = torch.zeros(5, 2) + w
    for t in range(4):
        out = net(XS[t])
        flat = out.view(-1)
        inner.step(F.mse_loss(out + kept, YS[t]) + kept[t].sum() * flat.mean())
        kept = kept.clone()
        kept[t] = flat[::2][:2] * 0.5
    return query(net) + kept.square().sum()


@offline
def changed_before_and_after_a_step(inner: Any, net: Any, w: Tensor, _: Any) -> Tensor:
    total = torch.zeros(5, 2)
    for t in range(4):
        total += net(XS[t]).detach() * w
        inner.step(F.mse_loss(net(XS[t]) + total, YS[t]))
        total *= 0.5
    return F.mse_loss(net(XS[8]) + total, YS[8])


@offline
def all_losses_kept(inner: Any, net: Any, w: Tensor, _: Any) -> Tensor:
    losses = []
    for t in range(4):
        losses.append(support(net, t) * w)
        inner.step(losses[-1])
    return torch.stack(losses).sum() + losses[0] * losses[2]


@offline
def gradient_in_the_outer_loss(inner: Any, net: Any, w: Tensor, _: Any) -> Tensor:
    for t in range(3):
        inner.step(support(net, t) * w)
    loss = query(net)
    grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    return loss + sum(g.square().sum() for g in grads)


@offline
def the_same_loss_twice(inner: Any, net: Any, w: Tensor, _: Any) -> Tensor:
    for t in range(3):
        loss = support(net, t) * w
        inner.step(loss)
        inner.step(loss)
    return query(net)


@offline
def masked_in_place(inner: Any, net: Any, w: Tensor, _: Any) -> Tensor:
    for t in range(4):
        out = net(XS[t]) * 1.0
        out.clamp_(max=0.5)
        out[out < -0.5] = -0.5
        out[YS[t] > 1] = -1.0
        inner.step(F.mse_loss(out, YS[t]) * w)
    return query(net)


@offline
def kept_from_the_first_iteration(inner: Any, net: Any, w: Tensor, win: Any) -> Tensor:
    """A scan's invariants: one from before it, detached, and one that its first iteration has left."""
    first, before = None, net(XS[0]).detach() * w
    for x, y in win.scan(XS, YS):
        out = net(x)
        first = out.tanh() * w if first is None else first
        inner.step(F.mse_loss(out + first.detach() * w + before, y))
    return query(net) + before.sum()


@offline
def two_scans_that_share_a_body(inner: Any, net: Any, w: Tensor, win: Any) -> Tensor:
    h, total, between = torch.zeros(5, 2), torch.zeros(()), torch.zeros(5, 2)
    for xs in (XS, XS.flip(0)):
        for x, y in win.scan(xs, YS):
            h = (net(x) + h * w).tanh()
            inner.step(F.mse_loss(h, y))
            total = total + h.mean()
        between = between + h * 2
    return query(net) + total + between.sum()


@function
def active_from_some_step_on() -> Made:
    """Equal steps, the first of which no gradient reaches."""
    net, w = mlp(), leaf()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with window():
            scale = torch.tensor(1.0)
            for t in range(6):
                inner.step(support(net, t) * scale)
                if t == 3:
                    scale = scale * w
            return query(net)

    return Made(of, [w], lambda: list(net.parameters()))


@function
def learning_rates_by_step_and_by_group() -> Made:
    net, rates, beta = mlp(), torch.linspace(-3, -2, 5).requires_grad_(), leaf(0.8)

    def of(window: Any) -> Tensor:
        groups = [{"params": net[0], "betas": (beta.sigmoid(), 0.9)}, {"params": net[2], "lr": 0.01}]
        inner = metaoptim.MetaAdam(groups)
        with window(offline=True):
            for t in range(5):
                inner.param_groups[0]["lr"] = rates[t].exp()
                inner.step(support(net, t))
            return query(net)

    return Made(of, [rates, beta, *net.parameters()])


@function
def data_scanned_and_read() -> Made:
    net, w, xs = mlp(), leaf(), XS.clone().requires_grad_()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1 * w.exp())
        with window(offline=True) as win:
            for x in win.scan(xs):
                inner.step(F.mse_loss(net(x), xs[0, :, :2]) * w)
            return F.mse_loss(net(xs[3]), YS[8]) + xs.mean()

    return Made(of, [w, xs, *net.parameters()])


@function
def read_after_an_online_window() -> Made:
    torch.manual_seed(0)
    net, w = nn.Linear(3, 2), leaf()
    inner = metaoptim.MetaSGD([net], lr=0.1)

    def of(window: Any) -> Tensor:
        with window():
            for t in range(2):
                inner.step(support(net, t) * w)
            loss = query(net)
        return 2 * loss + w * support(net, 7).detach()

    return Made(of, [w], lambda: list(net.parameters()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    compare(FUNCTIONS[name])
