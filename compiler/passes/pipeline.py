"""The passes in order, the verifier between them, and a record of what each one did."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..derive.flat import uncollected
from ..ir.program import Program
from ..ir.segments import Partition
from ..ir.text import operator_count, partition_text, trace_text
from ..ir.trace import Input, Trace
from ..ir.verify import verify_partition, verify_program
from .canonicalize import canonicalize, outline
from .checkpoint import checkpoint
from .differentiate import differentiate
from .loop import loop
from .lower import lower
from .mode import mode
from .options import Options
from .prune import keep_all, prune
from .roll import roll
from .rows import rows
from .split import split

Form = Trace | Partition | Program
_log = logging.getLogger("metaoptim.passes")


def _check_split(partition: Partition, options: Options) -> None:
    verify_partition(partition, outlined=False)


def _check_partition(partition: Partition, options: Options) -> None:
    verify_partition(partition)


def _check_rolled(program: Program, options: Options) -> None:
    verify_program(program, pruned="canonicalize" not in options.skip)


def _check_looped(program: Program, options: Options) -> None:
    verify_program(program, pruned="canonicalize" not in options.skip, folded=True)


@dataclass(frozen=True)
class Pass:
    """One rewrite in its place.

    Attributes:
        run: (program, options) -> (program, note of what was done).
        check: the verifier of what it makes.
        instead: what is done where it is skipped.
        planned: whether it waits for a plan of what is kept, which a call makes.
    """

    run: Callable[[Any, Options], tuple[Form, str]]
    check: Callable[[Any, Options], None] | None = None
    instead: Callable[[Any, Options], tuple[Form, str]] | None = None
    planned: bool = False

    @property
    def name(self) -> str:
        """That of its function."""
        return self.run.__name__

    def __str__(self) -> str:
        return f"{self.name:<14}{(inspect.getdoc(self.run) or '').partition(chr(10))[0]}"


PIPELINE = (
    Pass(mode),
    Pass(rows),
    Pass(split, _check_split),
    Pass(canonicalize, _check_partition, instead=outline),
    Pass(prune, _check_partition, instead=keep_all),
    Pass(roll, _check_rolled, instead=roll),
    Pass(loop, _check_looped),
    Pass(differentiate),
    Pass(lower),
    Pass(checkpoint, planned=True),
)
#: Those that apply to a partition that is one part: a step, recorded or compiled.
OF_A_STEP = tuple(p for p in PIPELINE if p.run in (canonicalize, prune))


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
    before: dict[str, int] = field(default_factory=dict[str, int])
    after: dict[str, int] = field(default_factory=dict[str, int])
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

    def run(self, passes: Sequence[Pass], program: Form, options: Options) -> Form:
        """Take a program through passes."""
        for one in passes:
            run = one.instead if one.name in options.skip else one.run
            if run is None:
                continue
            before, begun = sizes_of(program), time.perf_counter()
            program, note = run(program, options)
            milliseconds = 1e3 * (time.perf_counter() - begun)
            self._note(Record(one.name, note, milliseconds, before, sizes_of(program), self._text(program)))
            if one.check is not None:
                self.check(one.check, program, options)
        return program

    def check(self, check: Callable[[Any, Options], None], program: Form, options: Options) -> None:
        """Run a verifier."""
        begun = time.perf_counter()
        check(program, options)
        self._checked += 1e3 * (time.perf_counter() - begun)

    def end(self) -> list[Record]:
        """All records, the verifier's own among them."""
        self._note(Record("verify", "the program is well-formed after every pass", self._checked))
        return self.records

    def _note(self, record: Record) -> None:
        self.records.append(record)
        _log.info("%s", record)

    def _text(self, program: Form) -> str:
        if self.texts is None:
            return ""
        if isinstance(program, Trace):
            return trace_text(program)
        return partition_text(program) if isinstance(program, Partition) else program.text(self.texts)


@uncollected()
def compile_trace(
    trace: Trace, options: Options, texts: Mapping[Input, str] | None = None
) -> tuple[Program, list[Record]]:
    """Take a trace through all passes that need no plan.

    Args:
        trace: what was captured; it is rewritten.
        options: which passes to leave out, among others.
        texts: names for the tensors it reads, for records that hold the program as text; None for records without.

    Raises:
        CaptureError: for what cannot be compiled.
        ProgramError: where the verifier finds a pass to be wrong.
    """
    log = PassLog(trace, texts)
    program = log.run([p for p in PIPELINE if not p.planned], trace, options)
    assert isinstance(program, Program)
    return program, log.end()


def shaped(partition: Partition, texts: Mapping[Input, str] | None = None) -> list[Record]:
    """Take a partition that is one part, a compiled step, through the passes that apply to it."""
    log, options = PassLog(partition.trace, texts), Options()
    log.check(_check_split, partition, options)
    log.run(OF_A_STEP, partition, options)
    return log.end()


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
