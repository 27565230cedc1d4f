"""Schedules: hyper-parameters that are functions of the step count, with numbers that may be learnt.

A hyper-parameter of a `MetaOptimizer`, or of a transform, may be a `Schedule`: before every step it is called with the
number of steps that the optimizer has taken so far. Schedules may be joined, and multiplied by one another and by
numbers. Names, arguments and values are those of optax where it has the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metaoptim.runtime.windows.updates.schedule import Schedule

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "exponential",
    "join",
    "linear",
    "piecewise",
    "polynomial",
    "table",
    "warmup",
]

Number: TypeAlias = float | Tensor
Hyper = dict[str, Any]


def constant(value: Number) -> Schedule:
    """A value that stays: as good as the number itself, and something to join.

    Args:
        value: a number, or a tensor.

    Example:
        >>> float(metaoptim.schedules.constant(0.1)(7))
        0.1
    """
    return Schedule(_constant, value=value)


def _constant(step: Tensor, hyper: Hyper) -> Number:
    return hyper["value"]


def polynomial(
    init_value: Number,
    end_value: Number,
    power: Number,
    transition_steps: Number,
    transition_begin: Number = 0,
) -> Schedule:
    """From one value to another: (a - b) (1 - s)^p + b, with s = min(max(t - t₀, 0) / T, 1).

    Args:
        init_value: a.
        end_value: b, kept from step t₀ + T on.
        power: p.
        transition_steps: T, more than 0.
        transition_begin: t₀.

    Raises:
        ValueError: for a number of steps that is not positive.

    Example:
        >>> schedule = metaoptim.schedules.polynomial(1.0, 0.0, 2, 10)
        >>> [float(schedule(t)) for t in (0, 5, 20)]
        [1.0, 0.25, 0.0]
    """
    _check_positive(transition_steps=transition_steps)
    return Schedule(
        _polynomial,
        init_value=init_value,
        end_value=end_value,
        power=power,
        transition_steps=transition_steps,
        transition_begin=transition_begin,
    )


def linear(
    init_value: Number, end_value: Number, transition_steps: Number, transition_begin: Number = 0
) -> Schedule:
    """From one value to another along a line: `polynomial` with power 1.

    Args:
        init_value: the first value.
        end_value: the last one, kept from step ``transition_begin + transition_steps`` on.
        transition_steps: how many steps lie between, more than 0.
        transition_begin: steps before it begins.

    Example:
        >>> schedule = metaoptim.schedules.linear(0.1, 0.0, 10)
        >>> [float(schedule(t)) for t in (0, 5, 20)]
        [0.1, 0.05, 0.0]
    """
    return polynomial(init_value, end_value, 1, transition_steps, transition_begin)


def _polynomial(step: Tensor, hyper: Hyper) -> Tensor:
    begin, steps, end = hyper["transition_begin"], hyper["transition_steps"], hyper["end_value"]
    over = step >= begin + steps
    # where it is over, the power of 0 would have a derivative that is infinite or NaN
    passed = torch.where(over, torch.zeros_like(step), step - begin).clamp(min=0)
    rest = 1 - passed / steps
    return torch.where(over, end, (hyper["init_value"] - end) * rest ** hyper["power"] + end)


def cosine(
    init_value: Number,
    decay_steps: Number,
    alpha: Number = 0.0,
    exponent: Number = 1.0,
    *,
    restarts: bool = False,
) -> Schedule:
    """Cosine annealing (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5): a ((1 - α) c^p + α).

    c = (1 + cos(π min(t, T) / T)) / 2. With ``restarts`` it begins anew every T steps: t mod T stands for min(t, T).

    Args:
        init_value: a.
        decay_steps: T, more than 0.
        alpha: the last value as a fraction of the first.
        exponent: p.
        restarts: begin anew instead of staying at the last value.

    Raises:
        ValueError: for a number of steps that is not positive.

    Example:
        >>> schedule = metaoptim.schedules.cosine(0.1, 10)
        >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 15)]
        [0.1, 0.05, 0.0, 0.0]
        >>> round(float(metaoptim.schedules.cosine(0.1, 10, restarts=True)(15)), 3)
        0.05
    """
    _check_positive(decay_steps=decay_steps)
    at = _cosine_restarts if restarts else _cosine
    return Schedule(at, init_value=init_value, decay_steps=decay_steps, alpha=alpha, exponent=exponent)


def _cosine(step: Tensor, hyper: Hyper) -> Tensor:
    steps, alpha = hyper["decay_steps"], hyper["alpha"]
    over = step >= steps
    passed = torch.where(over, torch.zeros_like(step), step)
    wave = (0.5 * (1 + torch.cos(math.pi * passed / steps))) ** hyper["exponent"]
    return torch.where(over, hyper["init_value"] * alpha, hyper["init_value"] * ((1 - alpha) * wave + alpha))


def _cosine_restarts(step: Tensor, hyper: Hyper) -> Tensor:
    return _cosine(step % hyper["decay_steps"], hyper)


def exponential(
    init_value: Number,
    transition_steps: Number,
    decay_rate: Number,
    transition_begin: Number = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> Schedule:
    """Exponential decay: a r^((t - t₀) / T) from step t₀ on, a before.

    Args:
        init_value: a.
        transition_steps: T, more than 0.
        decay_rate: r, more than 0.
        transition_begin: t₀.
        staircase: round (t - t₀) / T down.
        end_value: where it stops: a lower bound for r < 1, an upper one otherwise.

    Raises:
        ValueError: for a rate or a number of steps that is not positive.

    Example:
        >>> schedule = metaoptim.schedules.exponential(1.0, 10, 0.5)
        >>> [float(schedule(t)) for t in (0, 10, 20)]
        [1.0, 0.5, 0.25]
    """
    _check_positive(transition_steps=transition_steps, decay_rate=decay_rate)
    return Schedule(
        _exponential,
        init_value=init_value,
        transition_steps=transition_steps,
        decay_rate=decay_rate,
        transition_begin=transition_begin,
        staircase=staircase,
        end_value=end_value,
    )


def _exponential(step: Tensor, hyper: Hyper) -> Tensor:
    rate, end = hyper["decay_rate"], hyper["end_value"]
    power = (step - hyper["transition_begin"]).clamp(min=0) / hyper["transition_steps"]
    value = hyper["init_value"] * rate ** (power.floor() if hyper["staircase"] else power)
    if end is None:
        return value
    lower, upper = torch.where(value < end, end, value), torch.where(value > end, end, value)
    return torch.where(torch.as_tensor(rate < 1), lower, upper)


def piecewise(init_value: Number, boundaries_and_scales: Mapping[int, Number]) -> Schedule:
    """Piecewise constant: the first value times the scales of all boundaries passed so far.

    Args:
        init_value: the value before the first boundary.
        boundaries_and_scales: {step from which on it counts: factor}.

    Example:
        >>> schedule = metaoptim.schedules.piecewise(1.0, {10: 0.5, 20: 0.1})
        >>> [float(schedule(t)) for t in (9, 10, 20)]
        [1.0, 0.5, 0.05]
    """
    return Schedule(_piecewise, init_value=init_value, boundaries_and_scales=dict(boundaries_and_scales))


def _piecewise(step: Tensor, hyper: Hyper) -> Tensor:
    value = hyper["init_value"] * torch.ones_like(step)
    for boundary, factor in hyper["boundaries_and_scales"].items():
        value = torch.where(step >= boundary, value * factor, value)
    return value


def table(
    values: Tensor | Sequence[float | Tensor], steps: int = 1, *, interpolate: bool = False
) -> Schedule:
    """A table of values, one for every few steps: v[⌊t / k⌋], or on the lines between them; the last one stays.

    Args:
        values: v, along the leading axis; a learnt one has a gradient for each of its values.
        steps: k.
        interpolate: linearly between values, where value i is that of step i k; otherwise each is held for k steps.

    Raises:
        ValueError: for no values, or a number of steps that is not positive.

    Example:
        >>> values = torch.tensor([1.0, 0.5, 0.25], requires_grad=True)
        >>> schedule = metaoptim.schedules.table(values, steps=10)
        >>> [schedule(t).item() for t in (9, 10, 99)]
        [1.0, 0.5, 0.25]
        >>> metaoptim.schedules.table(values, steps=10, interpolate=True)(5).item()
        0.75
    """
    _check_positive(steps=steps)
    if not isinstance(values, Tensor):
        listed = [torch.as_tensor(value, dtype=torch.float64) for value in values]
        values = torch.stack(listed) if listed else torch.empty(0)
    if not values.dim() or not len(values):
        raise ValueError(
            f"values: got a tensor of shape {tuple(values.shape)}, expected one value or more in a row"
        )
    return Schedule(_lines if interpolate else _held, values=values, steps=steps)


def _held(step: Tensor, hyper: Hyper) -> Tensor:
    values = hyper["values"]
    return _row(values, (step / hyper["steps"]).floor().clamp(max=len(values) - 1))


def _row(values: Tensor, at: Tensor) -> Tensor:
    return values[at.long().reshape(1)].squeeze(0)  # an index without dimensions would be asked for its value


def _lines(step: Tensor, hyper: Hyper) -> Tensor:
    values = hyper["values"]
    at = (step / hyper["steps"]).clamp(max=len(values) - 1)
    low = at.floor()
    high = (low + 1).clamp(max=len(values) - 1)
    part = (at - low).to(values.dtype)
    return (1 - part) * _row(values, low) + part * _row(values, high)


def join(schedules: Sequence[Schedule], boundaries: Sequence[Number]) -> Schedule:
    """One schedule after the other; each begins to count when its turn comes.

    Args:
        schedules: in order.
        boundaries: the steps at which the second and later ones begin.

    Raises:
        ValueError: unless there is one boundary less than there are schedules.

    Example:
        >>> s = metaoptim.schedules
        >>> schedule = s.join([s.linear(0.0, 1.0, 4), s.cosine(1.0, 10)], [4])
        >>> [float(schedule(t)) for t in (0, 2, 4, 9)]
        [0.0, 0.5, 1.0, 0.5]
    """
    if isinstance(boundaries, (int, float, Tensor)):
        raise TypeError(f"join: got {boundaries!r} as boundaries, expected a list of steps: [{boundaries!r}]")
    _check_schedules(*schedules)
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"join: got {len(schedules)} schedules and {len(boundaries)} boundaries, expected one boundary less than "
            "there are schedules: the steps at which the later ones begin"
        )
    return Schedule(_join, schedules=list(schedules), boundaries=list(boundaries))


def _join(step: Tensor, hyper: Hyper) -> Tensor:
    first, *later = hyper["schedules"]
    value = first(step)
    for boundary, schedule in zip(hyper["boundaries"], later, strict=True):
        value = torch.where(step < boundary, value, schedule((step - boundary).clamp(min=0)))
    return value


def warmup(schedule: Schedule, warmup_steps: int, init_value: Number = 0.0) -> Schedule:
    """A linear warm-up to the first value of another schedule, which follows it.

    Args:
        schedule: what follows; it begins to count after the warm-up.
        warmup_steps: how many steps lead up to it, more than 0.
        init_value: where the warm-up begins.

    Raises:
        ValueError: for a number of steps that is not positive.

    Example:
        >>> schedule = metaoptim.schedules.warmup(metaoptim.schedules.cosine(0.1, 90), 10)
        >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 55)]
        [0.0, 0.05, 0.1, 0.05]
    """
    _check_schedules(schedule)
    _check_positive(warmup_steps=warmup_steps)
    return Schedule(_warmup, schedule=schedule, warmup_steps=warmup_steps, init_value=init_value)


def _warmup(step: Tensor, hyper: Hyper) -> Tensor:
    schedule, steps, first = hyper["schedule"], hyper["warmup_steps"], hyper["init_value"]
    value = schedule((step - steps).clamp(min=0))  # its first one, before it begins
    return torch.where(step < steps, first + (value - first) * (step / steps), value)


def _check_schedules(*given: Any) -> None:
    for schedule in given:
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"got {schedule!r} as a schedule, expected one of metaoptim.schedules; write constant({schedule!r}) "
                "for a number"
            )


def _check_positive(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Tensor) and not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number that is positive")
