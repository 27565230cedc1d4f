"""The circumstances under which anything is traced."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

from metaoptim.compiler.compat import DisableAutocast, disable_current_modes

from ..capture.intercept import recording

_lock = RLock()  # make_fx patches torch globally while it runs


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's cycle collector rests inside the block.

    A trace is many objects, all of them alive, and no cycles: the collector would go through them, and through all that
    torch has loaded, again and again (more than half of the time that a capture of 1,000 steps took).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def tracing() -> Iterator[None]:
    """One trace at a time, outside the window, the user's modes, autocast and inference mode, with grad mode on."""
    recorder = recording.set(None)
    with (
        uncollected(),
        _lock,
        disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        DisableAutocast(),
        torch.autograd.set_detect_anomaly(False),
    ):
        try:
            yield
        finally:
            recording.reset(recorder)
