"""Where the time of a meta-gradient goes: what the engine and windows tell while somebody listens."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.ir.programs.calls import StepCall
from metaoptim.compiler.ir.step import Lowered
from metaoptim.compiler.ir.tensors import TensorSpec, tensor_spec

#: Graphs by their kinds; replays are forward, or run again, as the engine stands.
_DERIVATIVES = ("vjp", "backward", "loss")

#: What a graph was run for, as far as its cost goes: its call, its kind, and the layout of its operands.
Ran = tuple[StepCall, str, tuple[TensorSpec, ...]]


class Times:
    """Seconds by part, each without the parts inside it.

    Attributes:
        seconds: "forward", "again" and "derivative" (graphs), "lower" (until there is one), "loop" and "sweep" (the
            engine around them), "data" (inputs looked at), "step" (`inner.step` of ordinary windows).
        runs: how many graphs each of the first three has run.
        graphs: which graphs ran, and how often.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.runs: Counter[str] = Counter()
        self.graphs: dict[tuple[int, str], tuple[Ran, int]] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time of a block goes to ``name``."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """The time since the last turn belongs to the innermost part."""
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, call: StepCall, kind: str, program: Lowered) -> Lowered:
        """A graph whose runs are timed."""
        part = "derivative" if kind in _DERIVATIVES else "forward" if "loop" in self._open else "again"

        def run(*operands: Tensor) -> Sequence[Any]:
            with self.part(part):
                results = program(*operands)
                if any(t.is_cuda for t in operands):
                    torch.cuda.synchronize()
            self.runs[part] += 1
            key = id(call.step), kind
            ran, count = self.graphs.get(key) or ((call, kind, tuple(map(tensor_spec, operands))), 0)
            self.graphs[key] = ran, count + 1
            return results

        return run


_NOT: AbstractContextManager[None] = nullcontext()
listening: Times | None = None  # of the process: a backward may run in another thread


def part(name: str) -> AbstractContextManager[None]:
    """The time of a block goes to ``name``, if anybody listens."""
    return _NOT if listening is None else listening.part(name)


def timed(call: StepCall, kind: str, program: Lowered) -> Lowered:
    """A graph whose runs are timed, if anybody listens."""
    return program if listening is None else listening.timed(call, kind, program)


@contextmanager
def listen(to: Times) -> Iterator[None]:
    """Have what goes on in a block told to ``to``; the block's own time is its part "else"."""
    global listening
    if listening is not None:
        raise RuntimeError("metaoptim.profile: another profile is being taken; end that one first")
    listening = to
    try:
        with to.part("else"):
            yield
    finally:
        listening = None
