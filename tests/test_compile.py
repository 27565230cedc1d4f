"""Form C against the full-tape oracle, over a covering part of the grid of networks, optimizers, modes and horizons."""

from __future__ import annotations

import itertools

import pytest
import torch

from forms import run_compiled
from oracle import Problem, agree, run_oracle, run_window
from problems import NETWORKS, OPTIMIZERS, problem

GRID = [n for n in NETWORKS if n != "lstm"]  # whose graphs are large: tested below
MODES = list(itertools.product((True, False), (0, 1, 2, 7)))  # offline, steps


def cases(network: str, optimizer: str) -> list[tuple[Problem, int | None]]:
    """Problems with slots and without: every network and every optimizer meets every mode and horizon."""
    i, j = GRID.index(network), list(OPTIMIZERS).index(optimizer)
    per_step, carry = bool((i + j) % 2), bool((i // 2 + j) % 2)
    found = []
    for k in (0, 4):
        offline, steps = MODES[(i + 3 * j + k) % len(MODES)]
        case = problem(network, optimizer, steps, offline, per_step=per_step, carry=carry)
        found.append((case, 2 if (i + j + k // 4) % 2 else None))
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", GRID)
def test_grid(network: str, optimizer: str) -> None:
    for case, slots in cases(network, optimizer):
        expected = run_oracle(case)
        if case.steps > 1:
            assert any(v is not None and v.abs().max() > 1e-6 for v in expected.values())
        try:
            agree(run_compiled(case, slots=slots), expected)
        except Exception as error:
            raise AssertionError(f"{case.offline=} {case.steps=} {slots=}: {error}") from error


def test_the_grid_covers() -> None:
    """Every network, and every optimizer, in either mode with every horizon."""
    for axis, other in ((GRID, OPTIMIZERS), (OPTIMIZERS, GRID)):
        for name in axis:
            pairs = [(name, o) if axis is GRID else (o, name) for o in other]
            seen = {(c.offline, c.steps) for pair in pairs for c, _ in cases(*pair)}
            assert seen == set(MODES), (name, set(MODES) - seen)


@pytest.mark.parametrize("optimizer, offline", [("sgd", True), ("adam", False)])
def test_lstm(optimizer: str, offline: bool) -> None:
    case = problem("lstm", optimizer, 2, offline, carry=True)
    agree(run_compiled(case, slots=None if offline else 1), run_oracle(case))


@pytest.mark.parametrize("optimizer, offline", [("sgd", False), ("adam", True)])
def test_random_stream(optimizer: str, offline: bool) -> None:
    """Masks are those of an ordinary window, and the generator ends where it would have without us."""
    case = problem("dropout", optimizer, 7, offline, per_step=True, carry=True)
    eager = run_window(case)
    after = torch.get_rng_state()
    expected = run_oracle(case)
    agree(eager, expected)
    got = run_compiled(case, slots=2)
    assert torch.equal(torch.get_rng_state(), after)
    agree(got, eager)
    agree(got, expected)


@pytest.mark.parametrize(
    "network, optimizer, offline",
    [
        ("linear", "amsgrad", True),
        ("conv_bn", "momentum", False),
        ("tied", "sgd", True),
        ("dropout", "adam", False),
    ],
)
def test_aot_eager(network: str, optimizer: str, offline: bool) -> None:
    case = problem(network, optimizer, 3, offline, per_step=True, carry=True)
    agree(run_compiled(case, backend="aot_eager", slots=2), run_oracle(case))
