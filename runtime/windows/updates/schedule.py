"""A schedule: a hyper-parameter that is a function of the step count, with numbers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.ir.update import name_of


class Schedule:
    """A hyper-parameter as a pure function of the step count: ``schedule(step)``.

    An optimizer evaluates it before each of its steps, at the number of steps that it has taken so far. ``a * b`` is
    the product of two schedules, or of one and a number or tensor.

    Args:
        at: ``step -> value``, or ``(step, hyper) -> value`` where there are numbers; ``step`` is a 0-dim float64 tensor
            that is not negative and counts from 0. It has no value while a function is captured, so that it decides by
            `torch.where`, not by ``if``. It may be a module.
        **hyper: what ``at`` finds in ``hyper``, by name. A tensor that requires grad receives a meta-gradient.

    Attributes:
        hyper: these numbers, a dictionary. Values that are set in it hold from the next step on.

    Raises:
        TypeError: for something that cannot be called.

    Example:
        >>> schedule = metaoptim.schedules.Schedule(lambda step, hyper: hyper["lr"] / (1 + step).sqrt(), lr=0.2)
        >>> float(schedule(3))
        0.1
        >>> float((schedule * 0.5)(3))
        0.05
        >>> float(metaoptim.schedules.Schedule(lambda step: 0.5**step)(2))
        0.25
    """

    def __init__(self, at: Callable[..., float | Tensor], /, **hyper: Any) -> None:
        if not callable(at):
            raise TypeError(f"Schedule: got {at!r}, expected a function (step, hyper) -> number or tensor")
        self.at, self.hyper = at, hyper

    def __call__(self, step: float | Tensor) -> Tensor:
        """The value after ``step`` steps, of float64 where no number is a tensor."""
        count = torch.as_tensor(step, dtype=torch.float64)
        value = self.at(count, self.hyper) if self.hyper else self.at(count)
        if not isinstance(value, (int, float, Tensor)):
            raise TypeError(f"the schedule {self!r} gives {value!r}, expected a number or a tensor")
        return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)

    def __mul__(self, other: float | Tensor | Schedule) -> Schedule:
        if not isinstance(other, (int, float, Tensor, Schedule)):
            return NotImplemented
        return Schedule(_product, first=self, second=other)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"{name_of(self.at)}({', '.join(f'{k}={v!r}' for k, v in self.hyper.items())})"


def _product(step: Tensor, hyper: dict[str, Any]) -> Tensor:
    second = hyper["second"]
    return hyper["first"](step) * (second(step) if isinstance(second, Schedule) else second)
