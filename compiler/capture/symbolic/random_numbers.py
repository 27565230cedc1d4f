"""Random numbers that a capture cannot follow, Python's and numpy's, and seeds: they would be the same in every call.

Generators of the process are everybody's: that one has moved does not say who has moved it.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from metaoptim.errors import CaptureError

from ..intercept import recording

_elsewhere: Counter[str] = Counter()  # calls of other threads, by whose they are


def install(stack: ExitStack) -> None:
    """Have the functions of Python's and numpy's generators refuse to be called by a thread that captures."""
    for owner, (module, generator) in _generators().items():
        for name, function in list(vars(module).items()):
            moves = getattr(function, "__self__", None) is generator and name not in ("getstate", "get_state")
            if moves or name == "seed":
                stack.enter_context(patch.object(module, name, _refused(function, owner)))


@contextmanager
def untouched() -> Iterator[None]:
    """Raise `CaptureError` if a generator has moved in the block that no other thread is known to have moved."""
    elsewhere = _elsewhere.copy()
    before = _states()
    yield
    now = _states()
    for owner, state in before.items():
        if now[owner] != state and _elsewhere[owner] == elsewhere[owner]:
            _refuse(owner)


def _generators() -> dict[str, tuple[Any, Any]]:
    """Whose it is -> the module with its functions, and the generator."""
    found: dict[str, tuple[Any, Any]] = {"Python": (random, random.getrandbits.__self__)}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found["numpy"] = numpy.random, numpy.random.get_state.__self__
    return found


def _states() -> dict[str, Any]:
    states: dict[str, Any] = {"Python": random.getstate(), "numpy": None}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        _, keys, position, *_ = numpy.random.get_state()
        states["numpy"] = keys.tobytes(), position
    # what the function draws from torch's is part of the trace; others may draw from it meanwhile
    states["torch"] = torch.initial_seed()
    return states


def _refused(original: Callable, owner: str) -> Callable:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = recording.get()
        if recorder is not None and recorder.symbolic:
            raise CaptureError(_message(owner))
        _elsewhere[owner] += 1
        try:
            return original(*args, **kwargs)
        finally:
            _elsewhere[owner] += 1  # a capture may have begun since

    return call


def _message(owner: str) -> str:
    return (
        f"random numbers of {owner} were drawn or seeded while the function was captured; they would be the same in "
        "every call. Draw them outside and pass them in (torch.rand and the like inside are fine)"
    )


def _refuse(owner: str) -> None:
    others = threading.active_count() - 1
    if not others:
        raise CaptureError(_message(owner))
    raise CaptureError(
        f"the random generator of {owner} has {'been seeded' if owner == 'torch' else 'moved'} while the function was "
        f"captured, by the function or by another thread ({others} more are alive). If the function draws from it or "
        "seeds it, do that outside and pass the numbers in (torch.rand and the like inside are fine). If not, call the "
        "function a first time, which captures it, while no other thread does"
    )
