"""Inner loops whose states are offloaded, for the tests of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metaoptim
from forms import mlp
from metaoptim.runtime.states.disk import Files
from problems import data


def files(directory: Path) -> list[Path]:
    """The states that lie in a directory now."""
    return sorted(directory.glob("metaoptim-*/*.state"))


def loop(steps: int, batches: Any = None, **options: Any) -> tuple[Any, Tensor, list[Tensor]]:
    """An engine, the outer loss of its loop, and what that is differentiated by."""
    net, lr = mlp(), torch.tensor(0.1, requires_grad=True)
    own = [*net.parameters(), lr]
    inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.5)
    xs, ys = data(steps) if batches is None else batches
    with metaoptim.SlidingWindow(offline=True, **options) as window:
        engine: Any = getattr(window._session, "engine", None)
        for t in range(steps):
            inner.step(F.mse_loss(net(xs[t]), ys[t]))
        return engine, F.mse_loss(net(xs[steps]), ys[steps]), own


def same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def watch_writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every file that is written from now on."""
    found, real = [], Files.write

    def write(self: Files, parts: Any) -> Any:
        file = real(self, parts)
        found.append(file.nbytes)
        return file

    monkeypatch.setattr(Files, "write", write)
    return found
