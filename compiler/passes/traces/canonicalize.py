"""canonicalize: what nothing reads is dropped, and equal segments are made equal in what they give."""

from __future__ import annotations

from ...ir.text import plural
from ...ir.traces.trace import Partition, Segment, arguments
from ...ir.values import Noise, Value
from ..options import Options
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
    distinct = plural(len(partition.kinds), "distinct part")
    return partition, f"{before - len(partition.part_of)} of {before} calls are not needed; {distinct}"


def outline(partition: Partition, options: Options) -> tuple[Partition, str]:
    """Note what each part gives to later ones; no call is dropped."""
    for value in [*partition.finals(), *(v for part in partition.parts for v in part.segment.inputs)]:
        if isinstance(value, Value):
            part, place = partition.made(value)
            part.kind.outputs[place] = value.ref
    return partition, f"left out; {plural(len(partition.kinds), 'distinct part')}"


def _live(partition: Partition) -> dict[int, set[int]]:
    """For each kind, the places of the calls that are needed: alike ones stand for each other."""
    place = {id(e): (part.kind, n) for part in partition.parts for n, e in enumerate(part.segment.entries)}
    live: dict[int, set[int]] = {id(kind): set() for kind in partition.kinds}
    drawn = (e for e in partition.trace.entries if any(isinstance(a, Noise) for a in e.args))
    wanted = [*(v.entry for v in partition.finals() if isinstance(v, Value)), *drawn]
    while wanted:
        kind, number = place[id(wanted.pop())]
        if number not in live[id(kind)]:
            live[id(kind)].add(number)
            for entry in (part.segment.entries[number] for part in kind.parts):
                wanted += [a.entry for a in arguments(entry) if isinstance(a, Value)]
                wanted += entry.deps
    return live
