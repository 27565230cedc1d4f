"""What a function becomes when it is compiled, what a call will cost, and where its gradients go."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from torch import Tensor

from ..compiler.compat import profiling
from ..compiler.cost.step import step_cost
from ..compiler.ir.program import Kept, Program
from ..compiler.ir.step import Role
from ..compiler.ir.tensors import nbytes
from ..compiler.ir.text import plural, signature
from ..compiler.ir.trace import Input, Trace
from ..compiler.passes.checkpoint import checkpoint
from ..compiler.passes.options import Options
from ..compiler.passes.pipeline import Record, compile_trace
from ..errors import WindowError
from ..functions.guards import Dependencies
from ..functions.specialization import captured_step, name_of, retention_of, trace_of
from ..functions.surroundings import tensor_names
from ..runtime.budget.measure import measured_peak, rehearse
from ..runtime.budget.planner import decide
from ..runtime.budget.simulate import predict
from ..runtime.windows.recording_session import RecordedSession
from ..runtime.windows.session import current_session
from .report import CUT_OFF, NO_FLOW, Report, calls_text, of_gradients, of_program, shape_of


def report_of(fn: Callable, options: Options, args: tuple, kwargs: dict, measure: bool = False) -> Report:
    """What `explain` returns, for a call of ``fn`` with these arguments."""
    session = current_session()
    if measure and (session is not None or profiling()):
        raise WindowError("explain(measure=True): call it outside windows, and while no profiler is active")
    if isinstance(session, RecordedSession):
        return _of_step(fn, options, session, args, kwargs)
    if session is not None:
        raise WindowError("explain inside a full_tape window, where nothing is compiled; call it outside")
    names = tensor_names(fn, args, kwargs)
    trace, _, _ = trace_of(fn, args, kwargs)
    labels = {x: names.get(id(x.tensor)) or _unnamed(x) for x in trace.inputs}
    program, records = compile_trace(trace, options, labels)
    said, lowering = retention_of(program, options), options.lowering
    tensors = {x: x.tensor for x in program.inputs}
    if measure:
        rehearse(program, tensors, lowering)
    begun = time.perf_counter()
    kept, plan = decide(program, lowering, said, name_of(fn), tensors if measure else None)
    slots, offload = kept.slots, kept.offload
    prediction = predict(program, slots, lowering, offload is not None)
    if not prediction.reached:
        kept = Kept(1)
        prediction = predict(program, 1, lowering)
    saved = kept.saved
    peak = plan.peak_bytes if plan is not None and saved else prediction.peak_bytes
    kind = "scheduled" if offload is None else "tiered"
    if not prediction.reached:
        kind = "forward only"
    elif saved and saved == program.swept:
        kind = "unrolled"
    elif slots is None or slots >= program.swept:
        kind = "all states"
    text = program.text(labels)
    _, done = checkpoint(program, replace(options, kept=kept))
    done += f"; {plural(prediction.extra_forwards, 'call')} made again"
    records.append(Record("checkpoint", done, 1e3 * (time.perf_counter() - begun)))
    whole = prediction.reached
    if program.window:
        whole = predict(replace(program, window=None), slots, lowering).reached
    paths, targets = _gradients(trace, program, labels, names, prediction.reached, whole)
    dependencies = _learnable(names, fn, args, kwargs)
    read = {id(x.tensor) for x in trace.inputs}
    paths |= {name: "not read" for name, t in dependencies.items() if id(t) not in read and name not in paths}
    order = [*(n for n in dependencies if n in paths), *(n for n in paths if n not in dependencies)]
    extra = prediction.extra_forwards
    return Report(
        **of_program(program, lambda g: program.lowering_of(g, lowering)),
        **of_gradients({n: paths[n] for n in order}, targets),
        function=name_of(fn),
        form="window",
        window=program.window,
        offline=program.offline,
        slots=slots,
        memory_budget=None if plan is None else plan.budget,
        minimum_budget=None if plan is None else plan.minimum,
        offload=said.place,
        plan=kind,
        kept_states=prediction.kept,
        saved_calls=saved,
        extra_forwards=extra,
        recompute_factor=1 + extra / max(program.positions, 1),
        state_bytes=program.state_bytes,
        predicted_peak_bytes=peak,
        predicted_forward_bytes=prediction.forward_bytes,
        measured_peak_bytes=measured_peak(program, tensors, lowering, kept) if measure else None,
        passes=list(map(asdict, records)),
        program=text,
    )


def _of_step(fn: Callable, options: Options, window: RecordedSession, args: tuple, kwargs: dict) -> Report:
    with window.recorder.paused():
        names = tensor_names(fn, args, kwargs)
        step, trace, _ = captured_step(fn, window, args, kwargs, texts={})
    cost = step_cost(step.step, options.lowering)
    first = step.step.states
    given = list(zip(step.given, step.step.inputs[first:], cost.depends[first:], strict=False))
    targets = {x: "this step" for x, p, depends in given if p.role is Role.META and depends}
    labels = {x: names.get(id(x.tensor)) or _unnamed(x) for x in trace.inputs}
    own = {id(p) for p in window.networks.originals}
    missing = [x for x in trace.inputs if x.grad and x not in targets and id(x.tensor) not in own]
    missing = [x for x in missing if x.tensor.requires_grad]
    paths = {labels[x]: "this step" for x in targets}
    paths |= {labels[x]: "no result of the step depends on it" for x in missing}
    return Report(
        **of_gradients(paths, {labels[x] for x in targets}),
        function=name_of(fn),
        form="step",
        horizon=len(trace.steps),
        calls=1,
        num_programs=1,
        window=window.options.window,
        offline=window.options.offline,
        slots=window.options.retention.slots,
        offload=window.options.retention.place,
        plan="streaming",
        state_bytes=sum(nbytes(p.spec) for p in step.step.outputs),
        transient_bytes=cost.vjp_bytes,
        passes=list(map(asdict, step.records)),
        shapes={"step": shape_of(step.step, 1, options.lowering)},
        program=signature(step.step, "step") + "\n" + str(step.step),
    )


# -- what reaches the results ----------------------------------------------------------------------------------------


def _gradients(
    trace: Trace,
    program: Program,
    labels: Mapping[Input, str],
    names: Mapping[int, str],
    reached: frozenset[Input],
    whole: frozenset[Input],
) -> tuple[dict[str, str], set[str]]:
    """Name of what requires grad -> through which step graphs its gradient comes, or why it gets none; who gets one.

    Args:
        trace: what was captured.
        program: made of it.
        labels: of what it reads.
        names: by id, of what the caller has names for.
        reached: inputs that a gradient reaches.
        whole: inputs that a gradient would reach if it were not truncated.
    """
    entries = [e for w in trace.windows if not w.offline for e in w.adopted]
    adopted = {id(x.tensor) for e in entries for x in e.args if isinstance(x, Input)}
    through = _paths(program)
    found = [x for x in trace.inputs if x in reached]
    paths = {labels[x]: through[x] for x in found}
    told = {id(x) for x in program.inputs}
    for x in trace.inputs:
        # networks of other optimizers that are still alive are taken in too: nothing to tell
        if x.grad and x not in reached and (id(x) in told or id(x.tensor) in names):
            paths[labels[x]] = _why_not(x, program, adopted, whole)
    return paths, {labels[x] for x in found}


def _paths(program: Program) -> dict[Input, str]:
    """Through which step graphs the gradient of each input comes."""
    names, counts = program.names(), dict[Input, Counter[str]]()
    for call, count in program.counted():
        times: dict[Input, int] = {}
        for g, p in zip(call.inputs, call.step.inputs[call.step.states :], strict=True):
            if p.role is Role.META:
                listed = Counter(
                    x for x in g.sources if isinstance(x, Input)
                )  # of a list, each call takes one
                for x, k in listed.items():
                    times[x] = max(times.get(x, 0), k if g.kind == "each" else count)
        for x, k in times.items():
            counts.setdefault(x, Counter())[names[id(call.step)]] += k
    return {x: "through " + calls_text(of) for x, of in counts.items()}


def _why_not(x: Input, program: Program, adopted: set[int], whole: frozenset[Input]) -> str:
    if id(x.tensor) in adopted:
        return CUT_OFF
    if not any(x is y for y in program.inputs):
        return "read, but no result depends on it"
    if x in whole:
        return f"only read more than window={program.window} super-steps before the loss"
    return NO_FLOW


def _learnable(names: Mapping[int, str], fn: Callable, args: tuple, kwargs: dict) -> dict[str, Tensor]:
    dependencies = Dependencies.of_call(fn, args, kwargs)
    return {names[id(t)]: t for t in dependencies.tensors if t.requires_grad and id(t) in names}


def _unnamed(x: Input) -> str:
    where = f", first read at {x.location}" if x.location else ""
    return f"a tensor of shape {tuple(x.spec.shape)}{where}"
