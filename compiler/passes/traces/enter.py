"""enter: optimizer state from before the window is passed on to the first step, so that this one is as the others."""

from __future__ import annotations

from typing import Any

from ...ir.step import show
from ...ir.text import plural
from ...ir.traces.trace import Part, Partition, Segment, is_inner_state
from ...ir.values import Entry, Input, Value
from ..options import Options
from .split import group


def enter(partition: Partition, options: Options) -> tuple[Partition, str]:
    """Pass optimizer state from outside through a part of its own.

    So the first step reads it from the part before, as the second step reads it from the first. Two steps that do
    the same then are of one kind, and have one step graph and one derivative.
    """
    parts: list[Part] = []
    entered = 0
    for part, following in zip(partition.parts, [*partition.parts[1:], None], strict=True):
        taken = _entering(part, following) if following is not None and part.steps else []
        if taken:
            first = part.segment.entries[0]
            calls = {id(x): Entry(show, (x,), {}, first.epoch, first.seq, (), True) for x in taken}
            for entry in part.segment.entries:
                entry.args = _replaced(entry.args, calls)
                entry.kwargs = _replaced(entry.kwargs, calls)
            parts.append(Part(Segment([*calls.values()], partition.trace), 0, "", None))
            part.segment = Segment(part.segment.entries, partition.trace)
            entered += len(taken)
        parts.append(part)
    partition.parts = parts
    partition.part_of = {id(e): n for n, u in enumerate(parts) for e in u.segment.entries}
    group(partition)
    return partition, f"{plural(entered, 'value')} of optimizer state passed on from before the first step"


def _entering(part: Part, following: Part) -> list[Input]:
    """What only ``part`` reads from outside, if that is all by which the two differ."""
    (calls, kinds, hooks), (other_calls, other_kinds, other_hooks) = part.segment.key, following.segment.key
    # hashes first: some of the objects that calls are given cannot be compared
    if (
        kinds == other_kinds
        or hash((calls, hooks)) != hash((other_calls, other_hooks))
        or calls != other_calls
    ):
        return []
    found: list[Input] = []
    places = zip(part.segment.inputs, following.segment.inputs, kinds, other_kinds, strict=True)
    for a, b, kind, other in places:
        if kind != other:
            passed_on = isinstance(b, Value) and is_inner_state(b) and b.ref.dtype.is_floating_point
            if not (isinstance(a, Input) and not a.grad and passed_on and a.spec == b.ref):
                return []
            found.append(a)
    return found


def _replaced(a: Any, calls: dict[int, Entry]) -> Any:
    if isinstance(a, tuple):
        return tuple([_replaced(b, calls) for b in a])  # pyright: ignore[reportUnknownVariableType]
    if isinstance(a, dict):
        return {k: _replaced(b, calls) for k, b in a.items()}  # pyright: ignore[reportUnknownVariableType]
    return Value(calls[id(a)], None, a.spec) if id(a) in calls else a
