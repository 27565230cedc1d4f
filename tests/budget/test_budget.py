"""Memory budgets: plans, what counts, what is refused; random loops under budgets are in test_random_budgets.py."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from budget_cases import Case, state_bytes
from metaoptim.compiler.ir.step import EAGER
from metaoptim.compiler.passes.options import Options
from metaoptim.compiler.passes.pipeline import compile_trace
from metaoptim.functions.specialization import trace_of
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.budget.peaks import peaks_of
from metaoptim.runtime.budget.simulate import predict
from metaoptim.runtime.engine.engine import Engine
from metaoptim.runtime.states import schedule
from metaoptim.runtime.states.slots import Keep, Slots
from metaoptim.runtime.states.streams import shrink

# -- the plan --------------------------------------------------------------------------------------------------------


def test_recomputation_never_rises_with_the_budget() -> None:
    case = Case(5, steps=30, dominant="state")
    arguments = case.make()
    with pytest.raises(metaoptim.BudgetError) as refused:
        case.compiled(memory_budget=100).explain(*arguments)
    least = refused.value.minimum
    reports = [case.compiled(memory_budget=int(least * k)).explain(*arguments) for k in (1, 1.3, 2, 3, 6, 30)]
    extra = [r.extra_forwards for r in reports]
    assert extra == sorted(extra, reverse=True) and extra[0] > extra[2] > extra[-1] == 0
    saved = [r.saved_calls for r in reports]
    assert saved == sorted(saved) and saved[0] == 0 < saved[-1]
    assert all(r.predicted_peak_bytes <= r.memory_budget for r in reports)
    assert reports[0].slots == 1 and reports[-1].slots is None
    assert reports[0].minimum_budget == least


def test_the_window_inside_says_what_the_decorator_does_not() -> None:
    net, log_lr, xs, ys = Case(5, steps=8).make()

    @metaoptim.compile(backend="eager", slots=3)
    def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(offline=True, memory_budget="1GiB") as window:
            for x, y in window.scan(xs, ys):
                inner.step(F.mse_loss(net(x), y))
            return F.mse_loss(net(xs[0]), ys[0])

    report = meta_loss.explain(net, log_lr, xs, ys)
    assert (report.slots, report.memory_budget) == (None, 2**30)


def test_slots_shrink_as_the_window_fills_with_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = Engine.limit

    def limit(self: Engine, slots: int) -> None:
        real(self, slots)
        seen.append(slots)
        assert len(self.store) <= slots

    monkeypatch.setattr(Engine, "limit", limit)
    case = Case(9, steps=40, dominant="inputs")
    _, most = case.loop(True)
    _, peak = case.loop(True, memory_budget=most)
    assert peak <= most
    window = seen[len(seen) // 2 :]
    assert window == sorted(window, reverse=True) and window[-1] < window[0]


def test_a_sliding_window_counts_the_inputs_it_still_holds() -> None:
    """However many batches have come and gone."""

    def peak(steps: int) -> int:
        for meter in (nullcontext(), AllocatorMeter()):
            torch.manual_seed(0)
            net, log_lr = nn.Linear(64, 2), torch.tensor(-4.0, requires_grad=True)
            inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
            with meter, metaoptim.SlidingWindow(window=3, memory_budget=1_000_000):
                for _ in range(steps):
                    inner.step(net(torch.randn(64, 64)).square().mean())  # 32 KiB, the window's own
                net(torch.ones(1, 64)).square().mean().backward()
            assert log_lr.grad is not None and float(log_lr.grad.abs()) > 0
        assert isinstance(meter, AllocatorMeter)
        return meter.peak

    assert peak(20) <= 1_000_000 and peak(150) <= 1_000_000  # 150 batches are 4.7 MiB


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (0, ValueError, "positive number of bytes"),
        (-5, ValueError, "positive number of bytes"),
        (1.5, ValueError, "fraction of the free memory between 0 and 1"),
        ("12 parsecs", ValueError, "'512MiB'"),
        ("0MiB", ValueError, "'512MiB'"),
        (True, TypeError, "memory_budget: got bool"),
        ([1], TypeError, "memory_budget: got list"),
    ],
)
def test_what_is_no_budget(budget: Any, error: type[Exception], message: str) -> None:
    for make in (metaoptim.SlidingWindow, metaoptim.compile):
        with pytest.raises(error, match=message):
            make(memory_budget=budget)


def test_a_budget_and_slots_exclude_each_other() -> None:
    for make in (metaoptim.SlidingWindow, metaoptim.compile):
        with pytest.raises(ValueError, match="give one of the two"):
            make(memory_budget="1GiB", slots=3)
    with pytest.raises(ValueError, match="full_tape"):
        metaoptim.SlidingWindow(memory_budget="1GiB", strategy="full_tape")


def test_a_compiled_step_has_no_budget_of_its_own() -> None:
    net, xs = nn.Linear(3, 1), torch.randn(2, 4, 3)
    inner = metaoptim.MetaSGD([net])
    step = metaoptim.compile(
        lambda x: inner.step(net(x).square().mean()), backend="eager", memory_budget="1GiB"
    )
    with (
        pytest.raises(metaoptim.WindowError, match="give the budget to SlidingWindow"),
        metaoptim.SlidingWindow(),
    ):
        step(xs[0])


def test_plan_is_for_functions_that_hold_their_window() -> None:
    net, xs = nn.Linear(3, 1), torch.randn(2, 4, 3)
    inner = metaoptim.MetaSGD([net])
    step = metaoptim.compile(lambda x: inner.step(net(x).square().mean()), backend="eager")
    with metaoptim.SlidingWindow(), pytest.raises(metaoptim.WindowError, match=r"explain\(step\)"):
        metaoptim.plan(step, horizon=10)(xs[0])


def test_plan_of_a_compiled_method() -> None:
    class Learner:
        def __init__(self) -> None:
            self.net = nn.Linear(3, 1)

        @metaoptim.compile(backend="eager", slots=2)
        def meta_loss(self, xs: Tensor) -> Tensor:
            inner = metaoptim.MetaSGD([self.net])
            with metaoptim.SlidingWindow(offline=True) as window:
                for x in window.scan(xs):
                    inner.step(self.net(x).square().mean())
                return self.net(xs[0]).square().mean()

    assert metaoptim.plan(Learner().meta_loss, horizon=500)(torch.randn(6, 4, 3)).slots == 2


def test_amounts() -> None:
    from metaoptim.runtime.budget.amounts import budget_bytes, free_bytes

    cpu = torch.device("cpu")
    assert budget_bytes("512MiB", cpu) == 512 * 2**20
    assert budget_bytes("1.5 GB", cpu) == 1_500_000_000
    assert budget_bytes("2000", cpu) == budget_bytes(2000, cpu) == 2000
    assert 0.4 < budget_bytes(0.5, cpu) / free_bytes(cpu) < 0.6


def test_a_refused_window_leaves_everything_as_it_was() -> None:
    net, log_lr, xs, ys = Case(1, steps=3).make()
    inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
    before = [p.clone() for p in net.parameters()]
    with (
        pytest.raises(metaoptim.BudgetError, match="at inner step 1"),
        metaoptim.SlidingWindow(memory_budget=64),
    ):
        inner.step(F.mse_loss(net(xs[0]), ys[0]))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert not inner.state and all(p.grad is None for p in net.parameters())


def test_a_store_that_shrinks_gives_up_what_is_cheapest_to_lose() -> None:
    store = Slots(None)
    for position in range(12):
        store.apply(Keep(position), [])
    for action in shrink(store, 4):
        store.apply(action)
    assert len(store) == 4 and store.base == 0
    cost = sum(
        schedule.advances(b - a, 4 - i)
        for i, (a, b) in enumerate(zip(store.kept, [*store.kept[1:], 12], strict=True))
    )
    assert cost <= 1.25 * (schedule.advances(13, 4) - 12) + 12


# -- what it would cost ----------------------------------------------------------------------------------------------


def test_the_cost_model_is_revolves_and_that_of_a_run() -> None:
    case = Case(5, steps=30, dominant="state")
    arguments = case.make()
    fn = case.compiled()
    model = metaoptim.plan(fn)(*arguments).model
    for slots in (1, 2, 6, 20):
        assert model.at(30, slots)["extra_forwards"] == schedule.extra_forwards(30, slots)
        report = case.compiled(slots=slots).explain(*arguments)
        predicted = model.at(report.calls, slots)["peak_bytes"]
        assert 0 <= predicted - report.predicted_peak_bytes <= 1024 + 3 * state_bytes(case)
    assert str(model.extra_forwards) == "-T + r*(T + 1) - binomial(c + r, c + 1)"


def test_what_another_horizon_would_cost() -> None:
    case = Case(5, steps=10, dominant="state")
    arguments, fn = case.make(), case.compiled()
    least = metaoptim.plan(fn)(*arguments).minimum_budget
    budgets = (int(1.5 * least), 5 * least, "20GiB")
    costs = [metaoptim.plan(fn, horizon=20_000, memory_budget=b)(*arguments) for b in budgets]
    assert [c.horizon for c in costs] == [20_000] * 3
    assert all(c.peak_bytes <= c.memory_budget for c in costs)
    factors = [c.time_factor for c in costs]
    assert factors == sorted(factors, reverse=True) and factors[0] > 1.5 and factors[-1] < 1.0
    assert costs[-1].slots == 20_002  # with what comes before and after
    assert "runs 0 steps a second time" in str(costs[-1])
    with pytest.raises(metaoptim.BudgetError, match="smallest feasible") as refused:
        metaoptim.plan(fn, horizon=20_000, memory_budget=1000)(*arguments)
    cost = metaoptim.plan(fn, horizon=20_000, memory_budget=refused.value.minimum)(*arguments)
    assert cost.slots == 1
    curve, work = zip(*costs[0].curve(), strict=True)
    assert list(curve) == sorted(curve) and list(work) == sorted(work, reverse=True)


# -- together with what else windows do ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hook", "sliding", "two optimizers", "compiled step"])
def test_the_gradient_does_not_depend_on_the_budget(kind: str) -> None:
    def run(**options: Any) -> Tensor | None:
        torch.manual_seed(0)
        actor = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))
        critic, log_lr, xs = nn.Linear(4, 1), torch.tensor(-3.0, requires_grad=True), torch.randn(8, 6, 4)
        of_actor = metaoptim.MetaAdam([actor], lr=log_lr.exp())
        of_critic = metaoptim.MetaSGD([critic], lr=log_lr.exp(), momentum=0.9)

        def step(x: Tensor) -> None:
            of_actor.step(actor(x).square().mean() * (1 + critic(x).mean()))

        if kind == "compiled step":
            step = metaoptim.compile(step, backend="eager")
        options |= {"hook": {"backward_hook": lambda g: 0.5 * g}, "sliding": {"window": 3}}.get(kind, {})
        total: Any = 0.0
        with metaoptim.SlidingWindow(**options):
            for x in xs:
                if kind == "two optimizers":
                    value = critic(x)
                    losses = (
                        (actor(x) * value.detach()).square().mean(),
                        (value - actor(x).sum(-1)).square().mean(),
                    )
                    of_actor.step(losses[0])
                    of_critic.step(losses[1])
                else:
                    step(x)
                total = total + actor(xs[0]).square().mean() if kind == "sliding" else total
            (total + actor(xs[0]).sum() + critic(xs[0]).sum()).backward()
        return log_lr.grad

    expected = run()
    assert expected is not None and float(expected.abs()) > 1e-4
    with pytest.raises(metaoptim.BudgetError) as refused:
        run(memory_budget=100)
    drawn = 8 * 5056 if kind == "compiled step" else 0  # states of the generator, one for every step
    torch.testing.assert_close(
        run(memory_budget=2 * refused.value.minimum + drawn), expected, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(run(memory_budget="1GiB"), expected, rtol=1e-12, atol=0)


def test_gradients_that_are_there_already_count() -> None:
    """A window keeps copies of them, to put back if it fails; also of another optimizer's network."""

    def peak(grads: bool, budget: int | None = None) -> int:
        meter = AllocatorMeter()
        for within in (nullcontext(), meter):
            net, log_lr, xs, ys = Case(1002, steps=6).make()
            other = nn.Linear(200, 40)
            if grads:
                other(torch.ones(1, 200)).sum().backward()
            inner, foreign = metaoptim.MetaSGD([net], lr=log_lr.exp()), metaoptim.MetaSGD([other])
            with within, metaoptim.SlidingWindow(offline=True, memory_budget=budget or "1GiB"):
                for x, y in zip(xs, ys, strict=True):
                    inner.step(F.mse_loss(net(x), y))
                F.mse_loss(net(xs[0]), ys[0]).backward()
            assert foreign.param_groups
        return meter.peak

    outer = Case(1002).outer()
    assert peak(True) >= peak(False) + 0.95 * 8 * 200 * 40
    with pytest.raises(metaoptim.BudgetError) as refused:
        peak(True, 1000)
    minimum = refused.value.minimum
    for _ in range(8):
        try:
            assert peak(True, minimum) <= minimum + outer
            return
        except metaoptim.BudgetError as error:
            minimum = error.minimum
    raise AssertionError("no budget works")


@pytest.mark.parametrize("kind", ["noise alone", "noise as data", "several"])
def test_random_numbers_of_a_compiled_step_count(kind: str) -> None:
    """All that a step draws is there at once, whenever it is run again."""

    def peak(budget: int | str) -> tuple[int, Tensor | None]:
        torch.manual_seed(0)
        net, lr, xs = nn.Linear(20, 20), torch.tensor(0.05, requires_grad=True), torch.randn(12, 4, 20)
        inner = metaoptim.MetaSGD([net], lr=lr)

        def step(x: Tensor) -> None:
            drawn = torch.randn(2000, 20)
            if kind == "noise as data":
                drawn = net(drawn)
            elif kind == "several":
                drawn = F.dropout(drawn, 0.3) + torch.rand_like(drawn)
            inner.step(net(x).sin().mean() + drawn.mean() * net(x).mean())

        step = metaoptim.compile(step, backend="eager")
        gc.collect()
        with AllocatorMeter() as meter, metaoptim.SlidingWindow(memory_budget=budget):
            for x in xs:
                step(x)
            net(xs[0]).square().mean().backward()
        return meter.peak, lr.grad

    expected = peak("1GiB")[1]
    minimum = 1000
    for _ in range(50):  # it grows by a state of the generator with every step
        try:
            peak(minimum)
            break
        except metaoptim.BudgetError as error:
            minimum = error.minimum
    for budget in (minimum, int(1.2 * minimum), 2 * minimum):
        taken, found = peak(budget)
        assert taken <= budget
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert minimum > 8 * 2000 * 20


@pytest.mark.parametrize("offload", [None, "disk"])
def test_a_truncated_window_meets_a_new_kind_of_step(offload: str | None) -> None:
    """Under a budget, when what has made its state is forgotten already."""
    found = []
    for options in ({}, {"memory_budget": 2600, "offload": offload}):  # of which 2,336 are needed
        torch.manual_seed(1)
        net, lr = nn.Linear(3, 2), torch.tensor(0.05, requires_grad=True)
        x = torch.linspace(-1, 2, 30 * 12).view(30, 4, 3)
        inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.5)
        with metaoptim.SlidingWindow(window=4, **options):
            for t in range(30):
                y = net(x[t])
                inner.step(y.square().mean() if t < 20 else y.sin().mean())
            net(x[3]).square().mean().backward()
        found.append(lr.grad)
    assert found[0] is not None and torch.equal(*found)


@pytest.mark.parametrize("rows", [2, 200])
def test_no_horizon_takes_more_than_was_planned_for_it(rows: int) -> None:
    """Slots are planned on loops cut short; here the whole loop is gone through, with small and large outer losses."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    lr = torch.tensor(0.1, requires_grad=True)

    def loop(net: nn.Module, lr: Tensor, xs: Tensor, judged: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.9)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x in window.scan(xs):
                inner.step(net(x).square().mean())
            return net(judged).square().mean()

    for steps in (3, 9, 16, 57, 100, 128, 250):
        trace, _, _ = trace_of(loop, (net, lr, torch.randn(steps, 8, 8), torch.randn(rows, 8)), {})
        program, _ = compile_trace(trace, Options(lowering=EAGER))
        peaks = peaks_of(program, EAGER)
        for slots in range(1, min(9, program.swept)):
            assert predict(program, slots, EAGER).peak_bytes <= peaks(slots), (steps, slots)


def test_explain_says_what_the_call_saves() -> None:
    def setting() -> tuple[Any, ...]:
        torch.manual_seed(0)
        return nn.Linear(3, 2), torch.tensor(0.02, requires_grad=True), torch.randn(20, 40, 3)

    for budget in (18_000, 26_000, 40_000, 80_000):

        @metaoptim.compile(backend="eager", memory_budget=budget)
        def meta_loss(net: nn.Module, lr: Tensor, xs: Tensor) -> Tensor:
            inner = metaoptim.MetaAdam([net], lr=lr)
            with metaoptim.SlidingWindow(offline=True) as window:
                for x in window.scan(xs):
                    inner.step(net(x).square().mean())
                return net(xs[0]).square().sum()

        meta_loss(*setting())
        ((program,),) = meta_loss._specializations.known.values()
        report, cost = meta_loss.explain(*setting()), metaoptim.plan(meta_loss)(*setting())
        assert program.plan.saved == report.saved_calls == cost.saved_calls, budget
        assert report.plan == cost.plan


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_few_large_steps_do_not_hide_what_states_take(late: bool, compiled: bool) -> None:
    """Beside them a few states more make no higher peak; many do."""
    torch.manual_seed(0)
    small, big = torch.randn(2, 20), torch.randn(400, 20)

    def run(budget: int, steps: int) -> tuple[int, Tensor]:
        for meter in (nullcontext(), AllocatorMeter()):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20))
            lr, xs = torch.tensor(0.05, requires_grad=True), small.expand(steps, 2, 20).clone()

            def loop(net: nn.Module, lr: Tensor, xs: Tensor, **options: Any) -> Tensor:
                inner = metaoptim.MetaSGD([net], lr=lr)
                with metaoptim.SlidingWindow(offline=True, **options) as window:
                    inner.step(net(big).sin().mean())
                    for x in window.scan(xs):
                        inner.step(net(x).sin().mean())
                    if late:
                        inner.step(net(big).sin().mean())
                    return net(small).square().mean()

            fn = metaoptim.compile(loop, backend="eager", memory_budget=budget) if compiled else loop
            options = {} if compiled else {"memory_budget": budget}
            if compiled:
                fn(net, lr, xs)  # measures
            gc.collect()
            with meter:
                (grad,) = torch.autograd.grad(fn(net, lr, xs, **options), lr)
        assert isinstance(meter, AllocatorMeter)
        return meter.peak, grad

    _, expected = run(2**30, 400)
    peak, found = run(1_500_000, 400)
    assert 600_000 < peak <= 1_500_000 + 16 * 2 * 20  # and the outer loss's graph
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("stepping", [False, True])
def test_nothing_comes_of_a_window_in_which_a_step_was_refused(stepping: bool) -> None:
    """Also where the error is caught inside the block: the step is half taken."""
    torch.manual_seed(0)
    net, lr = nn.Linear(20, 3), torch.tensor(0.05, requires_grad=True)
    small, big = torch.randn(4, 20), torch.randn(3000, 20)
    inner, before = metaoptim.MetaSGD([net], lr=lr, momentum=0.9), net.weight.detach().clone()
    with (
        pytest.raises(metaoptim.WindowError, match="refused for want of room"),
        metaoptim.SlidingWindow(offline=True, memory_budget=100_000),
    ):
        for _ in range(3):
            inner.step(net(small).sin().mean())
        with pytest.raises(metaoptim.BudgetError):
            inner.step(net(big).sin().mean())
        if stepping:
            inner.step(net(small).sin().mean())
        net(small).square().mean().backward()
    assert torch.equal(net.weight, before) and not inner.state and lr.grad is None
