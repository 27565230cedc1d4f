"""Meta-gradients against the full-tape oracle, over the grid of optimizers, modes, horizons, windows and networks.

``pytest tests/exact/test_exact_grid.py --whole-grid`` runs all of it with every number of slots. Without the option,
horizons of 7 and 13 steps keep every state or, by turns, 1, 2 or 5 of them.
"""

from __future__ import annotations

import itertools

import pytest

from oracle import agree, run_oracle, run_window
from problems import NETWORKS, OPTIMIZERS, problem

SLOTS = (None, 1, 2, 5)
CASES = list(itertools.product((True, False), (0, 1, 2, 7, 13), (None, 1, 3)))  # offline, steps, window


def slots_of(case: int, network: str, optimizer: str, whole: bool) -> tuple[int | None, ...]:
    """Numbers of slots to run a case with; in the part, every few cases all of them have had their turn."""
    if whole or CASES[case][1] < 7:
        return SLOTS
    turn = case + list(NETWORKS).index(network) + list(OPTIMIZERS).index(optimizer)
    return (None, SLOTS[1 + turn % 3]) if turn % 2 else (SLOTS[1 + turn % 3],)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_grid(network: str, optimizer: str, request: pytest.FixtureRequest) -> None:
    whole = request.config.getoption("whole_grid")
    for number, (offline, steps, window) in enumerate(CASES):
        case = problem(network, optimizer, steps, offline, window)
        expected = run_oracle(case)
        if steps > 1 and not (window is not None and offline):
            assert any(v is not None and v.abs().max() > 1e-6 for v in expected.values())
        for slots in slots_of(number, network, optimizer, whole):
            try:
                agree(run_window(case, slots=slots), expected)
            except Exception as error:
                raise AssertionError(
                    f"offline={offline} steps={steps} window={window} slots={slots}: {error}"
                ) from error


def test_the_part_covers() -> None:
    """Each network, and each optimizer, meets every mode, horizon and window with every number of slots."""
    for of, others in ((NETWORKS, OPTIMIZERS), (OPTIMIZERS, NETWORKS)):
        for name in of:
            pairs = [(name, other) if of is NETWORKS else (other, name) for other in others]
            seen = {(n, s) for n in range(len(CASES)) for pair in pairs for s in slots_of(n, *pair, False)}
            assert len(seen) == len(CASES) * len(SLOTS)
