"""A short run of a program on its real inputs, in which what its lowered graphs allocate is measured."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.compat import profiling
from metaoptim.compiler.cost.step import made_of, measured
from metaoptim.compiler.derive.interpret import measuring_hook
from metaoptim.compiler.ir.calls import Loop, StepCall
from metaoptim.compiler.ir.program import Kept, Program
from metaoptim.compiler.ir.step import Lowering, Measured
from metaoptim.compiler.ir.values import Input
from metaoptim.compiler.lower.derivatives import lowered, residuals
from metaoptim.errors import UnreachableWarning

from ..engine.engine import Engine
from ..engine.function import Run
from ..engine.progress import progress
from .meter import AllocatorMeter

_ITERATIONS = 3  # of each loop: a first one, one as all, a last one


def shortened(program: Program, most: int, long: Loop | None = None, longest: int = 0) -> Program:
    """``program`` with at most ``most`` iterations of each loop, and ``longest`` of the loop ``long``."""
    calls = [
        replace(c, count=min(c.count, longest if c is long else most)) if isinstance(c, Loop) else c
        for c in program.calls
    ]
    return replace(program, calls=calls)


def rehearse(
    program: Program, tensors: dict[Input, Tensor], lowering: Lowering, saving: bool = False
) -> None:
    """Run a few steps of ``program`` and their derivatives, so that `measured` knows all its step graphs.

    Nothing outside changes: what the program would write is dropped, and the random generator stays where it is. Graphs
    are compiled on the way, and checked where ``lowering`` says so.

    Args:
        program: of the compiled function.
        tensors: behind its inputs.
        lowering: the backend and HVP mode of the step graphs.
        saving: whether with residuals.
    """
    kinds = ("forward", "backward") if saving else ("replay", "vjp")
    graphs = [g for g in program.step_graphs if not saving or residuals(g, lowering.hvp) is not None]
    if all(measured(g, kind, program.lowering_of(g, lowering)) for g in graphs for kind in kinds):
        return
    short = shortened(program, _ITERATIONS)
    kept = Kept(None, short.positions) if saving else Kept(1)
    run = Run(short, tensors, lowering, measuring_hook, kept, engine=_MeteredEngine, rehearsal=True)
    _run_and_pull(run, program)


def measured_peak(
    program: Program,
    tensors: dict[Input, Tensor],
    lowering: Lowering,
    kept: Kept,
) -> int:
    """Most bytes that a call and its backward hold, in a run of all its steps. Nothing outside changes.

    Args:
        program, tensors, lowering: see `rehearse`, which has been run.
        kept: what is kept for the backward.
    """
    with AllocatorMeter() as meter, progress(meter.watch):
        _run_and_pull(Run(program, tensors, lowering, measuring_hook, kept, rehearsal=True), program)
    return meter.peak


def _run_and_pull(run: Run, program: Program) -> None:
    """A call and its backward, with ones for cotangents."""
    results = run.forward()
    live = [isinstance(w, int) and i not in program.dead for i, w in enumerate(program.outputs)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreachableWarning)
        run.backward([torch.ones_like(t) if ok else None for t, ok in zip(results, live, strict=True)])


@contextmanager
def _garbage_left() -> Iterator[None]:
    """Nothing is collected in the block: memory that an earlier meter has seen would count as given back in it."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _MeteredEngine(Engine):
    """An engine whose every call is measured."""

    def _lowered(self, call: StepCall, kind: str, operands: Sequence[Tensor]) -> Callable[..., Sequence[Any]]:
        if profiling():
            return super()._lowered(call, kind, operands)
        with AllocatorMeter() as first:
            program = lowered(call.step, kind, operands, call.lowering)
        return lambda *inputs: metered(program, call, kind, inputs, first.peak)


def metered(
    program: Callable[..., Sequence[Any]], call: StepCall, kind: str, inputs: Sequence[Tensor], first: int = 0
) -> Sequence[Any]:
    """What ``program``, the lowered graph of a call, returns; what it takes is noted for `measured`.

    Args:
        program: the lowered graph.
        call, kind, inputs: what it was lowered for, as `lowered` takes them.
        first: bytes that compiling and checking it took.
    """
    if profiling():  # another one: the graphs' own sizes have to do
        return program(*inputs)
    with _garbage_left(), AllocatorMeter() as meter:
        results = program(*inputs)
    given = {t.untyped_storage()._cdata: i for i, t in enumerate(inputs) if t.layout is torch.strided}
    made = made_of([_memory(t) for t in results], given)
    known = measured(call.step, kind, call.lowering) or Measured(0, 0, ())
    call.step.derived.measured[kind, call.lowering] = Measured(
        max(known.peak_bytes, meter.peak), max(known.first_bytes, first), tuple(made)
    )
    return results


def _memory(t: Tensor | None) -> tuple | None:
    if t is None:
        return ()
    return (t.untyped_storage()._cdata, t.untyped_storage().nbytes()) if t.layout is torch.strided else None
