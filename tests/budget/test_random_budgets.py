"""Random inner loops under random budgets: the measured peak stays within, the gradient is that of the full tape.

    pytest tests/budget/test_random_budgets.py --budget-cases 300    # horizons up to 3,000

The first few cases, which run every time, are short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import metaoptim
from budget_cases import Case, same, state_bytes
from metaoptim.runtime.engine.engine import Engine
from metaoptim.runtime.states import schedule
from metaoptim.runtime.states.slots import Slots

_EVERY_TIME = 6  # cases that are short
_ONE_SLOT = 40  # steps run with a single state kept: they take time that is quadratic in them
_REPLAYS = 6  # replays per step that a long loop may take


def case_of(budget_case: int) -> Case:
    """The case of a seed."""
    return Case(budget_case, most=30 if budget_case < _EVERY_TIME else 3000)


def further_slots(case: Case) -> int:
    """How many states beside the first make the loop quick enough."""
    fits = (c for c in range(1, case.steps + 2) if enough(case.steps, c))
    return next(fits) - 1


def enough(steps: int, slots: int) -> bool:
    return steps <= _ONE_SLOT or schedule.extra_forwards(steps, slots) <= _REPLAYS * steps


def leaking(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Slots, list[Tensor]]]:
    """Let every loop hold one state that no plan knows of; returns where they are."""
    append, after, leaked = Engine.append, Engine._after, []

    def leak(engine: Engine, position: int, state: Any) -> None:
        tensors = [t.clone() for t in state if isinstance(t, Tensor)]
        if position >= 2 and tensors and all(store is not engine.store for store, _ in leaked):
            leaked.append((engine.store, tensors))

    def leaking_append(self: Engine, *call: Any, **read: Any) -> None:
        leak(self, self.position, self.state)
        append(self, *call, **read)

    def leaking_after(self: Engine, position: int, state: Any, *how: Any) -> Any:
        leak(self, position, state)
        return after(self, position, state, *how)

    monkeypatch.setattr(Engine, "append", leaking_append)
    monkeypatch.setattr(Engine, "_after", leaking_after)
    return leaked


def leaks_show(run: Callable[[], int], peak: int) -> None:
    """The peak is higher if a state is leaked, by about that."""
    with pytest.MonkeyPatch.context() as patched:
        leaked = leaking(patched)
        more = run()
        if leaked:  # not by loops that are over before
            assert more - peak >= 0.9 * sum(t.nbytes for t in leaked[-1][1])


def test_a_compiled_function_keeps_its_budget(budget_case: int) -> None:
    case = case_of(budget_case)
    short = case.cut(_ONE_SLOT)
    with pytest.raises(metaoptim.BudgetError, match="smallest feasible budget") as refused:
        short.run(memory_budget=100)
    minimum = refused.value.minimum
    got, peak, plan = short.run(memory_budget=minimum)
    assert peak <= minimum == plan.minimum, (case, plan)
    same(got, short.gradients_on_the_tape())
    with pytest.raises(metaoptim.BudgetError):
        short.run(memory_budget=minimum - 1)
    leaks_show(lambda: short.run(memory_budget=minimum)[1], peak)

    most = metaoptim.explain(case.compiled(memory_budget="10GiB"))(*case.make())
    assert most.minimum_budget == minimum or case.steps <= _ONE_SLOT
    assert most.predicted_peak_bytes is not None
    low = minimum + further_slots(case) * state_bytes(case)
    budget = case.between(low, 2 * most.predicted_peak_bytes)
    got, peak, plan = case.run(memory_budget=budget)
    assert peak <= budget, (case, plan)
    assert plan.saved or peak >= 0.9 * plan.peak_bytes - 3 * state_bytes(case)
    same(got, case.gradients_on_the_tape())


def test_a_window_keeps_its_budget(budget_case: int) -> None:
    case = case_of(budget_case)
    fresh = case.seed % 2 == 0
    short = case.cut(_ONE_SLOT)
    minimum, got, peak = smallest(short, fresh)
    assert peak <= minimum + case.outer(), case
    same(got, short.gradients_on_the_tape())
    with pytest.raises(metaoptim.BudgetError):
        short.loop(fresh, memory_budget=minimum - 1)
    leaks_show(lambda: short.loop(fresh, memory_budget=minimum)[1], peak)

    x = case.make()[2][0]
    held = (x.nbytes + 64) * case.steps if fresh else 64 * case.steps  # and numbers
    low = minimum + held + further_slots(case) * state_bytes(case)
    budget = case.between(low, low + case.steps * state_bytes(case))
    got, peak = case.loop(fresh, memory_budget=budget)
    assert peak <= budget + case.outer(), case
    same(got, case.gradients_on_the_tape())


def smallest(case: Case, fresh: bool) -> tuple[int, Any, int]:
    """The smallest budget that a window names, in the end, and what comes out with it."""
    budget = 100
    for _ in range(case.steps + 2):  # it grows with the inputs that the window holds
        try:
            return budget, *case.loop(fresh, memory_budget=budget)
        except metaoptim.BudgetError as error:
            assert "smallest feasible budget" in str(error) and error.minimum > budget
            budget = error.minimum
    raise AssertionError(f"{case}: no budget works")


def test_the_check_fails_when_a_state_is_leaked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(3, steps=30, dominant="state")
    minimum = case.run(memory_budget="10GiB")[2].minimum
    budget = case.run(memory_budget=int(1.3 * minimum))[2].peak_bytes
    _, peak, plan = case.run(memory_budget=budget)
    assert peak <= budget and plan.slots is not None
    leaked = leaking(monkeypatch)
    _, peak, _ = case.run(memory_budget=budget)
    assert leaked and peak > budget
