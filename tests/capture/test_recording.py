"""What a recording knows of tensors: of these, not of others that get their place, and only as long as they live."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import full_tape, leaf, mlp
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine.inputs import Inputs

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

# -- addresses that are used again ------------------------------------------------------------------------------------


def _metric(window: Any) -> tuple[Tensor | None, ...]:
    """A metric whose operators write into memory, of a tensor whose graph is gone."""
    net, w = mlp(), leaf(0.3)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    metric = (w * 2).exp().expand(2).clone()
    metric.sum().backward()
    with window(offline=True):
        for _ in range(20):
            torch.isclose(metric.detach(), metric.detach())
            inner.step(net(X).square().mean())
        net(X).square().mean().backward()
    return tuple(p.grad for p in net.parameters())


def _log(window: Any) -> tuple[Tensor | None, ...]:
    """A line that logs, before losses of two networks whose values the second reads after the first's step."""
    nets = mlp(0), mlp(1)
    first, second = (metaoptim.MetaSGD([net], lr=0.1) for net in nets)
    with window(offline=True):
        for _ in range(4):
            for _ in range(3):
                (nets[0](X).detach() * 2).add_(1)
            kept, out = [nets[1](X) for _ in range(6)], nets[0](X)
            first.step(out.square().mean())
            second.step(torch.stack([(k * k).mean() for k in kept]).mean())
        (nets[0](X) * nets[1](X)).mean().backward()
    return tuple(p.grad for net in nets for p in net.parameters())


def _retained(window: Any) -> tuple[Tensor | None, ...]:
    """A tensor that retains its gradient, born where one was changed in place."""
    net, w = mlp(), leaf(0.3)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with window(offline=True):
        for _ in range(5):
            (w * 2).add_(1)
            scale = w.exp()
            scale.retain_grad()
            inner.step((net(X) * scale).square().mean())
        net(X).square().mean().backward()
    return (w.grad, *(p.grad for p in net.parameters()))


def _set_apart(window: Any) -> tuple[Tensor | None, ...]:
    """A tensor changed in place, born where one had retained its gradient."""
    net, w = mlp(), leaf(0.3)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with window(offline=True):
        for _ in range(5):
            w.exp().retain_grad()
            scale = w * 2
            scale.add_(1)
            inner.step((net(X) * scale).square().mean())
        net(X).square().mean().backward()
    return (w.grad, *(p.grad for p in net.parameters()))


@pytest.mark.parametrize("of", [_metric, _log, _retained, _set_apart])
def test_memory_that_takes_the_place_of_other_memory(of: Callable) -> None:
    for found, expected in zip(of(metaoptim.SlidingWindow), of(full_tape), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_holds_of_another_kind_outlive_the_first() -> None:
    """What is held of memory is copied before a write, also when what was held of it first is gone."""
    inputs, base = Inputs(lambda t: False), torch.randn(6, dtype=torch.complex128)
    first = inputs.hold(base)
    second = inputs.hold(torch.view_as_real(base))
    expected = torch.view_as_real(base).clone()
    del first
    inputs.hold(base)
    inputs.preserve([base])
    base.zero_()
    assert torch.equal(second.get(), expected)


# -- what dies is forgotten -------------------------------------------------------------------------------------------


def _objects(steps: int, between: Callable[[nn.Module], Any]) -> int:
    """Bytes of Python objects after so many steps with ``between`` before each."""
    net = mlp()
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, slots=3):
        tracemalloc.start()
        for _ in range(steps):
            between(net)
            inner.step(net(X).square().mean())
        gc.collect()
        found, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return found


def _acted(net: nn.Module, rate: Tensor) -> None:
    with torch.no_grad():
        for _ in range(4):
            (net(torch.randn(1, 3)) * rate).sum()


def _normalized(net: nn.Module, _: Tensor) -> None:
    F.batch_norm(net(X), torch.randn(2), torch.ones(2))


def _carried(net: nn.Module, state: list[Tensor]) -> None:
    with torch.no_grad():  # of all that was learnt so far
        state[0] = 0.5 * state[0] + leaf(0.1)


@pytest.mark.parametrize("kind", [_acted, _normalized, _carried])
def test_what_comes_between_steps_leaves_nothing(kind: Callable) -> None:
    rate = [leaf()] if kind is _carried else leaf()
    _objects(4, lambda net: kind(net, rate))
    few, many = (_objects(n, lambda net: kind(net, rate)) for n in (30, 70))
    assert (many - few) / 40 < 1500  # a step itself takes some 600


def _written(module: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 2)
    out[:, 0] = module(x)[:, 0]
    return out


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net(x),
        lambda net, x: F.relu_(net(x)),
        lambda net, x: F.dropout(net(x), 0.2, inplace=True),
        _written,
    ],
)
def test_forwards_that_are_dropped_keep_nothing_until_the_next_step(forward: Callable) -> None:
    net = nn.Linear(100, 2)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    batch = 1000 * 100 * 8
    with metaoptim.SlidingWindow(offline=True, slots=3):
        inner.step(forward(net, torch.randn(1000, 100)).square().mean())
        with AllocatorMeter() as meter:
            for _ in range(40):
                float(forward(net, torch.randn(1000, 100)).mean().detach())
    assert meter.peak < 10 * batch


def test_windows_in_a_row_leave_nothing() -> None:
    net, rate = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 1)),
        leaf(-2.0),
    )

    def windows(count: int) -> int:
        for _ in range(count):
            window()
        gc.collect()
        return len(gc.get_objects())

    def window() -> None:
        inner = metaoptim.MetaAdam([net], lr=rate.exp())
        with metaoptim.SlidingWindow(offline=True):
            for _ in range(3):
                inner.step(net(X).square().mean())
            net(X).mean().backward()

    assert windows(5) + 100 > windows(20)


def test_a_window_that_is_given_its_slots_counts_nothing() -> None:
    net = mlp()
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, slots=3) as window:
        for t in range(5):
            inner.step(net(torch.randn(5, 3)).square().mean() * leaf(0.1 * t))
        session: Any = window._session
        ledger = session.view.inputs.ledger
        assert not ledger.bytes and not ledger._watches


@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_tensors_written_by_lists_are_known_to_be_written(strategy: str) -> None:
    """Below a dispatch mode torch moves no versions of them, so autograd would not see that what it saved is gone."""
    net, scale = nn.Linear(3, 1), torch.ones(4, 1)
    inner, weight = metaoptim.MetaSGD([net], lr=0.1), torch.tensor(2.0, requires_grad=True)
    with metaoptim.SlidingWindow(offline=True, strategy=strategy):
        inner.step((net(torch.randn(4, 3)) * weight).square().sum())
        outer = (net(torch.randn(4, 3)) * scale * weight).sum()
        before = scale._version
        torch._foreach_mul_([scale], 5.0)
        assert scale._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outer.backward()
