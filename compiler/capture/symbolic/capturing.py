"""The block in which a function is captured: fake tensors, a tracer, and what is put back after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from metaoptim.compiler.compat import FakeTensorMode

from .tracer import Tracer

#: Called when a capture begins: what they return puts Python state back that the captured function may change.
preserving: list[Callable[[], Callable[[], None]]] = []


@contextmanager
def capturing() -> Iterator[Tracer]:
    """Everything the calling thread does inside the block is traced, over fake tensors."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tracer = Tracer(fake)
    restore = [keep() for keep in preserving]
    warned = warnings.catch_warnings()
    warned.__enter__()
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by copy.deepcopy
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # by faking one
    # autocast remembers the casts of leaves: fake ones would outlive the capture, real ones enter it as constants
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with fake:
            tracer.__enter__()
            try:
                yield tracer
            finally:
                tracer.depth += 1
                tracer.close()
    finally:
        warned.__exit__(None, None, None)
        torch.set_autocast_cache_enabled(cached)
        for put_back in restore:
            put_back()
