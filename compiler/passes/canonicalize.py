"""canonicalize: what nothing reads is dropped, and equal segments are made equal in what they give."""

from __future__ import annotations

from ..ir.program import plural
from ..ir.segments import Part, Partition, PartKind, Segment, arguments
from ..ir.trace import Noise
from ..ir.values import Value
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
        part.segment = Segment([e for i, e in enumerate(part.segment.entries) if i in live], partition.hooks)
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
    live: dict[int, set[int]] = {id(b): set() for b in partition.kinds}
    wanted: list[tuple[PartKind, int]] = []

    def want(value: object) -> None:
        if isinstance(value, Value):
            part = partition.parts[partition.part_of[id(value.entry)]]
            wanted.append((part.kind, part.segment.number_of[id(value.entry)]))

    for value in partition.finals():
        want(value)
    for part in partition.parts:
        for number, entry in enumerate(part.segment.entries):
            if any(isinstance(a, Noise) for a in entry.args):
                wanted.append((part.kind, number))
    while wanted:
        kind, number = wanted.pop()
        if number in live[id(kind)]:
            continue
        live[id(kind)].add(number)
        for part in kind.parts:
            _follow(part, number, want, wanted)
    return live


def _follow(part: Part, number: int, want: object, wanted: list) -> None:
    entry = part.segment.entries[number]
    for a in arguments(entry):
        want(a)  # type: ignore[operator]
    for write in entry.deps:
        wanted.append((part.kind, part.segment.number_of[id(write)]))
