"""What a window has recorded: calls by position, rounds that repeat folded as they come."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from time import perf_counter

from .calls import LONGEST, Assign, Loop, Operand, StepCall, calls_of, extended, folded
from .program import Calls
from .text import plural

Call = StepCall | Assign


class Tape(Calls):
    """The inner loop of a window: tape position -> call, from `start` on.

    Args:
        start: the first position.
        calls: at it and the following ones.

    Attributes:
        items: the calls; all but the last few have been through `passes.loop`, so that a long window holds little
            besides what its steps were given.
        milliseconds: how long that took.
        begun: whether a step has been taken.
        reach: how many calls back steps read theta, at most: super-steps may overlap.
    """

    def __init__(self, start: int = 0, calls: Iterable[Call] = ()) -> None:
        self.start = start
        self.items: list[Call | Loop] = []
        self._ends: list[int] = []  # position after each item
        self._loose = 0  # items at the end that may still be folded
        self.milliseconds = 0.0
        self.begun = False
        self.reach = 0
        for call in calls:
            self.append(call)

    @property
    def end(self) -> int:
        """The position after the last call."""
        return self._ends[-1] if self._ends else self.start

    def __getitem__(self, position: int) -> Call:
        at = bisect_right(self._ends, position)
        item = self.items[at]
        return _nth(item, position - self._begin(at)) if isinstance(item, Loop) else item

    def __iter__(self) -> Iterator[Call]:
        return (self[position] for position in range(self.start, self.end))

    def append(self, call: Call) -> None:
        """Extend it by a call."""
        self._ends.append(self.end + 1)
        self.items.append(call)
        if isinstance(call, StepCall):
            self.begun = True
            self.reach = max(self.reach, call.back)
        self._loose += 1
        if self._loose > 2 * LONGEST:
            self.fold()

    def fold(self) -> None:
        """Fold what has come since it was last done."""
        begun = perf_counter()
        at = len(self.items) - self._loose
        loose = self.items[at:]
        if at and isinstance(before := self.items[at - 1], Loop):
            del loose[: extended(before, loose)]
            at -= 1
            loose.insert(0, before)
        self._replace(at, len(self.items), folded(loose))
        ending = next(
            (n for n, item in enumerate(reversed(self.items)) if isinstance(item, Loop)), len(self.items)
        )
        self._loose = min(ending, LONGEST)
        self.milliseconds += 1e3 * (perf_counter() - begun)

    def forget(self, start: int) -> None:
        """Drop the calls before ``start``."""
        gone = bisect_right(self._ends, start)
        rest = self._cut(gone, start)
        self.start = start
        self._replace(0, gone + bool(rest), rest)
        self._loose = min(self._loose, len(self.items))

    def _cut(self, at: int, start: int) -> list[Call | Loop]:
        """What is left of an item from ``start`` on, if that lies within it."""
        if at == len(self.items) or start == self._begin(at):
            return []
        loop = self.items[at]
        assert isinstance(loop, Loop)
        rounds, begun = divmod(start - self._begin(at), len(loop.calls))
        ending: list[Call | Loop] = []
        if begun:
            until = (rounds + 1) * len(loop.calls)
            ending += [_nth(loop, n) for n in range(until - len(loop.calls) + begun, until)]
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
        self.items[first:last] = items

    def counted(self) -> Iterator[tuple[StepCall, int]]:
        """Each step as it is written, and how many times it is taken."""
        for item in self.items:
            for call in () if isinstance(item, Assign) else calls_of(item):
                yield call, item.count if isinstance(item, Loop) else 1

    def __str__(self) -> str:
        self.fold()
        graphs, names = self.step_graphs, self.names()
        lines = [f"program of {plural(self.horizon, 'inner step')}, {len(graphs)} distinct"]
        if self.start:
            lines[0] += f" (what lies before position {self.start} is forgotten)"
        for item in self.items:
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


def _nth(loop: Loop, n: int) -> StepCall:
    """A loop's ``n``-th call."""
    k, which = divmod(n, len(loop.calls))
    call = loop.calls[which]
    return StepCall(
        call.step,
        call.reads,
        call.writes,
        [x.of[k] if type(x) is Operand else x for x in call.inputs],
        call.location,
        call.back,
        tuple([m.of[k] if type(m) is Operand else m for m in call.metas]),
        lowering=call.lowering,
    )
