"""window.explain(): what has been recorded, what its backward costs, who gets a gradient; and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter

T = 24
XS, YS = torch.linspace(-1, 2, T * 6 * 5).view(T, 6, 5), torch.linspace(1, -1, T * 6 * 3).view(T, 6, 3)


class Loop:
    """An inner loop with a rate, weights of which every step reads one, and something only read detached."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.raw = torch.tensor(-2.0, requires_grad=True)
        self.weights = [torch.tensor(1 + t / 9, requires_grad=True) for t in range(T)]
        self.lost = torch.tensor(1.5, requires_grad=True)
        self.inner = metaoptim.MetaAdam([self.net], lr=self.raw.exp())

    def run(self) -> None:
        for t in range(T):
            self.inner.step(self.weights[t] * self.lost.detach() * F.mse_loss(self.net(XS[t]), YS[t]))

    def outer(self) -> Tensor:
        return F.mse_loss(self.net(XS[0]), YS[1])

    @property
    def learnt(self) -> list[Tensor]:
        return [self.raw, *self.weights, *self.net.parameters()]


pytestmark = pytest.mark.filterwarnings("ignore:.*requires grad, but reaches the inner loss only")


@pytest.mark.parametrize(
    "options", [{}, {"slots": 3}, {"memory_budget": "20KiB"}, {"slots": 2, "offload": "disk"}]
)
def test_it_says_what_the_backward_does(options: dict[str, Any]) -> None:
    task = Loop()
    with metaoptim.SlidingWindow(offline=True, **options) as window:
        task.run()
        report = window.explain()
        engine = window._session.engine
        outer = task.outer()
        before, held = engine.replays, len(engine.store)
        outer.backward()
    assert (report.horizon, report.num_programs, report.kept_states) == (T, 1, held)
    assert report.extra_forwards == engine.replays - before
    assert report.plan == ("all states" if not options else "tiered" if "offload" in options else "streaming")
    assert all(t.grad is not None for t in task.learnt) and task.lost.grad is None
    weights = {f"task.weights[{t}]" for t in range(T)}
    nets = {f"task.net.{k}" for k, _ in task.net.named_parameters()}
    assert set(report.gradient_targets) == {"task.raw", *weights, *nets}
    assert report.paths["task.raw"] == f"through step_a ({T} calls)"
    assert report.unreachable == ["task.lost"] and "detach" in report.paths["task.lost"]
    assert [p["name"] for p in report.passes] == ["canonicalize", "prune", "verify", "loop", "differentiate"]
    assert f"loop {T} times" in report.program and "24 inner steps" in str(report)


@pytest.mark.parametrize("slots", [2, 6])
def test_the_predicted_peak_holds(slots: int) -> None:
    """All states of the tape, and derivatives; what the outer loss takes is autograd's."""
    for warm in (True, False):
        task = Loop()
        with AllocatorMeter() as meter, metaoptim.SlidingWindow(offline=True, slots=slots) as window:
            task.run()
            meter.note()
            if not warm:
                report = window.explain()
            outer = task.outer()
            torch.autograd.grad(outer, task.learnt)
    beside = (
        2 * sum(p.nbytes for p in task.net.parameters()) + 4096
    )  # the gradients, the outer loss's own graph
    assert 0.5 * report.predicted_peak_bytes <= meter.peak <= report.predicted_peak_bytes + beside


def test_under_a_budget_it_says_what_the_budget_does() -> None:
    task = Loop()
    with metaoptim.SlidingWindow(offline=True, memory_budget=20_000) as window:
        task.run()
        report = window.explain()
    assert report.memory_budget == 20_000 and report.minimum_budget is not None
    assert report.minimum_budget <= report.predicted_peak_bytes <= 20_000
    with (
        pytest.raises(metaoptim.BudgetError),
        metaoptim.SlidingWindow(offline=True, memory_budget=report.minimum_budget - 1),
    ):
        Loop().run()


def test_before_the_first_step_there_is_nothing_to_budget() -> None:
    task = Loop()
    with metaoptim.SlidingWindow(offline=True, memory_budget=20_000) as window:
        report = window.explain()
        task.run()
    assert report.horizon == report.extra_forwards == 0 and report.minimum_budget is None


def test_it_changes_nothing() -> None:
    found = []
    for asked in (False, True):
        task = Loop()
        with metaoptim.SlidingWindow(offline=True, slots=2) as window:
            for t in range(T):
                task.inner.step(task.weights[t] * F.mse_loss(task.net(XS[t]), YS[t]))
                if asked and t in (0, 5, 6):
                    assert window.explain().horizon == t + 1
            found.append(torch.autograd.grad(task.outer(), task.learnt))
    assert all(map(torch.equal, *found))


def test_online_and_truncated_windows() -> None:
    task = Loop()
    with metaoptim.SlidingWindow() as window:
        task.run()
        report = window.explain()
    assert "online" in report.paths["task.net.0.weight"] and "task.net.0.weight" in report.unreachable
    task = Loop()
    with metaoptim.SlidingWindow(offline=True, window=4) as window:
        task.run()
        report = window.explain()
        outer = task.outer()
    with pytest.warns(metaoptim.UnreachableWarning, match="window=4"):
        outer.backward()
    got = {f"task.weights[{t}]" for t, w in enumerate(task.weights) if w.grad is not None} | {"task.raw"}
    assert set(report.gradient_targets) == got and len(got) == 5
    assert "window=4" in report.paths["task.net.0.weight"] and report.horizon <= 5


@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_it_is_asked_for_inside_a_block_that_records(strategy: str) -> None:
    window = metaoptim.SlidingWindow(strategy=strategy)
    with pytest.raises(metaoptim.WindowError, match="inside the block"):
        window.explain()
    task = Loop()
    with window:
        task.run()
        if strategy == "full_tape":
            with pytest.raises(metaoptim.WindowError, match="records"):
                window.explain()
