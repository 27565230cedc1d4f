"""The actions that a schedule consists of: what to run, which states to keep, and where."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Advance(NamedTuple):
    """Run the calls from ``start`` to ``stop``, from the state at ``start``; then the one at ``stop`` is at hand."""

    start: int
    stop: int
    residuals: bool = False  # whether those of the calls are saved

    def __str__(self) -> str:
        return f"advance {self.start} -> {self.stop}" + (", saving residuals" if self.residuals else "")


class _Of(NamedTuple):
    position: int

    def __str__(self) -> str:
        return f"{'pull back' if isinstance(self, PullBack) else type(self).__name__.lower()} {self.position}"


class Keep(_Of):
    """Put the state at hand into a slot."""


class Drop(_Of):
    """Let go of a state, in a slot or at hand."""


class Offload(_Of):
    """Copy a state from its slot to the tier."""


class Prefetch(_Of):
    """Begin to bring a state back from the tier."""


class Load(_Of):
    """Have a state of the tier at hand."""


class Forget(_Of):
    """Remove a state from the tier."""


class PullBack(_Of):
    """Pull cotangents back through the call at a position; the states that it has read are at hand."""


Action = Advance | Keep | Drop | Offload | Prefetch | Load | Forget | PullBack


def drawn(actions: Iterable[Action]) -> str:
    """A schedule as text: positions from left to right, time downwards, a line whenever steps have been run.

    ``█`` is a state in a slot, ``▒`` one in the tier alone, ``>`` a step that is run, ``<`` one that is pulled back.
    """
    kept: set[int] = {0}
    far: set[int] = set()
    lines: list[str] = []

    def line(steps: range, sign: str) -> None:
        width = 1 + max([*kept, *far, *steps])
        states = dict.fromkeys(far, "▒") | dict.fromkeys(kept, "█")
        lines.append("".join(states.get(p, "·") + (sign if p in steps else " ") for p in range(width)))

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
    return "\n".join(line.rstrip() for line in lines)
