"""metaoptim.plan: what it predicts is what the engine does; work never rises with the budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine.engine import Engine
from metaoptim.runtime.states import schedule
from offloading import watch_writes

STEPS = 60


def compiled(**options: Any) -> Any:
    @metaoptim.compile(**{"backend": "eager", **options})
    def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp(), momentum=0.9)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x in window.scan(xs):
                inner.step(F.mse_loss(net(x), x[:, :2]))
            return F.mse_loss(net(xs[0]), xs[0][:, :2])

    return meta_loss


def arguments(steps: int = STEPS) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 60), nn.Tanh(), nn.Linear(60, 2))
    return net, torch.tensor(-2.0, requires_grad=True), torch.randn(steps, 20, 3)


class Counted:
    """What the engines that run tensors have done."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []

    def reset(self) -> None:
        self.engines.clear()

    @property
    def engine(self) -> Engine:
        (engine,) = self.engines
        return engine


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    counted, real = Counted(), Engine.run

    def run(self: Engine, state: Any) -> Any:
        if type(self) is Engine:
            counted.engines.append(self)
        return real(self, state)

    monkeypatch.setattr(Engine, "run", run)
    yield counted
    counted.reset()


def budgets(curve: Any) -> list[int]:
    """Some budgets of a curve, among them the first, that which just keeps every state, and the last."""
    found, work = zip(*curve, strict=True)
    every = max(budget for budget, factor in zip(found, work, strict=True) if factor >= 1)
    return [*found[:: max(1, len(found) // 4)], every, found[-1]]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_the_engine_does_what_was_predicted(
    window: int | None, offload: bool, ran: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps run again, steps whose derivative spares the forward, bytes written, and the peak of an allocator."""
    given = arguments()
    for options in ({}, {"memory_budget": "1GiB"}):
        compiled(window=window, **options)(*given).backward()  # everything is measured
    place: dict[str, Any] = {"offload": tmp_path} if offload else {}
    asked = metaoptim.plan(compiled(window=window), memory_budget="1GiB", **place)(*given)
    written = watch_writes(monkeypatch)
    plans = set()
    for budget in budgets(asked.curve(offload=offload)):
        cost = metaoptim.plan(compiled(window=window), memory_budget=budget, **place)(*given)
        meta_loss = compiled(window=window, memory_budget=budget, **place)
        meta_loss(*given).backward()
        written.clear()
        ran.reset()
        given[1].grad = None
        given[0].zero_grad()
        with AllocatorMeter() as meter:
            meta_loss(*given).backward()
        ((program,),) = meta_loss._specializations.known.values()
        states = program.program.swept
        assert (program.plan.slots or states) == cost.slots and program.plan.saved == cost.saved_calls
        forward = program.program.positions
        assert ran.engine.replays - forward == cost.extra_forwards
        assert ran.engine.vjps <= states + 1
        assert meter.peak <= cost.peak_bytes <= budget
        assert cost.peak_bytes - meter.peak < 6 * cost.model.state_bytes + cost.model.transient_bytes
        assert abs(sum(written) - cost.offloaded_bytes) <= 2 * cost.model.state_bytes
        assert bool(written) == (cost.plan == "tiered")
        values = cost.model.at(forward, cost.slots, cost.saved_calls, cost.plan == "tiered")
        assert abs(values["peak_bytes"] - cost.peak_bytes) <= 4 * max(
            cost.model.state_bytes, cost.model.residual_bytes
        )
        plans.add(cost.plan)
        assert f"{budget} bytes" not in str(cost) and cost.plan in str(cost)
    assert {"scheduled", "all states", "unrolled"} - plans == (
        set() if not offload else {"scheduled"} - plans
    )
    assert ("tiered" in plans) == offload


@pytest.mark.parametrize("horizon", [7, 60, 20_000])
def test_work_never_rises_with_the_budget(horizon: int, tmp_path: Path) -> None:
    given = arguments(20)
    costs = [
        metaoptim.plan(compiled(window=window), horizon=horizon, memory_budget="100GiB", offload=tmp_path)(
            *given
        )
        for window in (None, 50)
    ]
    for cost, offload in itertools.product(costs, (False, True)):
        sizes, work = zip(*cost.curve(30, offload=offload), strict=True)
        assert list(sizes) == sorted(set(sizes)) and list(work) == sorted(work, reverse=True)
        assert 0.3 < work[-1] < 1  # with residuals; without any gain it is 1
        assert cost.plan == "unrolled" and cost.horizon == horizon
    assert not list(tmp_path.iterdir())


def test_with_residuals_the_forward_is_not_run_again() -> None:
    """A derivative then takes the operations of what follows the forward."""
    given = arguments()
    cost = metaoptim.plan(compiled(), memory_budget="1GiB")(*given)
    model = cost.model
    assert cost.plan == "unrolled" and cost.saved_calls == cost.slots == STEPS + 2
    assert 0.8 * model.forward_flops <= model.saved_flops <= model.forward_flops
    assert cost.time_factor == 1 - model.saved_flops / (model.forward_flops + model.vjp_flops)


def test_the_formulas_are_the_schedules() -> None:
    model = metaoptim.plan(compiled(slots=3), offload=None)(*arguments(20)).model
    for steps, slots in itertools.product((1, 2, 5, 12, 30, 31), (1, 2, 3, 7, 12)):
        values = model.at(steps, min(slots, steps))
        assert values["extra_forwards"] == schedule.extra_forwards(steps, min(slots, steps))
        values = model.at(steps, slots, tiered=True)
        assert values["extra_forwards"] == schedule.tiered_forwards(steps, slots)
        assert values["offloaded_bytes"] == schedule.offloaded_states(steps, slots) * model.state_bytes
    assert {str(s) for s in model.peak.free_symbols} == {"K", "A", "S", "B", "T", "c"}
    assert {str(s) for s in model.peak.subs(model.sizes).free_symbols} == {"T", "c"}


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 11])
def test_a_tier_by_steps_and_slots(slots: int, ran: Counted, tmp_path: Path) -> None:
    for steps in (1, 2, 5, 6, 7, 11, 12, 13, 24):
        given = arguments(steps)
        ran.reset()
        meta_loss = compiled(slots=slots, offload=tmp_path)
        meta_loss(*given).backward()
        ((program,),) = meta_loss._specializations.known.values()
        positions = program.program.positions
        assert ran.engine.replays - positions == schedule.tiered_forwards(positions, slots)
        cost = metaoptim.plan(compiled(slots=slots, offload=tmp_path))(*given) if steps > 2 else None
        assert cost is None or cost.extra_forwards == ran.engine.replays - positions


def test_a_tier_stays_within_its_budget_for_every_horizon(tmp_path: Path) -> None:
    """The peak depends on how many steps follow the last state that was offloaded."""
    for steps in (20, 21, 22, 23):
        given = arguments(steps)
        compiled(memory_budget="1GiB")(*given).backward()  # everything is measured
        asked = metaoptim.plan(compiled(), memory_budget="1GiB", offload=tmp_path)(*given)
        least = next(asked.curve(offload=True))[0]
        for budget in (least, least + asked.model.state_bytes):
            fn = compiled(memory_budget=budget, offload=tmp_path)
            fn(*given).backward()
            with AllocatorMeter() as meter:
                torch.autograd.grad(fn(*given), given[1])
            assert meter.peak <= budget
        with pytest.raises(metaoptim.BudgetError) as refused:
            compiled(memory_budget=least - 1, offload=tmp_path)(*given)
        assert refused.value.minimum == least


def test_which_slots_are_used_beside_a_tier() -> None:
    """Never more work with more of them; none of it is more than the slots alone would do."""
    for steps in (1, 5, 17, 60, 333):
        least = None
        for slots in range(1, steps + 1):
            chosen, tiered = schedule.with_tier(steps, slots, range(1, slots + 1))
            work = schedule.extra_forwards(steps, chosen)
            if tiered:
                assert chosen <= slots
                work = schedule.tiered_forwards(steps, chosen) + schedule.offloaded_states(steps, chosen)
            assert work <= min(steps, schedule.extra_forwards(steps, slots))
            assert least is None or work <= least
            least = work
        assert least == 0
    assert schedule.with_tier(100, 0, []) == (0, True)


# -- window=W --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [None, 1, 3])
def test_truncated_gradients_take_the_memory_of_their_steps(slots: int | None, ran: Counted) -> None:
    """However long the loop: states before the last W steps are not kept, and the schedule is that of W steps."""
    peaks, work = [], []
    for steps in (30, 90):
        given = arguments(steps)
        fn = compiled(window=8, slots=slots)
        with pytest.warns(metaoptim.UnreachableWarning):
            fn(*given).backward()
        ran.reset()
        with pytest.warns(metaoptim.UnreachableWarning), AllocatorMeter() as meter:
            fn(*given).backward()
        ((program,),) = fn._specializations.known.values()
        assert program.program.swept == 9  # the outer loss is a call too
        assert len(ran.engine.store) <= (slots or 9)
        work.append(ran.engine.replays - program.program.positions)
        peaks.append(meter.peak)
        cost = metaoptim.plan(fn)(*given)
        assert cost.slots == (slots or 9) and cost.extra_forwards == work[-1]
        assert meter.peak <= cost.peak_bytes
    assert work[0] == work[1] == schedule.extra_forwards(9, slots or 9)
    assert abs(peaks[0] - peaks[1]) < 200


def test_a_second_backward_of_a_truncated_one() -> None:
    given = arguments(30)
    for slots in (None, 2):
        with pytest.warns(metaoptim.UnreachableWarning):
            loss = compiled(window=8, slots=slots)(*given)
            first = torch.autograd.grad(loss, given[1], retain_graph=True)
            second = torch.autograd.grad(loss, given[1])
        assert torch.equal(first[0], second[0]) and first[0] != 0


def test_losses_between_the_steps_have_no_formula() -> None:
    @metaoptim.compile(backend="eager", window=4)
    def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
        total = torch.zeros(())
        with metaoptim.SlidingWindow() as window:
            for x in window.scan(xs):
                inner.step(F.mse_loss(net(x), x[:, :2]))
                total = total + F.mse_loss(net(x), x[:, :2])
        return total

    with pytest.raises(metaoptim.WindowError, match=r"window=4.*no formulas.*explain"):
        metaoptim.plan(meta_loss)(*arguments(20))
    report = meta_loss.explain(*arguments(20))
    assert report.horizon == 20 and report.calls > 20


# -- what it shows ---------------------------------------------------------------------------------------------------


def test_plots(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    given = arguments(20)
    for place, lines in (({}, 2), ({"offload": tmp_path}, 3)):
        cost = metaoptim.plan(compiled(), horizon=500, memory_budget="100KiB", **place)(*given)
        axes = cost.plot()
        assert len(axes.lines) == lines
        x, y = axes.lines[0].get_data()
        assert x[-1] * 2**20 > 500 * cost.model.residual_bytes and y[-1] < 1 < y[0]
        pyplot.close("all")
    with pytest.raises(ValueError, match="offload"):
        list(metaoptim.plan(compiled())(*given).curve(offload=True))


@pytest.mark.parametrize("listed", [False, True])
def test_learnt_data_of_a_longer_horizon(listed: bool) -> None:
    """Each step adds a copy and a gradient of what it alone reads: a few steps tell what many cost."""
    net = nn.Linear(4, 2)

    @metaoptim.compile(backend="eager")
    def meta_loss(xs: Any) -> torch.Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                inner.step(net(x).square().mean())
            return net(xs[0]).square().mean()

    def given(steps: int) -> Any:
        if listed:
            return [torch.ones(6, 4, requires_grad=True) for _ in range(steps)]
        return torch.ones(steps, 6, 4, requires_grad=True)

    for budget in (None, "120KiB"):
        few = metaoptim.plan(meta_loss, horizon=300, memory_budget=budget)(given(8))
        many = metaoptim.plan(meta_loss, memory_budget=budget)(given(300))
        assert few.minimum_budget == many.minimum_budget and abs(few.slots - many.slots) <= 2
        assert few.peak_bytes == pytest.approx(many.peak_bytes, rel=0.001)
        assert few.model.at(300, 74) == pytest.approx(many.model.at(300, 74), rel=0.01)


def test_a_horizon_that_is_too_short() -> None:
    with pytest.raises(ValueError, match=r"horizon: got 0, expected at least 4"):
        metaoptim.plan(compiled(), horizon=0)(*arguments(20))
