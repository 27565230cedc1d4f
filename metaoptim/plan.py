"""plan: what a compiled function would cost at another horizon or in another budget; nothing is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from .compile import BoundFunction, CompiledFunction
from .compiler.cost.polynomials import TIMES
from .compiler.ir.program import Program, nbytes
from .compiler.ir.step import Loop
from .compiler.lower.library import Library, library
from .compiler.passes.pipeline import Options, compile_trace
from .errors import WindowError
from .functions.captured import stated, trace_of
from .planning.batch import Batch
from .planning.cost import Cost, Setting
from .planning.formulas import by_batch, model_of
from .runtime.budget.amounts import budget_bytes, check_budget
from .runtime.budget.planner import Planner, default_plan, device_of, residuals_from
from .runtime.states.tiered import check_offload
from .runtime.windows.session import current_session


def plan(
    fn: Callable,
    *,
    horizon: int | None = None,
    memory_budget: int | float | str | None = None,
    offload: str | os.PathLike[str] | None = None,
    batch: Mapping[str, int] | None = None,
) -> Callable[..., Cost]:
    """Say what a compiled function would cost at some horizon, in some memory, without running it.

    Args:
        fn: compiled, or a plain function that holds a window. Its loop is a ``window.scan`` or ``window.range``.
        horizon: T, in place of the length of its loop (the longest, if it has several); None for as it is.
        memory_budget: as of `compile`; None for what the function itself says.
        offload: as of `compile`, with ``memory_budget``; None for what the function itself says.
        batch: name of a parameter of the function -> which dimension of it, or of every tensor in it, is the batch. The
            sizes in ``cost.model`` are then formulas in the size of a batch. The function is captured with larger
            ones too, made of shapes alone; and everything rests on the sizes of the graphs, measured or not.

    Returns:
        A function of the same arguments that returns a `Cost`.

    Raises:
        BudgetError: from that function, for a budget too small for the horizon.
        CaptureError: likewise, for what cannot be captured.
        ValueError: likewise, for a ``batch`` that names no parameter, no dimension, dimensions of several sizes, or one
            that the function loops over.
        WindowError: likewise, for a function without a loop, or one whose gradients are truncated by ``window=W`` at
            losses between its inner steps; with ``batch`` for one that cannot be captured with a larger batch, or whose
            graphs are others then.

    Example:
        >>> net = torch.nn.Linear(3, 1)
        >>> @metaoptim.compile(backend="eager")
        ... def meta_loss(net, xs):
        ...     inner = metaoptim.MetaAdam([net])
        ...     with metaoptim.SlidingWindow(offline=True) as window:
        ...         for x in window.scan(xs):
        ...             inner.step(net(x).square().mean())
        ...         return net(xs[0]).square().mean()
        >>> cost = metaoptim.plan(meta_loss, horizon=50_000, memory_budget="64KiB")(net, torch.ones(20, 2, 3))
        >>> cost.horizon, cost.peak_bytes <= 64 * 1024
        (50000, True)
        >>> cost = metaoptim.plan(meta_loss, batch={"xs": 1})(net, torch.ones(20, 16, 3))
        >>> cost.batch, cost.model.sizes[metaoptim.compiler.cost.model.A]
        (16, Max(16*batch + 316, 32*batch + 80))
        >>> cost.model.at(horizon=20, slots=5, batch=64)["peak_bytes"] > cost.peak_bytes
        True

    References:
        Griewank & Walther 2000, "Algorithm 799: Revolve", ACM TOMS 26.
    """
    check_budget(memory_budget, None)
    check_offload(offload, None, memory_budget)
    if current_session() is not None:
        raise WindowError(
            "plan was called inside a window: it takes a function that holds its window itself. For a compiled step "
            "use explain(step); to plan, put the loop into a function"
        )
    if isinstance(fn, BoundFunction):
        bound = plan(fn.function, horizon=horizon, memory_budget=memory_budget, offload=offload, batch=batch)
        return partial(bound, fn.instance)
    compiled: Any = fn if isinstance(fn, CompiledFunction) else CompiledFunction(fn, Options())

    def cost(*args: Any, **kwargs: Any) -> Cost:
        options = compiled._options
        named = None if batch is None else Batch(compiled._fn, args, kwargs, batch)
        steps = library if named is None else Library()  # with ``batch``, nothing was measured
        program = _program(partial(compiled._fn, *args, **kwargs), options, steps)
        said = stated(program, options)
        slots, budget = said.slots, said.memory_budget
        tiered = offload is not None or said.offload is not None
        if memory_budget is not None:
            slots, budget = None, memory_budget
        setting = _setting(compiled, program, horizon, tiered)
        if named is not None:
            larger = [_larger(named, times, program, options, steps) for times in TIMES[1:]]
            settings = [setting, *(_setting(compiled, p, horizon, tiered) for p in larger)]
            model = replace(setting.model, by_batch=by_batch(settings, named.size))
            setting = replace(setting, model=model, batch=named.size)
        if budget is None:
            kept = None if slots is not None else default_plan(setting.alone)
            return setting.with_slots(slots, tiered) if kept is None else setting.cost(kept, kept.budget)
        return setting.within(budget_bytes(budget, device_of(program)), tiered)

    return cost


def _program(call: Callable[[], Any], options: Options, steps: Library) -> Program:
    traced, tracer, _ = trace_of(call, (), {})
    tracer.trace.outputs = traced.tensors
    return compile_trace(tracer.trace, options, steps)[0]


def _larger(batch: Batch, times: int, program: Program, options: Options, steps: Library) -> Program:
    """The program for so many times the batch of ``program``."""
    sizes = f"{' and '.join(batch.names)} enlarged from a batch of {batch.size} to {times * batch.size}"
    try:
        larger = _program(batch.enlarged(times), options, steps)
    except Exception as error:  # of the user's code, of torch, or ours
        raise WindowError(
            f"plan: with {sizes} the function cannot be captured, as it can with the arguments given: "
            f"{type(error).__name__}: {error}. Name every argument that has the batch, as in "
            f"batch={{{', '.join(f'{name!r}: ...' for name in batch.names)}, 'labels': 0}}, and give as arguments what "
            "it reads from elsewhere"
        ) from error
    if _shape(larger) != _shape(program):
        raise ValueError(
            f"batch: with {sizes} got {larger.horizon} inner steps in {larger.positions} calls, expected "
            f"{program.horizon} in {program.positions}, one by one as with the arguments given; name a dimension that "
            "the function does not loop over (how often it loops is the horizon)"
        )
    return larger


def _shape(program: Program) -> list[tuple[int, int]]:
    return [(call.step.steps, count) for call, count in program.counted()]


def _setting(fn: CompiledFunction, program: Program, horizon: int | None, offload: bool) -> Setting:
    loops = [x for x in program.calls if isinstance(x, Loop)]
    if not loops:
        raise WindowError("plan: the function has no loop; write it with window.scan or window.range")
    if program.window is not None and program.loss_between:
        raise WindowError(
            f"plan: with window={program.window}, each of the losses between the inner steps sweeps back over steps of "
            "its own, for which there are no formulas; fn.explain(...) goes through all of it"
        )
    longest = max(loops, key=lambda x: x.count)
    more = 0 if horizon is None else horizon - program.horizon
    each = sum(call.step.steps for call in longest.calls)
    count = longest.count + more // max(each, 1)
    if count < 1:
        raise ValueError(
            f"horizon: got {horizon}, expected at least {program.horizon - each * (longest.count - 1)}"
        )
    stretched = _stretched(longest, count)
    longer = replace(program, calls=[stretched if x is longest else x for x in program.calls])
    learnt = _learnt_bytes(longest)
    step_bytes, beside = learnt // len(longest.calls), learnt * (count - longest.count)
    name, lowering = getattr(fn, "__qualname__", "the function"), fn._options.lowering
    alone = Planner(longer, lowering, name, beside=beside)
    tier = Planner(longer, lowering, name, True, beside) if offload else None
    model = model_of(alone, tier, stretched, step_bytes)
    return Setting(name, longer, alone, tier, stretched, model, residuals_from(longer, lowering))


def _stretched(loop: Loop, count: int) -> Loop:
    """A loop of so many iterations; a list that it reads begins anew where it ends."""
    times = -(-count // loop.count)
    calls = (
        replace(
            call, inputs=[replace(g, of=tuple(g.of) * times) if g.kind == "each" else g for g in call.inputs]
        )
        for call in loop.calls
    )
    return replace(loop, calls=tuple(calls), count=count)


def _learnt_bytes(loop: Loop) -> int:
    """Bytes that an iteration adds: a gradient and a copy of rows and of listed tensors that it alone reads."""
    moving = [
        g
        for call, strides in zip(loop.calls, loop.strides, strict=True)
        for g, stride in zip(call.inputs, strides, strict=True)
        if stride
    ]
    read = [x for g in moving for x in (g.of if g.kind == "each" else [g])]
    rows = {x.of for x in read if x.kind == "scan" and x.of.grad}
    listed = {x.of for x in read if x.kind == "input" and x.of.grad}
    of_rows = sum(nbytes(x.spec) // x.spec[0][0] for x in rows)
    return 2 * (of_rows + sum(nbytes(x.spec) for x in listed) // loop.count)
