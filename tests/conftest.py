"""One torch thread per test process, and float64 throughout: tests compare to many digits."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metaoptim.compiler.lower.files import remembered
from metaoptim.compiler.lower.library import library
from metaoptim.compiler.lower.processes import background
from metaoptim.optim.base.alive import live_optimizers

os.environ.setdefault("METAOPTIM_WAIT", "1")  # compiled graphs are tested, not whether they come in time
remembered.PAYS = float("inf")  # derivations are tested, not what is read of earlier ones
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


#: Folders whose tests count bytes. A window copies the networks of every optimizer that is alive.
COUNTING = ("budget", "derive", "engine", "planning", "report", "states", "windows")


@pytest.fixture(autouse=True)
def _no_optimizers_left(request: pytest.FixtureRequest) -> None:
    if live_optimizers and request.path.parent.name in COUNTING:
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _no_steps_left() -> Iterator[None]:
    """Python's collector goes through all objects, and steps are many: what a file has captured goes with it.

    What has been imported by then stays, and is looked at no more.
    """
    yield
    library.clear()
    gc.collect()
    gc.freeze()


@pytest.fixture
def never_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No graph is ever compiled, and nobody waits for it."""
    monkeypatch.setenv("METAOPTIM_WAIT", "0")
    monkeypatch.setattr(background, "submit", lambda *args: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(background, "_coming", {})  # or other tests would wait for what does not come
    library.clear()
    yield
    library.clear()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What there is by now stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What takes long, on request."""
    parser.addoption(
        "--budget-cases",
        default="3",
        help="random inner loops under memory budgets: how many, or the first:the end",
    )
    parser.addoption(
        "--whole-grid",
        action="store_true",
        help="all forms over the whole grid of networks, optimizers, modes, horizons and windows (about an hour)",
    )
    parser.addoption(
        "--whole-models",
        action="store_true",
        help="all models of transformers in all variants (some minutes)",
    )
    parser.addoption(
        "--whole-sweep",
        action="store_true",
        help="all operators and modules of PyTorch's databases in all forms (more than an hour)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``budget_case``: the seed of one."""
    if "budget_case" in metafunc.fixturenames:
        first, _, end = metafunc.config.getoption("--budget-cases").rpartition(":")
        metafunc.parametrize("budget_case", range(int(first or 0), int(end)))
