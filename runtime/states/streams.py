"""Schedules as streams of actions, made lazily; `schedule` has the numbers behind them.

A stream reads what is held from `Slots`, and each of its actions is carried out before the next one is asked for. A
forward pass leaves states in slots, a sweep (`reverse`) goes back over them and runs steps again on its way.

* T is known: `revolve`.
* T is not known: `stumm_walther` says what to keep before each step.
* There is a lower tier: `multistage`, whether T is known or not.

``held`` are the states; ``keepable`` says whether the state at a position may be kept: not within a super-step.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

from .schedule import crowded_out, places
from .slots import Action, Advance, Drop, Forget, Keep, Load, Offload, Prefetch, PullBack, Slots, State

Keepable = Callable[[int], bool]


def always(position: int) -> bool:
    """Every state may be kept."""
    return True


def forward(
    held: Slots, begin: int, end: int, saving: int = sys.maxsize, keepable: Keepable = always
) -> Iterator[Action]:
    """A forward pass over T = ``end`` steps; the state at position 0 is in a slot.

    States before ``begin``, which no sweep over inner steps goes back to, are given up; residuals are saved from
    ``saving`` on.
    """
    if begin:
        yield Advance(0, begin)
        yield Drop(0)
        yield Keep(begin)
    if held.tier is None:
        yield from revolve(held, begin, end, keepable, saving)
        return
    at = begin
    for position in filter(keepable, range(begin + 1, end)):
        for action in multistage(held, position):
            if at < position:
                yield Advance(at, position)
                at = position
            yield action
    yield Advance(at, end)


def revolve(
    held: Slots, start: int, target: int, keepable: Keepable = always, saving: int = sys.maxsize
) -> Iterator[Action]:
    """From a state in a slot to ``target``, keeping those states that a sweep back from there is cheapest with.

    Where a state may not be kept, the next one that may be is. Residuals are saved from ``saving`` on.
    """
    at = start
    marks: Iterable[int] = range(start + 1, target)
    if held.slots is not None:
        marks = places(start, target, held.slots - len(held) + 1)
    for mark in marks:
        if mark <= at:
            continue
        mark = next((p for p in range(mark, target) if keepable(p)), target)
        if mark == target:
            break
        yield Advance(at, mark, at >= saving)
        yield Keep(mark)
        at = mark
    yield Advance(at, target, at >= saving)


def keeping(positions: Iterable[int], end: int) -> Iterator[Action]:
    """From the state at position 0 to ``end``, keeping the states at ``positions``."""
    at = 0
    for position in positions:
        if position > at:
            yield Advance(at, position)
            yield Keep(position)
            at = position
    yield Advance(at, end)


def coming(held: Slots, position: int) -> Iterator[Action]:
    """Before the step at ``position`` of a window, the end of which is not known."""
    return (stumm_walther if held.tier is None else multistage)(held, position)


def stumm_walther(held: Slots, position: int) -> Iterator[Action]:
    """Before the step at ``position`` of a loop of unknown length: what to keep, and in whose place (`crowded_out`)."""
    if position == held.kept[-1] or held.slots is None or len(held) < held.slots:
        yield Keep(position)
        return
    lost = crowded_out(held.kept, position, held.slots)
    if lost != position:
        yield Drop(lost)
        yield Keep(position)


def multistage(held: Slots, position: int) -> Iterator[Action]:
    """The same above a lower tier, where every few steps a state goes instead of being given up.

    The loop is cut into segments of c + 1 steps, c being the number of slots. The state at the beginning of each goes
    to the tier; a sweep brings it back, one segment ahead, and runs the segment's other states again into the slots. Of
    c + 2 states from one beginning to the next, the first takes a slot, c - 1 take the others, the last but one is
    worked on, and the last belongs to the next segment: so a step is run again once at most, whatever T. This is
    asynchronous multistage checkpointing (N. Kukreja, J. Hückelheim, G. Gorman, "Backpropagation for long sequences:
    beyond memory constraints with constant overheads", 2018) with the shortest segments that there are slots for.
    """
    begin = held.kept[0]
    upward = not held.far or begin >= held.far[-1]  # no sweep has gone down from here
    if upward and (held.slots is None or position <= begin + held.slots):
        yield from stumm_walther(held, position)
        return
    yield from _leave_segment(held)
    yield Keep(position)
    yield Offload(position)


def reverse(held: Slots, targets: Iterable[tuple[int, int]], keepable: Keepable = always) -> Iterator[Action]:
    """A sweep: have the states at hand that each of ``targets`` needs, and pull back through it.

    ``targets`` come in the order they are pulled back: the position of a call, and the position that its loss has read.
    They are asked for one by one, so that what a pull-back gives may decide which comes next.
    """
    ahead = -1
    for position, base in targets:
        if held.work:
            for passed in [p for p in held.work if p not in (position, base)]:
                yield Drop(passed)
        while held.slots is not None and position < held.kept[-1] > held.kept[0]:
            yield Drop(held.kept[-1])
        if held.far and (below := bisect_left(held.far, held.kept[0])):
            if held.far[below - 1] != ahead:
                ahead = held.far[below - 1]
                yield Prefetch(ahead)
        for wanted in (base, position) if base < position else (position,):
            if not held.at_hand(wanted):
                yield from _reached(held, wanted, keepable)
        yield PullBack(position)


def _reached(held: Slots, target: int, keepable: Keepable) -> Iterator[Action]:
    """From the nearest state that there is to one that is not at hand."""
    if target < held.base:
        yield Advance(0, target)
        return
    start = held.nearest(target)
    at_hand = max((p for p in held.work if p < target), default=start)
    if at_hand > start:
        yield Advance(at_hand, target)
        return
    if not held.at_hand(start):
        yield from _entered(held, start)
    if start < target:
        yield from revolve(held, start, target, keepable)


def _entered(held: Slots, begin: int) -> Iterator[Action]:
    """Have the slots for the segment that begins there."""
    yield Load(begin)
    yield from _leave_segment(held)
    yield Keep(begin)


def _leave_segment(held: Slots) -> Iterator[Action]:
    """The slots will be another segment's: its beginning must not be lost."""
    if not held.offloaded(held.kept[0]):
        yield Offload(held.kept[0])
    while held.kept:
        yield Drop(held.kept[-1])


def shrink(held: Slots, slots: int, within: Set[int] = frozenset()) -> Iterator[Action]:
    """Keep no more than ``slots`` states; those at positions ``within`` super-steps go first."""
    for position in [p for p in held.kept[1:] if p in within]:
        yield Drop(position)
    while len(held) > slots:
        *kept, last = held.kept
        yield Drop(crowded_out(kept, last, len(kept)))


def rebase(held: Slots, position: int) -> Iterator[Action]:
    """The loop begins at ``position`` only, where the state is at hand."""
    while held.kept:
        yield Drop(held.kept[-1])
    yield Keep(position)


def slide(held: Slots, needed: int, end: int) -> Iterator[Action]:
    """No sweep of a loop of ``end`` steps so far will go below ``needed``: begin there, or at a state nearest below."""
    base = held.nearest(needed)
    if base == held.base and needed - base > max(16, end - needed):
        if not held.at_hand(base):
            yield from _entered(held, base)
        yield Advance(base, needed)
        yield Drop(base)
        yield Keep(needed)
        base = needed
    far = held.kept[-1] < base
    if far:
        yield Load(base)
    for position in [p for p in held.kept if p < base]:
        yield Drop(position)
    if far:
        yield Keep(base)
    for position in [p for p in held.far if p < base]:
        yield Forget(position)


# -- schedules to be looked at -----------------------------------------------------------------------------------------


def carried_out(held: Slots, actions: Iterable[Action]) -> Iterator[Action]:
    """A stream, of which only the positions matter: each action is carried out on states without anything in them."""
    for action in actions:
        if isinstance(action, Advance):
            held.work[action.stop] = []
        elif not isinstance(action, PullBack):
            held.apply(action)
        yield action


class _Nowhere:
    """A tier of which only the positions matter."""

    def __getattr__(self, name: str) -> Callable[..., State]:
        return lambda *of: []


def whole(steps: int, slots: int | None, tiered: bool = False, known: bool = True) -> Iterator[Action]:
    """The schedule of a forward pass, to which T (``steps``) is ``known`` or not, and of a sweep over all of it."""
    nowhere: Any = _Nowhere() if tiered else None
    held = Slots(slots, nowhere)

    def stepwise() -> Iterator[Action]:
        held.work[0] = []
        for position in range(steps):
            yield from coming(held, position)
            yield Advance(position, position + 1)
            if position in held.work:
                yield Drop(position)

    def both() -> Iterator[Action]:
        yield from forward(held, 0, steps) if known else stepwise()
        yield Drop(steps)
        yield from reverse(held, ((p, p) for p in range(steps - 1, -1, -1)))

    return carried_out(held, both())


def drawn(actions: Iterable[Action]) -> str:
    """A schedule as text: positions from left to right, time downwards, a line whenever steps have been run.

    ``█`` is a state in a slot, ``▒`` one in the tier alone, ``>`` a step that is run, ``<`` one that is pulled back.
    """
    kept, far, lines = {0}, set[int](), list[str]()

    def line(steps: range, sign: str) -> None:
        width = 1 + max([*kept, *far, *steps])
        states = dict.fromkeys(far, "▒") | dict.fromkeys(kept, "█")
        text = "".join(states.get(p, "·") + (sign if p in steps else " ") for p in range(width))
        lines.append(text.rstrip())

    for action in actions:
        match action:
            case Advance(start, stop):
                line(range(start, stop), ">")
            case PullBack(position):
                line(range(position, position + 1), "<")
            case Keep(position):
                kept.add(position)
            case Drop(position):
                kept.discard(position)
            case Offload(position):
                far.add(position)
            case Forget(position):
                far.discard(position)
            case Prefetch() | Load():
                pass
    return "\n".join(lines)
