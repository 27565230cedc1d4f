"""Hyper-parameters: numbers, or tensors that are differentiated by, also where torch's schedulers set them."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from metaoptim.compiler.capture.intercept import recording
from metaoptim.compiler.compat import transforms_active
from metaoptim.errors import WindowError
from metaoptim.runtime.windows.updates.hyper import Scheduled
from metaoptim.runtime.windows.updates.schedule import Schedule

#: A hyper-parameter: a number, a tensor, or a function of the optimizer's step count.
Number: TypeAlias = float | Tensor | Schedule
_in_place = lr_scheduler._update_param_group_val  # torch writes the next rate into the tensor of the last one


def detached(value: Any) -> Any:
    """A number or tensor, or a tuple of them, without the gradient."""
    if isinstance(value, Tensor):
        return value.detach()
    return tuple(map(detached, value)) if isinstance(value, tuple) else value


def as_number(value: Any, schedules: Scheduled) -> Any:
    """A hyper-parameter as the ``state_dict`` of torch's optimizers has it: detached, with schedules' values of now."""
    if isinstance(value, tuple):
        return tuple([as_number(v, schedules) for v in value])
    now = detached(schedules.at(value))
    return now.item() if isinstance(value, Schedule) and now.numel() == 1 else now


def plain(value: Any) -> Any:
    """A hyper-parameter as a number where it is one: scalar tensors are."""
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else value.detach()
    return value


def learned(value: Any) -> bool:
    """Whether a hyper-parameter requires grad or is a schedule, or one of a tuple of them; modules count too."""
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (Schedule, nn.Module)) or (isinstance(value, tuple) and any(map(learned, value)))


def active(hyper: Any) -> bool:
    """Whether an optional term is switched on: any tensor, or a number that is not 0."""
    return isinstance(hyper, Tensor) or hyper != 0


def is_symbolic() -> bool:
    """Whether a function is being captured, so that tensors have no values to check."""
    recorder = recording.get()
    return recorder is not None and recorder.symbolic


def has_values() -> bool:
    """Whether tensors have values to check: not while a function is captured, or transformed by `torch.func`."""
    return not (is_symbolic() or transforms_active())


def check_non_negative(**hyper: Any) -> None:
    """Raise ValueError for a negative number, by name."""
    for name, value in hyper.items():
        if isinstance(value, Schedule):
            continue
        if not isinstance(value, (int, float, Tensor)):
            hint = ": metaoptim.schedules.Schedule(f)" if callable(value) else ""
            raise TypeError(f"{name}: got {value!r}, expected a number, a tensor or a schedule{hint}")
        if isinstance(value, Tensor) and not has_values():
            continue
        smallest = float(value.detach().min()) if isinstance(value, Tensor) else value
        if not smallest >= 0:
            raise ValueError(f"{name}: got {smallest}, expected a number that is not negative")


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root, with derivative 0 at exactly 0.

    There torch's derivative is infinite, and 0 · ∞ = NaN in what follows: the second moment of a parameter whose
    gradient has always been zero would make every meta-gradient NaN. `MetaAdam` and `MetaRMSprop` use this one.

    Args:
        x: not negative.

    Returns:
        √x; differentiable any number of times.

    Example:
        >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> metaoptim.safe_sqrt(x).sum().backward()
        >>> x.grad.tolist()
        [0.0, 0.25]
    """
    if not (x.requires_grad and torch.is_grad_enabled()) and not transforms_active():
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())


def _set_rate(param_group: dict[str, Any], key: str, val: float | Tensor) -> None:
    """Let a learnt rate be followed by what was computed from it, with its gradient."""
    rate = param_group[key]
    if isinstance(rate, Schedule):
        raise WindowError(
            f"a scheduler of torch drives {key!r}, which is a schedule of the optimizer's own steps: {rate!r}; join or "
            "multiply schedules (metaoptim.schedules), or give the optimizer a number or a tensor"
        )
    if not (isinstance(rate, Tensor) and rate.requires_grad):
        _in_place(param_group, key, val)
    elif isinstance(val, Tensor) and val.requires_grad:
        param_group[key] = val
    else:
        raise WindowError(
            f"a scheduler puts a value without a gradient in the place of the learnt {key!r}, as OneCycleLR, CyclicLR "
            "and ReduceLROnPlateau do, and any under no_grad; take another, or compute the schedule from the "
            f"meta-parameter: inner.param_groups[0][{key!r}] = base * factor(t)"
        )


lr_scheduler._update_param_group_val = _set_rate
