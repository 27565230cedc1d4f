"""`window=W` over a complete program: every read of theta by an outer loss sees the W super-steps before it."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from torch import Tensor

from metaoptim.compiler.ir.step import Role
from metaoptim.errors import UnreachableWarning, warn

from .engine import Engine
from .sweep import Sweep

_INNER = (Role.THETA, Role.OPT_STATE)


def pull_back_truncated(engine: Engine, sweep: Sweep, window: int, offline: bool) -> None:
    """Collect gradients of the deposits in ``sweep`` in its ``metas``.

    Cotangents of what the user's own code carries from step to step (sums, hidden states) flow on without end, as on
    autograd's tape. Where they reach theta or optimizer state - an outer loss has read it there - a sweep of its own
    goes back ``window`` super-steps and ends: W step-VJPs for each such read.
    """
    program: Any = engine.program
    steps = [p for p in range(program.end) if program.takes_step(p)]
    cut = False
    with engine.sweeping():
        sweep.top = program.end
        sweep.arrive(program.end)
        for position in range(program.end - 1, -1, -1):
            reads = _pull(engine, sweep, position)
            sweep.arrive(position)
            engine.tell(sweep, position)
            if not reads:
                continue
            done = bisect_left(steps, position)
            bottom = steps[done - window] if done > window else 0
            cut |= done > window
            inner = Sweep()
            inner.cotangents = reads
            for below in range(position - 1, bottom - 1, -1):
                call = program[below]
                received = {k: inner.cotangents.pop(r, None) for k, r in call.changed()}
                for role, register, grad in engine.vjp(call, below, received):
                    if role is Role.META:
                        sweep.meta(register, grad)
                    elif role in _INNER:
                        inner.add(register, grad)
                    else:
                        sweep.deposit(below, register, grad)
    if cut and offline:
        warn(
            f"the loss lies more than window={window} steps after the start of an offline window: the initial "
            "parameters receive no gradient (None) from it",
            UnreachableWarning,
        )


def _pull(engine: Engine, sweep: Sweep, position: int) -> dict[int, Tensor]:
    """Pull what the user's own code carries through one call; what reaches theta and optimizer state there."""
    call: Any = engine.program[position]
    reads = Sweep()
    received = {k: sweep.cotangents.pop(r, None) for k, r in call.changed()}
    for role, register, grad in engine.vjp(call, position, received):
        if role is Role.META:
            sweep.meta(register, grad)
        else:
            (reads if role in _INNER else sweep).add(register, grad)
    return reads.cotangents
