"""Compiled steps in ordinary windows that save residuals, and what becomes of these when room is short."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.runtime.budget import amounts
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine.engine import Engine

OFFLINE = pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
STATE = 3 * 8 * (20 * 10 + 10)  # parameters, and two states of Adam for each


class Run:
    """A window over a small network, whose steps are compiled where ``backend`` is given.

    Attributes:
        saved: over how many calls there were residuals when the last step had been taken.
    """

    def __init__(
        self, steps: int = 8, backend: str | None = "eager", draws: bool = False, **options: Any
    ) -> None:
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(20, 10), nn.Tanh(), nn.Dropout(0.2 if draws else 0.0))
        self.log_lr = torch.tensor(-3.0, requires_grad=True)
        self.weights = torch.randn(4).requires_grad_()
        self.xs, self.last = torch.randn(steps, 4, 20), torch.randn(4, 20)
        self.inner: metaoptim.MetaOptimizer = metaoptim.MetaAdam([self.net], lr=0.01)
        self.options, self.steps = options, steps

        def step(x: Tensor) -> None:
            self.inner.step((self.net(x).square().mean(1) * self.weights.sigmoid()).mean())

        self.step = step if backend is None else metaoptim.compile(backend=backend)(step)

    def losses(self, between: Callable[[Run, int], Any] = lambda run, t: None) -> list[Tensor]:
        """The outer loss at the end, after what ``between`` gives behind each step."""
        for group in self.inner.param_groups:
            group["lr"] = self.log_lr.exp()
        found: list[Tensor] = []
        with metaoptim.SlidingWindow(**self.options) as window:
            for t in range(self.steps):
                self.step(self.xs[t])
                if isinstance(loss := between(self, t), Tensor):
                    found.append(loss)
            if self.options.get("strategy") is None:
                self.saved = window.explain().saved_calls
            found.append(self.outer())
        return found

    def outer(self) -> Tensor:
        return F.mse_loss(self.net(self.last), torch.ones(4, 10))

    @property
    def grads(self) -> list[Tensor]:
        """Gradients of the meta-parameters, of θ₀, and the parameters that are left."""
        found = [p.grad for p in (self.log_lr, self.weights, *self.net.parameters())]
        return [g for g in found if g is not None] + [p.detach() for p in self.net.parameters()]


def gradient(run: Run, between: Callable[[Run, int], Any] = lambda run, t: None) -> list[Tensor]:
    sum(run.losses(between), torch.zeros(())).backward()
    return run.grads


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds of the graphs that engines run, but for the steps as they are taken."""
    found: list[str] = []
    own = Engine._lowered

    def spied(self: Engine, call: Any, kind: str, *args: Any) -> Any:
        found.append(kind)
        return own(self, call, kind, *args)

    monkeypatch.setattr(Engine, "_lowered", spied)
    return found


@OFFLINE
@pytest.mark.parametrize("draws", [False, True], ids=["dropless", "dropout"])
def test_gradients_are_those_of_the_tape(offline: bool, draws: bool, kinds: list[str]) -> None:
    expected = gradient(Run(backend=None, draws=draws, offline=offline, strategy="full_tape"))
    run = Run(draws=draws, offline=offline)
    assert len(expected) == (6 if offline else 4) and all(bool(g.any()) for g in expected)
    torch.testing.assert_close(gradient(run), expected, rtol=1e-10, atol=1e-14)
    assert run.saved == 5  # of 8: the first is another graph, and what runs twice at most is not divided
    assert kinds == ["backward"] * 5 + ["vjp"] * 3


def test_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAOPTIM_WAIT", "1")
    run = Run(backend="inductor", offline=True)
    found = gradient(run)
    assert run.saved == 5
    torch.testing.assert_close(found, gradient(Run(backend=None, offline=True)), rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("never_compiled")
def test_meanwhile_steps_run_undivided() -> None:
    """Nobody waits for graphs that are derived from the replay and the VJP: these are compiled first."""
    run = Run(backend="inductor", offline=True)
    expected = gradient(Run(backend=None, offline=True))
    torch.testing.assert_close(gradient(run), expected, rtol=1e-10, atol=1e-14)
    assert run.saved == 0


@OFFLINE
def test_backward_again_and_again(offline: bool, kinds: list[str]) -> None:
    once, again = Run(offline=offline), Run(offline=offline)
    gradient(once)
    (loss,) = again.losses()
    kinds.clear()
    whole = ["backward"] * 5 + ["vjp"] * 3
    (0.25 * loss).backward(retain_graph=True)
    (0.25 * loss).backward(retain_graph=True)
    assert kinds == 2 * whole
    (0.25 * loss).backward(retain_graph=True)
    (part,) = torch.autograd.grad(loss, [again.weights])  # lets go of them, and of the user's own graph
    assert kinds == 4 * whole
    torch.testing.assert_close(again.weights.grad, 0.75 * part, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(part, once.weights.grad, rtol=1e-12, atol=1e-16)


def test_a_sliding_window_saves_what_it_goes_back_over() -> None:
    outer = lambda run, t: run.outer().backward(retain_graph=True)
    expected = gradient(Run(60, backend=None, window=3), outer)
    run = Run(60, window=3)
    torch.testing.assert_close(gradient(run, outer), expected, rtol=1e-10, atol=1e-14)
    assert 3 <= run.saved <= 24  # states are given up when that pays, and residuals with them


class Softmax(metaoptim.MetaOptimizer):
    """Shows what its derivative goes on from as its state."""

    def __init__(self, networks: Any, lr: Any) -> None:
        super().__init__(networks, {"lr": lr})

    @staticmethod
    def init_state(param: Tensor, hyper: Any) -> dict[str, Tensor]:
        return {"weights": torch.zeros_like(param)}

    @staticmethod
    def update(param: Tensor, grad: Tensor, state: Any, hyper: Any) -> tuple[Tensor, dict[str, Tensor]]:
        weights = (1e3 * grad).softmax(-1)
        return param - hyper["lr"] * weights * (grad + state["weights"]), {"weights": weights}


def test_states_that_are_written_into_are_kept() -> None:
    def write(run: Run, t: int) -> None:
        for of_parameter in run.inner.state.values():
            if "weights" in of_parameter:
                of_parameter["weights"].mul_(0.5)

    found = []
    for backend in (None, "eager"):
        run = Run(backend=backend, offline=True)
        run.inner = Softmax([run.net], lr=0.01)
        found.append(gradient(run, write))
    assert run.saved >= 5
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("when", ["after", "next window"])
def test_states_may_be_written_into_after_the_window(when: str) -> None:
    """The last residuals of momentum are what the optimizer has then."""

    def found(writes: bool) -> list[Tensor]:
        run = Run()
        run.inner = metaoptim.MetaSGD([run.net], lr=0.01, momentum=0.9)
        (loss,) = run.losses()
        assert run.saved == 5
        if writes:
            with metaoptim.SlidingWindow() if when == "next window" else nullcontext():
                for of_parameter in run.inner.state.values():
                    of_parameter["momentum_buffer"].zero_()
        loss.backward()
        return run.grads

    assert all(map(torch.equal, found(True), found(False)))


def test_results_that_nobody_differentiates_count() -> None:
    """They would die with their step, were they no residuals."""
    torch.manual_seed(0)
    body, head = nn.Linear(8, 2048).requires_grad_(False), nn.Linear(2048, 1)
    log_lr, xs = torch.tensor(-9.0, requires_grad=True), torch.randn(60, 64, 8)
    inner = metaoptim.MetaSGD([head], lr=log_lr.exp())

    @metaoptim.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        features = body(x)
        inner.step(head(features).square().mean())
        return features

    budget = 16_000_000
    with AllocatorMeter() as meter:
        with metaoptim.SlidingWindow(offline=True, memory_budget=budget):
            for x in xs:
                step(x)
            loss = head.weight.square().sum()
        loss.backward()
    assert meter.peak <= budget and log_lr.grad is not None and bool(log_lr.grad)


def test_batches_that_were_changed_are_refused() -> None:
    run = Run()
    (loss,) = run.losses()
    run.xs.mul_(2)
    with pytest.raises(metaoptim.StaleInputError, match="was overwritten"):
        loss.backward()


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "default"])
def test_when_room_is_short_they_go_first(
    stated: bool, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradient(Run(150, backend=None, offline=True))
    budget = 120 * STATE
    if not stated:
        monkeypatch.setattr(amounts, "free_bytes", lambda device: 2 * budget)
    options = {"memory_budget": budget} if stated else {}
    few, many = Run(8, offline=True, **options), Run(150, offline=True, **options)
    gradient(few)
    assert few.saved == 5
    kinds.clear()
    with AllocatorMeter() as meter:
        if stated:
            found = gradient(many)
        else:
            with pytest.warns(UserWarning, match="half of the memory that was free"):
                found = gradient(many)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert many.saved == 0 and meter.peak <= budget
    assert "backward" not in kinds
    # steps that ran with residuals are replayed by the same graph, to be the same to the bit
    assert {"forward", "replay"} <= {*kinds}


def test_slots_save_none() -> None:
    run = Run(offline=True, slots=4)
    gradient(run)
    assert run.saved == 0
