"""The number of an iteration while a loop is captured by a few of them: it may index tensors, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metaoptim.errors import CaptureError


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
