"""Ordinary steps that are taken by their compiled graphs, with residuals, and what is left to autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.ir.step import Lowering, StepGraph
from metaoptim.compiler.lower import derivatives
from metaoptim.compiler.lower.derivatives import residuals
from metaoptim.compiler.lower.library import library
from metaoptim.runtime.windows import known_steps
from metaoptim.runtime.windows.session import current_session
from oracle import agree, run_oracle, run_window
from problems import NETWORKS, OPTIMIZERS, problem


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step that was expected to be taken by its graph: whether it was."""
    found: list[bool] = []
    take = known_steps.take

    def watched(*args: Any) -> Any:
        made = take(*args)
        found.append(made is not None)
        return made

    monkeypatch.setattr(known_steps, "take", watched)
    return found


@pytest.fixture
def by_graph(monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> list[bool]:
    """The same, with graphs that run as they are in the place of compiled ones, from the second step of a kind on."""

    def ready(graph: StepGraph, lowering: Lowering) -> Lowering | None:
        return lowering.uncompiled if residuals(graph, lowering.hvp) is not None else None

    monkeypatch.setattr(known_steps, "compiled_with_residuals", ready)
    return taken


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_the_gradient_is_the_tapes(by_graph: list[bool], network: str, optimizer: str) -> None:
    for offline in (True, False):
        for window in (None, 3):
            case = problem(network, optimizer, 7, offline, window)
            agree(run_window(case), run_oracle(case), rtol=1e-9)
    assert sum(by_graph) >= 10 or network in ("lstm", "tied")  # these write in place, or share what they read


class Loop:
    """A window over a small network, and the same by hand."""

    def __init__(self, kind: str = "MetaAdam", **options: Any) -> None:
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.log_lr = torch.tensor(-2.5, requires_grad=True)
        self.weight = torch.tensor(0.4, requires_grad=True)
        self.xs, self.kind, self.options = torch.randn(9, 6, 3), kind, options
        self.inner = getattr(metaoptim, kind)([self.net], lr=0.1)

    def loss(self, t: int) -> Tensor:
        return (self.net(self.xs[t]) - 0.1 * t).square().mean() * self.weight.sigmoid()

    def grads(self, steps: Callable[[Loop], Any] | None = None, **window: Any) -> list[Tensor | None]:
        """The meta-gradient of a window in which ``steps``, by default one for each x, are taken."""
        for group in self.inner.param_groups:
            group["lr"] = self.log_lr.exp()
        with metaoptim.SlidingWindow(offline=True, **self.options, **window) as opened:
            extra = (steps or Loop.all)(self)
            if not window:
                self.saved = opened.explain().saved_calls
            total = self.net(self.xs[0]).sin().mean() + (0.0 if extra is None else extra)
        leaves = [self.log_lr, self.weight, *self.net.parameters()]
        return list(torch.autograd.grad(total, leaves, allow_unused=True))

    def all(self) -> None:
        for t in range(9):
            self.inner.step(self.loss(t))


def same(steps: Callable[[Loop], Any] | None = None, **options: Any) -> Loop:
    """Check the window against the full tape; the loop."""
    loop, tape = Loop(**options), Loop()
    torch.testing.assert_close(
        loop.grads(steps), tape.grads(steps, strategy="full_tape"), rtol=1e-9, atol=1e-15
    )
    return loop


def test_compiled_graphs_take_over(taken: list[bool]) -> None:
    """First the derivative is compiled, then the step with residuals: the third window runs by them."""
    loop, expected = Loop(backend="inductor"), Loop().grads(strategy="full_tape")
    for _ in range(3):
        torch.testing.assert_close(loop.grads(), expected, rtol=1e-9, atol=1e-15)
    assert taken and all(taken) and loop.saved >= 8


def test_residuals_that_are_given_up(by_graph: list[bool]) -> None:
    """Steps run again by the graph that they have run by."""

    def dropped(loop: Loop) -> None:
        loop.all()
        session: Any = current_session()
        assert session.engine.saved_calls >= 7
        session.engine.drop_residuals()
        session.engine.limit(2)

    expected = Loop().grads(strategy="full_tape")
    torch.testing.assert_close(Loop().grads(dropped), expected, rtol=1e-9, atol=1e-15)


def test_losses_of_such_steps_are_outer_losses_too(by_graph: list[bool]) -> None:
    def steps(loop: Loop) -> Tensor:
        losses = []
        for t in range(9):
            losses.append(loop.loss(t))
            loop.inner.step(losses[-1])
        return torch.stack(losses).sum()

    same(steps)
    assert sum(by_graph) >= 6


def test_a_budget_that_has_no_room_for_residuals(by_graph: list[bool]) -> None:
    library.clear()  # whether a graph has been checked before decides how much room it wants
    loop = Loop(memory_budget="40KiB", backend="eager")
    expected = Loop().grads(strategy="full_tape")
    torch.testing.assert_close(loop.grads(), expected, rtol=1e-9, atol=1e-15)
    assert any(by_graph) and not by_graph[-1]  # then there is no room for more
    assert loop.saved < 8


def another_loss(loop: Loop) -> None:
    for t in range(9):
        loss = loop.loss(t)
        loop.inner.step(loss if t % 3 else loss + 0.01 * loop.net[2].weight.square().sum())


def twice(loop: Loop) -> None:
    """Two losses are computed before both are stepped by."""
    for t in range(0, 8, 2):
        first, second = loop.loss(t), loop.loss(t + 1)
        loop.inner.step(first)
        loop.inner.step(second)


def the_same_again(loop: Loop) -> None:
    for t in range(0, 8, 2):
        loss = loop.loss(t)
        loop.inner.step(loss)
        loop.inner.step(loss)


def hooked(loop: Loop) -> None:
    """A hook on an activation comes and goes."""
    for t in range(9):
        hidden = loop.net[1](loop.net[0](loop.xs[t]))
        if t in (3, 6):
            hidden.register_hook(lambda g: 1.5 * g)
        loop.inner.step((loop.net[2](hidden) - 0.1 * t).square().mean() * loop.weight)


def loaded(loop: Loop) -> None:
    """A parameter is written into between steps."""
    for t in range(9):
        loop.inner.step(loop.loss(t))
        if t == 4:
            with torch.no_grad():
                loop.net[0].weight.mul_(0.5)


def another_rate(loop: Loop) -> None:
    """Hyper-parameters change, as numbers and as tensors."""
    for t in range(9):
        loop.inner.param_groups[0]["lr"] = loop.log_lr.exp() * (1 + 0.1 * t) if t > 4 else 0.05 * (t + 1)
        loop.inner.step(loop.loss(t))


@pytest.mark.parametrize("steps", [another_loss, twice, the_same_again, hooked, loaded, another_rate])
def test_steps_that_change(by_graph: list[bool], steps: Callable[[Loop], None]) -> None:
    same(steps)
    assert any(by_graph) or steps in (another_loss, the_same_again)


def test_hooks_on_parameters_are_autograds(by_graph: list[bool]) -> None:
    def run(**window: Any) -> list[Tensor | None]:
        loop = Loop()
        handle = loop.net[0].weight.register_hook(lambda g: 0.5 * g)
        found = loop.grads(**window)
        handle.remove()
        return found

    torch.testing.assert_close(run(), run(strategy="full_tape"), rtol=1e-9, atol=1e-15)
    assert not by_graph


def overwriting(write: Callable[[Tensor], Any]) -> Callable[[Loop], None]:
    """Steps, one of whose inputs is written into between its loss and the step."""

    def steps(loop: Loop) -> None:
        for t in range(9):
            x = loop.xs[t].clone()
            loss = (loop.net(x) - 0.1 * t).square().mean()
            if t == 6:
                write(x)
            loop.inner.step(loss)

    return steps


def test_an_input_that_is_overwritten_before_the_step(by_graph: list[bool]) -> None:
    """The values that the loss has read count; where they are gone, there is no gradient."""
    expected = Loop().grads(overwriting(lambda x: None), strategy="full_tape")
    got = Loop().grads(overwriting(Tensor.zero_))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)
    assert all(by_graph[1:])  # in the second step, a number of the first becomes an input
    with pytest.raises(metaoptim.CaptureError, match=r"was changed through \.data or numpy between its use"):
        Loop().grads(overwriting(lambda x: x.data.zero_()))


def test_anomaly_mode_has_autograds_gradient(by_graph: list[bool]) -> None:
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        same()
    assert not by_graph


def test_it_goes_on_in_the_next_window(by_graph: list[bool]) -> None:
    loop = Loop("MetaSGD")
    expected = loop.grads()
    by_graph.clear()
    torch.testing.assert_close(loop.grads(), expected, rtol=1e-12, atol=1e-15)
    assert len(by_graph) == 9 and all(by_graph)


# -- steps that look alike ---------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A trunk and heads of one structure."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.trunk, self.heads = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 2) for _ in range(2))


def test_another_head_of_the_same_structure(by_graph: list[bool]) -> None:
    def grads(**window: Any) -> list[Tensor | None]:
        net, xs = Heads(), torch.randn(9, 6, 3, generator=torch.Generator().manual_seed(1))
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True, **window):
            for t, x in enumerate(xs):
                loss = net.heads[t // 3 % 2](net.trunk(x).tanh()).square().mean()
                inner.step(loss, allow_unused=True)
            outer = net.heads[0](net.trunk(xs[0]).sin()).mean()
        return list(torch.autograd.grad(outer, list(net.parameters()), allow_unused=True))

    torch.testing.assert_close(grads(), grads(strategy="full_tape"), rtol=1e-9, atol=1e-15)
    assert len(by_graph) == 6 and all(by_graph)  # two of each three


def test_a_parameter_that_is_read_but_not_trained_gets_no_state(by_graph: list[bool]) -> None:
    torch.manual_seed(0)
    nets, xs = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]), torch.randn(3, 6, 3)
    inner, own = metaoptim.MetaRprop([nets], lr=0.1), [list(net.parameters()) for net in nets]
    for k in range(2):
        a, b = nets[k], nets[1 - k]
        with metaoptim.SlidingWindow():
            for x in xs:
                inner.step((a(x) - b(x).detach()).square().mean(), allow_unused=True)
        assert set(inner.state) == set(own[k])
        inner.state.clear()
    assert by_graph == [True] * 4


def test_python_of_the_users_own_runs_in_every_step(by_graph: list[bool]) -> None:
    loop, calls = Loop("MetaSGD"), []

    def halved(grads: list[Tensor], params: list[Tensor], hyper: dict[str, Any]) -> list[Tensor]:
        calls.append(len(grads))
        return [g / 2 for g in grads]

    loop.inner.transforms = [halved]
    with metaoptim.SlidingWindow(offline=True):
        loop.all()
        assert len(calls) >= 9
    assert not by_graph


def test_gradients_that_are_asked_for_are_there(by_graph: list[bool]) -> None:
    loop = Loop("MetaSGD")
    with metaoptim.SlidingWindow(offline=True):
        for x in loop.xs:
            hidden = loop.net[0](x)
            hidden.retain_grad()
            loop.inner.step(loop.net[2](hidden.tanh()).square().mean())
            assert hidden.grad is not None and bool(hidden.grad.any())
    assert not by_graph


def test_checkpoints_are_recomputed_as_often(by_graph: list[bool]) -> None:
    """Running statistics are updated once more by each recomputation, which is autograd's."""

    def buffers(**window: Any) -> list[Tensor]:
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        inner, xs = metaoptim.MetaSGD([net], lr=0.1), torch.randn(6, 5, 3)
        with metaoptim.SlidingWindow(**window):
            for x in xs:
                hidden = torch.utils.checkpoint.checkpoint(net[:3], x.requires_grad_(), use_reentrant=False)
                inner.step(net[3](hidden).square().mean())
        return [b.clone() for b in net.buffers()]

    got = buffers()
    assert not by_graph
    known_steps._last.clear()
    torch.testing.assert_close(got, buffers(backend="eager"))


def test_a_step_without_residuals_stays_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that writes in place, whose derivative has been compiled."""
    monkeypatch.setattr(derivatives, "_is_there", lambda step, kind, how: kind == "vjp")
    net, xs = nn.Linear(3, 2), torch.randn(4, 6, 3)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True) as window:
        for x in xs:
            y, h = net(x), torch.zeros(6, 2)
            h[:, 0], h[:, 1] = y[:, 0], y[:, 1].sin()
            inner.step(h.square().mean())
        (graph,) = {id(g): g for g in window._session.program.step_graphs}.values()
        assert residuals(graph, "auto") is None
        assert (
            derivatives.compiled_with_residuals(graph, Lowering("inductor", hvp="auto", replays=False))
            is None
        )


# -- what the user may write into afterwards ---------------------------------------------------------------------------


class Hands(metaoptim.MetaOptimizer):
    """An optimizer that hands on what it is given: its state, and in the next the parameter and the gradient."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__(nets, {"lr": 0.1})

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        return {"same": torch.ones_like(param), "old": torch.ones_like(param), "grad": torch.ones_like(param)}

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        moved = grad * grad.abs() + 0.5 * state["grad"] * grad * state["same"] + 0.1 * state["old"]
        return param - hyper["lr"] * moved, {"same": state["same"], "old": param, "grad": grad}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("name", ["same", "old", "grad"])
def test_optimizer_state_that_is_written_into_after_the_window(
    name: str, slots: int | None, compiled: bool
) -> None:
    def grad(factor: float) -> Tensor:
        torch.manual_seed(0)
        net, xs = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(6, 6, 3)
        weight, inner = torch.tensor(0.5, requires_grad=True), Hands([net])

        def step(x: Tensor) -> None:
            inner.step((net(x) - 0.1).square().mean() * weight)

        step = metaoptim.compile(backend="eager")(step) if compiled else step
        with metaoptim.SlidingWindow(slots=slots):
            for x in xs:
                step(x)
            outer = net(xs[0]).sin().mean()
        for state in inner.state.values():
            state[name].mul_(factor)
        return torch.autograd.grad(outer, weight)[0]

    torch.testing.assert_close(grad(3.0), grad(1.0), rtol=1e-12, atol=0)
