"""`window.scan` in a captured function: a few iterations of a loop are captured, and stand for all.

A count, a list that grows, or a scheduler acts in the captured iterations as it does at their numbers, and would in all
others as well: the Python values that the code around the loop may go by must be the same in every iteration.
"""

from __future__ import annotations

import dis
import enum
import itertools
import operator
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from metaoptim.compiler.capture.symbolic.tracer import Tracer
from metaoptim.compiler.ir.traces.trace import Scan
from metaoptim.compiler.ir.values import Input, ScanItem
from metaoptim.errors import CaptureError, user_location

# Iterations of a scan that are captured: one may differ (state is created), the others show what is carried from one to
# the next, and that nothing is carried further.
CAPTURED_ITERATIONS = 4


class Loops:
    """The loops of one window that are captured; ``open``: whether one is being captured."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer, self.open = tracer, False

    def scan(self, tensors: tuple[Tensor, ...], count: int) -> Iterator[tuple[int, list[Tensor]]]:
        """The first iterations of a loop over the leading axis of ``tensors``; they stand for all."""
        if self.open:
            raise CaptureError(
                "window.scan inside window.scan; flatten the loops, or use a plain `for` inside"
            )
        trace = self._tracer.trace
        labels = list(range(min(count, CAPTURED_ITERATIONS)))
        if count > CAPTURED_ITERATIONS:
            # later ones, so that what depends on the index shows; unevenly, so that a row of an earlier one does
            labels[-2:] = [(count - 1) // 2, count - 1]
        scan, self.open = Scan(count, labels, user_location()), True
        facts: list[dict[str, Any]] = []
        for k in labels:
            self._check_python(facts, count)
            scan.begins.append(len(trace.entries))
            yield Iteration(k), [self._item(t, k) for t in tensors]
        self._check_python(facts, count)
        scan.end, self.open = len(trace.entries), False
        if scan.begins:
            trace.scans.append(scan)

    def _check_python(self, facts: list[dict[str, Any]], count: int) -> None:
        """Refuse Python values that change from one iteration to the next, after the first; ``facts``: those so far."""
        if count <= CAPTURED_ITERATIONS:  # all of them are captured
            return
        facts.append(_facts())
        if len(facts) < 3:
            return
        before, now = facts[-2:]
        changed = [p for p in now if p in before and now[p] != before[p]]
        if changed:
            path = min(changed, key=len)
            where, was, becomes = path.removesuffix(".__len__()"), before[path], now[path]
            what = f"a Python number changes: {path} is {was}, then {becomes}"
            if where != path:
                what = f"{where} holds {was}, then {becomes} values in the middle of a scan"
            raise CaptureError(
                f"{what}, from one iteration of window.scan or window.range to the next. A few iterations are captured "
                "and stand for all, so whatever depends on it would keep its first values. Scan a tensor of what "
                "differs, use the number of window.range as an index, add up in a tensor, or use a plain `for`"
            )

    def _item(self, t: Tensor, k: int) -> Tensor:
        tracer = self._tracer
        source = tracer.value_of(t)
        if not isinstance(source, Input):
            return t[k]  # computed inside: a call of the trace
        with tracer.paused():
            item = tracer.faked(t)[0].detach()
            if source.grad:
                item.requires_grad_()
        tracer.bind(item, ScanItem(source, k))
        return item


class Loop:
    """A captured loop, to be iterated over by a `for` of the user's."""

    def __init__(self, iterations: Iterator[Any]) -> None:
        self._iterations = iterations

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        if dis.opname[frame.f_code.co_code[frame.f_lasti]] != "GET_ITER":
            raise CaptureError(
                "window.scan or window.range is handed to something else than a `for` (zip, enumerate, list, ...). A "
                "few iterations are captured and stand for all, and what runs beside them does not. Scan a tensor of "
                "it as well, use the number of window.range as an index, or use a plain `for`"
            )
        return self._iterations


def _refusing(name: str) -> Callable:
    def refuse(self: int, *others: Any) -> Any:
        raise CaptureError(
            f"the number of an iteration of window.range is asked for its value ({name}): it may index tensors (xs[t], "
            "xs[2 * t + 1]), and nothing else may depend on it, since a few iterations stand for all. Scan a tensor of "
            "what differs, or use a plain `for`"
        )

    return refuse


class Iteration(int):
    """The number of an iteration of a captured loop."""

    def __add__(self, other: Any) -> Any:
        return _moved(int.__add__(self, other))

    def __sub__(self, other: Any) -> Any:
        return _moved(int.__sub__(self, other))

    def __mul__(self, other: Any) -> Any:
        return _moved(int.__mul__(self, other))

    def __rsub__(self, other: Any) -> Any:
        return _moved(int.__rsub__(self, other))

    __radd__, __rmul__ = __add__, __mul__


for _name in (
    "__bool__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__mod__", "__floordiv__", "__rmod__",
    "__rfloordiv__", "__divmod__", "__and__", "__or__", "__xor__", "__rshift__", "__lshift__", "__hash__",
):  # fmt: skip
    setattr(Iteration, _name, _refusing(_name))


def _moved(value: Any) -> Any:
    return value if value is NotImplemented else Iteration(value)


# -- Python values that the code around a loop may go by --------------------------------------------------------------

_SIMPLE = (int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)
_DEPTH, _LONGEST = 4, 256
_OWN = __name__.partition(".")[0]
_PACKAGES = [f"{os.sep}{name}-packages{os.sep}" for name in ("site", "dist")]
_LIBRARIES = (os.path.dirname(os.__file__) + os.sep, *_PACKAGES)


def _facts() -> dict[str, Any]:
    """Python values that the user's code sees, from here up to what is captured, by where they are; no tensors."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def note(path: str, value: Any, depth: int) -> None:
        if isinstance(value, (Iteration, Tensor, type, types.ModuleType)):
            return
        if isinstance(value, _SIMPLE):
            found[path] = repr(value)
        elif depth and id(value) not in seen:
            seen.add(id(value))
            for name, inner in _parts(value):
                note(f"{path}{name}", inner, depth - 1)

    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "metaoptim.functions.specialization":
        names, code = frame.f_globals, frame.f_code
        if not _foreign(names.get("__name__", ""), code.co_filename):
            for name, value in ({n: names[n] for n in code.co_names if n in names} | frame.f_locals).items():
                note(name, value, _DEPTH)
        frame = frame.f_back
    return found


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value is made of, each part with what is written after the value to have it."""
    if isinstance(value, torch.optim.Optimizer):
        for i, group in enumerate(value.param_groups):
            yield from ((f".param_groups[{i}][{k!r}]", v) for k, v in group.items() if k != "params")
        for i, transform in enumerate(getattr(value, "transforms", ())):
            yield f".transforms[{i}].hyper", transform.hyper
    elif isinstance(value, nn.Module):
        for path, module in value.named_modules():
            own = ((k, v) for k, v in vars(module).items() if k[0] != "_")
            yield from (("." + (f"{path}." if path else "") + k, v) for k, v in own)
    elif isinstance(value, Mapping):
        yield ".__len__()", len(value)
        first = itertools.islice(value, _LONGEST)
        yield from ((f"[{k!r}]", value[k]) for k in first if isinstance(k, _SIMPLE))
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
    elif not _foreign(type(value).__module__):
        yield from ((f".{k}", v) for k, v in getattr(value, "__dict__", {}).items())
        slots = {name for cls in type(value).__mro__ for name in vars(cls).get("__slots__", ())}
        yield from ((f".{k}", getattr(value, k)) for k in slots if hasattr(value, k))


def _foreign(module: str, path: str | None = None) -> bool:
    """Whether code is of a library, or of ours; ``path``: of its file, if that need not be its module's."""
    where: str = path or getattr(sys.modules.get(module), "__file__", None) or ""
    return module.partition(".")[0] == _OWN or any(library in where for library in _LIBRARIES)
