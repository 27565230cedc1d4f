"""Under a memory budget an ordinary window counts whatever it holds for its steps, however it has come by it."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine.engine import Engine
from metaoptim.runtime.engine.inputs import checksum

Loop = Callable[[nn.Module, Tensor, dict[str, Any]], int]


def network(width: int = 20) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def run(loop: Loop, budget: int | None) -> tuple[Tensor, int]:
    """The gradient, and the peak beyond what the loop says is the caller's own."""
    torch.manual_seed(0)
    net, lr = network(), torch.tensor(0.05, requires_grad=True)
    options = {"memory_budget": "1GiB" if budget is None else budget}
    gc.collect()
    meter = AllocatorMeter()
    with meter if budget is not None else nullcontext():
        own = loop(net, lr, options)
    assert lr.grad is not None and float(lr.grad.abs()) > 0
    return lr.grad, meter.peak - own if budget is not None else 0


def refused(loop: Loop, budget: int) -> int | None:
    """The minimum that is named, if the budget is too small."""
    try:
        run(loop, budget)
    except metaoptim.BudgetError as error:
        assert error.minimum > budget
        return error.minimum
    return None


def keeps_to_its_budget(loop: Loop, factors: tuple[float, ...] = (1, 1.2, 2)) -> int:
    """At the smallest budget that is named, and at multiples of it; that budget."""
    expected, _ = run(loop, None)
    low, high = 1000, 8_000_000
    while high > 1.3 * low:
        middle = int((low * high) ** 0.5)
        low, high = (low, middle) if refused(loop, middle) is None else (middle, high)
    minimum = low
    while (named := refused(loop, minimum)) is not None:  # each is the minimum up to one step
        minimum = named
    for factor in factors:
        budget = int(factor * minimum)
        found, peak = run(loop, budget)
        assert peak <= budget, (peak, budget, factor)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    return minimum


def test_copies_of_a_buffer_that_is_overwritten_for_every_step() -> None:
    xs = torch.randn(40, 50, 20)

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any], evaluated: bool = False) -> int:
        buffer = torch.empty(50, 20)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True, **options):
            for x in xs:
                buffer.copy_(x)
                inner.step(net(buffer).sin().mean())
                if evaluated:
                    net(buffer[:2]).square().mean()
            buffer.zero_()
            net(xs[0, :3]).square().mean().backward()
        return buffer.nbytes

    minimum = keeps_to_its_budget(loop)
    assert minimum > 39 * 50 * 20 * 8  # of which it has the last one in the loop's buffer
    # copies that nothing holds any more do not count
    evaluated = keeps_to_its_budget(lambda *args: loop(*args, evaluated=True))
    assert evaluated < minimum + 50 * 20 * 8


def test_a_large_tensor_that_is_changed_in_between_is_still_the_users() -> None:
    """Only what steps have read of it is copied, and what they read afterwards is not the window's."""

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        xs = torch.ones(20_000, 20)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(40):
                if t % 10 == 5:
                    xs.mul_(0.9)
                inner.step(net(xs[t : t + 3]).sin().mean())
            net(xs[:3]).square().mean().backward()
        return xs.nbytes

    assert keeps_to_its_budget(loop) < 500_000


@pytest.mark.parametrize("kept", [8, 25])
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("views", [False, True])
def test_batches_that_the_user_holds_for_long_and_then_drops(kept: int, sliding: bool, views: bool) -> None:
    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        held: deque[Tensor] = deque(maxlen=kept)
        options |= {"window": 20} if sliding else {}
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(**options):
            for _ in range(60):
                held.append(torch.randn(50, 20))
                inner.step(net(held[-1][10:] if views else held[-1]).sin().mean())
            net(held[0]).square().mean().backward()
        return kept * 50 * 20 * 8

    keeps_to_its_budget(loop, (1.2, 2) if sliding else (1, 1.2, 2))


@pytest.mark.parametrize("inside", [True, False])
def test_batches_that_are_dropped_after_the_last_step(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are given up when the backward begins: when they are dropped nobody can know."""
    given_up: list[int] = []
    limit = Engine.limit

    def noted(self: Engine, slots: int) -> None:
        before = len(self.store)
        limit(self, slots)
        given_up.append(before - len(self.store))

    monkeypatch.setattr(Engine, "limit", noted)

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        held = [torch.randn(50, 20) for _ in range(40)]
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(40):
                inner.step(net(held[t]).sin().mean())
            outer = net(held[0][:3]).square().mean()
            given_up.clear()
            held.clear()
            if inside:
                outer.backward()
        if not inside:
            outer.backward()
        return 0

    expected, _ = run(loop, None)
    for budget in (500_000, 300_000):  # for the smaller one it is too late
        found, _ = run(loop, budget)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert given_up[0] > 10


class Quantiles(metaoptim.MetaSGD):
    """State that is a view: of a sorted gradient one entry."""

    @staticmethod
    def init_state(param: Tensor, hyper: Any) -> dict:
        return {}

    @staticmethod
    def update(param: Tensor, grad: Tensor, state: dict, hyper: Any) -> tuple[Tensor, dict]:
        new = {f"q{k}": grad.abs().flatten().sort().values[k] for k in range(8)}
        q = new["q7"] if "q7" not in state else 0.9 * new["q7"] + 0.1 * state["q7"]
        return param - hyper["lr"] * grad / (1 + q), new


@pytest.mark.parametrize("budget", [500_000, 1_500_000, 2_500_000])
def test_state_that_is_a_view_of_something_larger(budget: int) -> None:
    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        inner, x = Quantiles([net], lr=lr), torch.ones(4, 20)
        with metaoptim.SlidingWindow(**options):
            for _ in range(60):
                inner.step(net(x).sin().mean())
            net(x).square().mean().backward()
        return 0

    expected, _ = run(loop, None)
    found, peak = run(loop, budget)
    assert budget // 4 < peak <= budget
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("what", ["record_grad_tape", "pickup_step", "pickup at the end"])
def test_copies_made_for_the_user(what: str) -> None:
    x = torch.randn(4, 20)

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        options |= {"record_grad_tape": True} if what == "record_grad_tape" else {}
        options |= {"pickup_step": 3 if what == "pickup_step" else 23} if "pickup" in what else {}
        inner = metaoptim.MetaAdam([net], lr=lr)
        with metaoptim.SlidingWindow(**options):
            for _ in range(24):
                inner.step(net(x).sin().mean())
            net(x).square().mean().backward()
        return 0

    keeps_to_its_budget(loop)


def test_frozen_parameters_that_are_overwritten() -> None:
    x = torch.randn(4, 20)

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        frozen = nn.Linear(200, 200).requires_grad_(False)
        gc.collect()
        inner = metaoptim.MetaSGD([nn.ModuleList([net, frozen])], lr=lr)
        with metaoptim.SlidingWindow(**options):
            for _ in range(20):
                inner.step(net(x).sin().mean())
                with torch.no_grad():
                    frozen.weight.mul_(0.9)
            net(x).square().mean().backward()
        return 201 * 200 * 8

    assert keeps_to_its_budget(loop) > 200 * 200 * 8


def test_a_target_network_that_follows() -> None:
    """Frozen, read by every step, and overwritten between them: its values are copied."""
    x = torch.randn(4, 20)

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        target = network().requires_grad_(False)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True, **options):
            for _ in range(40):
                inner.step((net(x) - target(x)).square().mean())
                with torch.no_grad():
                    for p, q in zip(target.parameters(), net.parameters(), strict=True):
                        p.lerp_(q, 0.1)
            net(x).square().mean().backward()
        return sum(p.nbytes for p in target.parameters())

    keeps_to_its_budget(loop)


@pytest.mark.parametrize("after", [False, True])
def test_values_written_into_parameters(after: bool) -> None:
    """Between steps, and after the last one."""
    x = torch.randn(4, 20)

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        inner, outer = metaoptim.MetaSGD([net], lr=lr), torch.zeros(())
        with metaoptim.SlidingWindow(**options):
            for t in range(40):
                if t < 5 or not after:
                    inner.step(net(x).sin().mean())
                if t > 5 or not after:
                    with torch.no_grad():
                        for p in net.parameters():
                            p.mul_(0.99)
                        net(x)
                if t == 4:
                    outer = outer + sum(p.sum() for p in net.parameters())  # as they are here
            if not after:
                inner.step(net(x).sin().mean())
            (outer + net(x).square().mean()).backward()
        return 0

    keeps_to_its_budget(loop)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_backward_hook_takes(compiled: bool) -> None:
    """It is not called to find out: as often as there are gradients, whatever the budget."""
    x, calls = torch.randn(3, 80), [0]

    def hook(grad: Tensor) -> Tensor:
        calls[0] += 1
        return (grad * 2 + grad * 3 + (grad.sin() * grad.cos() + grad * 7)) * 0.05

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        calls[0] = 0
        net = nn.Linear(80, 80)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(backward_hook=hook, **options):
            for _ in range(10):
                inner.step(net(x).sin().mean())
            net(x).sum().backward()
        assert calls[0] == 2 * 10
        return sum(p.nbytes for p in net.parameters())

    def compiled_loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        xs, net = torch.ones(10, 3, 80), nn.Linear(80, 80)

        @metaoptim.compile(backend="eager", **options)
        def meta_loss(net: nn.Module, lr: Tensor, xs: Tensor) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=lr)
            with metaoptim.SlidingWindow(offline=True, backward_hook=hook) as window:
                for x in window.scan(xs):
                    inner.step(net(x).sin().mean())
                return net(xs[0]).sum()

        calls[0] = 0
        meta_loss(net, lr, xs).backward()
        assert calls[0] == 2 * 10
        lr.grad = None
        own = sum(p.nbytes for p in net.parameters())
        net.zero_grad()
        meta_loss(net, lr, xs).backward()
        return own + xs.nbytes

    keeps_to_its_budget(compiled_loop if compiled else loop)


def test_sparse_inputs() -> None:
    a, x = torch.eye(4).to_sparse(), torch.randn(4, 20)

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True, **options):
            for _ in range(10):
                inner.step(torch.sparse.mm(a, net(x)).sin().mean())
            net(x).square().mean().backward()
        return 0

    keeps_to_its_budget(loop)


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(4, 20).expand(1000, 4, 20),
        torch.randn(200, 300).t(),
        torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last),
    ],
    ids=["expanded", "transposed", "channels last"],
)
def test_digests_of_what_is_dense_in_memory_take_none(value: Tensor) -> None:
    with AllocatorMeter() as meter:
        before = checksum(value)
    assert meter.peak == 0
    last = value[tuple(-1 for _ in value.shape)]
    last.add_(1)
    assert checksum(value) != before
    last.sub_(1)


def test_gradients_of_what_single_steps_have_read() -> None:
    """A copy and a gradient of each: they are all there at the end of the sweep."""

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        learnt = [torch.full((50, 20), 0.1 + t / 90, requires_grad=True) for t in range(40)]
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True, **options):
            for x in learnt:
                inner.step(net(x).sin().mean())
            net(torch.ones(3, 20)).square().mean().backward()
        assert all(x.grad is not None for x in learnt)
        return sum(x.nbytes for x in learnt)  # themselves

    assert keeps_to_its_budget(loop) > 40 * 2 * 50 * 20 * 8


def test_losses_of_every_step_do_not_wait_for_one_sweep() -> None:
    weights = [torch.randn(t.shape) for t in network().parameters()]

    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        inner, total = metaoptim.MetaSGD([net], lr=lr), torch.zeros(())
        x = torch.linspace(-1, 2, 80).view(4, 20)
        with metaoptim.SlidingWindow(**options):
            for t in range(60):
                inner.step(net(x).sin().mean())
                total = total + sum(
                    (1 + t) * (p * w).sum() for p, w in zip(net.parameters(), weights, strict=True)
                )
            total.backward()
        return sum(w.nbytes for w in weights)  # products, on their way into a loss

    minimum = keeps_to_its_budget(loop)
    assert minimum < 20 * sum(w.nbytes for w in weights)  # of 60 cotangents, a few wait
    torch.manual_seed(0)
    net, lr = network(), torch.tensor(0.05, requires_grad=True)
    loop(net, lr, {"strategy": "full_tape"})
    found, _ = run(loop, minimum)
    torch.testing.assert_close(found, lr.grad, rtol=1e-9, atol=0)


@pytest.mark.parametrize("optimizer", [metaoptim.MetaSGD, metaoptim.MetaAdam])
def test_a_sliding_window_sweeps_beside_the_cotangents_it_was_given(optimizer: Any) -> None:
    def loop(net: nn.Module, lr: Tensor, options: dict[str, Any]) -> int:
        inner, x = optimizer([net], lr=lr), torch.linspace(-1, 2, 80).view(4, 20)
        with metaoptim.SlidingWindow(window=5, **options):
            for _ in range(60):
                inner.step(net(x).sin().mean())
            net(x).sum().backward()
        return x.nbytes

    keeps_to_its_budget(loop)
