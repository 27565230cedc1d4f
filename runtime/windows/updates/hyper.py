"""Hyper-parameters at a step: schedules at the step's count, and what a step is given of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.modules import take_apart
from metaoptim.compiler.ir.update import HyperRef, ModuleRef
from metaoptim.compiler.ir.values import Number

from .schedule import Schedule
from .transform import Transform

if TYPE_CHECKING:
    from .update import InnerOptimizer

#: Under it ``optimizer.state`` has the count that schedules are evaluated at, beside the state of each parameter.
COUNT: Any = "schedule"
_NUMBERS = (int, float, Tensor)


class Scheduled(NamedTuple):
    """An optimizer's schedules at a step."""

    values: Mapping[int, Tensor]  # id of a schedule -> its value
    after: Tensor | None  # the count after the step; None where nothing is counted

    def at(self, value: Any) -> Any:
        """A hyper-parameter with the values of schedules in their place."""
        if isinstance(value, (tuple, list)):
            return tuple([self.at(v) for v in value])
        return self.values.get(id(value), value)


_NONE = Scheduled({}, None)


def schedules_of(optimizer: InnerOptimizer) -> list[Schedule]:
    """The hyper-parameters that are schedules, each once."""
    waiting, found = list(_hyper_parameters(optimizer)), dict[int, Schedule]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, (tuple, list)):
            waiting += value
        elif isinstance(value, Schedule):
            found[id(value)] = value
    return list(found.values())


def _hyper_parameters(optimizer: InnerOptimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        for name in optimizer.defaults:
            yield group[name]
    for k, transform in enumerate(optimizer.transforms):
        if not isinstance(transform, Transform):
            raise TypeError(
                f"{type(optimizer).__name__}.transforms[{k}] is {transform!r}, expected a transform: write "
                "metaoptim.transforms.Transform(function), or set inner.transforms = [function]"
            )
        yield from transform.hyper.values()


def count_of(optimizer: InnerOptimizer) -> Tensor:
    """How many steps an optimizer has taken, as far as its state knows: where it has no count, its parameters may."""
    if COUNT in optimizer.state:
        return optimizer.state[COUNT]["step"]
    steps = [s["step"] for s in optimizer.state.values() if "step" in s and s["step"].numel() == 1]
    if not steps:
        return torch.zeros((), dtype=torch.float32)
    return torch.stack([s.detach().reshape(()).to("cpu", torch.float32) for s in steps]).max()


def scheduled(optimizer: InnerOptimizer) -> Scheduled:
    """Evaluate an optimizer's schedules at its count, in sight of whoever records."""
    schedules = schedules_of(optimizer)
    if not schedules and COUNT not in optimizer.state:
        return _NONE
    with torch.enable_grad():
        count = count_of(optimizer).detach()
        step = count.to(torch.float64)
        return Scheduled({id(schedule): schedule(step) for schedule in schedules}, count + 1)


class Hyper(NamedTuple):
    """An optimizer's hyper-parameters: what is constant, and what a step is given."""

    groups: tuple  # per parameter group, names with constants and `HyperRef`s
    transforms: tuple[tuple[Transform, tuple], ...]  # each with such names
    hyper_values: list[Any]  # the values that the references stand for
    roots: list[Any]  # what stands for the values in a recording


def hyper_of(
    optimizer: InnerOptimizer, schedules: Scheduled, value_of: Callable[[Tensor], Any], lifts: bool
) -> Hyper:
    """The hyper-parameters as they are now; ``lifts``: whether numbers may become inputs of the step."""
    given = _Given(value_of, lifts)
    template = given.template
    groups: list[tuple] = []
    defaults = optimizer.defaults.items()
    for k, group in enumerate(optimizer.param_groups):
        found = []
        for name, default in defaults:
            value = schedules.at(group[name])
            if type(default) in _NUMBERS and not isinstance(value, _NUMBERS):
                raise TypeError(
                    f"{type(optimizer).__name__}: param_groups[{k}][{name!r}] is {value!r}, expected a number, "
                    "a tensor or a schedule (metaoptim.schedules)"
                )
            if isinstance(default, nn.Module) and not isinstance(value, nn.Module):
                raise TypeError(
                    f"{type(optimizer).__name__}: param_groups[{k}][{name!r}] is {value!r}, expected an nn.Module"
                )
            found.append((name, template(value)))
        groups.append(tuple(found))
    transforms = [
        (t, tuple([(name, template(schedules.at(value))) for name, value in t.hyper.items()]))
        for t in optimizer.transforms
    ]
    return Hyper(tuple(groups), tuple(transforms), given.hyper_values, given.roots)


class _Given:
    """Takes apart hyper-parameters: what a step is given in their place (no closure, which would be a cycle)."""

    def __init__(self, value_of: Callable[[Tensor], Any], lifts: bool) -> None:
        self._value_of, self._lifts = value_of, lifts
        self.hyper_values: list[Any] = []
        self.roots: list[Any] = []

    def template(self, value: Any) -> Any:
        """A hyper-parameter with references in the place of what each step is given."""
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, Tensor):
            self.roots.append(self._value_of(value))
        elif type(value) is float and value != 0 and self._lifts:
            self.roots.append(Number(value))
        elif isinstance(value, (tuple, list)):
            return tuple([self.template(v) for v in value])
        elif isinstance(value, nn.Module):
            form, tensors = take_apart(value)
            return ModuleRef(form, tuple([self.template(t) for t in tensors]))
        else:
            return value
        self.hyper_values.append(value)
        return HyperRef.of(len(self.hyper_values) - 1)
