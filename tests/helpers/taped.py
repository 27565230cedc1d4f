"""Ordinary windows in tests, run by every recorded form and by the full tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metaoptim
from problems import data

STEPS = 3
XS, YS = data(STEPS)
RECORDED = ({}, {"slots": 1}, {"window": 99})


def loss_of(net: Any, t: int) -> Tensor:
    return F.mse_loss(net(XS[t]), YS[t])


def against_tape(run: Callable[[dict], list[Any]]) -> None:
    """The same numbers from every recorded window as from the full tape."""
    expected = run({"strategy": "full_tape"})
    assert any(v is not None and bool(v.any()) for v in expected), "nothing has a gradient, by the tape too"
    for options in RECORDED:
        got = run(options)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def refused(run: Callable[[dict], Any], match: str) -> None:
    """Refused by every recorded window, and taken by the full tape."""
    for options in RECORDED:
        with pytest.raises(metaoptim.CaptureError, match=match):
            run(options)
    run({"strategy": "full_tape"})
