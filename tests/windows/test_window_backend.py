"""Ordinary windows whose derivatives are compiled, or differentiated in mixed mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from budget_cases import Case
from metaoptim.compiler.cost.step import check_bytes, measured
from metaoptim.compiler.ir.step import Lowering
from metaoptim.compiler.lower import backends
from metaoptim.compiler.lower.derivatives import lowered
from metaoptim.compiler.lower.library import Library, library
from metaoptim.compiler.passes.options import Options
from metaoptim.compiler.passes.pipeline import compile_trace
from metaoptim.functions.specialization import trace_of
from metaoptim.runtime.budget.measure import rehearse
from oracle import agree, run_oracle, run_window
from problems import NETWORKS, OPTIMIZERS, problem


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_compiled_derivatives_are_those_of_the_tape(network: str, optimizer: str) -> None:
    turn = list(NETWORKS).index(network) + list(OPTIMIZERS).index(optimizer)
    case = problem(network, optimizer, 7, bool(turn % 2), (None, 3)[turn // 2 % 2])
    expected = run_oracle(case)
    assert any(v is not None and v.abs().max() > 1e-6 for v in expected.values())
    agree(run_window(case, backend="aot_eager", slots=(None, 2)[turn % 2]), expected)


@pytest.mark.parametrize("network", ["linear", "tied"])
def test_mixed_mode_derivatives_are_those_of_the_tape(network: str) -> None:
    library.clear()
    case = problem(network, "adam", 5, True, None)
    agree(run_window(case, hvp="mixed"), run_oracle(case))
    used = {
        lowering.hvp for step in library.steps() for kind, lowering in step.derived.lowered if kind == "vjp"
    }
    assert used == {"mixed"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor() -> None:
    case = problem("linear", "momentum", 6, True, None)
    agree(run_window(case, backend="inductor"), run_oracle(case))


def looped(**options: Any) -> tuple[Any, Any, Tensor, list[Tensor]]:
    torch.manual_seed(2)
    net, lr = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)),
        torch.tensor(0.05, requires_grad=True),
    )
    xs = torch.randn(9, 5, 4)
    inner = metaoptim.MetaAdam([net], lr=lr)
    with metaoptim.SlidingWindow(**options) as window:
        for x in xs:
            inner.step(net(x).sin().mean())
        loss = net(xs[0]).square().mean()
    return window, loss, lr, [p.detach().clone() for p in net.parameters()]


def test_the_forward_and_its_replay_stay_eager() -> None:
    """A state that is made again is the same to the bit, whatever the derivatives run on."""
    kinds: list[tuple[str, str]] = []

    def seen(step: Any, kind: str, inputs: Any, lowering: Any = None, **options: Any) -> Any:
        kinds.append((kind, lowering.backend_of(kind)))
        return lowered(step, kind, inputs, lowering, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaoptim.runtime.engine.engine.lowered", seen)
        _, loss, lr, theta = looped(backend="aot_eager", slots=2)
        loss.backward()
    assert {("replay", "eager"), ("vjp", "aot_eager")} == set(kinds)
    _, loss, plain, expected = looped()
    loss.backward()
    assert all(map(torch.equal, theta, expected))
    torch.testing.assert_close(lr.grad, plain.grad, rtol=1e-12, atol=0)


def test_a_broken_backend_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        return lambda *args: [None if g is None else 1.01 * g for g in graph(*args)]

    real = backends.lookup_backend
    monkeypatch.setattr(backends, "lookup_backend", lambda name: broken if name == "aot_ts" else real(name))
    _, loss, expected, _ = looped()
    loss.backward()
    _, loss, lr, _ = looped(backend="aot_ts")
    with pytest.warns(RuntimeWarning, match="compiled a part of the inner loop wrongly"):
        loss.backward()
    torch.testing.assert_close(lr.grad, expected.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dominant", ["state", "activations"])
def test_what_a_check_takes_is_bounded(dominant: str) -> None:
    case = Case(5, steps=4, dominant=dominant)
    lowering = Lowering.stated("aot_eager", "auto", True)
    trace, _, _ = trace_of(case.compiled()._fn, case.make(), {})
    program, _ = compile_trace(trace, Options(lowering=lowering, library=Library(0)))
    bounds = [check_bytes(g, lowering) for g in program.step_graphs]
    rehearse(program, {x: x.tensor for x in program.inputs}, lowering)
    for graph, bound in zip(program.step_graphs, bounds, strict=True):
        seen = measured(graph, "vjp", lowering)
        assert seen is not None or not graph.steps
        assert seen is None or seen.peak_bytes < seen.first_bytes <= bound


def test_under_a_budget_the_check_counts() -> None:
    """States are given up for it where a step comes late."""

    def run(**options: Any) -> tuple[Tensor | None, list[int]]:
        library.clear()
        torch.manual_seed(2)
        net, lr, xs = nn.Linear(40, 20), torch.tensor(0.05, requires_grad=True), torch.randn(30, 2, 40)
        inner, kept = metaoptim.MetaSGD([net], lr=lr), []
        with metaoptim.SlidingWindow(**options) as window:
            for t, x in enumerate(xs):
                y = net(x)
                inner.step((y.sin() if t < 25 else y.cos() * y).mean())
                kept.append(len(window._session.engine.store))  # type: ignore[union-attr]
            net(xs[0]).square().sum().backward()
        return lr.grad, kept

    expected, _ = run()
    with pytest.raises(metaoptim.BudgetError, match="compile its derivative and check it") as refused:
        run(backend="aot_eager", memory_budget=1000)
    minimum = refused.value.minimum
    for budget in (2 * minimum, int(1.2 * minimum)):
        found, kept = run(backend="aot_eager", memory_budget=budget)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    unchecked, more = run(backend="aot_eager", memory_budget=budget, self_check=False)
    torch.testing.assert_close(unchecked, expected, rtol=1e-12, atol=0)
    assert kept[25] < kept[24] == more[24] <= more[25]


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="backend: got 'inductr', expected one of"):
        metaoptim.SlidingWindow(backend="inductr")
    with pytest.raises(ValueError, match="hvp: got 'forward'"):
        metaoptim.SlidingWindow(hvp="forward")
    for options in ({"backend": "inductor"}, {"hvp": "mixed"}, {"self_check": False}):
        with pytest.raises(ValueError, match="full_tape window keeps everything"):
            metaoptim.SlidingWindow(strategy="full_tape", **options)
        ((name, value),) = options.items()
        assert repr(metaoptim.SlidingWindow(**options)) == f"SlidingWindow({name}={value!r})"


@metaoptim.compile(backend="eager")
def with_a_window_that_says(net: nn.Module) -> Tensor:
    inner = metaoptim.MetaSGD([net])
    with metaoptim.SlidingWindow(offline=True, backend="aot_eager"):
        inner.step(net(torch.ones(2, 4)).square().sum())
        return net(torch.ones(2, 4)).sum()


def test_in_a_compiled_function_the_decorator_says() -> None:
    with pytest.raises(metaoptim.WindowError, match=r"give them to metaoptim\.compile"):
        with_a_window_that_says(nn.Linear(4, 2))


def test_shapes_that_depend_on_values_are_not_compiled() -> None:
    def gradient(**options: Any) -> Tensor | None:
        torch.manual_seed(2)
        net, lr, xs = nn.Linear(4, 2), torch.tensor(0.05, requires_grad=True), torch.randn(3, 5, 4)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(**options):
            for x in xs:
                y = net(x)
                inner.step(y[y > 0].square().sum())
            net(xs[0]).square().sum().backward()
        return lr.grad

    with pytest.raises(metaoptim.CaptureError, match="shapes in this step depend on values"):
        gradient(backend="aot_eager")
    found = gradient()
    assert found is not None and float(found.abs()) > 1e-3


def test_explain_says_how_steps_are_differentiated() -> None:
    torch.manual_seed(2)
    net = nn.Linear(4, 2)
    inner = metaoptim.MetaSGD([net], lr=torch.tensor(0.05, requires_grad=True))
    with metaoptim.SlidingWindow(hvp="mixed") as window:
        inner.step(net(torch.ones(3, 4)).sin().mean())
        (done,) = (p["done"] for p in window.explain().passes if p["name"] == "differentiate")
    assert "mixed" in done


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_negated_views_are_read_as_their_values() -> None:
    """Compiled graphs read memory; of such a view that holds the negatives."""
    torch.manual_seed(0)
    net, rate = torch.nn.Linear(3, 2), torch.tensor(0.1, requires_grad=True)
    xs = torch.randn(3, 5, 3, dtype=torch.complex128).conj().imag
    assert xs[0].is_neg()

    def gradient(**options: Any) -> torch.Tensor:
        inner = metaoptim.MetaSGD([net], lr=rate)
        with metaoptim.SlidingWindow(offline=True, **options):
            for x in xs:
                inner.step((net(x) * x.sum(1, keepdim=True)).square().mean())
            return torch.autograd.grad(net(xs[0]).square().mean(), rate)[0]

    got, want = gradient(backend="inductor", self_check=False), gradient(strategy="full_tape")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
