"""Forms B and C against the full tape, over the grid of networks, optimizers, modes, horizons and windows.

The whole grid takes most of an hour: ``pytest tests/exact/test_compiled_grid.py --whole-grid``. Without the option, in
form C every network and every optimizer meets every mode and horizon, and every window; form B, which has the same step
graphs, runs every other pair of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from forms import in_form_c, run_compiled, run_step
from oracle import Problem, agree, leaves, run_oracle, run_window
from problems import NETWORKS, OPTIMIZERS, problem

FORMS: dict[str, Any] = {"B": run_step, "C": run_compiled}
BACKENDS = ("eager", "aot_eager")
HORIZONS, WINDOWS, SLOTS = (0, 1, 2, 7, 20), (None, 1, 3), (None, 2, 1, 5)
MODES = list(itertools.product((True, False), HORIZONS))  # offline, steps
# Backends differ in what they make of a step graph; what a form does around it is the same.
AOT_EAGER = {
    "B": {("dropout", "momentum")},
    "C": {("linear", "adam"), ("conv_bn", "momentum"), ("tied", "sgd"), ("dropout", "rmsprop")},
}

Case = tuple[Problem, int | None]  # and slots


def whole(network: str, optimizer: str) -> list[Case]:
    """The grid of an ordinary window's tests."""
    turn = list(NETWORKS).index(network) + list(OPTIMIZERS).index(optimizer)
    grid = itertools.product(MODES, WINDOWS)
    return [
        (problem(network, optimizer, steps, offline, window), SLOTS[(turn + k) % 4])
        for k, ((offline, steps), window) in enumerate(grid)
    ]


def part(form: str, network: str, optimizer: str) -> list[Case]:
    """Two of these, with outer losses at every step and values that are carried from step to step by turns."""
    i, j = list(NETWORKS).index(network), list(OPTIMIZERS).index(optimizer)
    if form == "B" and (i + j) % 5 not in (0, 2):
        return []
    found = []
    for k in (0, 1):
        offline, steps = MODES[(i + 2 * j + 5 * k) % len(MODES)]
        window = WINDOWS[(i + j) % 3]
        per_step = bool((i + j) % 2)
        carry = form == "C" and window is None and bool((i // 2 + j) % 2)
        case = problem(network, optimizer, steps, offline, window, per_step=per_step, carry=carry)
        found.append((case, SLOTS[(i + j + k) % 4]))
    return found


def check(form: str, backend: str, cases: list[Case]) -> None:
    for case, slots in cases:
        try:
            expected = run_oracle(case)
            if case.steps > 1 and not (case.window is not None and case.offline):
                assert any(v is not None and v.abs().max() > 1e-6 for v in expected.values())
            agree(FORMS[form](case, backend=backend, slots=slots), expected)
        except Exception as error:
            raise AssertionError(
                f"offline={case.offline} steps={case.steps} window={case.window} slots={slots}: {error}"
            ) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_grid:
        every = itertools.product(FORMS, BACKENDS, NETWORKS, OPTIMIZERS)
        if not metafunc.config.getoption("whole_grid"):
            every = (
                c for c in every if (part(c[0], *c[2:]) if c[1] == "eager" else c[2:] in AOT_EAGER[c[0]])
            )
        metafunc.parametrize(("form", "backend", "network", "optimizer"), list(every))


@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_grid(form: str, backend: str, network: str, optimizer: str, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("whole_grid"):
        check(form, backend, whole(network, optimizer))
    elif backend == "eager":
        check(form, backend, part(form, network, optimizer))
    else:
        check(form, backend, [(problem(network, optimizer, 3, network != "conv_bn", per_step=True), 2)])


def test_the_part_covers() -> None:
    modes, windows = set(MODES), set(itertools.product((True, False), WINDOWS))
    for axis, other in ((NETWORKS, OPTIMIZERS), (OPTIMIZERS, NETWORKS)):
        for name in axis:
            pairs = [(name, o) if axis is NETWORKS else (o, name) for o in other]
            seen = [c for pair in pairs for c, _ in part("C", *pair)]
            assert {(c.offline, c.steps) for c in seen} == modes
            assert {(c.offline, c.window) for c in seen} == windows
            assert any(part("B", *pair) for pair in pairs)
    seen = [c for pair in itertools.product(NETWORKS, OPTIMIZERS) for c, _ in part("B", *pair)]
    assert {(c.offline, c.steps) for c in seen} == modes
    assert {(c.offline, c.window) for c in seen} == windows


def test_the_whole_grid_is_that_of_an_ordinary_window() -> None:
    cases = [c for c, _ in whole("linear", "sgd")]
    assert len({(c.offline, c.steps, c.window) for c in cases}) == len(cases) == 30


@pytest.mark.parametrize("optimizer, offline", [("sgd", False), ("adam", True)])
def test_random_stream(optimizer: str, offline: bool) -> None:
    """Masks are those of an ordinary window, and the generator ends where it would have without us."""
    case = problem("dropout", optimizer, 4, offline, per_step=True, carry=True)
    eager = run_window(case)
    after = torch.get_rng_state()
    expected = run_oracle(case)
    agree(eager, expected)
    got = run_compiled(case, slots=2)
    assert torch.equal(torch.get_rng_state(), after)
    agree(got, eager)
    agree(got, expected)


def test_steps_over_indexed_data_share_a_graph() -> None:
    """Also where the network changes tensors of its own in place, as an LSTM's cells do."""
    case = problem("lstm", "sgd", 6, True)
    torch.manual_seed(3)
    net = case.build()
    report = in_form_c(case).explain(net, leaves(case.metas))
    assert report.num_programs == 3  # the first step, the others, the outer loss
