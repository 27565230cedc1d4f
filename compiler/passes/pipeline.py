"""The passes in order, each with a record of what it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..capture.tracer import Trace
from ..ir import Lowering
from ..program import RolledProgram
from ..segments import split
from .canonicalize import canonicalize
from .differentiate import differentiate
from .mode import mode
from .prune import prune
from .roll import StepOf, roll


@dataclass(frozen=True)
class Options:
    """Options of `metaoptim.compile`."""

    window: int | None = None
    slots: int | None = None
    lowering: Lowering = field(default_factory=lambda: Lowering("inductor", hvp="auto"))


@dataclass(frozen=True)
class Record:
    """What a pass did, and how long it took."""

    name: str
    done: str
    milliseconds: float

    def __str__(self) -> str:
        return f"{self.name:<14}{self.done}  ({self.milliseconds:.0f} ms)"


def compile_trace(trace: Trace, options: Options, step_of: StepOf) -> tuple[RolledProgram, list[Record]]:
    """Take a trace through all passes."""
    records: list[Record] = []

    def run(name: str, pass_: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        *result, done = pass_()
        records.append(Record(name, done, 1e3 * (time.perf_counter() - begun)))
        return result

    writes, limit = run("mode", lambda: mode(trace))
    draft = split(trace)
    draft.writes, draft.limit = writes, options.window if limit is None else limit
    run("canonicalize", lambda: (canonicalize(draft),))
    run("prune", lambda: (prune(draft),))
    (rolled,) = run("roll", lambda: roll(draft, step_of))
    if any(x.grad for x in trace.inputs):
        run("differentiate", lambda: (differentiate(rolled, options.lowering.hvp),))
    return rolled, records
