"""What a window records: runs of equal steps are folded as they come, and found again by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import metaoptim
from metaoptim.compiler.ir import Assign, Loop, StepCall, StepGraph
from metaoptim.compiler.recorded_program import Program
from tests.oracle import agree

STEP = StepGraph(torch.fx.Graph(), (), ())
OTHER = StepGraph(torch.fx.Graph(), (), ())


def call(position: int, inputs: Any = (), **changes: Any) -> StepCall:
    given = {"step": STEP, "base": position, "metas": (), "location": "here", **changes}
    return StepCall(
        theta=(0,), update=(0,), opt_state_in=(1,), opt_state_out=(1,), inputs=list(inputs), **given
    )


def listed(program: Program) -> list[Any]:
    """Each call, as what distinguishes it."""
    return [(c.step, c.base, c.inputs, c.metas) if isinstance(c, StepCall) else c.values for c in program]


def test_equal_steps_are_one_loop_and_are_found_again() -> None:
    calls = [Assign((0,), [])] + [call(t, ["rate", f"x{t}"], metas=(0, t)) for t in range(1, 9)]
    program = Program(0, calls)
    assert [getattr(item, "count", 1) for item in program.items] == [1, 8]
    assert (
        listed(program)
        == listed(Program(0, calls))
        == [[]] + [(STEP, t, ["rate", f"x{t}"], (0, t)) for t in range(1, 9)]
    )
    assert (program.end, program.horizon, program.step_graphs) == (9, 8, [STEP])
    assert calls[1].inputs == ["rate", "x1"]  # the caller's own is as it was


@pytest.mark.parametrize(
    "changes",
    [
        {"step": OTHER},
        {"base": 1},  # a step of the same super-step reads theta of before the last one
        {"spies": ("hook",)},
        {"location": "there"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_differs_in_more_than_what_it_is_given_is_apart(changes: dict[str, Any]) -> None:
    program = Program(1, [call(1), call(2, **changes), call(3)])
    assert not any(isinstance(item, Loop) for item in program.items)
    assert program[2].step is changes.get("step", STEP) and program[2].base == changes.get("base", 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("start", range(8))
def test_forgetting_cuts_loops(start: int) -> None:
    """Three steps, a load, four steps; whatever is forgotten, the rest stays and goes on."""
    calls = [call(t, [t]) for t in range(3)] + [Assign((0,), [])] + [call(t, [t]) for t in range(4, 8)]
    program = Program(0, calls)
    program.forget(start)
    assert program.start == start and program.end == 8
    assert listed(program) == listed(Program(start, calls[start:]))
    program.append(call(8, [8]))
    assert program[8].inputs == [8] and program.end == 9  # type: ignore[union-attr]


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
            lengths.add(len(window.program.items))
        found[strategy, steps] = {str(k): p.grad for k, p in enumerate((lr, *weights, *net.parameters()))}
    assert lengths == {3}  # the parameters, the first step, which has no state yet, and the others
    agree(found["auto", 12], found["full_tape", 12])
