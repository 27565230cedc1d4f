"""PyTorch's own operator database inside inner loops, in every form.

A share of the operators by default, all of them with ``--whole-sweep``.
"""

from __future__ import annotations

import pytest

from operators import OPS, SHARE, sweep


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``operator``: the name of one."""
    if "operator" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole-sweep")
        metafunc.parametrize("operator", [*OPS] if whole else [*OPS][::SHARE])


@pytest.mark.filterwarnings("ignore")
def test_operator(operator: str) -> None:
    found = list(sweep(operator))
    assert not [str(f) for f in found if f.outcome in ("wrong", "crashed")]
