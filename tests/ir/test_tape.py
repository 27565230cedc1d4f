"""What a window records: runs of equal steps are folded as they come, and found again by position."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import metaoptim
from metaoptim.compiler.ir.programs.calls import Assign, Loop, StepCall
from metaoptim.compiler.ir.programs.program import Tape
from metaoptim.compiler.ir.step import StepGraph, gradient
from oracle import agree


def _step() -> StepGraph:
    graph = torch.fx.Graph()
    graph.call_function(gradient, ())  # one inner step
    return StepGraph(graph, (), ())


STEP, OTHER = _step(), _step()


def call(inputs: Any = (), **changes: Any) -> StepCall:
    given = {"step": STEP, "location": "here", "writes": (0, 1), **changes}
    return StepCall(reads=(0, 1), inputs=list(inputs), **given)


def listed(calls: Iterable[Any]) -> list[Any]:
    """Each call, as what distinguishes it."""
    return [(c.step, c.back, c.inputs, c.metas) if isinstance(c, StepCall) else c.values for c in calls]


def shape(program: Tape) -> list[Any]:
    return [(len(x.calls), x.count) if isinstance(x, Loop) else 1 for x in program.calls]


@pytest.mark.parametrize("steps", [8, 100, 333])
def test_equal_steps_are_one_loop_and_are_found_again(steps: int) -> None:
    calls = [Assign((0,), [])] + [call(["rate", f"x{t}"], metas=(0, t)) for t in range(steps)]
    program = Tape(0, calls)
    assert len(program.calls) <= 80  # folded on the way
    assert listed(program) == listed(calls)
    program.fold()
    assert shape(program) == [1, (1, steps)] and listed(program) == listed(calls)
    program.fold()
    assert shape(program) == [1, (1, steps)]
    assert (program.end, program.horizon, program.step_graphs) == (steps + 1, steps, [STEP])
    assert calls[1].inputs == ["rate", "x0"]  # the caller's own is as it was


@pytest.mark.parametrize("rounds", [5, 41, 150])
def test_rounds_of_two_steps_are_one_loop(rounds: int) -> None:
    """The second step of a round reads theta of before the first, as a critic and an actor do."""
    calls = [c for t in range(rounds) for c in (call([t]), call(["rate"], step=OTHER, back=1))]
    program = Tape(0, [*calls, call(["last"])])
    program.fold()
    assert shape(program) == [(2, rounds), 1] and listed(program) == listed([*calls, call(["last"])])


@pytest.mark.parametrize(
    "changes",
    [{"step": OTHER}, {"back": 1}, {"spies": ("hook",)}, {"location": "there"}, {"writes": (1, 1)}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_differs_in_more_than_what_it_is_given_is_apart(changes: dict[str, Any]) -> None:
    calls = [call(), call(**changes), call()]
    program = Tape(1, calls)
    program.fold()
    assert shape(program) == [1, 1, 1] and listed(program) == listed(calls)


@pytest.mark.parametrize("start", range(12))
def test_forgetting_cuts_loops(start: int) -> None:
    """Three steps, a load, four rounds of two; whatever is forgotten, the rest stays and goes on."""
    calls = [call([t]) for t in range(3)] + [Assign((0,), [])]
    calls += [c for t in range(4) for c in (call([t]), call([-t], step=OTHER, back=1))]
    program = Tape(0, calls)
    program.fold()
    assert shape(program) == [(1, 3), 1, (2, 4)]
    program.forget(start)
    assert program.start == start and program.end == 12
    assert listed(program) == listed(calls[start:])
    program.append(call([8]))
    program.fold()
    assert listed(program) == listed([*calls[start:], call([8])])


def test_a_long_window_is_a_short_program() -> None:
    """Learnt rates that all steps read, and learnt weights that each reads one of."""
    torch.manual_seed(3)
    xs, ys = torch.randn(40, 5, 3, dtype=torch.float64), torch.randn(40, 5, 1, dtype=torch.float64)
    lengths, found = set(), {}
    for strategy, steps in (("auto", 12), ("auto", 40), ("full_tape", 12)):
        torch.manual_seed(4)
        net = torch.nn.Linear(3, 1).double()
        lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        weights = [torch.tensor(1 + 0.1 * t, dtype=torch.float64, requires_grad=True) for t in range(steps)]
        inner = metaoptim.MetaAdam([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True, strategy=strategy) as window:
            for t in range(steps):
                inner.step(weights[t] * F.mse_loss(net(xs[t]), ys[t]))
            F.mse_loss(net(xs[0]), ys[1]).backward()
        if strategy == "auto":
            window.program.fold()
            lengths.add(len(window.program.calls))
        found[strategy, steps] = {str(k): p.grad for k, p in enumerate((lr, *weights, *net.parameters()))}
    assert lengths == {3}  # the parameters, the first step, which has no state yet, and the others
    agree(found["auto", 12], found["full_tape", 12])
