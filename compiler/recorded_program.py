"""What a window has recorded: calls by position, runs of equal ones folded as they come."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from .ir import Assign, Loop, StepCall, StepGraph
from .program import Given, plural, step_name

Call = StepCall | Assign


class Program:
    """The inner loop of a window: tape position -> call, from `start` on.

    Args:
        start: the first position.
        calls: at it and the following ones.

    Attributes:
        items: the calls; what follows on a step and differs from it in nothing but what it is given is one `Loop` with
            it, so that a long window holds little besides the inputs themselves.
    """

    def __init__(self, start: int = 0, calls: Iterable[Call] = ()) -> None:
        self.start = start
        self.items: list[Call | Loop] = []
        self._ends: list[int] = []  # position after each item
        for call in calls:
            self.append(call)

    @property
    def end(self) -> int:
        """The position after the last call."""
        return self._ends[-1] if self._ends else self.start

    def __getitem__(self, position: int) -> Call:
        item = self.items[bisect_right(self._ends, position)]
        return _nth(item, position - item.call.base) if isinstance(item, Loop) else item

    def __iter__(self) -> Iterator[Call]:
        return (self[position] for position in range(self.start, self.end))

    def append(self, call: Call) -> None:
        """Extend it by a call."""
        joined = (
            _joined(self.items[-1], call, self.end) if self.items and isinstance(call, StepCall) else None
        )
        self._ends.append(self.end + 1)
        if joined is None:
            self.items.append(call)
        else:
            self.items[-1] = joined
            del self._ends[-2]

    def forget(self, start: int) -> None:
        """Drop the calls before ``start``."""
        gone = bisect_right(self._ends, start)
        del self.items[:gone], self._ends[:gone]
        if self.items:
            first = self.items[0]
            if isinstance(first, Loop) and first.call.base < start:
                self.items[0] = _without(first, start - first.call.base)
        self.start = start

    @property
    def horizon(self) -> int:
        """Number of inner steps held."""
        return sum(x.count if isinstance(x, Loop) else isinstance(x, StepCall) for x in self.items)

    @property
    def step_graphs(self) -> list[StepGraph]:
        """The distinct steps, in order of appearance."""
        calls = [x.call if isinstance(x, Loop) else x for x in self.items]
        return list({id(c.step): c.step for c in calls if isinstance(c, StepCall)}.values())

    def __str__(self) -> str:
        graphs = self.step_graphs
        names = {id(g): step_name(i) for i, g in enumerate(graphs)}
        lines = [f"program of {plural(self.horizon, 'inner step')}, {len(graphs)} distinct"]
        if self.start:
            lines[0] += f" (what lies before position {self.start} is forgotten)"
        for item in self.items:
            call, count = (item.call, item.count) if isinstance(item, Loop) else (item, 1)
            lines.append(f"  {names[id(call.step)] if isinstance(call, StepCall) else 'assign'} × {count}")
        for g in graphs:
            lines.append(str(g).replace("step(", f"{names[id(g)]}(", 1))
        return "\n".join(lines)


# -- loops -----------------------------------------------------------------------------------------------------------


def _joined(last: Call | Loop, call: StepCall, position: int) -> Loop | None:
    """``last`` and ``call``, at ``position`` after it, as one loop; None if they are no such."""
    first, count = (last.call, last.count) if isinstance(last, Loop) else (last, 1)
    if not isinstance(first, StepCall) or first.step is not call.step or call.spies or first.spies:
        return None
    if call.base != position or first.base != position - count or first.rng >= 0:
        return None  # steps of one super-step read theta of an earlier position
    if (first.theta, first.update, first.opt_state_in, first.opt_state_out, first.how, first.location) != (
        call.theta,
        call.update,
        call.opt_state_in,
        call.opt_state_out,
        call.how,
        call.location,
    ):
        return None
    loop = last if isinstance(last, Loop) else Loop(replace(first, inputs=list(first.inputs)), 1, ())
    head = loop.call
    for k, value in enumerate(call.inputs):
        head.inputs[k] = _extended(head.inputs[k], value, count)
    if head.metas != call.metas:
        head.metas = tuple(_extended(m, n, count) for m, n in zip(head.metas, call.metas, strict=True))
    loop.count += 1
    return loop


def _extended(column: Any, value: Any, count: int) -> Any:
    """What stands for the input of ``count`` calls, and a further one."""
    if isinstance(column, Given):
        column.of.append(value)
        return column
    return column if column is value or column == value else Given("each", [column] * count + [value])


def _nth(loop: Loop, k: int) -> StepCall:
    head = loop.call
    return StepCall(
        head.step,
        head.theta,
        head.update,
        head.opt_state_in,
        head.opt_state_out,
        head.base + k,
        [x.of[k] if type(x) is Given else x for x in head.inputs],
        tuple([m.of[k] if type(m) is Given else m for m in head.metas]),
        head.location,
        how=head.how,
    )


def _without(loop: Loop, count: int) -> Loop:
    """``loop`` without its first calls."""
    head = loop.call
    for column in (*head.inputs, *head.metas):
        if type(column) is Given:
            del column.of[:count]
    head.base += count
    loop.count -= count
    return loop
