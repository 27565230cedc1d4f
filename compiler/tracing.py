"""The circumstances under which anything is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .capture.intercept import recording

_lock = RLock()  # make_fx patches torch globally while it runs


@contextmanager
def tracing() -> Iterator[None]:
    """One trace at a time, outside the window, the user's modes and autocast, with grad mode on."""
    recorder = recording.set(None)
    with (
        _lock,
        _disable_current_modes(),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.autograd.set_detect_anomaly(False),
    ):
        try:
            yield
        finally:
            recording.reset(recorder)
