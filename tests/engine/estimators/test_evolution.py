"""Evolution strategies, against smoothed losses of quadratics by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim import Evolution, SlidingWindow
from metaoptim.runtime.engine.estimators.evolution import Particles

CURVATURES, START, SIGMA = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([1.0, -2.0, 0.7]), 0.1


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(START.clone())

    def forward(self) -> Tensor:
        return energy(self.theta)


def energy(theta: Tensor) -> Tensor:
    return (CURVATURES * theta.square()).sum() / 2


def smoothed(f: Callable[[Sequence[Tensor]], Tensor], eta: Tensor, count: int) -> Tensor:
    """The derivative of E f(η + σε_1, ..., η + σε_count) by η, exactly for polynomials."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    total = torch.zeros_like(eta)
    for at in product(range(len(nodes)), repeat=count):
        leaf = eta.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(f([leaf + SIGMA * float(nodes[k]) for k in at]), leaf)
        total += math.prod(float(weights[k]) for k in at) / (2 * math.pi) ** (count / 2) * grad
    return total


def check_mean(draw: Callable[[Evolution], Tensor], expected: Tensor, **options: Any) -> None:
    """The mean of many estimates is that expected, within four of its standard errors, which are small."""
    gradient = Evolution(SIGMA, generator=torch.Generator().manual_seed(0), **options)
    found = torch.stack([draw(gradient) for _ in range(40)])
    error = found.std(0) / len(found) ** 0.5
    assert bool((error < 0.1 * expected.abs()).all()), (error, expected)
    assert bool(((found.mean(0) - expected).abs() < 4 * error).all()), (found.mean(0), expected, error)


def after(theta: Tensor, eta: Tensor, steps: int) -> Tensor:
    return (1 - eta * CURVATURES) ** steps * theta


@pytest.mark.parametrize("kind", ["outer", "stepped"])
def test_the_mean_is_the_derivative_of_what_is_smoothed(kind: str) -> None:
    eta = torch.tensor(0.3, requires_grad=True)

    def draw(gradient: Evolution) -> Tensor:
        net = Quadratic()
        inner = metaoptim.MetaSGD([net], lr=eta)
        with SlidingWindow(gradient=gradient):
            for _ in range(3):
                inner.step(net())
            last = net()
            if kind == "stepped":
                inner.step(last)
            (grad,) = torch.autograd.grad(last, eta)
        return grad

    cotangent = CURVATURES * after(START, eta, 3).detach()
    of_trajectory = smoothed(lambda etas: cotangent @ after(START, etas[0], 3), eta, 1)
    of_loss = smoothed(lambda etas: energy(after(START, etas[0], 3)), eta, 1)
    assert not torch.allclose(of_trajectory, of_loss, rtol=0.1), "the two differ"
    check_mean(draw, of_loss if kind == "stepped" else of_trajectory, pairs=50 if kind == "stepped" else 20)


def test_persistent_windows_do_not_truncate() -> None:
    """The sum over windows is the derivative of the whole loop's losses, each window's rate smoothed by itself."""
    eta, windows, steps = torch.tensor(0.15, requires_grad=True), 3, 2

    def whole(etas: Sequence[Tensor]) -> Tensor:
        theta, total = START, torch.zeros(())
        for rate in etas:
            for _ in range(steps):
                total = total + energy(theta)
                theta = theta - rate * CURVATURES * theta
        return total

    def draw(gradient: Evolution) -> Tensor:
        net, total = Quadratic(), torch.zeros(())
        inner = metaoptim.MetaSGD([net], lr=eta)
        for _ in range(windows):
            with SlidingWindow(gradient=gradient):
                losses = []
                for _ in range(steps):
                    losses.append(net())
                    inner.step(losses[-1])
                (grad,) = torch.autograd.grad(torch.stack(losses).sum(), eta)
            total += grad
        return total

    expected = smoothed(whole, eta, windows)
    check_mean(draw, expected, pairs=20, persistent=True)
    truncated = Evolution(SIGMA, 100, torch.Generator().manual_seed(0))
    assert float((draw(truncated) - expected).abs()) > 0.2 * float(expected.abs()), "what it is for"


def test_persistent_runs_go_on_with_their_own_optimizer_state_and_begin_anew_with_the_networks() -> None:
    """To first order f(+) - f(-) = 2σ (ε_1 ∂f/∂η_1 + ε_2 ∂f/∂η_2), of the rates of two windows."""
    rates = torch.full((2,), 0.05, requires_grad=True)
    net = Quadratic()
    with SlidingWindow():
        inner = metaoptim.MetaAdam([net], lr=rates[0])
        grads = []
        for steps, rate in zip((2, 3), rates, strict=True):
            inner.param_groups[0]["lr"] = rate
            for _ in range(steps):
                inner.step(net())
            grads.append(torch.autograd.grad(net.theta.sum(), rates, retain_graph=True)[0])
    (alone, _), (of_first, of_second) = grads
    eta, found = torch.tensor(0.05, requires_grad=True), []
    gradient = Evolution(1e-5, 1, torch.Generator().manual_seed(1), persistent=True)
    for restart, steps in ((True, 2), (False, 3), (True, 2)):
        if restart:
            net = Quadratic()
            inner = metaoptim.MetaAdam([net], lr=eta)
        with SlidingWindow(gradient=gradient):
            for _ in range(steps):
                inner.step(net())
            (grad,) = torch.autograd.grad(net.theta.sum(), eta)
        with SlidingWindow(gradient=gradient):
            net().detach()  # no steps, no matter
        with pytest.raises(KeyError), SlidingWindow(gradient=gradient):
            inner.step(net())
            raise KeyError
        assert gradient._left is not None
        found.append((grad, gradient._left.pairs[0].before[eta]))
    (first, noise), (second, both), (again, fresh) = found
    torch.testing.assert_close(first, noise**2 * alone, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(
        second, both * (noise * of_first + (both - noise) * of_second), rtol=1e-4, atol=0.0
    )
    torch.testing.assert_close(again, fresh**2 * alone, rtol=1e-4, atol=0.0)


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def check_projection(run: Callable[[Any], list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair and a small σ give ε ⟨ε, ∇⟩, of the exact gradient ∇; the first tensor is the only scalar."""
    drawn: list[Tensor] = []
    original = Particles._noise

    def noise(self: Particles, pair: Any, key: Any, spec: Any) -> Tensor:
        if key not in pair.noise:
            drawn.append(original(self, pair, key, spec))
        return original(self, pair, key, spec)

    monkeypatch.setattr(Particles, "_noise", noise)
    ours, exact = run(Evolution(1e-5, 1, torch.Generator().manual_seed(2))), run("exact")
    (of_first,) = (t for t in drawn if not t.shape)
    projection = ours[0] / of_first
    inner_product = sum((a * b).sum() for a, b in zip(ours, exact, strict=True)) / projection
    torch.testing.assert_close(projection, inner_product, rtol=1e-5, atol=0.0)
    total = sum(float(g.sum()) for g in ours) / float(projection)
    assert len(drawn) == len(ours) and math.isclose(total, float(sum(t.sum() for t in drawn)), rel_tol=1e-9)


@pytest.mark.parametrize("offline", [True, False])
def test_all_that_has_a_gradient_is_perturbed(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(5)), torch.zeros(12, 2)

    def run(gradient: Any) -> list[Tensor]:
        net, meta, rate = mlp(), nn.Linear(2, 1), torch.tensor(0.1, requires_grad=True)
        with torch.no_grad():
            meta.weight.fill_(0.5)
        other = metaoptim.MetaSGD([meta], lr=0.1)  # does not step
        weights, total = torch.linspace(0.5, 1.5, 12).requires_grad_(), torch.zeros(())
        kept = []
        with SlidingWindow(offline=offline, gradient=gradient):
            inner = metaoptim.MetaAdam([net], lr=rate)
            for _ in range(4):
                with torch.no_grad():
                    meta.bias.mul_(1.5)  # no history cut: no step moves it
                out = net(F.dropout(x))
                loss = (weights * (out - y).square().sum(1)).mean() + meta(out).square().mean()
                inner.step(loss)
                kept.append(loss)
                total = total + F.mse_loss(net(x + 1), y)
            (total + kept[0] + kept[-1]).backward()
        own = list(net.parameters()) if offline else []
        assert other.param_groups and all((p.grad is not None) == offline for p in net.parameters())
        found = [t.grad for t in (rate, weights, meta.weight, meta.bias, *own) if t.grad is not None]
        assert len(found) == 4 + len(own)
        return found

    check_projection(run, monkeypatch)


def test_several_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(5))

    def run(gradient: Any) -> list[Tensor]:
        torch.manual_seed(2)
        trunk, actor, critic = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)
        rate, slope = torch.tensor(0.1, requires_grad=True), torch.ones(2, requires_grad=True)
        first = metaoptim.MetaSGD([trunk, actor], lr=rate, momentum=0.9)
        second, total = metaoptim.MetaAdam([critic], lr=0.05), torch.zeros(())
        with SlidingWindow(gradient=gradient):
            for _ in range(4):
                hidden = torch.tanh(trunk(x))
                loss, fit = (
                    (slope * actor(hidden)).square().mean(),
                    (critic(hidden) - slope).square().mean(),
                )
                first.step(loss)
                second.step(fit)
                total = total + loss
            outer = (actor(trunk(x)) * critic(trunk(x))).mean() + total
            return list(torch.autograd.grad(outer, (rate, slope)))

    check_projection(run, monkeypatch)


def test_steps_without_a_useful_derivative() -> None:
    """Rounded: exact gradients are 0, and the estimate has the right sign."""
    eta = torch.tensor(0.3, requires_grad=True)
    for gradient in ("exact", Evolution(0.05, 30, torch.Generator().manual_seed(0))):
        net = Quadratic()
        with SlidingWindow(gradient=gradient):
            inner = metaoptim.MetaSGD([net], lr=(eta * 20).round() / 20)
            for _ in range(3):
                inner.step(net())
            inner.step(last := net())
            (grad,) = torch.autograd.grad(last, eta, allow_unused=True)
        assert (gradient == "exact") == (grad is None or not grad), grad
    assert grad is not None and float(grad) < 0


def test_going_back_starting_and_several_backwards() -> None:
    eta, first = torch.tensor(0.1, requires_grad=True), torch.tensor([1.0, 1.0, 2.0], requires_grad=True)
    grads = []
    for gradient in (Evolution(1e-6, 1, torch.Generator().manual_seed(3)), "exact"):
        net = Quadratic()
        inner = metaoptim.MetaSGD([net], lr=eta, momentum=0.5)
        with SlidingWindow(gradient=gradient):
            inner.step(net())
            there = metaoptim.extract_state(net, inner, by="detached")
            inner.start({"theta": first * 2})
            inner.step(net())
            one = net()
            metaoptim.recover_state(there)
            inner.step(net())
            two = net()
            grads.append(torch.autograd.grad(one, (eta, first), retain_graph=True))
            grads.append(torch.autograd.grad(two, eta, retain_graph=True))
            if gradient != "exact":
                with pytest.raises(metaoptim.WindowError, match="by='detached'"):
                    metaoptim.extract_state(net)
    (by_eta, by_first), (second,), exact, (last,) = grads
    noise = by_first / (by_eta * exact[0] + by_first @ exact[1]).abs() ** 0.5
    assert torch.isfinite(noise).all() and bool(by_eta) and bool(second)
    assert float(by_eta * exact[0] + by_first @ exact[1]) > 0 and float(second * last) > 0, "never uphill"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a number above 0"):
        Evolution(0.0)
    for pairs in (0, 1.5):
        with pytest.raises(ValueError, match=r"pairs: got .* expected a positive integer"):
            Evolution(pairs=pairs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a torch\.Generator"):
        Evolution(generator=0)  # type: ignore[arg-type]
    options: list[dict[str, Any]] = [
        {"slots": 3},
        {"memory_budget": "1MiB"},
        {"window": 2},
        {"backward_hook": metaoptim.zero_nan_hook},
        {"backend": "inductor"},
        {"hvp": "mixed"},
        {"strategy": "full_tape"},
    ]
    for option in options:
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.*an evolution gradient.*leave it out"):
            SlidingWindow(gradient=Evolution(), **option)
    with pytest.raises(ValueError, match=r"offline=True with Evolution\(persistent=True\)"):
        SlidingWindow(offline=True, gradient=Evolution(persistent=True))
    raw, net = torch.tensor(-2.0, requires_grad=True), Quadratic()
    inner = metaoptim.MetaSGD([net], lr=raw.exp())
    with SlidingWindow(gradient=Evolution(persistent=True)):
        for _ in range(2):
            with pytest.raises(metaoptim.WindowError, match="make it a leaf"):
                inner.step(net())

    def compiled(net: Quadratic) -> Tensor:
        with SlidingWindow(gradient=Evolution()):
            metaoptim.MetaSGD([net], lr=0.1).step(net())
            return net()

    with pytest.raises(metaoptim.WindowError, match=r"gradient=Evolution.*take the decorator off"):
        metaoptim.compile(compiled, backend="eager")(net)


def test_runs_that_diverge_are_told_of() -> None:
    torch.manual_seed(0)
    net, lr = nn.Linear(2, 1), torch.tensor(0.05, requires_grad=True)
    x = 1e3 * torch.randn(8, 2)
    evolution = metaoptim.Evolution(sigma=0.5, pairs=2, generator=torch.Generator().manual_seed(0))
    with metaoptim.SlidingWindow(gradient=evolution):
        inner = metaoptim.MetaSGD([net], lr=1e-6 * lr)
        for _ in range(80):
            inner.step(net(x).pow(2).mean())
        loss = net(x).square().mean()
        with pytest.warns(UserWarning, match=r"not finite: with sigma=0.5 .* smaller sigma"):
            loss.backward()
