"""Programs: a whole function as calls on registers, and the tape of what a window has recorded."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from time import perf_counter
from typing import Any

from ..operators import is_several
from ..retention import UNSAID, Retention
from ..step import Lowering, Role, StepGraph
from ..tensors import nbytes
from ..text import plural, readable_bytes, signature, step_name
from ..values import Input
from .calls import LONGEST, Assign, Call, Item, Loop, Operand, StepCall, calls_of, extended, folded, nth


@dataclass(frozen=True)
class Kept:
    """What of an inner loop is kept for its derivative."""

    slots: int | None = None  # how many states at a time, others being made again; None for all
    saved: int = 0  # over how many of the last calls residuals are
    offload: str | os.PathLike[str] | None = (
        None  # where states go that have no slot; see `metaoptim.compile`
    )

    def __str__(self) -> str:
        text = "every state" if self.slots is None else f"at most {plural(self.slots, 'state')}"
        text += f", residuals of the last {plural(self.saved, 'call')}" if self.saved else ""
        return text + ("" if self.offload is None else f", others in {os.fspath(self.offload)}")


class Calls:
    """Calls of step graphs, those of loops once: what a program is, of a function or of a window."""

    calls: Any  # in order, of a program or a tape

    def counted(self) -> Iterator[tuple[StepCall, int]]:
        """Each call, and how many times it is made."""
        for item in self.calls:
            if not isinstance(item, Assign):
                for call in calls_of(item):
                    yield call, item.count if isinstance(item, Loop) else 1

    @property
    def horizon(self) -> int:
        """Number of inner steps."""
        return sum(count * call.step.steps for call, count in self.counted())

    @property
    def step_graphs(self) -> list[StepGraph]:
        """The distinct step graphs, in order of appearance."""
        return list({id(call.step): call.step for call, _ in self.counted()}.values())

    def names(self) -> dict[int, str]:
        """Id of a step graph -> its name in the text."""
        return {id(g): step_name(i) for i, g in enumerate(self.step_graphs)}


@dataclass
class Program(Calls):
    """A whole function as calls on registers: what the passes arrive at and the engine runs."""

    calls: list[StepCall | Loop] = field(default_factory=list["StepCall | Loop"])
    registers: int = 0  # how many values are alive at most
    # Where what the function returns, and what it leaves in tensors from outside, is found in the end: a register, or
    # an `Input` passed through.
    outputs: list[int | Input] = field(default_factory=list["int | Input"])
    writes: list[tuple[Any, int | Input]] = field(default_factory=list[tuple[Any, "int | Input"]])
    dead: tuple[int, ...] = ()  # places of the outputs that carry no gradient
    retention: Retention = UNSAID  # this and the next are options of its windows
    backward_hook: Callable[..., Any] | None = None
    kept: Kept | None = None  # as the pass checkpoint has decided
    # Ids of the step graphs that the pass lower has compiled, None for all; and the backend of the others.
    compiled: frozenset[int] | None = None
    others: str = "eager"
    window: int | None = None  # W, where gradients are truncated
    offline: bool = False  # whether a window's own parameters receive a gradient

    def lowering_of(self, step: StepGraph, stated: Lowering) -> Lowering:
        """The lowering of one of its step graphs, where ``stated`` is asked for."""
        if step.chunked:
            return stated.uncompiled
        if self.compiled is None or id(step) in self.compiled:
            return stated
        return replace(stated, backend="eager" if stated.backend == "eager" else self.others)

    @property
    def positions(self) -> int:
        """Number of calls when it runs, those of its loops one by one."""
        return sum(count for _, count in self.counted())

    @property
    def swept(self) -> int:
        """Over how many of its last positions a backward goes back, besides what comes before the inner steps.

        All of them, unless gradients are truncated and no loss lies between the steps.
        """
        _, inner, after = self._stretches()
        if self.window is None or self.loss_between or self.window >= sum(count for _, count in inner):
            return self.positions
        return self.window + sum(count for _, count in after)

    @property
    def loss_between(self) -> bool:
        """Whether a cotangent may come from between the inner steps."""
        return any(
            not step.steps or any(p.role is Role.CARRY and p.differentiable for p in step.outputs)
            for step, _ in self._stretches()[1]
        )

    def _stretches(self) -> tuple[list[tuple[StepGraph, int]], ...]:
        """Step graphs and how often they are called: before the inner steps, from the first to the last, after them."""
        items = [(call.step, count) for call, count in self.counted()]
        taking = [i for i, (step, _) in enumerate(items) if step.steps]
        first, end = (taking[0], taking[-1] + 1) if taking else (len(items), len(items))
        return items[:first], items[first:end], items[end:]

    @property
    def state_bytes(self) -> int:
        """Bytes in the registers, when there are most."""
        sizes: dict[int, int] = {}
        most = 0
        for call, _ in self.counted():
            outputs = zip(call.writes, call.step.outputs)
            sizes.update((register, nbytes(port.spec)) for register, port in outputs if register >= 0)
            most = max(most, sum(sizes.values()))
        return most

    @property
    def inputs(self) -> list[Input]:
        """What it reads of tensors from outside, in the order they are met."""
        given = [x for call, _ in self.counted() for g in call.inputs for x in g.sources]
        found = [*given, *self.outputs, *(where for _, where in self.writes)]
        return list({id(x): x for x in found if isinstance(x, Input)}.values())

    def text(self, inputs: Mapping[Input, str] | None = None, *, operators: bool = False) -> str:
        """The program as text.

        Args:
            inputs: names for the tensors it reads; x0, x1, ... without.
            operators: whether to write out the operators of every step graph.
        """
        named = {x: f"x{i}" for i, x in enumerate(self.inputs)} | dict(inputs or {})
        names = self.names()
        mode = "offline" if self.offline else "online"
        truncated = f", truncated to {self.window} super-steps" if self.window else ""
        kept = f"; kept: {self.kept}" if self.kept is not None else ""
        lines = [
            f"program of {plural(self.horizon, 'inner step')}, {mode}: {plural(self.positions, 'call')} of "
            f"{plural(len(names), 'step graph')}, {plural(self.registers, 'register')} "
            f"({readable_bytes(self.state_bytes)}){truncated}{kept}"
        ]
        for item in self.calls:
            inside = [call.text(names, named) for call in calls_of(item)]
            loop = f"  loop {item.count} times, t = 0, 1, ...:" if isinstance(item, Loop) else " "
            lines += [f"{loop} {inside[0]}"] if len(inside) == 1 else [loop, *("    " + i for i in inside)]
        lines.append("  return " + (", ".join(_place_text(w, named) for w in self.outputs) or "nothing"))
        lines += [f"  {_target_text(t, named)} := {_place_text(w, named)}" for t, w in self.writes]
        for step in self.step_graphs:
            lines.append(signature(step, names[id(step)]))
            if operators:
                lines += ["    " + line for line in str(step).splitlines()[1:]]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def _place_text(where: int | Input, named: Mapping[Input, str]) -> str:
    return f"r{where}" if isinstance(where, int) else named[where]


def _target_text(target: Any, named: Mapping[Input, str]) -> str:
    if is_several(target):
        optimizer, _, name = target
        return f"{type(optimizer).__name__}.state[...][{name!r}]"
    known = (name for x, name in named.items() if getattr(x, "tensor", None) is target)
    return next(known, f"a tensor of shape {tuple(target.shape)}")


class Tape(Calls):
    """The inner loop of a window: tape position -> call, from the position ``start`` on.

    All calls but the last few are folded, so that a long window holds little besides what its steps were given.
    """

    def __init__(self, start: int = 0, calls: Iterable[Call] = ()) -> None:
        self.start = start
        self.calls: list[Item] = []
        self._ends: list[int] = []  # position after each of them
        self._loose = 0  # how many at the end may still be folded
        self.milliseconds = 0.0  # how long folding took
        self.begun = False  # whether a step has been taken
        self.reach = 0  # how many calls back steps read theta, at most: super-steps may overlap
        for call in calls:
            self.append(call)

    @property
    def end(self) -> int:
        """The position after the last call."""
        return self._ends[-1] if self._ends else self.start

    def __getitem__(self, position: int) -> Call:
        at = bisect_right(self._ends, position)
        item = self.calls[at]
        return nth(item, position - self._begin(at)) if isinstance(item, Loop) else item

    def __iter__(self) -> Iterator[Call]:
        return (self[position] for position in range(self.start, self.end))

    def append(self, call: Call) -> None:
        """Extend it by a call."""
        self._ends.append(self.end + 1)
        self.calls.append(call)
        if isinstance(call, StepCall):
            self.begun = True
            self.reach = max(self.reach, call.back)
        self._loose += 1
        if self._loose > 2 * LONGEST:
            self.fold()

    def fold(self) -> None:
        """Fold what has come since it was last done."""
        begun = perf_counter()
        at = len(self.calls) - self._loose
        loose = self.calls[at:]
        if at and isinstance(before := self.calls[at - 1], Loop):
            del loose[: extended(before, loose)]
            at -= 1
            loose.insert(0, before)
        self._replace(at, len(self.calls), folded(loose))
        loops = (n for n, item in enumerate(reversed(self.calls)) if isinstance(item, Loop))
        self._loose = min(next(loops, len(self.calls)), LONGEST)
        self.milliseconds += 1e3 * (perf_counter() - begun)

    def forget(self, start: int) -> None:
        """Drop the calls before ``start``."""
        gone = bisect_right(self._ends, start)
        rest = self._cut(gone, start)
        self.start = start
        self._replace(0, gone + bool(rest), rest)
        self._loose = min(self._loose, len(self.calls))

    def _cut(self, at: int, start: int) -> list[Call | Loop]:
        """What is left of an item from ``start`` on, if that lies within it."""
        if at == len(self.calls) or start == self._begin(at):
            return []
        loop = self.calls[at]
        assert isinstance(loop, Loop)
        rounds, begun = divmod(start - self._begin(at), len(loop.calls))
        ending: list[Call | Loop] = []
        if begun:
            until = (rounds + 1) * len(loop.calls)
            ending += [nth(loop, n) for n in range(until - len(loop.calls) + begun, until)]
            rounds += 1
        for call in loop.calls:
            for column in (*call.inputs, *call.metas):
                if type(column) is Operand:
                    del column.of[:rounds]
        loop.count -= rounds
        return [*ending, loop] if loop.count else ending

    def _begin(self, at: int) -> int:
        return self._ends[at - 1] if at else self.start

    def _replace(self, first: int, last: int, items: list[Call | Loop]) -> None:
        """Have ``items`` in the place of those from ``first`` to ``last``."""
        sizes = [x.count * len(x.calls) if isinstance(x, Loop) else 1 for x in items]
        self._ends[first:last] = list(accumulate(sizes, initial=self._begin(first)))[1:]
        self.calls[first:last] = items

    def __str__(self) -> str:
        self.fold()
        graphs, names = self.step_graphs, self.names()
        lines = [f"tape of {plural(self.horizon, 'inner step')}, {len(graphs)} distinct"]
        if self.start:
            lines[0] += f" (what lies before position {self.start} is forgotten)"
        for item in self.calls:
            if isinstance(item, Assign):
                lines.append(f"  {plural(len(item.indices), 'tensor')} of the state set")
            else:
                made = ", ".join(names[id(c.step)] for c in calls_of(item))
                lines.append(f"  loop {item.count} times: {made}" if isinstance(item, Loop) else f"  {made}")
        for g in graphs:
            lines.append(str(g).replace("step(", f"{names[id(g)]}(", 1))
        return "\n".join(lines)


def super_steps(calls: Iterable[Call]) -> list[list[Call]]:
    """Calls put together that belong together: each from where its loss has read theta to itself."""
    found: list[list[Call]] = []
    for call in calls:
        found.append([call])
        while isinstance(call, StepCall) and call.back >= len(found[-1]) and len(found) > 1:
            found[-2:] = [found[-2] + found[-1]]
    return found
