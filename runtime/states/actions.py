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


class Keep(NamedTuple):
    """Put the state at hand into a slot."""

    position: int

    def __str__(self) -> str:
        return f"keep {self.position}"


class Drop(NamedTuple):
    """Let go of a state, in a slot or at hand."""

    position: int

    def __str__(self) -> str:
        return f"drop {self.position}"


class Offload(NamedTuple):
    """Copy a state from its slot to the tier."""

    position: int

    def __str__(self) -> str:
        return f"offload {self.position}"


class Prefetch(NamedTuple):
    """Begin to bring a state back from the tier."""

    position: int

    def __str__(self) -> str:
        return f"prefetch {self.position}"


class Load(NamedTuple):
    """Have a state of the tier at hand."""

    position: int

    def __str__(self) -> str:
        return f"load {self.position}"


class Forget(NamedTuple):
    """Remove a state from the tier."""

    position: int

    def __str__(self) -> str:
        return f"forget {self.position}"


class PullBack(NamedTuple):
    """Pull cotangents back through the call at ``position``; the states that it has read are at hand."""

    position: int

    def __str__(self) -> str:
        return f"pull back {self.position}"


Action = Advance | Keep | Drop | Offload | Prefetch | Load | Forget | PullBack


def drawn(actions: Iterable[Action]) -> str:
    """A schedule as text: positions from left to right, time downwards, a line whenever steps have been run.

    ``█`` is a state in a slot, ``▒`` one in the tier alone, ``>`` a step that is run, ``<`` one that is pulled back.
    """
    kept: set[int] = set()
    far: set[int] = set()
    lines: list[str] = []

    def line(running: dict[int, str]) -> None:
        width = 1 + max([*kept, *far, *running], default=0)
        marks = dict.fromkeys(far, "▒") | running | dict.fromkeys(kept, "█")
        lines.append("".join(marks.get(p, "·") for p in range(width)))

    for action in actions:
        match action:
            case Advance(start, stop):
                line(dict.fromkeys(range(start, stop), ">"))
            case PullBack(position):
                line({position: "<"})
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
