"""A window inside a window: exact against tapes written by hand, at every level; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim
from nested_loops import SHOTS, TASKS, Setting, Theta, agree, by_hand

OUTER = [{}, {"slots": 1}, {"strategy": "full_tape"}, {"backend": "aot_eager"}, {"memory_budget": "4MiB"}]


def by_windows(kind: Any, meta_kind: Any, window: dict[str, Any], **options: Any) -> list[Any]:
    s = Setting()
    meta = meta_kind([s.net], lr=s.log_meta_lr.exp())
    before = {n: p.clone() for n, p in s.net.state_dict().items()}
    with metaoptim.SlidingWindow(offline=True, **window):
        for t in range(TASKS):
            inner = kind([s.net], lr=s.log_lr.exp(), **options)
            theta = [p.detach().clone() for p in s.net.parameters()]
            with metaoptim.SlidingWindow(offline=True):
                for k in range(SHOTS):
                    inner.step(s.loss(t, k))
                loss = s.loss(t, SHOTS)
            for p, q in zip(s.net.parameters(), theta, strict=True):
                assert torch.equal(p, q)  # offline: back where it was
            assert not inner.state
            meta.step(loss)
        outer = s.loss(0, 0)
        outer.backward()
    for name, value in s.net.state_dict().items():
        assert torch.equal(value, before[name])
    return [outer.detach(), *(p.grad for p in s.leaves())]


PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD in Adam": (metaoptim.MetaSGD, metaoptim.MetaAdam, {}),
    "Adam in SGD": (metaoptim.MetaAdam, metaoptim.MetaSGD, {}),
    "momentum in RMSprop": (metaoptim.MetaSGD, metaoptim.MetaRMSprop, {"momentum": 0.9}),
}


CASES = [(w, "SGD in Adam") for w in OUTER] + [(w, p) for w in OUTER[:1] for p in list(PAIRS)[1:]]


@pytest.mark.parametrize(("window", "pair"), CASES, ids=str)
def test_a_meta_learned_meta_learner(window: dict[str, Any], pair: str) -> None:
    kind, meta_kind, options = PAIRS[pair]
    agree(by_windows(kind, meta_kind, window, **options), by_hand(kind, meta_kind, **options))


def test_finite_differences() -> None:
    def outer(log_lr: float) -> tuple[float, float]:
        s = Setting()
        s.log_lr = torch.tensor(log_lr, requires_grad=True)
        meta = metaoptim.MetaSGD([s.net], lr=0.3)
        with metaoptim.SlidingWindow(offline=True):
            for t in range(TASKS):
                with metaoptim.SlidingWindow(offline=True):
                    inner = metaoptim.MetaAdam([s.net], lr=s.log_lr.exp())
                    inner.step(s.loss(t, 0))
                    loss = s.loss(t, SHOTS)
                meta.step(loss)
            found = s.loss(0, 0)
        found.backward()
        assert s.log_lr.grad is not None
        return found.item(), s.log_lr.grad.item()

    numeric = (outer(-1 + 1e-5)[0] - outer(-1 - 1e-5)[0]) / 2e-5
    assert abs(outer(-1.0)[1] - numeric) < 1e-5 * abs(numeric)


@pytest.mark.parametrize("window", [{}, {"strategy": "full_tape"}], ids=str)
@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
def test_the_outer_window_may_train_something_else(window: dict[str, Any], offline: bool) -> None:
    """Inner losses weighed by what the outer window trains; θ₀ and the outer rate receive gradients."""

    def weighed(s: Setting, t: int, k: int, weights: Tensor, theta: Theta | None = None) -> Tensor:
        x, net = s.xs[t, k], s.net
        out = net(x) if theta is None else functional_call(net, theta, (x,))
        return (
            F.linear(x, weights).sigmoid()[:, 0] * F.cross_entropy(out, s.ys[t, k], reduction="none")
        ).mean()

    s = Setting()
    weigh = nn.Linear(3, 1, bias=False)
    w: Tensor = weigh.weight
    own = list(s.net.parameters())
    for t in range(TASKS):
        phi = {n: p.view_as(p) for n, p in s.theta().items()}  # inner gradients do not go by way of w
        for k in range(SHOTS):
            grads = torch.autograd.grad(weighed(s, t, k, w, phi), list(phi.values()), create_graph=True)
            phi = {n: p - 0.5 * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        (g,) = torch.autograd.grad(s.loss(t, SHOTS, phi), [w], create_graph=True)
        w = w - s.log_meta_lr.exp() * g
    expected = torch.autograd.grad(w.square().sum(), [s.log_meta_lr, weigh.weight, *own])

    inner = metaoptim.MetaSGD([s.net], lr=0.5)
    meta = metaoptim.MetaSGD([weigh], lr=s.log_meta_lr.exp())
    with metaoptim.SlidingWindow(offline=offline, **window):
        for t in range(TASKS):
            with metaoptim.SlidingWindow(offline=True):
                for k in range(SHOTS):
                    inner.step(weighed(s, t, k, weigh.weight))
                loss = s.loss(t, SHOTS)
            meta.step(loss)
        weigh.weight.square().sum().backward()
    got = [p.grad for p in (s.log_meta_lr, weigh.weight, *own)]
    if not offline:
        assert got.pop(1) is None
        expected = (expected[0], *expected[2:])
        torch.testing.assert_close(weigh.weight.detach(), w.detach(), rtol=1e-9, atol=0)
    agree(got, list(expected))


@pytest.mark.parametrize("window", [{}, {"slots": 1}, {"strategy": "full_tape"}], ids=str)
def test_an_online_window_inside_leaves_its_last_parameters(window: dict[str, Any]) -> None:
    """A history cut for the window around; a loss computed inside goes back through the inner steps."""
    s = Setting()
    inner, meta = (metaoptim.MetaSGD([s.net], lr=r.exp()) for r in (s.log_lr, s.log_meta_lr))
    with metaoptim.SlidingWindow(offline=True, **window):
        meta.step(s.loss(0, 0))
        with metaoptim.SlidingWindow():
            for k in range(SHOTS):
                inner.step(s.loss(1, k))
            loss = s.loss(1, SHOTS)
        meta.step(s.loss(2, 0))
        outer = s.loss(0, 0) + loss
        outer.backward()
    got = [outer.detach(), *(p.grad for p in s.leaves())]

    s = Setting()

    def down(theta: Theta, loss: Tensor, log_rate: Tensor) -> Theta:
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        return {n: p - log_rate.exp() * g for (n, p), g in zip(theta.items(), grads, strict=True)}

    theta = s.theta()
    own = list(theta.values())
    phi = down(theta, s.loss(0, 0, theta), s.log_meta_lr)
    for k in range(SHOTS):
        phi = down(phi, s.loss(1, k, phi), s.log_lr)
    theta = {n: p.detach().requires_grad_() for n, p in phi.items()}
    theta = down(theta, s.loss(2, 0, theta), s.log_meta_lr)
    outer = s.loss(0, 0, theta) + s.loss(1, SHOTS, phi)
    agree(got, [outer.detach(), *torch.autograd.grad(outer, [s.log_lr, s.log_meta_lr, *own])])


def test_three_levels() -> None:
    def run(**window: Any) -> list[Any]:
        s = Setting()
        rate = torch.tensor(-1.5, requires_grad=True)
        top, middle = (
            metaoptim.MetaSGD([s.net], lr=rate.exp()),
            metaoptim.MetaSGD([s.net], lr=s.log_meta_lr.exp()),
        )
        with metaoptim.SlidingWindow(offline=True, **window):
            for t in range(2):
                with metaoptim.SlidingWindow(offline=True):
                    for k in range(2):
                        inner = metaoptim.MetaSGD([s.net], lr=s.log_lr.exp())
                        with metaoptim.SlidingWindow(offline=True):
                            inner.step(s.loss(t, k))
                            loss = s.loss(t, 2)
                        middle.step(loss)
                    loss = s.loss(t, 0)
                top.step(loss)
            outer = s.loss(2, 0)
            outer.backward()
        return [outer.detach(), rate.grad, *(p.grad for p in s.leaves())]

    def taped() -> list[Tensor]:
        s = Setting()
        rate = torch.tensor(-1.5, requires_grad=True)

        def down(theta: Theta, loss: Tensor, log_rate: Tensor) -> Theta:
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            return {n: p - log_rate.exp() * g for (n, p), g in zip(theta.items(), grads, strict=True)}

        theta = s.theta()
        own = list(theta.values())
        for t in range(2):
            phi = theta
            for k in range(2):
                phi = down(phi, s.loss(t, 2, down(phi, s.loss(t, k, phi), s.log_lr)), s.log_meta_lr)
            theta = down(theta, s.loss(t, 0, phi), rate)
        outer = s.loss(2, 0, theta)
        return [outer.detach(), *torch.autograd.grad(outer, [rate, s.log_lr, s.log_meta_lr, *own])]

    expected = taped()
    for window in ({}, {"strategy": "full_tape"}):
        agree(run(**window), expected)


class PlainNorm(nn.BatchNorm1d):
    """Batch norm in plain operators: torch's own has no right third derivative."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(0), x.var(0, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)  # type: ignore[union-attr]
            self.running_var.lerp_(x.var(0), 0.1)  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


def test_dropout_and_batch_norm_inside() -> None:
    """Masks and running statistics are those of the full tape; statistics go back with an offline window inside."""

    def run(norm: type[nn.BatchNorm1d], **window: Any) -> list[Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4, bias=False), norm(4), nn.Dropout(0.3), nn.Linear(4, 2))
        x, lr = torch.randn(8, 3), torch.tensor(0.3, requires_grad=True)
        meta, inner = metaoptim.MetaSGD([net], lr=0.2), metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=False, **window):
            for _ in range(2):
                with metaoptim.SlidingWindow(offline=True):
                    before = net[1].running_mean.clone()  # type: ignore[union-attr, operator]
                    inner.step(net(x).square().mean())
                    loss = net(x).square().mean()
                assert torch.equal(net[1].running_mean, before)  # type: ignore[arg-type]
                meta.step(loss)
                meta.step(net(x).square().mean())
            net(x).square().mean().backward()
        return [lr.grad, *(t.double() for t in net.state_dict().values())]

    expected = run(PlainNorm, strategy="full_tape")
    for got, want in zip(run(nn.BatchNorm1d, slots=1), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_states_inside() -> None:
    """Branches of the inner loop, from one state in its middle."""

    def run(by_state: bool, **window: Any) -> list[Any]:
        s = Setting()
        meta = metaoptim.MetaSGD([s.net], lr=s.log_meta_lr.exp())
        with metaoptim.SlidingWindow(offline=True, **window):
            for t in range(2):
                inner = metaoptim.MetaAdam([s.net], lr=s.log_lr.exp())
                total: Any = 0.0
                if by_state:
                    with metaoptim.SlidingWindow(offline=True):
                        inner.step(s.loss(t, 0))
                        there = metaoptim.extract_state(s.net, inner)
                        for k in (1, 2):
                            metaoptim.recover_state(there)
                            inner.step(s.loss(t, k))
                            total = total + s.loss(t, 0)
                else:
                    for k in (1, 2):
                        with metaoptim.SlidingWindow(offline=True):
                            inner.step(s.loss(t, 0))
                            inner.step(s.loss(t, k))
                            total = total + s.loss(t, 0)
                meta.step(total)
            outer = s.loss(2, 0)
            outer.backward()
        return [outer.detach(), *(p.grad for p in s.leaves())]

    expected = run(False, strategy="full_tape")
    for window in ({}, {"slots": 1}, {"strategy": "full_tape"}):
        agree(run(True, **window), expected)


@pytest.mark.parametrize("window", [{}, {"slots": 1}, {"strategy": "full_tape"}], ids=str)
def test_several_adapted_copies_alive_at_once(window: dict[str, Any]) -> None:
    """Two adapted networks from one θ₀, and a loss that reads both: named parameters stay what they were."""
    s = Setting()
    names = list(s.theta())
    with metaoptim.SlidingWindow(offline=True, **window):
        meta = metaoptim.MetaSGD([s.net], lr=s.log_meta_lr.exp())
        for t in range(2):
            copies = []
            for k in range(2):
                with metaoptim.SlidingWindow(offline=True):
                    inner = metaoptim.MetaSGD([s.net], lr=s.log_lr.exp())
                    inner.step(s.loss(t, k))
                    copies.append(s.theta())
            x = s.xs[t, 2]
            one, other = (functional_call(s.net, theta, (x,)) for theta in copies)
            meta.step((one - other).square().mean() + F.cross_entropy(one + other, s.ys[t, 2]))
        outer = s.loss(2, 0)
        outer.backward()
    got = [outer.detach(), *(p.grad for p in s.leaves())]

    s = Setting()
    theta = s.theta()
    own = list(theta.values())
    for t in range(2):
        copies = []
        for k in range(2):
            g = torch.autograd.grad(s.loss(t, k, theta), list(theta.values()), create_graph=True)
            copies.append({n: theta[n] - s.log_lr.exp() * d for n, d in zip(names, g, strict=True)})
        one, other = (functional_call(s.net, phi, (s.xs[t, 2],)) for phi in copies)
        loss = (one - other).square().mean() + F.cross_entropy(one + other, s.ys[t, 2])
        g = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {n: theta[n] - s.log_meta_lr.exp() * d for n, d in zip(names, g, strict=True)}
    outer = s.loss(2, 0, theta)
    agree(got, [outer.detach(), *torch.autograd.grad(outer, [s.log_lr, s.log_meta_lr, *own])])
