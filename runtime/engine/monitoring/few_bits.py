"""A warning of parameters and optimizer state in few bits, with what they cost a meta-gradient, measured once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor

from metaoptim.compiler.derive.few_bits import cosine_with_float32, few_bits
from metaoptim.compiler.ir.programs.calls import StepCall
from metaoptim.errors import warn

_told: set[tuple[str, torch.dtype]] = set()  # what has been warned of, in this process


def tell_of_few_bits(call: StepCall, operands: Sequence[Tensor], limited: Callable[[], bool]) -> None:
    """Warn, once for each kind, if a step trains in few bits; ``operands`` are what its derivative is given.

    Nothing is measured where memory is ``limited``, of which it takes some, or where it would call the user's own hooks
    and Functions.
    """
    step = call.step
    new = few_bits(step).dtypes - _told
    if not new:
        return
    _told.update(new)
    inputs, cotangents = operands[: len(step.inputs)], operands[len(operands) - len(step.cotangents) :]
    name = str(max((dtype for _, dtype in new), key=lambda d: torch.finfo(d).eps))
    eps = max(torch.finfo(dtype).eps for _, dtype in new)
    held = " and ".join(sorted(f"{what} in {str(dtype).removeprefix('torch.')}" for what, dtype in new))
    where = f"the inner step at {call.location}" if call.location else "an inner step"
    measured = "" if limited() or step.opaque else _measured(call, [*inputs, *cotangents])
    warn(
        f"{where} has {held}: what is added to a number there is lost where it is smaller than 1/{round(2 / eps)} of "
        f"it, so that small updates and much of a meta-gradient are. {measured}Keep "
        f"parameters and optimizer state in float32, and compute the loss under torch.autocast(..., dtype={name})"
    )


def _measured(call: StepCall, operands: Sequence[Tensor]) -> str:
    try:
        cosine = cosine_with_float32(call.step, operands)
    except Exception as error:  # of memory, or whatever the user's own update raises of another type
        return f"(What this step loses cannot be measured: {error}.) "
    if cosine is None:
        return ""
    if not isfinite(cosine):
        return "The second derivatives of this step are not finite. "
    return (
        f"What the second derivatives of this step add to the meta-gradient has a cosine of {cosine:.3f} with the same "
        "in float32, where 1 would be no loss. "
    )
