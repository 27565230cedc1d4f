"""torch's learning-rate schedulers on learnt rates: torch writes the next rate into the tensor of the last one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

from metaoptim.errors import WindowError

_in_place = lr_scheduler._update_param_group_val


def _set_rate(param_group: dict[str, Any], key: str, val: float | Tensor) -> None:
    """Let a learnt rate be followed by what was computed from it, with its gradient."""
    rate = param_group[key]
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
