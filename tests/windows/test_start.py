"""Inner loops that begin at values computed from meta-parameters: `MetaOptimizer.start`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import leaf, mlp

torch.manual_seed(5)
X, Y = torch.randn(6, 3), torch.randn(6, 2)
STEPS = 3


def metas() -> dict[str, Tensor]:
    torch.manual_seed(9)
    return {
        "w": torch.randn(2, 4, requires_grad=True),
        "b": torch.randn(2, requires_grad=True),
        "lr": leaf(0.1),
    }


def by_hand(offline: bool, middle: bool, window: int | None = None) -> list[Tensor | None]:
    """Gradients by the tape: the head begins at 2w + mean(w), and in the middle its bias at sin(b) plus itself."""
    net, m = mlp(), metas()

    def cut(theta: dict) -> dict:
        return {k: v.detach().requires_grad_() for k, v in theta.items()}

    theta: dict[str, Tensor] = dict(net.named_parameters())
    if not offline:
        theta = cut(theta)
    theta["2.weight"] = 2 * m["w"] + m["w"].mean()

    def loss() -> Tensor:
        return F.mse_loss(torch.func.functional_call(net, theta, (X,)), Y)

    for t in range(2 * STEPS if middle else STEPS):
        if window is not None and t == STEPS - window:
            theta = cut(theta)
        if middle and t == STEPS:
            theta["2.bias"] = m["b"].sin() + theta["2.bias"]
        grads = torch.autograd.grad(loss(), list(theta.values()), create_graph=True)
        theta = {k: v - m["lr"] * g for (k, v), g in zip(theta.items(), grads, strict=True)}
    loss().backward()
    return [p.grad for p in (*net.parameters(), *m.values())]


def by_window(form: str, offline: bool, middle: bool, **options: Any) -> list[Tensor | None]:
    net, m = mlp(), metas()
    inner = metaoptim.MetaSGD([net], lr=m["lr"])

    def step() -> None:
        inner.step(F.mse_loss(net(X), Y))

    def whole(net: nn.Module, m: dict[str, Tensor]) -> Tensor:
        with metaoptim.SlidingWindow(offline=offline, **options):
            inner.start({"2.weight": 2 * m["w"] + m["w"].mean()})
            for _ in range(STEPS):
                step()
            if middle:
                inner.start({net[2].bias: m["b"].sin() + net[2].bias})
                for _ in range(STEPS):
                    step()
            return F.mse_loss(net(X), Y)

    if form == "B":
        step = metaoptim.compile(step, backend="eager")
    if form == "C":
        whole = metaoptim.compile(whole, backend="eager")
    before = [p.detach().clone() for p in net.parameters()]
    whole(net, m).backward()
    assert all(torch.equal(p, q) == offline for p, q in zip(net.parameters(), before, strict=True))
    return [p.grad for p in (*net.parameters(), *m.values())]


def equal(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for g, e in zip(got, expected, strict=True):
        if g is None or e is None:
            assert all(t is None or not t.any() for t in (g, e))
        else:
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
@pytest.mark.parametrize("middle", [False, True], ids=["first", "middle"])
@pytest.mark.parametrize("form", ["A", "B", "C", "tape"])
def test_the_gradient_reaches_what_the_values_come_from(form: str, middle: bool, offline: bool) -> None:
    expected = by_hand(offline, middle)
    assert expected[4].abs().max() > 1e-2 and (expected[5] is not None) is middle
    for options in (
        ({"strategy": "full_tape"},) if form == "tape" else ({}, {"slots": 2}, {"window": 2 * STEPS})
    ):
        equal(by_window(form, offline, middle, **options), expected)


@pytest.mark.parametrize("form", ["A", "B", "C"])
def test_truncation_cuts_it_off(form: str) -> None:
    for window in (STEPS - 1, STEPS):
        equal(
            by_window(form, False, False, window=window),
            by_hand(False, False, window if window < STEPS else None),
        )


def test_several_optimizers_and_a_step_that_was_captured_with_it() -> None:
    def run(strategy: str, form: str) -> list[Tensor]:
        a, b, m = mlp(0), mlp(1), metas()
        first, second = metaoptim.MetaAdam([a], lr=m["lr"]), metaoptim.MetaSGD([b], lr=0.1)

        def begin() -> None:
            first.start({a[2].weight: m["w"] * 2})
            first.step(F.mse_loss(a(X), b(X)))

        if form == "B":
            begin = metaoptim.compile(begin, backend="eager")

        def whole(a: nn.Module, b: nn.Module, m: dict[str, Tensor]) -> Tensor:
            with metaoptim.SlidingWindow(offline=True, strategy=strategy):
                for _ in range(2):
                    begin()
                    second.start({"2.bias": m["b"] * a[2].weight.sum()})
                    one, two = F.mse_loss(a(X), b(X)), (a(X) * b(X)).mean()
                    first.step(one)
                    second.step(two)
                return F.mse_loss(a(X), b(X) + Y)

        if form == "C":
            whole = metaoptim.compile(whole, backend="eager")
        whole(a, b, m).backward()
        return [p.grad for p in (*a.parameters(), *b.parameters(), *m.values())]

    expected = run("full_tape", "A")
    for form in "ABC":
        equal(run("auto", form), expected)


def test_bad_values() -> None:
    net, other = mlp(), mlp()
    inner = metaoptim.MetaSGD([net, other])
    with pytest.raises(metaoptim.WindowError, match="outside a window"):
        inner.start({"2.bias": Y[0]})
    for values, error, match in (
        ({"2.bias": Y[0]}, KeyError, "more than one parameter"),
        ({"3.bias": Y[0]}, KeyError, "no parameter"),
        ({net[2].bias: X[0]}, ValueError, r"got \(3,\) of torch.float64, expected a tensor of shape \(2,\)"),
        ({net[2].bias: 1.0}, ValueError, "got float"),
    ):
        with pytest.raises(error, match=match), metaoptim.SlidingWindow():
            inner.start(values)
    for strategy in ("auto", "full_tape"):
        with (
            pytest.raises(metaoptim.WindowError, match=r"inner\.start\(\{name: values\}\)"),
            metaoptim.SlidingWindow(strategy=strategy),
        ):
            net[2].bias.copy_(leaf() * Y[0])
