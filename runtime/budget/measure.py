"""A short run of a program on its real inputs, in which what its lowered graphs allocate is measured."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.compat import profiling
from metaoptim.compiler.cost.step import made_of, measured
from metaoptim.compiler.ir.programs.calls import StepCall
from metaoptim.compiler.ir.programs.program import Kept, Program
from metaoptim.compiler.ir.step import Lowering, Measured
from metaoptim.compiler.ir.values import Input
from metaoptim.compiler.lower.derivatives import Lowered, lowered, residuals
from metaoptim.errors import UnreachableWarning

from ..engine.engine import lowered_for
from ..engine.function import Run
from ..engine.monitoring.progress import progress
from .meter import AllocatorMeter
from .peaks import shortened

_ITERATIONS = 3  # of each loop: the first, one like the others, the last


def rehearse(
    program: Program, tensors: dict[Input, Tensor], lowering: Lowering, saving: bool = False
) -> None:
    """Run a few steps of ``program`` and their derivatives, so that `measured` knows all its step graphs.

    Nothing outside changes: what the program would write is dropped, and the random generator stays where it is. Graphs
    are compiled on the way, and checked where ``lowering`` says so. ``saving``: with residuals.
    """
    kinds = ("forward", "backward") if saving else ("replay", "vjp")
    graphs = [g for g in program.step_graphs if not saving or residuals(g, lowering.hvp) is not None]
    if all(measured(g, kind, program.lowering_of(g, lowering)) for g in graphs for kind in kinds):
        return
    short = shortened(program, _ITERATIONS)
    kept = Kept(None, short.positions) if saving else Kept(1)
    _run_and_pull(Run(short, tensors, lowering, kept, rehearsal=True, lower=_metered_graph), program)


def measured_peak(program: Program, tensors: dict[Input, Tensor], lowering: Lowering, kept: Kept) -> int:
    """Most bytes that a call and its backward hold, in a run of all its steps, where ``kept`` is kept.

    Nothing outside changes. `rehearse` has been run before.
    """
    with AllocatorMeter() as meter, progress(meter.watch):
        _run_and_pull(Run(program, tensors, lowering, kept, rehearsal=True), program)
    return meter.peak


def _run_and_pull(run: Run, program: Program) -> None:
    """A call and its backward, with ones for cotangents."""
    results = run.forward()
    live = [isinstance(w, int) and i not in program.dead for i, w in enumerate(program.outputs)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreachableWarning)
        run.backward([torch.ones_like(t) if ok else None for t, ok in zip(results, live, strict=True)])


def _metered_graph(call: StepCall, kind: str, operands: Sequence[Tensor]) -> Lowered:
    """One of a call's graphs, of which each call is measured."""
    if profiling():
        return lowered_for(call, kind, operands)
    with AllocatorMeter() as first:
        program = lowered(call.step, kind, operands, call.lowering)
    return partial(metered, program, call, kind, first.peak)


def metered(
    program: Callable[..., Sequence[Any]], call: StepCall, kind: str, first: int, *inputs: Tensor
) -> Sequence[Any]:
    """What ``program``, the lowered graph of a call, returns; what it takes is noted for `measured`.

    ``first`` are bytes that compiling and checking it took.
    """
    if profiling():  # another one: the graphs' own sizes have to do
        return program(*inputs)
    collecting = gc.isenabled()
    gc.disable()  # memory that an earlier meter has seen would count as given back
    try:
        with AllocatorMeter() as meter:
            results = program(*inputs)
    finally:
        if collecting:
            gc.enable()
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
