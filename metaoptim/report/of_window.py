"""What an ordinary window has recorded so far, what a backward from here would cost, and where its gradients go."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, replace

from ..compiler.derive.liveness import results_of
from ..compiler.ir.calls import Loop, Operand
from ..compiler.ir.step import Lowering, StepGraph
from ..compiler.ir.tape import Tape
from ..compiler.ir.tensors import memory_of
from ..compiler.ir.text import plural
from ..compiler.lower.derivatives import derived
from ..compiler.passes.differentiate import derive_all
from ..compiler.passes.pipeline import Record
from ..errors import WindowError, user_scope
from ..functions.surroundings import names_in
from ..runtime.budget.simulate import predict_sweep
from ..runtime.engine.graph import leaves_of
from ..runtime.windows.recording_session import RecordedSession
from .report import CUT_OFF, NO_FLOW, Report, calls_text, of_gradients, of_program


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
    beside = 0 if streaming is None else streaming.beside
    lowerings = {id(call.step): call.lowering for call, _ in program.counted()}
    budgeted = streaming if streaming is not None and streaming.acts and lowerings else None
    below = "streaming" if options.retention.offload is None else "tiered"
    return Report(
        **of_program(program, lambda g: lowerings[id(g)]),
        **of_gradients(*_paths(session, program)),
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
        saved_calls=0,
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
    loops = sum(isinstance(x, Loop) for x in program.items)
    done = f"{plural(calls, 'call')} in {plural(loops, 'loop')} and "
    done += plural(len(program.items) - loops, "call")
    found.append(Record("loop", done, program.milliseconds))
    begun = time.perf_counter()
    modes: dict[str, list[StepGraph]] = {}
    for g in program.step_graphs:
        modes.setdefault(lowerings[id(g)].hvp, []).append(g)
    done = "; ".join(derive_all(graphs, hvp) for hvp, graphs in modes.items())
    return [*found, Record("differentiate", done, 1e3 * (time.perf_counter() - begun))]


def _paths(session: RecordedSession, program: Tape) -> tuple[dict[str, str], set[str]]:
    """Name of what requires grad -> through which step graphs its gradient comes, or why it gets none; who gets one."""
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
    paths: dict[str, str] = {}
    targets: set[str] = set()
    for number, tensor in session.view.reads.meta_params():
        steps = through.get(number, {})
        parts = calls_text(steps)
        for leaf in leaves_of(tensor):
            name = called.get(id(leaf)) or f"a tensor of shape {tuple(leaf.shape)}"
            if parts:
                targets.add(name)
                paths[name] = f"through {parts}"
            else:
                paths.setdefault(name, NO_FLOW)
    options, own = session.options, session.networks
    beyond = session.view.reads.truncates
    reason = "what the inner steps begin with" if options.offline else CUT_OFF
    if options.offline and beyond:
        reason = f"more than window={options.window} super-steps back"
    for i, shown in enumerate(own.shown):
        if session.view.indices[i] < 0:
            continue  # no loss has read it
        name, joined = called.get(id(shown), own.names[i]), i in own.joined
        paths[name] = reason if joined else "no optimizer has stepped it, losses read it"
        if not joined or (options.offline and not beyond):
            targets.add(name)
    return paths, targets
