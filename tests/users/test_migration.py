"""docs/migration.md: code for other libraries and for this one, pair by pair, gives the same meta-gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

TEXT = (Path(__file__).parents[2] / "docs" / "migration.md").read_text("utf-8")


class Pair(NamedTuple):
    """A library, and a loop in it and in metaoptim, with what the page has said before it."""

    library: str
    earlier: list[str]
    before: str
    after: str


def pairs() -> list[Pair]:
    """A block that names a library, and the next one that names none."""
    blocks = re.findall(r"```python *(\w*)\n(.*?)```", TEXT, re.DOTALL)
    setup, found, earlier = blocks[0][1], [], dict[str, list[str]]()
    for (library, before), (none, after) in zip(blocks[1::2], blocks[2::2], strict=True):
        assert library and not none
        found.append(Pair(library, [setup, *earlier.setdefault(library, [])], before, after))
        earlier[library] += re.findall(r"^import .*$", before, re.MULTILINE)
    return found


PAIRS = pairs()


def gradients(of: dict[str, Any]) -> dict[str, Tensor | None]:
    """Of the network, and of the meta-parameters that the loop has."""
    found = {k: p.grad for k, p in of["net"].named_parameters()}
    return found | {k: of[k].grad for k in ("lr", "log_lr") if k in of}


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{k}-{pair.library}" for k, pair in enumerate(PAIRS)])
@pytest.mark.filterwarnings("ignore")  # what other libraries do
def test_before_and_after_are_equal(pair: Pair) -> None:
    pytest.importorskip(pair.library)
    found = []
    for block in (pair.before, pair.after):
        scope: dict[str, Any] = {}
        for text in (*pair.earlier, block):
            exec(compile(text, "docs/migration.md", "exec"), scope)
        found.append(gradients(scope))
    before, after = found
    assert before.keys() == after.keys() and any(g is not None for g in before.values())
    for name, expected in before.items():
        if expected is None:
            assert after[name] is None
        else:
            assert expected.abs().max() > 1e-6
            torch.testing.assert_close(after[name], expected, rtol=1e-9, atol=1e-12)
