"""canonicalize: what nothing reads is dropped, and equal segments are made equal in what they give."""

from __future__ import annotations

from ..ir.program import plural
from ..ir.segments import Body, Draft, Segment, Unit, arguments, group
from ..ir.trace import Noise
from ..ir.values import Value


def canonicalize(draft: Draft) -> str:
    """Drop calls that no output depends on. Random numbers are drawn all the same, as eager would.

    Segments of equal structure keep the same calls: what one of them needs, all compute, so that they share a program.
    """
    before = sum(len(u.segment.entries) for u in draft.units)
    kept = _live(draft)
    for unit in draft.units:
        live = kept[id(unit.body)]
        unit.segment = Segment([e for i, e in enumerate(unit.segment.entries) if i in live], draft.hooks)
    draft.units = [u for u in draft.units if u.segment.entries]
    draft.unit_of = {id(e): n for n, u in enumerate(draft.units) for e in u.segment.entries}
    group(draft)
    outline(draft)
    after = sum(len(u.segment.entries) for u in draft.units)
    return f"{before - after} of {before} calls are not needed; {plural(len(draft.bodies), 'distinct part')}"


def outline(draft: Draft) -> str:
    """Note what each part gives to later ones; no call is dropped."""
    for value in draft.finals():
        _give(draft, value)
    for unit in draft.units:
        for value in unit.segment.inputs:
            _give(draft, value)
    return f"left out; {plural(len(draft.bodies), 'distinct part')}"


def _give(draft: Draft, value: object) -> None:
    if isinstance(value, Value):
        unit = draft.units[draft.unit_of[id(value.entry)]]
        unit.body.outputs[unit.segment.number_of[id(value.entry)], value.index] = value.ref


def _live(draft: Draft) -> dict[int, set[int]]:
    """For each body, the places of the calls that are needed."""
    live: dict[int, set[int]] = {id(b): set() for b in draft.bodies}
    wanted: list[tuple[Body, int]] = []

    def want(value: object) -> None:
        if isinstance(value, Value):
            unit = draft.units[draft.unit_of[id(value.entry)]]
            wanted.append((unit.body, unit.segment.number_of[id(value.entry)]))

    for value in draft.finals():
        want(value)
    for unit in draft.units:
        for number, entry in enumerate(unit.segment.entries):
            if any(isinstance(a, Noise) for a in entry.args):
                wanted.append((unit.body, number))
    while wanted:
        body, number = wanted.pop()
        if number in live[id(body)]:
            continue
        live[id(body)].add(number)
        for unit in body.units:
            _follow(unit, number, want, wanted)
    return live


def _follow(unit: Unit, number: int, want: object, wanted: list) -> None:
    entry = unit.segment.entries[number]
    for a in arguments(entry):
        want(a)  # type: ignore[operator]
    for write in entry.deps:
        wanted.append((unit.body, unit.segment.number_of[id(write)]))
