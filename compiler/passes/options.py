"""What passes are told besides the program: every pass is ``(program, options) -> (program, note)``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..ir.programs.program import Kept, Program
from ..ir.retention import UNSAID, Retention
from ..ir.step import Lowering
from ..lower.library import Library, library

OPTIONAL = ("rows", "enter", "canonicalize", "prune", "roll", "loop")


@dataclass(frozen=True)
class Options:
    """Options of `metaoptim.compile`.

    Attributes:
        recapture: see `metaoptim.compile`.
        skip: passes switched off, to find out what one of them does: without canonicalize, calls that nothing needs
            are run; without prune, everything is differentiated; without roll, every part has a step graph of its own;
            without enter, the first step with optimizer state from before the window has a step graph of its own;
            without rows and loop, a plain `for` stays a list of calls. The gradients are the same. (The pass mode is
            what makes a window online, so it always runs.)
        kept: what the pass checkpoint is to state, once it has been planned.
        library: where the pass roll looks for step graphs.
    """

    window: int | None = None
    retention: Retention = UNSAID
    lowering: Lowering = field(default_factory=lambda: Lowering("inductor", hvp="auto"))
    recapture: bool = False
    skip: frozenset[str] = frozenset()
    kept: Kept | None = None
    library: Library = field(default=library, repr=False, compare=False)

    def __post_init__(self) -> None:
        unknown = sorted(self.skip - set(OPTIONAL))
        if unknown:
            raise ValueError(
                f"skip: got {', '.join(map(repr, unknown))}, expected some of {', '.join(map(repr, OPTIONAL))}"
            )


def retention_of(program: Program, options: Options) -> Retention:
    """What is kept: what the windows of the program say, else what the decorator says."""
    return program.retention if program.retention.given else options.retention
