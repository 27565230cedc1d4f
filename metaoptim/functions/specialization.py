"""A function, or a step, specialized for what one call of it depends on: made by a capture, and run by later calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compiler.capture.symbolic.capturing import capturing
from ..compiler.compat import tree_flatten, tree_unflatten
from ..compiler.derive.flat import uncollected
from ..compiler.derive.graphs import results_of
from ..compiler.ir.programs.calls import StepCall
from ..compiler.ir.programs.program import Kept, Program
from ..compiler.ir.step import Lowering
from ..compiler.ir.tensors import tensor_spec
from ..compiler.ir.text import plural
from ..compiler.ir.traces.trace import Trace
from ..compiler.ir.values import Input, Noise
from ..compiler.lower.ambient import unaffected
from ..compiler.lower.compile_graph import waiting
from ..compiler.lower.cuda_graphs import check_captured
from ..compiler.lower.derivatives import begin, derived, divisible, residuals, settled
from ..compiler.lower.processes.handover import prepare, waits
from ..compiler.passes.options import Options, retention_of
from ..compiler.passes.pipeline import Record, checkpoint, compile_trace
from ..errors import CaptureError, UnreachableWarning, warn
from ..optim.base.alive import preserved
from ..runtime.budget.amounts import tell_default
from ..runtime.budget.planner import Plan, decide, with_default_residuals
from ..runtime.engine.engine import Check
from ..runtime.engine.function import Call, Run
from ..runtime.engine.monitoring import progress
from ..runtime.functions.captured_step import CapturedStep, aside, compiled
from ..runtime.functions.compiled_step import CompiledStep
from ..runtime.windows.recording_session import RecordedSession
from .blocks import Blocks, may_check
from .guards import Dependencies, Source
from .reads import Reads

_plans = logging.getLogger("metaoptim.plans")
_TENSOR = object()


@dataclass
class Traced:
    """What a captured function returned: what stands for its tensors, whatever else it was, and how they nest."""

    tensors: list[Any]
    leaves: list[Any]
    spec: Any

    def restored(self, tensors: Iterable[Tensor]) -> Any:
        """The result, with ``tensors`` in the place of its tensors."""
        given = iter(tensors)
        return tree_unflatten([next(given) if leaf is _TENSOR else leaf for leaf in self.leaves], self.spec)


def trace_of(
    fn: Callable, args: tuple, kwargs: dict, window: RecordedSession | None = None, reads: Reads | None = None
) -> tuple[Trace, Traced, CapturedStep | None]:
    """Run ``fn`` on these arguments, symbolically, watched by ``reads``; inside ``window``, as one of its steps."""
    begun = time.perf_counter()
    with uncollected(), preserved(), capturing() as tracer:
        session = None if window is None else CapturedStep(window, tracer)
        with nullcontext() if session is None else session.stepping():
            with nullcontext() if reads is None else reads.watching():
                result = fn(*args, **kwargs)
            leaves, spec = tree_flatten(result)
            given = [tracer.give(t) for t in leaves if isinstance(t, Tensor)]
            tracer.trace.left = [(t, tracer.give(t)) for t, _ in tracer.overwritten.values()]
    if reads is not None:
        for optimizer in tracer.stepped:
            reads.meet(optimizer, type(optimizer).__name__)
    trace = tracer.trace
    trace.milliseconds = 1e3 * (time.perf_counter() - begun)
    if session is None:
        trace.outputs = given
    kept = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]
    return trace, Traced(given, kept, spec), session


def captured_step(
    fn: Callable,
    window: RecordedSession,
    args: tuple,
    kwargs: dict,
    reads: Reads | None = None,
    texts: Mapping[Input, str] | None = None,
) -> tuple[CompiledStep, Trace, Traced]:
    """Capture ``fn`` as a step of ``window``, which is left as it is; for ``texts`` see `compiled`."""
    with aside(window):
        trace, traced, session = trace_of(fn, args, kwargs, window, reads)
    assert session is not None
    with unaffected():
        return compiled(session, traced.tensors, texts), trace, traced


class Specialization:
    """A captured function: the program that it runs, and what each pass did."""

    check: Check | None = None  # looks at each graph of a call before it runs

    def __init__(
        self,
        name: str,
        options: Options,
        dependencies: Dependencies,
        program: Program,
        records: list[Record],
        traced: Traced,
    ) -> None:
        self.program, self.records, self.traced = program, records, traced
        self.remembered = dependencies.remembered()  # references to what the capture knows by identity
        self.plan: Plan | None = None  # how it keeps to its memory budget, once it has run under one
        self._name, self._options = name, options
        self._planned = self._lowering = options.lowering  # what the plan is for, and what runs
        self._divided = False  # whether it has been decided on residuals that nobody has asked for
        self._blocks: Blocks | None = None  # the same program in blocks of steps
        self._steady = 0  # calls that have found the compiled graphs of single steps
        source = dependencies.sources()
        calls = [call for call, _ in program.counted()]
        found = {x for c in calls for g in c.inputs for x in g.sources if isinstance(x, Input)}
        found |= {where for where in program.outputs if isinstance(where, Input)}
        self.sources = {x: source(x.tensor) for x in found}  # of the tensor behind each input
        self._writes = [source(t) if isinstance(t, Tensor) else t for t, _ in program.writes]
        reached = {x for c in calls for x in _reached(c, options.lowering.hvp)}
        self._keys = [x for x in found if x.grad and x in reached]
        for x in found:
            if isinstance(self.sources[x], int):
                del x.tensor  # another call brings another one

    def run(self, dependencies: Dependencies, window: RecordedSession | None = None) -> Any:
        """A call, outside of windows: what the function returns."""
        # compiled graphs read memory, and a view of an imaginary part may say that its memory is to be negated
        tensors = {x: self.given(dependencies, x).resolve_neg() for x in self.sources}
        program = self.program
        differentiable = torch.is_grad_enabled() and bool(self._keys)
        kept = self._kept(tensors) if differentiable else Kept(1)
        if differentiable and (blocks := self._in_blocks(tensors)) is not None:
            assert blocks.kept is not None
            program, kept = blocks, blocks.kept
        written = [dependencies.tensor(t) for t in self._writes if not isinstance(t, tuple)]
        run = Run(program, tensors, self._lowering, kept, written)
        run.engine.check = self.check
        if retention_of(program, self._options).memory_budget is not None:
            run.engine.later = run.engine.spending = True
        if differentiable:
            found = Call.apply(run, self._keys, program.dead, *(tensors[x] for x in self._keys))
        else:
            found = run.forward()
        self._write(dependencies, run.last)
        return self.traced.restored(self.results(found))

    def given(self, dependencies: Dependencies, x: Input) -> Tensor:
        """What a call is given for an input of the program."""
        return dependencies.tensor(self.sources[x])

    def results(self, found: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the function returns, of what the program gives."""
        return found

    def _kept(self, tensors: dict[Input, Tensor]) -> Kept:
        """What to keep for the backward, decided in the first call."""
        program, retention = self.program, retention_of(self.program, self._options)
        lowering = settled(program.step_graphs, self._options.lowering)
        if program.kept is None or (lowering != self._planned and retention.memory_budget is not None):
            self._planned = lowering
            self.begin()
            if program.kept and self.plan and not may_check(program, lowering, self.plan.budget):
                self._lowering = lowering.uncompiled
                return program.kept
            with waiting(f"planning what {self._name} keeps ..."):
                kept, self.plan = decide(program, lowering, retention, self._name, tensors)
            checkpoint(program, replace(self._options, kept=kept))
            if self.plan is not None:
                if retention.memory_budget is None:
                    tell_default(self._name, self.plan.budget)
                _plans.info("%s: %s", self._name, self.plan)
        assert program.kept is not None
        if not retention.given and not self._divided and self.plan is None and self._divisible():
            # nobody has asked for residuals: they are taken up when their graphs are there
            self._divided = True
            kept, _ = with_default_residuals(program.kept, program, self._options.lowering)
            checkpoint(program, replace(self._options, kept=kept))
        return program.kept

    def begin(self) -> None:
        """Have the step graphs compiled that are to be: with residuals at once where calls wait for them."""
        program, lowering = self.program, self._options.lowering
        saving = waits() and not retention_of(program, self._options).given
        for step in program.step_graphs:
            divided = saving and residuals(step, lowering.hvp) is not None
            begin(step, program.lowering_of(step, lowering), divided)

    def _in_blocks(self, tensors: dict[Input, Tensor]) -> Program | None:
        """The program in blocks, once their graphs are there: they are compiled when those of steps are in use."""
        if self._blocks is None:
            retention, lowering = retention_of(self.program, self._options), self._options.lowering
            if retention.memory_budget is None:
                self._steady += self.program.kept is not None and self.program.kept.saved > 0
            else:
                self._steady += self._planned == self._lowering == lowering
            if self._steady < 2:
                return None
            self._blocks = Blocks(self.program, lowering, retention, self.plan, self._name)
        watched = self.check is not None or progress.current.get() is not None
        return None if watched else self._blocks.program(tensors)

    def _divisible(self) -> bool:
        lowering = self._options.lowering
        steps = [(g, self.program.lowering_of(g, lowering)) for g in self.program.step_graphs]
        ready = [divisible(g, how) for g, how in steps if how.backend == "inductor"]  # each is begun
        return all(ready)

    @torch.no_grad()
    def _write(self, dependencies: Dependencies, last: list[tuple[Any, Tensor]]) -> None:
        """Leave in tensors and optimizers from outside what the call has made of them."""
        for target, (_, value) in zip(self._writes, last, strict=True):
            if isinstance(target, tuple):
                optimizer, p, name = target
                optimizer.state[p][name] = value.clone()
            else:
                dependencies.tensor(target).copy_(value)


def _reached(call: StepCall, hvp: str) -> list[Any]:
    """What a call is given that a gradient of it reaches."""
    step, first = call.step, call.step.states
    at = step.metas
    if not at or not step.cotangents:
        return []
    grads = results_of(derived(step, hvp).graph)
    return [x for i in at if grads[i] is not None for x in call.inputs[i - first].sources]


class StepSpecialization:
    """A captured step of an ordinary window; the fields are those of `Specialization`."""

    def __init__(self, step: CompiledStep, lowering: Lowering, of: Dependencies, traced: Traced) -> None:
        self.step, self.program, self.traced, self._lowering = step, step.program, traced, lowering
        self.remembered, source = of.remembered(), of.sources()
        inputs = [x for x in (*step.given, *step.left) if isinstance(x, Input)]
        self.sources = {x: source(x.tensor) for x in inputs}
        for x in self.sources:
            del x.tensor  # another call brings another one

    def run(self, dependencies: Dependencies, window: RecordedSession | None) -> Any:
        """A step of the window: what the function returns."""
        assert window is not None
        results = self.step.run(window, lambda x: dependencies.tensor(self.sources[x]), self._lowering)
        return self.traced.restored(results)


def specialize(
    fn: Callable,
    options: Options,
    window: RecordedSession | None,
    dependencies: Dependencies,
    args: tuple,
    kwargs: dict,
    reads: Reads | None = None,
) -> Specialization | StepSpecialization:
    """Capture ``fn`` as it acts on these arguments, inside ``window`` as its step, and take it through the passes.

    ``dependencies`` are extended by what the capture ``reads``.
    """
    if window is not None:
        step, _, traced = captured_step(fn, window, args, kwargs, reads)
        if options.lowering.cuda_graphs:
            budget = window.options.retention.memory_budget
            check_captured([p.spec for p in step.step.inputs], budget, name_of(fn))
        if reads is not None:
            with window.recorder.paused():
                reads.settle(dependencies)
        return StepSpecialization(step, options.lowering, dependencies, traced)
    if options.lowering.backend == "inductor":
        prepare(dependencies.tensors)
    trace, traced, _ = trace_of(fn, args, kwargs, reads=reads)
    if reads is not None:
        reads.settle(dependencies)
    with unaffected():
        program, records = compile_trace(trace, options)
    if options.lowering.cuda_graphs:
        budget = retention_of(program, options).memory_budget
        check_captured([x.spec for x in program.inputs], budget, name_of(fn))
    warn_unreached(trace, program, fn)
    return Specialization(name_of(fn), options, dependencies, program, records, traced)


def warn_unreached(trace: Trace, program: Program, fn: Callable) -> None:
    """Warn if what a function returns depends on none of its inner steps."""
    if trace.steps and not program.horizon:
        warn(
            f"nothing that {getattr(fn, '__qualname__', 'the function')} returns depends on its "
            f"{plural(len(trace.steps), 'inner step')}, which are not run: was the outer loss meant to be "
            "computed inside the window's block? After an offline one the networks are back at their first parameters.",
            UnreachableWarning,
        )


def name_of(fn: Callable) -> str:
    """What messages call a function."""
    return getattr(fn, "__qualname__", type(fn).__name__)


# -- compile(recapture=True): is a captured function still the function it was captured from? --------------------------


def compare(
    name: str, known: Specialization | StepSpecialization, again: Specialization | StepSpecialization
) -> None:
    """Raise at the first difference of two captures of one function for equal guards: the first one, and one of now."""
    where = _difference(known, again)
    if where is None:
        return
    raise CaptureError(
        f"recapture=True: {name} is not what it was when it was captured, although its guards hold: {where}. It "
        "depends on something that is frozen at capture (the time of day, a file, what only Python's own functions "
        "give away); pass that as an argument, as a tensor if it changes often"
    )


def _difference(
    known: Specialization | StepSpecialization, again: Specialization | StepSpecialization
) -> str | None:
    if _result(known) != _result(again):
        return f"what it returns besides tensors was {_result(known)[0]}, and is {_result(again)[0]}"
    if known.program.horizon != again.program.horizon:
        return f"it took {plural(known.program.horizon, 'inner step')}, and takes {again.program.horizon}"
    calls, calls_now = list(known.program.counted()), list(again.program.counted())
    for (was, count), (now, counts) in zip(calls, calls_now, strict=False):
        place = f"at {now.location}" if now.location else "after the last inner step"
        if was.step is not now.step:
            for a, b in zip(str(was.step).splitlines(), str(now.step).splitlines(), strict=False):
                if a != b:
                    return f"what it does {place} was\n    {a.strip()}\nand is\n    {b.strip()}\nSo it has changed"
            return f"it does something else {place}"
        if (was.reads, was.writes) != (now.reads, now.writes):
            return f"what it does {place} reads or leaves other values"
        for a, b in zip(was.inputs, now.inputs, strict=True):
            listed, listed_now = ((g.of if g.kind == "each" else (g,)) for g in (a, b))
            if [(g.kind, g.at) for g in (a, *listed)] != [(g.kind, g.at) for g in (b, *listed_now)]:
                return f"what it reads {place} is another row or number"
            for x, y in zip(listed, listed_now, strict=True):
                change = _change(x.of, y.of, known.sources, again.sources)
                if change:
                    return f"{change} {place}"
        if (count, [g.stride for g in was.inputs]) != (counts, [g.stride for g in now.inputs]):
            told = "is another row or number in other iterations, or so are their numbers"
            return f"what it reads {place} {told}"
    if len(calls) != len(calls_now):
        return f"it consisted of {len(calls)} parts, and consists of {len(calls_now)}"
    return None


def _result(program: Any) -> tuple[str, Any]:
    return repr(program.traced.leaves), program.traced.spec


def _change(x: Any, y: Any, was: Mapping[Input, Source], now: Mapping[Input, Source]) -> str | None:
    """What has become of something that a call is given."""
    if isinstance(x, Noise) or isinstance(y, Noise):
        return None  # drawn anew; how is part of the step
    if not isinstance(x, Input) or not isinstance(y, Input):
        same = type(x) is type(y) and repr(x) == repr(y)
        return None if same else f"the number {x!r} is now {y!r},"
    a, b = was[x], now[y]
    if isinstance(a, int) or isinstance(b, int):
        return None if a == b else "another tensor is read"
    if a is b:
        return None
    if a.requires_grad or b.requires_grad or tensor_spec(a) != tensor_spec(b):
        return f"another tensor of shape {tuple(b.shape)} is read"
    equal = torch.equal(a, b)  # a constant made inside is another tensor each time
    return None if equal else f"a constant tensor of shape {tuple(b.shape)} has other values"
