"""Every exception and warning metaoptim raises, and where in the user's code it points to."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Iterator
from types import FrameType, ModuleType
from typing import Any

import torch

_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SKIP = tuple(os.path.join(_OWN, part) + os.sep for part in ("metaoptim", "compiler", "runtime")) + (
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    os.path.dirname(os.__file__) + os.sep + "contextlib",
)


class MetaOptimError(RuntimeError):
    """Base class of what metaoptim raises; the message names the thing, the fix, and the user's line."""

    def __init__(self, message: str) -> None:
        where = user_location()
        self.reason = message
        super().__init__(f"{message}\n  at {where}" if where else message)


class WindowError(MetaOptimError):
    """A window, an optimizer or a network was used where it cannot be."""


class LossError(MetaOptimError):
    """The inner loss given to ``step`` cannot be differentiated as it stands."""


class StaleInputError(MetaOptimError):
    """Something an inner step read was overwritten before its backward."""


class CaptureError(MetaOptimError):
    """An inner step does something that cannot be recorded exactly."""


class BudgetError(MetaOptimError):
    """A memory budget is too small for any plan.

    Attributes:
        minimum: the smallest budget, in bytes, that there is a plan for.

    Example:
        >>> net = torch.nn.Linear(3, 1)
        >>> @metaoptim.compile(backend="eager", memory_budget=64)
        ... def meta_loss(net, xs):
        ...     inner = metaoptim.MetaSGD([net])
        ...     with metaoptim.SlidingWindow(offline=True) as window:
        ...         for x in window.scan(xs):
        ...             inner.step(net(x).square().mean())
        ...         return net(xs[0]).square().mean()
        >>> try:
        ...     meta_loss(net, torch.ones(5, 2, 3))
        ... except metaoptim.BudgetError as error:
        ...     print(error.minimum > 64)
        True
    """

    def __init__(self, message: str, minimum: int) -> None:
        super().__init__(message)
        self.minimum = minimum


class StoreError(MetaOptimError):
    """A state that was offloaded cannot be kept, or is not what it was; it is never used then."""


class ProgramError(MetaOptimError):
    """A program that a compiled function became is not well-formed: a defect of metaoptim, found by its verifier."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"{message}. This is a defect of metaoptim; please report it. Without @metaoptim.compile the function runs "
            "as an ordinary window"
        )


class UnreachableWarning(UserWarning):
    """A tensor requires grad but no gradient can flow back to it."""


def _user_frames() -> Iterator[FrameType]:
    """The frames that belong to neither metaoptim nor torch, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_SKIP):
            yield frame
        frame = frame.f_back


def _seen_by(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """What a frame sees, by name: locals, globals, and attributes of locals."""
    own = list(frame.f_locals.items())
    yield from own
    yield from list(frame.f_globals.items())
    for name, value in own:
        if not isinstance(value, ModuleType):
            yield from ((f"{name}.{k}", v) for k, v in list(getattr(value, "__dict__", {}).items()))


def user_scope() -> list[tuple[str, Any]]:
    """What the innermost frame of the user's sees, by name."""
    return [named for frame in itertools.islice(_user_frames(), 1) for named in _seen_by(frame)]


def user_location() -> str:
    """File and line of the innermost frame of the user's."""
    for frame in _user_frames():
        return sys.intern(f"{frame.f_code.co_filename}:{frame.f_lineno}")
    return ""


def user_name_of(tensor: torch.Tensor) -> str | None:
    """The name ``tensor`` has in a calling frame (a local, a global, or an attribute of one), if any."""
    return next((name for f in _user_frames() for name, value in _seen_by(f) if value is tensor), None)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning that points at the user's line."""
    for frame in _user_frames():
        registry = frame.f_globals.setdefault("__warningregistry__", {})
        warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, registry=registry)
        return
    warnings.warn(message, category, stacklevel=2)
