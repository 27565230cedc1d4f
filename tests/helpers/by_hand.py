"""Inner loops with transforms and schedules: by hand on autograd's tape, and in each form of metaoptim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim
from metaoptim import MetaOptimizer, MetaSGD

STEPS = 9
Metas: TypeAlias = dict[str, Tensor]
Grads: TypeAlias = dict[str, Tensor]
#: (network, metas) -> the inner optimizer
Make: TypeAlias = Callable[[nn.Module, Metas], MetaOptimizer]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    xs, ys = (torch.randn(STEPS + 1, 6, n, generator=g, dtype=torch.float64) for n in (3, 2))
    return xs, 2 * ys


def leaves(values: dict[str, Any]) -> Metas:
    return {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in values.items()}


def _gradients(outer: Tensor, net: nn.Module, metas: Metas) -> dict[str, Tensor]:
    wanted = {**dict(net.named_parameters()), **metas}
    return dict(zip(wanted, torch.autograd.grad(outer, list(wanted.values())), strict=True))


def by_hand(
    values: dict[str, Any],
    rate: Callable[[int, Metas], Any],
    change: Callable[[int, Grads, Grads, Metas], Grads] = lambda t, grads, theta, metas: grads,
    momentum: float = 0.0,
) -> dict[str, Tensor]:
    """Gradients of a loop of gradient descent with learning rate ``rate(t)`` and ``change``d inner gradients."""
    net, metas, (xs, ys) = network(), leaves(values), data()
    theta, buffers = dict(net.named_parameters()), dict[str, Tensor]()
    for t in range(STEPS):
        loss = (functional_call(net, theta, (xs[t],)) - ys[t]).square().mean()
        grads = dict(
            zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True), strict=True)
        )
        grads = change(t, grads, theta, metas)
        buffers = {n: momentum * buffers[n] + g if n in buffers else g for n, g in grads.items()}
        theta = {n: p - rate(t, metas) * buffers[n] for n, p in theta.items()}
    outer = (functional_call(net, theta, (xs[STEPS],)) - ys[STEPS]).square().mean()
    return _gradients(outer, net, metas)


def in_window(make: Make, values: dict[str, Any], **window: Any) -> dict[str, Tensor]:
    net, metas, (xs, ys) = network(), leaves(values), data()
    inner = make(net, metas)
    with metaoptim.SlidingWindow(offline=True, **window):
        for t in range(STEPS):
            inner.step((net(xs[t]) - ys[t]).square().mean())
        outer = (net(xs[STEPS]) - ys[STEPS]).square().mean()
    assert not inner.state, "an offline window has left a state"
    return _gradients(outer, net, metas)


def in_function(make: Make, values: dict[str, Any], backend: str = "eager") -> dict[str, Tensor]:
    """In a compiled function, whose loop is captured by four of its iterations."""
    net, metas, (xs, ys) = network(), leaves(values), data()

    @metaoptim.compile(backend=backend)
    def meta_loss(net: nn.Module, metas: Metas, xs: Tensor, ys: Tensor) -> Tensor:
        inner = make(net, metas)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x, y in window.scan(xs[:STEPS], ys[:STEPS]):
                inner.step((net(x) - y).square().mean())
            return (net(xs[STEPS]) - ys[STEPS]).square().mean()

    return _gradients(meta_loss(net, metas, xs, ys), net, metas)


def in_steps(make: Make, values: dict[str, Any], backend: str = "eager") -> dict[str, Tensor]:
    """By a compiled step, with ordinary ones among its calls."""
    net, metas, (xs, ys) = network(), leaves(values), data()
    inner = make(net, metas)

    def plain(x: Tensor, y: Tensor) -> None:
        inner.step((net(x) - y).square().mean())

    step = metaoptim.compile(backend=backend)(plain)
    with metaoptim.SlidingWindow(offline=True, slots=2):
        for t in range(STEPS):
            (plain if t in (3, 6) else step)(xs[t], ys[t])
        outer = (net(xs[STEPS]) - ys[STEPS]).square().mean()
    return _gradients(outer, net, metas)


FORMS: dict[str, Callable[[Make, dict[str, Any]], dict[str, Tensor]]] = {
    "window": in_window,
    "slots": lambda make, values: in_window(make, values, slots=2),
    "full tape": lambda make, values: in_window(make, values, strategy="full_tape"),
    "function": in_function,
    "function, aot": lambda make, values: in_function(make, values, "aot_eager"),
    "steps": in_steps,
}


def equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to rounding, and nothing is zero that was asked for."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert float(value.abs().max()) > 1e-7, f"{name}: the case has no gradient"
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def descent(**options: Any) -> Make:
    """Gradient descent whose options may be functions of the metas."""

    def make(net: nn.Module, metas: Metas) -> MetaOptimizer:
        given: dict[str, Any] = {k: v(metas) if callable(v) else v for k, v in options.items()}
        return MetaSGD([net], **given)

    return make
