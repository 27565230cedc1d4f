"""A function, or a step of a window, run symbolically: its trace, and what it returned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.compat import tree_flatten, tree_unflatten

from ..compiler.capture import intercept
from ..compiler.capture.symbolic.capturing import capturing
from ..compiler.capture.symbolic.refusals import refusing
from ..compiler.derive.tracing import uncollected
from ..compiler.ir.trace import Input, Trace
from ..compiler.lower.ambient import unaffected
from ..runtime.functions.captured_step import CapturedStep, aside, compiled
from ..runtime.functions.compiled_step import CompiledStep
from ..runtime.windows.recording_session import RecordedSession
from .reads import Reads

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
    fn: Callable,
    args: tuple,
    kwargs: dict,
    window: RecordedSession | None = None,
    reads: Reads | None = None,
) -> tuple[Trace, Traced, CapturedStep | None]:
    """Run ``fn`` on these arguments, symbolically, watched by ``reads``; inside ``window``, as one of its steps."""
    begun = time.perf_counter()
    intercept.patches.install()
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
        intercept.patches.uninstall()
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
    texts: Mapping[Input, str] | None = None,
    reads: Reads | None = None,
) -> tuple[CompiledStep, Trace, Traced]:
    """Capture ``fn`` as a step of ``window``, which is left as it is; see `trace_of` for the rest.

    ``texts``: names of the inputs, where the text of each pass is asked for.
    """
    with aside(window):
        trace, traced, session = trace_of(fn, args, kwargs, window, reads)
    assert session is not None
    with unaffected():
        step = compiled(session, traced.tensors, texts)
    return step, trace, traced
