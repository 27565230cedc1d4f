"""canonicalize: what nothing reads is dropped, and equal segments are made equal in what they give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..ir.text import plural
from ..ir.trace import Partition, Segment, arguments
from ..ir.values import Entry, Noise, Value, reached
from .options import Options
from .split import group


def canonicalize(partition: Partition, options: Options) -> tuple[Partition, str]:
    """Drop calls that no output depends on. Random numbers are drawn all the same, as eager would.

    Segments of equal structure keep the same calls: what one of them needs, all compute, so that they share a program.
    """
    before = sum(len(u.segment.entries) for u in partition.parts)
    kept = _live(partition)
    for part in partition.parts:
        live = kept[id(part.kind)]
        part.segment = Segment([e for i, e in enumerate(part.segment.entries) if i in live], partition.trace)
    partition.parts = [u for u in partition.parts if u.segment.entries]
    partition.part_of = {id(e): n for n, u in enumerate(partition.parts) for e in u.segment.entries}
    group(partition)
    outline(partition, options)
    after = sum(len(u.segment.entries) for u in partition.parts)
    distinct = plural(len(partition.kinds), "distinct part")
    return partition, f"{before - after} of {before} calls are not needed; {distinct}"


def outline(partition: Partition, options: Options) -> tuple[Partition, str]:
    """Note what each part gives to later ones; no call is dropped."""
    for value in partition.finals():
        _give(partition, value)
    for part in partition.parts:
        for value in part.segment.inputs:
            _give(partition, value)
    return partition, f"left out; {plural(len(partition.kinds), 'distinct part')}"


def _give(partition: Partition, value: object) -> None:
    if isinstance(value, Value):
        part = partition.parts[partition.part_of[id(value.entry)]]
        part.kind.outputs[part.segment.number_of[id(value.entry)], value.index] = value.ref


def _live(partition: Partition) -> dict[int, set[int]]:
    """For each kind, the places of the calls that are needed."""
    place = {id(e): (part.kind, n) for part in partition.parts for n, e in enumerate(part.segment.entries)}

    def first(entries: Iterable[Entry]) -> Iterator[Entry]:
        """What stands for calls that are alike: the first of them."""
        for entry in entries:
            kind, number = place[id(entry)]
            yield kind.parts[0].segment.entries[number]

    def needs(entry: Entry) -> Iterator[Entry]:
        kind, number = place[id(entry)]
        for alike in (part.segment.entries[number] for part in kind.parts):
            yield from first(a.entry for a in arguments(alike) if isinstance(a, Value))
            yield from first(alike.deps)

    wanted = [v.entry for v in partition.finals() if isinstance(v, Value)]
    calls = (e for part in partition.parts for e in part.segment.entries)
    wanted += [e for e in calls if any(isinstance(a, Noise) for a in e.args)]
    live: dict[int, set[int]] = {id(kind): set() for kind in partition.kinds}
    for entry in reached(first(wanted), needs):
        kind, number = place[id(entry)]
        live[id(kind)].add(number)
    return live
