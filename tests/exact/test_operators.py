"""PyTorch's own databases of operators and of modules inside inner loops, in every form, against a plain tape.

docs/operators.md and docs/modules.md publish what is refused. By default a share of the entries, a few samples of each;
with ``--whole-sweep`` all of them, and groups of operators that inductor compiles.
"""

from __future__ import annotations

from types import ModuleType

import pytest

import modules
import operators
from sweep_pages import differences, shares

FEW = 3  # samples that make up a share


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``operator`` and ``module``: the name of one; with all operators, also of groups that inductor compiles."""
    whole = metafunc.config.getoption("--whole-sweep")
    if "operator" in metafunc.fixturenames:
        every, share = [*operators.OPS, *operators.COMPILED], [*operators.OPS][:: operators.SHARE]
        metafunc.parametrize("operator", every if whole else share)
    if "module" in metafunc.fixturenames:
        metafunc.parametrize("module", [*modules.MODULES][:: 1 if whole else modules.SHARE])


@pytest.fixture
def most(request: pytest.FixtureRequest) -> int | None:
    """How many samples of an entry are tried; None for all."""
    return None if request.config.getoption("--whole-sweep") else FEW


@pytest.mark.filterwarnings("ignore")
def test_operator(operator: str, most: int | None) -> None:
    found = [*operators.sweep(operator, None, most)]
    assert not differences(operator, found, operators.TABLE, whole=most is None)


@pytest.mark.filterwarnings("ignore")
def test_module(module: str, most: int | None) -> None:
    found = [*modules.sweep(module, None, most)]
    assert not differences(module, found, modules.TABLE, whole=most is None)


@pytest.mark.parametrize("database", [operators, modules])
def test_pages(database: ModuleType) -> None:
    """Nothing is wrong, and what eager PyTorch can differentiate twice is done but for a few."""
    for row in ("samples wrong", "samples crashed"):
        assert set(shares(database.TABLE, row).values()) == {"0"}
    for row in ("share of samples that are equal", "share of entries all of whose samples are equal"):
        for form, least in (("A", 98.0), ("B", 95.0), ("C", 95.0)):
            assert float(shares(database.TABLE, row)[form].rstrip("%")) >= least, (row, form)
