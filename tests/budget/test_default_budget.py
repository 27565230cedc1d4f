"""What is kept where nobody says: every state while there is room, and what is decided only when it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from budget_cases import Case
from metaoptim.compiler.lower.library import library
from metaoptim.runtime.budget import amounts, peaks
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine.engine import Engine

STATE = 8 * (20 * 10 + 10)


def loss_through(steps: int, step: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """An outer loss after so many steps of a network with 1,680 bytes of parameters, and its learning rate."""
    torch.manual_seed(3)
    net, lr = nn.Linear(20, 10), torch.tensor(0.03, requires_grad=True)
    xs = torch.randn(steps, 4, 20)
    inner = metaoptim.MetaSGD([net], lr=lr)
    with metaoptim.SlidingWindow(**options):
        for t in range(steps):
            inner.step((net(xs[t]).sin() * (1 + xs[t, :, :10])).mean())
            if step is not None:
                step(net, t)
        return net(xs[0]).square().mean(), lr


def gradient(steps: int, step: Any = None, **options: Any) -> Tensor:
    loss, lr = loss_through(steps, step, **options)
    loss.backward()
    assert lr.grad is not None
    return lr.grad


def free(monkeypatch: pytest.MonkeyPatch, bytes_: int | None) -> None:
    monkeypatch.setattr(amounts, "free_bytes", lambda device: bytes_)


def test_a_window_takes_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradient(60)
    free(monkeypatch, 2 * 40 * STATE)
    assert torch.equal(gradient(25), gradient(25, slots=25))  # no warning
    with AllocatorMeter() as meter, pytest.warns(UserWarning, match="half of the memory that was free"):
        found = gradient(60)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert 10 * STATE < meter.peak <= 40 * STATE + 8 * 60 * 4 * 20 + 8192  # and the caller's data


def test_nothing_is_refused_that_nobody_has_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradient(30)
    free(monkeypatch, 2 * STATE)
    with pytest.warns(UserWarning, match="some are given up"):
        found = gradient(30)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    free(monkeypatch, None)  # a device that does not tell
    assert torch.equal(gradient(30), expected)


def test_a_sliding_window_holds_few_states_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many it has had in all: no warning, and every state of its window kept."""
    free(monkeypatch, 2 * 40 * STATE)
    found = gradient(300, window=4)
    assert torch.equal(found, gradient(300, window=4, slots=300))


@pytest.mark.parametrize("share", [3, 0.2])
def test_a_compiled_function_takes_half_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    case = Case(5, steps=40, dominant="state")
    expected = case.loop(False)[0]
    report = case.compiled().explain(*case.make())
    assert report.plan == "all states" and report.memory_budget is None
    needed = report.predicted_peak_bytes
    free(monkeypatch, int(2 * share * needed))
    if share > 1:
        assert case.compiled().explain(*case.make()).plan == "all states"
        return
    fn = case.compiled()
    report = fn.explain(*case.make())
    assert report.plan == "scheduled" and report.memory_budget == int(share * needed)
    assert report.predicted_peak_bytes <= report.memory_budget and report.extra_forwards > 0
    cost = metaoptim.plan(case.compiled())(*case.make())
    assert (cost.plan, cost.slots, cost.memory_budget) == ("scheduled", report.slots, report.memory_budget)
    net, log_lr, xs, ys = case.make()
    with pytest.warns(UserWarning, match="half of the memory that was free"):
        fn(net, log_lr, xs, ys).backward()
    torch.testing.assert_close(log_lr.grad, expected["log_lr"], rtol=1e-11, atol=0)
    free(monkeypatch, 2)
    report = case.compiled().explain(*case.make())
    assert report.slots == 1 and report.memory_budget == report.minimum_budget > 1


def test_a_roomy_budget_is_planned_when_half_of_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    real = peaks._peaks
    monkeypatch.setattr(peaks, "_known", type(peaks._known)())
    monkeypatch.setattr(peaks, "_peaks", lambda *a: planned.append(1) or real(*a))
    limits: list[int] = []
    limit = Engine.limit
    monkeypatch.setattr(Engine, "limit", lambda self, n: limits.append(len(self.store)) or limit(self, n))
    expected = gradient(100, slots=100)
    for _ in range(2):  # what was foreseen is remembered
        limits.clear()
        with AllocatorMeter() as meter:
            loss, lr = loss_through(100, memory_budget=80 * STATE)
            loss.backward()
        torch.testing.assert_close(lr.grad, expected, rtol=1e-12, atol=0)
        assert meter.peak <= 80 * STATE + 8 * 100 * 4 * 20 + 8192
        assert len(planned) == 1
        assert 10 < limits[0] < 45 < max(limits)  # nothing was given up while there was room
    gradient(15, memory_budget=80 * STATE)
    assert len(planned) == 1


def test_values_written_into_parameters_count() -> None:
    """A replay writes them again, so the window keeps them all."""

    def clip(net: nn.Module, t: int) -> None:
        if t < 90:
            with torch.no_grad():
                for p in net.parameters():
                    p.clamp_(-0.2, 0.2)

    expected = gradient(100, clip)
    with pytest.raises(metaoptim.BudgetError, match="values written into parameters") as refused:
        gradient(100, clip, memory_budget=30 * STATE)
    assert refused.value.minimum > 30 * STATE
    with AllocatorMeter() as meter:
        found = gradient(100, clip, memory_budget=130 * STATE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert 90 * STATE < meter.peak <= 130 * STATE + 8 * 100 * 4 * 20 + 8192


def test_steps_whose_shapes_depend_on_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(explain: bool = False, **options: Any) -> Tensor | None:
        library.clear()
        torch.manual_seed(2)
        net, lr, xs = nn.Linear(4, 2), torch.tensor(0.05, requires_grad=True), torch.randn(12, 5, 4)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(**options) as window:
            for x in xs:
                y = net(x)
                inner.step(y[y > 0].square().sum() + y.sum())
            if explain:
                assert window.explain().horizon == 12
            net(xs[0]).square().sum().backward()
        return lr.grad

    expected = run(slots=12)
    assert expected is not None and float(expected.abs()) > 1e-3
    with pytest.raises(metaoptim.WindowError, match="only once it has been run"):
        run(True, slots=12)
    with AllocatorMeter():  # nothing can be measured then
        assert torch.equal(run(True, memory_budget=20_000), expected)
    assert torch.equal(run(True), expected)
    free(monkeypatch, 3000)
    with pytest.warns(UserWarning, match="some are given up"):
        torch.testing.assert_close(run(True), expected, rtol=1e-12, atol=0)
