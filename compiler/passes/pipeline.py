"""The passes in order, the verifier between them, and a record of what each one did."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..derive.tracing import uncollected
from ..ir.fold import loop
from ..ir.program import Program, operator_count
from ..ir.retention import UNSAID, Retention
from ..ir.segments import Partition, split
from ..ir.step import Lowering
from ..ir.text import partition_text, trace_text
from ..ir.trace import Input, Trace
from ..ir.verify import verify_partition, verify_program
from ..lower.library import Library
from .canonicalize import canonicalize, outline
from .differentiate import differentiate
from .lower import lower
from .mode import mode
from .prune import keep_all, prune
from .roll import roll
from .rows import rows

OPTIONAL = ("rows", "canonicalize", "prune", "roll", "loop")
_log = logging.getLogger("metaoptim.passes")


@dataclass(frozen=True)
class Options:
    """Options of `metaoptim.compile`.

    Attributes:
        recapture: see `metaoptim.compile`.
        skip: passes switched off, to find out what one of them does: without canonicalize, calls that nothing needs
            are run; without prune, everything is differentiated; without roll, every part has a step graph of its own;
            without rows and loop, a plain `for` stays a list of calls. The gradients are the same. (The pass mode is
            what makes a window online, so it always runs.)
    """

    window: int | None = None
    retention: Retention = UNSAID
    lowering: Lowering = field(default_factory=lambda: Lowering("inductor", hvp="auto"))
    recapture: bool = False
    skip: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        unknown = sorted(self.skip - set(OPTIONAL))
        if unknown:
            raise ValueError(
                f"skip: got {', '.join(map(repr, unknown))}, expected some of {', '.join(map(repr, OPTIONAL))}"
            )


@dataclass(frozen=True)
class Record:
    """What a pass did, and how long it took.

    Attributes:
        before, after: sizes of the program; which ones depends on the form it has there.
        text: the program after the pass, where asked for.
    """

    name: str
    done: str
    milliseconds: float
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    text: str = ""

    def __str__(self) -> str:
        return f"{self.name:<14}{self.done}  ({self.milliseconds:.1f} ms)"


class PassLog:
    """Runs passes and records them, with the verifier after each.

    Args:
        trace: what was captured.
        texts: names for the tensors it reads, to keep the program as text after each pass; None to keep none.
    """

    def __init__(self, trace: Trace, texts: Mapping[Input, str] | None = None) -> None:
        self.records: list[Record] = []
        self.texts = texts
        self._checked = 0.0
        sizes = sizes_of(trace)
        self._note(
            Record("capture", f"{sizes['calls']} calls", trace.milliseconds, {}, sizes, self._text(trace))
        )

    def run(
        self,
        name: str,
        pass_: Callable[[], Any],
        before: Any,
        after: Callable[[Any], Any],
        check: Callable[[Any], None] | None = None,
    ) -> Any:
        """Run one pass.

        Args:
            name: of the pass.
            pass_: the pass; it returns what it did, last or alone.
            before: what it works on.
            after: its result -> what it has made.
            check: the verifier of that.
        """
        sizes = sizes_of(before)
        begun = time.perf_counter()
        result = pass_()
        milliseconds = 1e3 * (time.perf_counter() - begun)
        *results, done = result if isinstance(result, tuple) else (result,)
        made = after(results)
        self._note(Record(name, done, milliseconds, sizes, sizes_of(made), self._text(made)))
        if check is not None:
            self.check(check, made)
        return results

    def check(self, check: Callable[[Any], None], made: Any) -> None:
        """Run the verifier."""
        begun = time.perf_counter()
        check(made)
        self._checked += 1e3 * (time.perf_counter() - begun)

    def end(self) -> list[Record]:
        """All records, the verifier's own among them."""
        self._note(Record("verify", "the program is well-formed after every pass", self._checked))
        return self.records

    def _note(self, record: Record) -> None:
        self.records.append(record)
        _log.info("%s", record)

    def _text(self, program: Trace | Partition | Program) -> str:
        if self.texts is None:
            return ""
        if isinstance(program, Trace):
            return trace_text(program)
        return partition_text(program) if isinstance(program, Partition) else program.text(self.texts)


@uncollected()
def compile_trace(
    trace: Trace, options: Options, library: Library, texts: Mapping[Input, str] | None = None
) -> tuple[Program, list[Record]]:
    """Take a trace through all passes.

    Args:
        trace: what was captured; it is rewritten.
        options: which passes to leave out, among others.
        library: of step graphs.
        texts: names for the tensors it reads, for records that hold the program as text; None for records without.

    Raises:
        CaptureError: for what cannot be compiled.
        ProgramError: where the verifier finds a pass to be wrong.
    """
    recorder = PassLog(trace, texts)
    writes, window = recorder.run("mode", lambda: mode(trace), trace, lambda _: trace)
    if "rows" not in options.skip:
        recorder.run("rows", lambda: rows(trace), trace, lambda _: trace)
    (partition,) = recorder.run("split", lambda: _split(trace), trace, lambda made: made[0], _verify_split)
    partition.writes, partition.window = writes, options.window if window is None else window
    shape(partition, options, recorder)
    if "roll" in options.skip:
        library = Library(0)
    pruned = "canonicalize" not in options.skip
    verify = partial(verify_program, pruned=pruned)
    (program,) = recorder.run(
        "roll", lambda: roll(partition, library), partition, lambda made: made[0], verify
    )
    if "loop" not in options.skip:
        verify = partial(verify_program, pruned=pruned, folded=True)
        recorder.run("loop", lambda: loop(program), program, lambda _: program, verify)
    if any(x.grad for x in trace.inputs):
        recorder.run(
            "differentiate",
            lambda: differentiate(program.step_graphs, options.lowering.hvp),
            program,
            lambda _: program,
        )
    recorder.run("lower", lambda: lower(program, options.lowering), program, lambda _: program)
    return program, recorder.end()


def _split(trace: Trace) -> tuple[Partition, str]:
    partition = split(trace)
    return partition, f"{len(partition.parts)} parts, {len(partition.kinds)} of them distinct"


_verify_split = partial(verify_partition, outlined=False)


def shape(partition: Partition, options: Options, recorder: PassLog) -> None:
    """The passes on a partition."""
    for name, pass_, instead in (("canonicalize", canonicalize, outline), ("prune", prune, keep_all)):
        pass_ = instead if name in options.skip else pass_
        recorder.run(name, lambda p=pass_: p(partition), partition, lambda _: partition, verify_partition)


def shaped(partition: Partition, texts: Mapping[Input, str] | None = None) -> list[Record]:
    """Take a partition that is one part, a compiled step, through the passes that apply to it."""
    recorder = PassLog(partition.trace, texts)
    recorder.check(_verify_split, partition)
    shape(partition, Options(), recorder)
    return recorder.end()


def sizes_of(program: Trace | Partition | Program) -> dict[str, int]:
    """Sizes of a program in whatever form.

    Returns:
        ``calls``; of a partition also ``parts``, ``distinct`` ones, ``values`` passed between them, and how many of
        these are ``differentiable``; of a program ``calls`` of step graphs, ``step_graphs``, their ``operators``
        in all, ``registers`` and ``state_bytes``.
    """
    if isinstance(program, Trace):
        return {"calls": len(program.entries)}
    if isinstance(program, Partition):
        return {
            "calls": sum(len(u.segment.entries) for u in program.parts),
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
