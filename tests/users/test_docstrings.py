"""Examples in docstrings: every public name has one, and it runs as it is written."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch

import metaoptim

SPOKEN = {
    "CaptureError",
    "LossError",
    "MetaOptimError",
    "ProgramError",
    "StaleInputError",
    "StoreError",
    "UnreachableWarning",
    "WindowError",
}
MODULES = [name for _, name, _ in pkgutil.walk_packages(metaoptim.__path__, "metaoptim.")]


def examples() -> dict[str, doctest.DocTest]:
    """All docstrings of the package that hold an example, by the name of what they document."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found: dict[str, doctest.DocTest] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for test in finder.find(module, name, module=module):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = examples()


class _Stated(doctest.OutputChecker):
    """Compares what is stated: a loop of steps also echoes their losses."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_example(name: str) -> None:
    torch.manual_seed(0)
    globals_: dict[str, Any] = {"torch": torch, "metaoptim": metaoptim}
    test = EXAMPLES[name]
    test.globs.update(globals_)
    runner = doctest.DocTestRunner(_Stated(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_every_public_name_has_an_example() -> None:
    documented = {name.rpartition(".")[2] for name in EXAMPLES}
    public = {f.__name__ for n in metaoptim.__all__ if callable(f := getattr(metaoptim, n))}
    assert public - documented - SPOKEN == set()
    assert all(inspect.getdoc(getattr(metaoptim, n)) for n in metaoptim.__all__)
