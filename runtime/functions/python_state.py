"""What Python values the code around a captured loop may go by: those must be the same in every iteration.

A few iterations stand for all. A count, a list that grows, or a scheduler acts in the captured ones as it does at their
numbers, and would in all others as well.
"""

from __future__ import annotations

import enum
import itertools
import operator
import os
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

_SIMPLE = (int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)
_DEPTH, _LONGEST = 4, 256
_LIBRARIES = (
    os.path.dirname(os.__file__) + os.sep,
    os.sep + "site-packages" + os.sep,
    os.sep + "dist-packages" + os.sep,
)
_HERE = __name__.partition(".")[0]


def user_frames(end: str) -> Iterator[types.FrameType]:
    """Frames of the user's own code, from the innermost one to the one that the module ``end`` has called."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != end:
        if not _foreign(frame.f_globals.get("__name__", ""), frame.f_code.co_filename):
            yield frame
        frame = frame.f_back


def facts_of(frames: Iterator[types.FrameType], ignored: type) -> dict[str, Any]:
    """Python values that the code in ``frames`` sees, by where they are; no tensors, and none that is ``ignored``."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def note(path: str, value: Any, depth: int) -> None:
        if isinstance(value, (ignored, Tensor, type, types.ModuleType)):
            return
        if isinstance(value, _SIMPLE):
            found[path] = repr(value)
            return
        if depth == 0 or id(value) in seen:
            return
        seen.add(id(value))
        for name, inner in _parts(value):
            note(f"{path}{name}", inner, depth - 1)

    for frame in frames:
        names = frame.f_code.co_names
        visible = {n: frame.f_globals[n] for n in names if n in frame.f_globals} | frame.f_locals
        for name, value in visible.items():
            note(name, value, _DEPTH)
    return found


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value is made of, each part with what is written after the value to have it."""
    if isinstance(value, torch.optim.Optimizer):
        for i, group in enumerate(value.param_groups):
            yield from ((f".param_groups[{i}][{k!r}]", v) for k, v in group.items() if k != "params")
    elif isinstance(value, nn.Module):
        for path, module in value.named_modules():
            own = ((k, v) for k, v in vars(module).items() if k[0] != "_")
            yield from (("." + (f"{path}." if path else "") + k, v) for k, v in own)
    elif isinstance(value, Mapping):
        yield ".__len__()", len(value)
        yield from (
            (f"[{k!r}]", value[k]) for k in itertools.islice(value, _LONGEST) if isinstance(k, _SIMPLE)
        )
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        yield ".__len__()", len(value)
        if not isinstance(value, (set, frozenset)):
            yield from ((f"[{i}]", v) for i, v in enumerate(itertools.islice(value, _LONGEST)))
    elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        yield ".tobytes()", hash(value.tobytes())
    elif isinstance(value, types.FunctionType):
        names = value.__code__.co_names
        cells = zip(value.__code__.co_freevars, value.__closure__ or ())
        yield from ((f"'s {n}", c.cell_contents) for n, c in cells if c != types.CellType())
        if not _foreign(value.__module__ or "", value.__code__.co_filename):
            yield from ((f"'s {n}", value.__globals__[n]) for n in names if n in value.__globals__)
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, types.GeneratorType):
        if value.gi_frame is not None:
            yield ".gi_frame", value.gi_frame.f_lasti
            yield from ((f".{k}", v) for k, v in value.gi_frame.f_locals.items())
    elif hasattr(value, "__next__"):
        left = operator.length_hint(value, -1)
        yield " (an iterator)", left if left >= 0 else repr(value)
    elif isinstance(value, LRScheduler):
        yield ".last_epoch", value.last_epoch
    elif not _foreign(
        type(value).__module__, getattr(sys.modules.get(type(value).__module__), "__file__", "")
    ):
        yield from ((f".{k}", v) for k, v in getattr(value, "__dict__", {}).items())
        slots = {name for cls in type(value).__mro__ for name in vars(cls).get("__slots__", ())}
        yield from ((f".{k}", getattr(value, k)) for k in slots if hasattr(value, k))


def _foreign(module: str, path: str | None) -> bool:
    """Whether code is of a library, or of ours."""
    own = module == _HERE or module.startswith(_HERE + ".")
    return own or any(library in (path or "") for library in _LIBRARIES)
