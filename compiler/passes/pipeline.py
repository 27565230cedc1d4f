"""The passes in order, the verifier between them, and a record of what each one did.

Passes that are a few lines are here, the others in the file of their name.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from metaoptim.errors import CaptureError

from ..derive.flat import uncollected
from ..derive.reverse import made_up
from ..ir.programs.calls import Loop, folded
from ..ir.programs.program import Program
from ..ir.step import StepGraph
from ..ir.text import operator_count, partition_text, plural, trace_text
from ..ir.traces.trace import Partition, Trace
from ..ir.values import Input, Value
from ..ir.verify import verify_partition, verify_program
from ..lower.derivatives import derived, residuals
from .options import Options, retention_of
from .roll import roll
from .traces.canonicalize import canonicalize, outline
from .traces.enter import enter
from .traces.prune import keep_all, prune
from .traces.rows import rows
from .traces.split import split

Stage = Trace | Partition | Program
_log = logging.getLogger("metaoptim.passes")
#: A step graph that a call runs no more often than this runs as it is.
FEW = 2


def mode(trace: Trace, options: Options) -> tuple[Trace, str]:
    """Say what is written back, and where gradients are truncated.

    Online, the parameters that a window adopts are cut off from the user's own, and what it leaves is written back.
    Offline, neither.
    """
    stated = {mark.window for mark in trace.windows}
    if len(stated) > 1:
        raise CaptureError(
            f"windows of one compiled function must agree on window=: got {sorted(map(str, stated))}"
        )
    if len({mark.backward_hook for mark in trace.windows}) > 1:
        raise CaptureError("windows of one compiled function must have the same backward_hook")
    writes: dict[Any, tuple[Any, Value]] = {}
    online = [mark for mark in trace.windows if not mark.offline]
    for mark in online:
        for entry in mark.adopted:
            entry.op = torch.ops.aten.detach.default
        for target, value in mark.last:
            key: Any = id(target)
            if isinstance(target, tuple):
                optimizer, tensor, name = target  # pyright: ignore[reportUnknownVariableType]
                key = (id(optimizer), id(tensor), name)  # pyright: ignore[reportUnknownArgumentType]
            writes[key] = (target, value)
    writes.update((id(target), (target, value)) for target, value in trace.left)
    trace.writes = list(writes.values())
    window = next(iter(stated), None)
    trace.window = options.window if window is None else window
    cut = sum(len(mark.adopted) for mark in online)
    note = f"{cut} parameters cut off at entry, {len(writes)} tensors written back"
    return trace, note + (f", truncated to {window} super-steps" if window else "")


def loop(program: Program, options: Options) -> tuple[Program, str]:
    """Fold rounds of calls that leave their results where the next round looks for them into Loops.

    A plain ``for`` leaves many: of one call each, or of several where optimizers step by turns. What calls are given
    besides is the same in every round, or a row or a whole number that moves on by as much every time, or listed.
    """
    before = len(program.calls)
    program.calls = folded(program.calls)
    loops = sum(isinstance(item, Loop) for item in program.calls)
    return program, f"{plural(before, 'entry')} now {len(program.calls)}, {plural(loops, 'loop')} among them"


def differentiate(program: Program, options: Options) -> tuple[Program, str]:
    """Derive the step graphs that a gradient can flow through, in the mode that legality and cost allow."""
    learnt, limited = (
        any(x.grad for x in program.inputs),
        retention_of(program, options).memory_budget is not None,
    )
    return program, derive_all(program.step_graphs if learnt else (), options.lowering.hvp, limited)


def derive_all(graphs: Iterable[StepGraph], hvp: str, limited: bool) -> str:
    """Derive those of the step graphs that a gradient can flow through, and say which mode each got.

    Where memory is ``limited``, none is run to be derived.
    """
    chosen: Counter[str] = Counter()
    for step in graphs:
        if any(p.differentiable for p in step.inputs) and any(p.differentiable for p in step.outputs):
            derived(step, hvp, None if limited else made_up(step, "vjp"))
            chosen[step.derivatives[hvp]] += 1
    return "; ".join(f"{count} × {what}" for what, count in chosen.items()) or "no part carries a gradient"


def lower(program: Program, options: Options) -> tuple[Program, str]:
    """State which step graphs are compiled: those that repeat in a call, or all where none does."""
    graphs, backend = len(program.step_graphs), options.lowering.backend
    if backend == "eager":
        return program, f"{plural(graphs, 'step graph')}, all run as they are"
    counts: Counter[int] = Counter()
    chunked = sum(step.chunked for step in program.step_graphs)
    for call, count in program.counted():
        counts[id(call.step)] += count * (not call.step.chunked)
    repeated = frozenset(step for step, count in counts.items() if count > FEW)
    program.compiled = repeated or None
    compiled = len(repeated) or graphs - chunked
    rest = f"; {chunked} in chunks run as they are" if chunked else ""
    if compiled < graphs - chunked:
        rest += f"; the others run at most {FEW} times a call, as they are"
        if (
            backend == "inductor" and retention_of(program, options).memory_budget is None
        ):  # a check takes memory
            program.others = "auto"
            rest += " until that has taken long"
    return program, f"{compiled} of {plural(graphs, 'step graph')} compiled by {backend}{rest}"


def checkpoint(program: Program, options: Options) -> tuple[Program, str]:
    """State what is kept for the derivative: which states, and the residuals of which calls, as a plan says.

    The steps of the last ``kept.saved`` calls are divided anew: into a forward that gives residuals and a backward that
    goes on from them, in the place of a replay and a derivative that runs it again.
    """
    assert options.kept is not None
    program.kept = options.kept
    left, divided = options.kept.saved, set[int]()
    for call, count in reversed(list(program.counted())):
        if left > 0 and residuals(call.step, options.lowering.hvp) is not None:
            divided.add(id(call.step))
        left -= count
    note = f"; {len(divided)} of {len(program.step_graphs)} step graphs divided" if divided else ""
    return program, f"{program.kept}{note}"


@dataclass(frozen=True)
class Pass:
    """One rewrite in its place: (program, options) -> (program, note); ``instead`` is run where it is skipped."""

    run: Callable[[Any, Options], tuple[Stage, str]]
    instead: Callable[[Any, Options], tuple[Stage, str]] | None = None

    @property
    def name(self) -> str:
        """That of its function."""
        return self.run.__name__

    def __str__(self) -> str:
        return f"{self.name:<14}{(inspect.getdoc(self.run) or '').partition(chr(10))[0]}"


_SHAPING = (Pass(canonicalize, instead=outline), Pass(prune, instead=keep_all))
_UNPLANNED = (
    *(Pass(mode), Pass(rows), Pass(split), Pass(enter), *_SHAPING),
    *(Pass(roll, instead=roll), Pass(loop), Pass(differentiate), Pass(lower)),
)
#: All passes; the last one waits for a plan of what is kept, which a call makes.
PIPELINE = (*_UNPLANNED, Pass(checkpoint))


@dataclass(frozen=True)
class Record:
    """What a pass did, how long it took, the program's `sizes_of` before and after, and its text where asked for."""

    name: str
    done: str
    milliseconds: float
    before: dict[str, int] = field(default_factory=dict[str, int])
    after: dict[str, int] = field(default_factory=dict[str, int])
    text: str = ""

    def __str__(self) -> str:
        return f"{self.name:<14}{self.done}  ({self.milliseconds:.1f} ms)"


@uncollected()
def compile_trace(
    trace: Trace, options: Options, texts: Mapping[Input, str] | None = None
) -> tuple[Program, list[Record]]:
    """Take a trace, which is rewritten, through all passes that need no plan.

    Records hold the program as text where ``texts`` has names for the tensors it reads.

    Raises:
        CaptureError: for what cannot be compiled.
        ProgramError: where the verifier finds a pass to be wrong.
    """
    program, records = _run(_UNPLANNED, trace, trace, options, texts)
    assert isinstance(program, Program)
    return program, records


def shaped(partition: Partition, texts: Mapping[Input, str] | None = None) -> list[Record]:
    """Take a partition that is one part, a recorded or compiled step, through the passes that apply to it."""
    verify_partition(partition, outlined=False)
    return _run(_SHAPING, partition.trace, partition, Options(), texts)[1]


def _run(
    passes: Sequence[Pass], trace: Trace, stage: Stage, options: Options, texts: Mapping[Input, str] | None
) -> tuple[Stage, list[Record]]:
    """Take a stage of ``trace`` through passes, with the verifier after each that rewrites."""
    records: list[Record] = []
    verifying = 0.0

    def note(name: str, done: str, milliseconds: float, before: dict[str, int], stage: Stage) -> None:
        text = "" if texts is None else _text(stage, texts)
        records.append(Record(name, done, milliseconds, before, sizes_of(stage), text))
        _log.info("%s", records[-1])

    note("capture", f"{len(trace.entries)} calls", trace.milliseconds, {}, trace)
    for one in passes:
        run = one.instead if one.name in options.skip else one.run
        if run is not None:
            before, begun = sizes_of(stage), time.perf_counter()
            stage, done = run(stage, options)
            note(one.name, done, 1e3 * (time.perf_counter() - begun), before, stage)
            begun = time.perf_counter()
            if isinstance(stage, Partition):
                verify_partition(stage, outlined=one.run not in (split, enter))
            elif isinstance(stage, Program) and one.run in (roll, loop):
                verify_program(stage, pruned="canonicalize" not in options.skip, folded=one.run is loop)
            verifying += 1e3 * (time.perf_counter() - begun)
    records.append(Record("verify", "the program is well-formed after every pass", verifying))
    _log.info("%s", records[-1])
    return stage, records


def _text(stage: Stage, texts: Mapping[Input, str]) -> str:
    if isinstance(stage, Trace):
        return trace_text(stage)
    return partition_text(stage) if isinstance(stage, Partition) else stage.text(texts)


def sizes_of(program: Stage) -> dict[str, int]:
    """Sizes of a program in whatever stage; ``values`` are passed between parts, ``distinct`` are kinds of these."""
    if isinstance(program, Trace):
        return {"entries": len(program.entries)}
    if isinstance(program, Partition):
        return {
            "entries": sum(len(u.segment.entries) for u in program.parts),
            "parts": len(program.parts),
            "distinct": len(program.kinds),
            "values": sum(len(b.outputs) for b in program.kinds),
            "differentiable": sum(len(b.active_outputs) for b in program.kinds),
        }
    graphs = program.step_graphs
    return {
        "calls": program.positions,
        "step_graphs": len(graphs),
        "operators": sum(operator_count(g.graph) for g in graphs),
        "registers": program.registers,
        "state_bytes": program.state_bytes,
    }
