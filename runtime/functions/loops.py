"""`window.scan` in a captured function: a few iterations of a loop are captured, and stand for all."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from metaoptim.compiler.capture.symbolic.tracer import Tracer
from metaoptim.compiler.ir.trace import Scan
from metaoptim.compiler.ir.values import Input, ScanItem
from metaoptim.errors import CaptureError, user_location

from .python_state import facts_of, user_frames

# Iterations of a scan that are captured: one may differ (state is created), the others show what is carried from one to
# the next, and that nothing is carried further.
CAPTURED_ITERATIONS = 4


class Loops:
    """The loops of one window that are captured.

    Attributes:
        open: whether one is being captured.
    """

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
            labels[-2:] = [count // 2, count - 1]  # later ones, so that what depends on the index shows
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
        facts.append(facts_of(user_frames("metaoptim.functions.captured"), Iteration))
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
                "and stand for all, so what goes by it would go by its first values. Scan a tensor of what differs, "
                "use the number of window.range as an index, add up in a tensor, or use a plain `for`"
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
