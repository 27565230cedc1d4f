"""split: a trace is cut into parts, one per super-step, and what comes before, between and after them."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from metaoptim.errors import CaptureError, user_location

from ...ir.step import gradient
from ...ir.traces.trace import Part, Partition, PartKind, Segment, Trace, leaves, sources
from ...ir.values import Entry, Value, changed, reached
from ..options import Options


def split(trace: Trace, options: Options) -> tuple[Partition, str]:
    """Cut a trace after every super-step, and around every iteration of a scan."""
    partition = Partition(trace)
    starts = {begin: (s, k) for s, scan in enumerate(trace.scans) for k, begin in enumerate(scan.begins)}
    ends = [end for end, _ in trace.steps]
    for begin, end in itertools.pairwise(_cuts(trace)):
        first, last = bisect_right(ends, begin), bisect_right(ends, end)
        location = trace.steps[last - 1][1] if last > first else ""
        _add(partition, trace.entries[begin:end], last - first, location, starts.get(begin))
    refuse_aliases_across(partition)
    group(partition)
    return partition, f"{len(partition.parts)} parts, {len(partition.kinds)} of them distinct"


def single(trace: Trace) -> Partition:
    """A trace as one part."""
    partition = Partition(trace)
    _add(partition, trace.entries, len(trace.steps), user_location())
    group(partition)
    return partition


def _add(
    partition: Partition, entries: list[Entry], steps: int, where: str, scan: tuple[int, int] | None = None
) -> None:
    partition.part_of.update(dict.fromkeys(map(id, entries), len(partition.parts)))
    partition.parts.append(Part(Segment(entries, partition.trace), steps, where, scan))


def group(partition: Partition) -> None:
    """Let equal segments share a kind."""
    kinds: dict[Any, PartKind] = {}
    for part in partition.parts:
        part.kind = kinds.setdefault((part.segment.key, part.steps > 0), PartKind())
        part.kind.parts.append(part)
    partition.kinds = list(kinds.values())


def _cuts(trace: Trace) -> list[int]:
    inside = [(scan.begins[0], scan.end) for scan in trace.scans]
    cuts = {0, len(trace.entries)}
    cuts.update(end for end, _ in trace.steps if not any(a < end <= b for a, b in inside))
    fixed = {at for scan in trace.scans for at in (*scan.begins, scan.end)}
    joined: set[int] = set()
    every = sorted(cuts | fixed)
    for entry in trace.entries:
        if entry.op is gradient:
            first = _first_use_of_theta(entry)
            crossed = set(every[bisect_right(every, first) : bisect_right(every, entry.seq)])
            if crossed & fixed:
                raise CaptureError(
                    "the loss of an inner step inside a scan depends on the parameters through a value from outside "
                    "the iteration; compute it inside, or use a plain `for`"
                )
            joined |= crossed
    return sorted((cuts - joined) | fixed)


def _first_use_of_theta(taken: Entry) -> int:
    """The first call on a path from the parameters to the losses of a `gradient` entry."""
    losses, thetas = list(leaves(taken.args[0])), taken.args[1]
    dependent = {id(t.entry) for t in thetas}
    oldest = min(t.entry.seq for t in thetas)

    def calls(refs: Iterable[Any]) -> list[Entry]:
        return [a.entry for a in refs if isinstance(a, Value)]

    def later(refs: Iterable[Any]) -> list[Entry]:
        return [e for e in calls(refs) if e.seq > oldest and id(e) not in dependent]

    first = taken.seq
    for entry in sorted(reached(later(losses), lambda e: later(sources(e))), key=lambda e: e.seq):
        if any(id(e) in dependent for e in calls(sources(entry))):
            dependent.add(id(entry))
            first = min(first, entry.seq)
    return first


def refuse_aliases_across(partition: Partition) -> None:
    """Raise where a part changes memory in place that a later part reads through another tensor."""
    for entry in partition.trace.entries:
        for write in entry.deps:
            inside = partition.parts[partition.part_of[id(write)]].segment
            if inside.memory_of(entry.args[0]) not in map(inside.memory_of, changed(write)):
                raise CaptureError(
                    "a tensor is changed in place in one inner step while another that shares its memory, made before "
                    "that step, is read later; clone one of them"
                )
