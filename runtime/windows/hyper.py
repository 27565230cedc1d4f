"""An optimizer's hyper-parameters, taken apart into what is constant and what a step is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from metaoptim.compiler.ir.update import Clip, HyperRef
from metaoptim.compiler.ir.values import Number

_NUMBERS = (int, float, Tensor)


class Hyper(NamedTuple):
    """The plan's groups and clipping, the slots' values, and what stands for these in the recording."""

    groups: tuple
    clip: Clip | None
    slots: list[Any]
    roots: list[Any]


def hyper_of(optimizer: Any, value_of: Callable[[Tensor], Any], lifts: bool) -> Hyper:
    """The hyper-parameters of ``optimizer`` as they are now.

    Args:
        optimizer: an inner optimizer.
        value_of: what stands for a tensor in the recording.
        lifts: whether numbers may become inputs of the step.
    """
    slots: list[Any] = []
    roots: list[Any] = []

    def template(value: Any) -> Any:
        if isinstance(value, Tensor):
            roots.append(value_of(value))
        elif type(value) is float and value != 0 and lifts:
            roots.append(Number(value))
        elif isinstance(value, (tuple, list)):
            return tuple([template(v) for v in value])
        else:
            return value
        slots.append(value)
        return HyperRef(len(slots) - 1)

    for k, group in enumerate(optimizer.param_groups):
        for name, default in optimizer.defaults.items():
            if type(default) in _NUMBERS and not isinstance(group[name], (int, float, Tensor)):
                raise TypeError(
                    f"{type(optimizer).__name__}: param_groups[{k}][{name!r}] is {group[name]!r}, expected a number or "
                    "a tensor"
                )
    groups = tuple(
        tuple((name, template(group[name])) for name in optimizer.defaults)
        for group in optimizer.param_groups
    )
    normalizer = optimizer._normalizer
    clip = None if normalizer is None else Clip(template(normalizer[0]), normalizer[1])
    return Hyper(groups, clip, slots, roots)
