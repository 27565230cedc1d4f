"""What a function becomes when it is compiled, or what a window has recorded; its cost, and where its gradients go."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from ..compiler.compat import profiling
from ..compiler.cost.step import step_cost
from ..compiler.derive.graphs import results_of
from ..compiler.ir.programs.calls import Loop, Operand
from ..compiler.ir.programs.program import Kept, Program, Tape
from ..compiler.ir.step import Lowering, Role, StepGraph
from ..compiler.ir.tensors import memory_of, nbytes
from ..compiler.ir.text import plural, signature
from ..compiler.ir.traces.trace import Trace
from ..compiler.ir.values import Input
from ..compiler.lower.derivatives import derived
from ..compiler.passes.block import sizes_of
from ..compiler.passes.options import Options, retention_of
from ..compiler.passes.pipeline import Record, checkpoint, compile_trace, derive_all
from ..errors import WindowError, user_scope
from ..functions.blocks import have_blocks
from ..functions.guards import Dependencies
from ..functions.specialization import captured_step, name_of, trace_of
from ..functions.surroundings import names_in, tensor_names
from ..runtime.budget.measure import measured_peak, rehearse
from ..runtime.budget.planner import decide, with_default_residuals
from ..runtime.budget.simulate import predict, predict_sweep
from ..runtime.engine.graph import leaves_of
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
    more = 0
    if plan is None and not said.given:
        kept, more = with_default_residuals(kept, program, lowering)
    slots, offload = kept.slots, kept.offload
    prediction = predict(program, slots, lowering, offload is not None)
    if not prediction.reached:
        kept, more = Kept(1), 0
        prediction = predict(program, 1, lowering)
    saved = kept.saved
    peak = plan.peak_bytes if plan is not None and saved else prediction.peak_bytes + more
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
    if (saved or said.memory_budget is not None) and have_blocks(program, lowering, said):
        begun, sizes = time.perf_counter(), sizes_of(program, lowering.hvp)
        if any(sizes):
            steps = " and ".join(map(str, filter(None, sizes)))
            done = f"loops run {steps} steps a graph, once the graphs of single steps are in use"
            records.append(Record("block", done, 1e3 * (time.perf_counter() - begun)))
    whole = prediction.reached
    if program.window:
        whole = predict(replace(program, window=None), slots, lowering).reached
    found, missed = _gradients(trace, program, labels, names, prediction.reached, whole)
    read = {id(x.tensor) for x in trace.inputs}
    learnable = [
        t for t in Dependencies.of_call(fn, args, kwargs).tensors if t.requires_grad and id(t) in names
    ]
    unread = {names[id(t)] for t in learnable if id(t) not in read} - found.keys()
    missed |= dict.fromkeys(unread - missed.keys(), "not read")
    order = {names[id(t)]: i for i, t in reversed(list(enumerate(learnable)))}

    def ordered(of: dict[str, str]) -> dict[str, str]:
        return dict(sorted(of.items(), key=lambda item: order.get(item[0], len(order))))

    extra = prediction.extra_forwards
    return Report(
        **of_program(program, lambda g: program.lowering_of(g, lowering)),
        **of_gradients(ordered(found), ordered(missed)),
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
    targets = [x for x, p, depends in given if p.role is Role.META and depends]
    labels = {x: names.get(id(x.tensor)) or _unnamed(x) for x in trace.inputs}
    own = {id(p) for p in window.networks.originals}
    others = [x for x in trace.inputs if x.grad and x not in targets and id(x.tensor) not in own]
    missing = [x for x in others if x.tensor.requires_grad]
    return Report(
        **of_gradients(
            {labels[x]: "this step" for x in targets},
            {labels[x]: "no result of the step depends on it" for x in missing},
        ),
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
) -> tuple[dict[str, str], dict[str, str]]:
    """By name, through which step graphs a gradient comes, and why the rest of what requires grad gets none.

    ``reached``: inputs that a gradient reaches; ``whole``: that it would reach if it were not truncated.
    """
    entries = [e for w in trace.windows if not w.offline for e in w.adopted]
    adopted = {id(x.tensor) for e in entries for x in e.args if isinstance(x, Input)}
    through, told = _paths(program), set(program.inputs)
    found: dict[str, str] = {}
    missed: dict[str, str] = {}
    for x in trace.inputs:
        if x in reached:
            found[labels[x]] = through[x]
        # networks of other optimizers that are still alive are taken in too: nothing to tell
        elif x.grad and (x in told or id(x.tensor) in names):
            if id(x.tensor) in adopted:
                why = CUT_OFF
            elif x not in told:
                why = "read, but no result depends on it"
            elif x in whole:
                why = f"only read more than window={program.window} super-steps before the loss"
            else:
                why = NO_FLOW
            missed[labels[x]] = why
    return found, missed


def _paths(program: Program) -> dict[Input, str]:
    """Through which step graphs the gradient of each input comes."""
    names, counts = program.names(), dict[Input, Counter[str]]()
    for call, count in program.counted():
        times: dict[Input, int] = {}
        for g, p in zip(call.inputs, call.step.inputs[call.step.states :], strict=True):
            if p.role is Role.META:
                # of a list, each call takes one
                listed = Counter(x for x in g.sources if isinstance(x, Input))
                for x, k in listed.items():
                    times[x] = max(times.get(x, 0), k if g.kind == "each" else count)
        for x, k in times.items():
            counts.setdefault(x, Counter())[names[id(call.step)]] += k
    return {x: "through " + calls_text(of) for x, of in counts.items()}


def _unnamed(x: Input) -> str:
    where = f", first read at {x.location}" if x.location else ""
    return f"a tensor of shape {tuple(x.spec.shape)}{where}"


# -- an ordinary window -----------------------------------------------------------------------------------------------


def explain_window(session: RecordedSession, title: str) -> Report:
    """What `SlidingWindow.explain` returns, while nothing is recorded."""
    engine, options, program = session.engine, session.options, session.program
    program.fold()
    for call, _ in program.counted():
        if call.step.dynamic and call.lowering.hvp not in call.step.derived.vjp:
            raise WindowError(
                f"window.explain: the shapes in the step at {call.location} depend on values, so its derivative is "
                "known only once it has been run; ask after a backward, or without slots="
            )
    store = engine.store
    positions = range(store.base, program.end)
    kept = [p - store.base for p in positions if p in store]
    swept = [program[p] for p in positions]
    prediction = predict_sweep(swept, store.slots, options.retention.offload is not None, engine.state, kept)
    streaming = engine.streaming
    beside = 0 if streaming is None else streaming.beside + streaming.saved
    lowerings = {id(call.step): call.lowering for call, _ in program.counted()}
    budgeted = streaming if streaming is not None and streaming.acts and lowerings else None
    below = "streaming" if options.retention.offload is None else "tiered"
    return Report(
        **of_program(program, lambda g: lowerings[id(g)]),
        **of_gradients(*_window_gradients(session, program)),
        function=title,
        form="block",
        window=options.window,
        offline=options.offline,
        slots=store.slots,
        memory_budget=None if budgeted is None else budgeted.budget,
        minimum_budget=None if budgeted is None else budgeted.minimum(engine),
        offload=options.retention.place,
        plan="all states" if store.slots is None else below,
        kept_states=len(store),
        saved_calls=engine.saved_calls,
        extra_forwards=prediction.extra_forwards,
        recompute_factor=1 + prediction.extra_forwards / max(program.end - program.start, 1),
        state_bytes=memory_of(engine.state),
        predicted_peak_bytes=prediction.peak_bytes + beside,
        predicted_forward_bytes=prediction.forward_bytes + beside,
        passes=list(map(asdict, _records(program, lowerings))),
        program=str(program),
    )


def _records(program: Tape, lowerings: dict[int, Lowering]) -> list[Record]:
    """What the passes have done, of each step graph by itself, and of the program."""
    names = program.names()
    found = [
        replace(r, done=f"{names[id(g)]}: {r.done}")
        for g in program.step_graphs
        for r in g.records
        if r.name != "capture"  # that was the step itself
    ]
    calls = program.end - program.start
    loops = sum(isinstance(x, Loop) for x in program.calls)
    done = f"{plural(calls, 'call')} in {plural(loops, 'loop')} and "
    done += plural(len(program.calls) - loops, "call")
    found.append(Record("loop", done, program.milliseconds))
    begun = time.perf_counter()
    modes: dict[str, list[StepGraph]] = {}
    for g in program.step_graphs:
        modes.setdefault(lowerings[id(g)].hvp, []).append(g)
    done = "; ".join(derive_all(graphs, hvp, True) for hvp, graphs in modes.items())
    return [*found, Record("differentiate", done, 1e3 * (time.perf_counter() - begun))]


def _window_gradients(session: RecordedSession, program: Tape) -> tuple[dict[str, str], dict[str, str]]:
    """By name, where a gradient comes from, and why the rest of what requires grad gets none."""
    called = names_in(user_scope())
    through: dict[int, Counter[str]] = {}
    names = program.names()
    for call, count in program.counted():
        grads = results_of(derived(call.step, call.lowering.hvp).graph)
        at = call.step.metas
        for meta in (m for m, i in zip(call.metas, at, strict=True) if grads[i] is not None):
            times = Counter(meta.of) if isinstance(meta, Operand) else {meta: count}
            for number, k in times.items():
                through.setdefault(number, Counter())[names[id(call.step)]] += k
    found: dict[str, str] = {}
    missed: dict[str, str] = {}
    for number, tensor in session.view.reads.meta_params():
        parts = calls_text(through.get(number, {}))
        for leaf in leaves_of(tensor):
            name = called.get(id(leaf)) or f"a tensor of shape {tuple(leaf.shape)}"
            (found if parts else missed)[name] = f"through {parts}" if parts else NO_FLOW
    options, own = session.options, session.networks
    beyond = session.view.reads.truncates
    reason = "what the inner steps begin with" if options.offline else CUT_OFF
    if options.offline and beyond:
        reason = f"more than window={options.window} super-steps back"
    for i, shown in enumerate(own.shown):
        if session.view.indices[i] < 0:
            continue  # no loss has read it
        name, joined = called.get(id(shown), own.names[i]), i in own.joined
        reached = found if not joined or (options.offline and not beyond) else missed
        reached[name] = reason if joined else "no optimizer has stepped it, losses read it"
    return found, missed
