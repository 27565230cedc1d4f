"""A function, captured: its trace, its program for one set of guards, and what the program needs of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..compiler.capture import intercept
from ..compiler.capture.symbolic.refusals import refusing
from ..compiler.capture.symbolic.tracer import Tracer, capturing
from ..compiler.derive.liveness import results_of
from ..compiler.derive.reverse import cotangent_outputs
from ..compiler.derive.tracing import uncollected
from ..compiler.ir.program import Operand, Program, plural
from ..compiler.ir.retention import Retention
from ..compiler.ir.step import Role, StepCall
from ..compiler.ir.trace import Input, Trace
from ..compiler.lower.ambient import unaffected
from ..compiler.lower.derivatives import derived
from ..compiler.passes.options import Options
from ..compiler.passes.pipeline import Record, compile_trace
from ..errors import UnreachableWarning, warn
from ..runtime.budget.planner import Plan
from ..runtime.functions.compiled_step import CapturedStep, CompiledStep, aside
from ..runtime.windows.recording_session import RecordedSession
from .guards import Dependencies
from .reads import Reads


class Specialization:
    """A captured function, for one set of guards.

    Attributes:
        rolled: its calls.
        records: what each pass did.
        plan: how it keeps to its memory budget, once it has run under one.
        sources: input of the program -> its place among the tensors of the dependencies, or the very tensor.
    """

    def __init__(
        self, dependencies: Dependencies, rolled: Program, records: list[Record], traced: Traced, hvp: str
    ) -> None:
        self.rolled, self.records, self.traced = rolled, records, traced
        self.remembered = dependencies.remembered()
        self.plan: Plan | None = None
        at = dependencies.place_of()
        calls = [call for call, _ in rolled.counted()]
        found = {x for c in calls for g in c.inputs for x in g.sources if isinstance(x, Input)}
        found |= {where for where in rolled.outputs if isinstance(where, Input)}
        self.sources: dict[Input, int | Tensor] = {x: at.get(id(x.tensor), x.tensor) for x in found}
        self.writes = [at.get(id(t), t) if isinstance(t, Tensor) else t for t, _ in rolled.writes]
        reached = {x for c in calls for x in _reached(c, hvp)}
        self.keys = [x for x in found if x.grad and x in reached]
        for x in found:
            if isinstance(self.sources[x], int):
                del x.tensor  # another call brings another one

    def tensors(self, dependencies: Dependencies) -> dict[Input, Tensor]:
        """The inputs' tensors in this call."""
        return {x: dependencies.tensors[s] if isinstance(s, int) else s for x, s in self.sources.items()}


def _reached(call: StepCall, hvp: str) -> list[Any]:
    """What a call is given that a gradient of it reaches."""
    step, first = call.step, len(call.step.inputs) - len(call.inputs)
    at = [i for i, port in enumerate(step.inputs) if port.role is Role.META]
    if not at or not cotangent_outputs(step):
        return []
    grads = results_of(derived(step, hvp).graph)
    return [x for i in at if grads[i] is not None for x in call.inputs[i - first].sources]


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


@dataclass
class StepSpecialization:
    """A captured step, for one set of guards."""

    step: CompiledStep
    sources: dict[Input, int | Tensor]
    remembered: list[Any]
    traced: Traced

    @property
    def rolled(self) -> Program:
        """What it does: one call."""
        given = [Operand("input", x) for x in self.step.given]
        return Program([StepCall(self.step.step, (), (), (), (), 0, given, (), "")])

    def tensor(self, x: Input, dependencies: Dependencies) -> Tensor:
        """The tensor behind an input in this call."""
        source = self.sources[x]
        return dependencies.tensors[source] if isinstance(source, int) else source


def trace_of(
    fn: Callable,
    args: tuple,
    kwargs: dict,
    window: RecordedSession | None = None,
    reads: Reads | None = None,
) -> tuple[Traced, Tracer, CapturedStep | None]:
    """Run ``fn`` on these arguments, symbolically; inside ``window``, as one of its steps; ``reads`` watches."""
    begun = time.perf_counter()
    intercept.install()
    try:
        with uncollected(), refusing(), capturing() as tracer:
            token = intercept.recording.set(tracer)
            try:
                session = None if window is None else CapturedStep(window, tracer)
                stepping = nullcontext() if session is None else session.stepping()
                with torch.inference_mode(False), torch.enable_grad(), stepping:
                    with nullcontext() if reads is None else reads.watching():
                        result = fn(*args, **kwargs)
                    leaves, spec = tree_flatten(result)
                    given = [tracer.give(t) for t in leaves if isinstance(t, Tensor)]
                    tracer.trace.left = [(t, tracer.give(t)) for t, _ in tracer.overwritten.values()]
            finally:
                intercept.recording.reset(token)
    finally:
        intercept.uninstall()
    if reads is not None:
        for optimizer in tracer.stepped:
            reads.meet(optimizer, type(optimizer).__name__)
    tracer.trace.milliseconds = 1e3 * (time.perf_counter() - begun)
    kept = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]
    return Traced(given, kept, spec), tracer, session


def captured_step(
    fn: Callable,
    window: RecordedSession,
    args: tuple,
    kwargs: dict,
    texts: Mapping[Input, str] | None = None,
    reads: Reads | None = None,
) -> tuple[CompiledStep, Trace, Traced]:
    """Capture ``fn`` as a step of ``window``, which is left as it is; the rest as of `compile_trace` and `trace_of`."""
    with aside(window):
        traced, tracer, session = trace_of(fn, args, kwargs, window, reads)
    assert session is not None
    with unaffected():
        step = CompiledStep(session, traced.tensors, texts)
    return step, tracer.trace, traced


def capture(
    fn: Callable,
    options: Options,
    dependencies: Dependencies,
    args: tuple,
    kwargs: dict,
    reads: Reads | None = None,
) -> Specialization:
    """Capture ``fn`` as it acts on these arguments, and take its trace through the passes.

    What it ``reads`` comes to ``dependencies``.
    """
    traced, tracer, _ = trace_of(fn, args, kwargs, reads=reads)
    if reads is not None:
        reads.settle(dependencies)
    tracer.trace.outputs = traced.tensors
    with unaffected():
        rolled, records = compile_trace(tracer.trace, options)
    if tracer.trace.steps and not rolled.horizon:
        warn(
            f"nothing that {getattr(fn, '__qualname__', 'the function')} returns depends on its "
            f"{plural(len(tracer.trace.steps), 'inner step')}, which are not run: was the outer loss meant to be "
            "computed inside the window's block? After an offline one the networks are back at their first parameters.",
            UnreachableWarning,
        )
    return Specialization(dependencies, rolled, records, traced, options.lowering.hvp)


def retention_of(program: Program, options: Options) -> Retention:
    """What is kept: what the windows of the program say, else what the decorator says."""
    return program.retention if program.retention.given else options.retention
