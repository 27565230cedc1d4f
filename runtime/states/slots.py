"""The actions that a schedule consists of, and the slots in which they put states, by position."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

State = list[Any]


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


class Below(Protocol):
    """What a schedule asks of a lower tier, or of what stands for one."""

    def save(self, position: int, state: State, /) -> object: ...
    def load(self, position: int, /) -> State: ...
    def prefetch(self, position: int, /) -> object: ...
    def forget(self, positions: Sequence[int], /) -> object: ...
    def rest(self) -> object: ...
    def settle(self) -> object: ...


class Slots:
    """States in slots, at hand beside them, and in a lower tier.

    Schedules read the positions, and rely on each action being carried out before they are asked for the next one.

    Args:
        slots: how many states may be kept, counting the initial one; None keeps all.
        tier: where states go that have no slot; None gives them up.
    """

    def __init__(self, slots: int | None, tier: Below | None = None) -> None:
        self.slots, self.tier = slots, tier
        self.kept = [0]  # positions of the states in slots, ascending
        self.far: list[int] = []  # positions of the states in the tier, ascending
        self.work: dict[int, State] = {}  # states at hand that take no slot
        self.initial: State = []  # the state at position 0, where steps before `base` can be run from it again
        self._states: dict[int, State] = {0: []}

    def __contains__(self, position: int) -> bool:
        return position in self._states or self.offloaded(position)

    def at_hand(self, position: int) -> bool:
        """Whether a state is on the device."""
        return position in self._states or position in self.work

    def offloaded(self, position: int) -> bool:
        """Whether a state is in the tier."""
        at = bisect_left(self.far, position)
        return at < len(self.far) and self.far[at] == position

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, position: int) -> State:
        if position in self._states:
            return self._states[position]
        if position in self.work:
            return self.work[position]
        if self.tier is not None and self.offloaded(position):
            return self.tier.load(position)
        if position == 0 and self.base:
            return self.initial
        raise AssertionError(f"the state at position {position} is not at hand: held are {self.kept}")

    @property
    def base(self) -> int:
        """The lowest position held."""
        return min(self.kept[0], *self.far[:1]) if self.far else self.kept[0]

    @property
    def states(self) -> list[State]:
        """All states on the device."""
        return [*self._states.values(), *self.work.values()]

    def nearest(self, position: int) -> int:
        """The highest position held that is not above ``position``."""
        found = [of[at - 1] for of in (self.kept, self.far) if (at := bisect_right(of, position))]
        if not found:
            raise AssertionError(f"position {position} lies below the tape, which begins at {self.base}")
        return max(found)

    def apply(self, action: Action, state: State | None = None) -> None:
        """Carry out an action that concerns states alone; `Keep` keeps ``state``, by default the one at hand."""
        match action, self.tier:
            case Keep(position), _:
                self._keep(position, self.work.pop(position) if state is None else state)
            case Drop(position), _ if position in self.work:
                del self.work[position]
            case Drop(position), _:
                del self.kept[bisect_left(self.kept, position)], self._states[position]
            case Offload(position), tier if tier is not None:
                tier.save(position, self._states[position])
                insort(self.far, position)
            case Prefetch(position), tier if tier is not None:
                tier.prefetch(position)
            case Load(position), tier if tier is not None:
                self.work[position] = tier.load(position)
            case Forget(position), tier if tier is not None:
                tier.forget([position])
                self.far.remove(position)
            case _:
                raise AssertionError(f"{action} is not about states alone")

    def _keep(self, position: int, state: State) -> None:
        if position not in self._states:
            if self.slots is not None and len(self.kept) >= self.slots:
                raise AssertionError(f"no slot is free for position {position}: held are {self.kept}")
            insort(self.kept, position)
        self._states[position] = state

    def rest(self) -> None:
        """A sweep has ended: what it has worked on is not needed any more."""
        self.work = {}
        if self.tier is not None:
            self.tier.rest()

    def settle(self) -> None:
        """Wait until the tier has written what it was given: until then it takes memory."""
        if self.tier is not None:
            self.tier.settle()
