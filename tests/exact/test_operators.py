"""PyTorch's own operator database inside inner loops, in every form; docs/operators.md publishes what is refused.

A share of the operators by default, with those that are refused; all of them with ``--whole-sweep``.
"""

from __future__ import annotations

import re

import pytest
import torch

from operators import OPS, SHARE, TABLE, rows, sweep

#: What a plain tape differentiates none of the samples of.
UNCOMPARED = ("__rpow__", "linalg.eig", "nn.functional.ctc_loss", "sparse.sampled_addmm", "to_sparse")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``operator``: the name of one."""
    if "operator" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole-sweep")
        refused = set(re.findall(r"^\| `([\w.]+)", TABLE.read_text(), re.MULTILINE))
        refused |= {name.rpartition(".")[0] for name in refused}
        share = [*OPS][::SHARE]
        metafunc.parametrize("operator", [n for n in OPS if whole or n in share or n in refused])


@pytest.mark.filterwarnings("ignore")
def test_operator(operator: str) -> None:
    found = list(sweep(operator))
    assert found or operator in UNCOMPARED
    assert not [str(f) for f in found if f.outcome in ("wrong", "crashed")]
    if not torch.__version__.startswith("2.13"):  # which the table is of
        return
    names = tuple(f"| `{name}` |" for name in {f.name for f in found})
    assert rows(found) == [line for line in TABLE.read_text().splitlines() if line.startswith(names)]
