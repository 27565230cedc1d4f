"""Meta-gradients against the full-tape oracle, over the grid of optimizers, modes, horizons, windows and networks."""

from __future__ import annotations

import itertools

import pytest

from oracle import agree, run_oracle, run_window
from problems import NETWORKS, OPTIMIZERS, problem


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_grid(network: str, optimizer: str) -> None:
    for offline, steps, window in itertools.product((True, False), (0, 1, 2, 7, 20), (None, 1, 3)):
        case = problem(network, optimizer, steps, offline, window)
        expected = run_oracle(case)
        if steps > 1 and not (window is not None and offline):
            assert any(v is not None and v.abs().max() > 1e-6 for v in expected.values())
        for slots in (None, 1, 2, 5):
            try:
                agree(run_window(case, slots=slots), expected)
            except Exception as error:
                raise AssertionError(
                    f"offline={offline} steps={steps} window={window} slots={slots}: {error}"
                ) from error
