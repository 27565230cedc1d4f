"""Slots: a container for the states of the inner loop that are kept; `schedule` says which."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Set

from torch import Tensor

from .schedule import Marks, crowded_out, places

State = list[Tensor]


class SlotStore:
    """States by tape position; at most ``slots`` of them at any time, counting the initial one.

    On the way forward states are offered in order. A sweep releases those it has passed and keeps others in their
    place.

    Args:
        slots: how many states may be kept; None keeps all.
        horizon: how many tape positions will follow the initial one, where that is known; the states kept are then the
            best for it. Beyond it, and where it is None, the scheme for unknown ends decides.
    """

    def __init__(self, slots: int | None, horizon: int | None = None) -> None:
        self.slots = slots
        self.horizon = horizon
        self._states: dict[int, State] = {0: []}
        self._positions = [0]
        self._planned = Marks()
        # Up to where `_planned` decides; None as long as the initial position may still move.
        self._end: int | None = None

    def __contains__(self, position: int) -> bool:
        return position in self._states

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> State:
        return self._states[position]

    @property
    def base(self) -> int:
        """The lowest position held."""
        return self._positions[0]

    @property
    def positions(self) -> list[int]:
        """The positions held, ascending."""
        return list(self._positions)

    @property
    def states(self) -> list[State]:
        """All states held."""
        return list(self._states.values())

    def nearest(self, position: int) -> int:
        """The highest position held that is not above ``position``."""
        at = bisect_right(self._positions, position)
        if not at:
            raise AssertionError(
                f"position {position} lies below the tape, which begins at {self._positions[0]}"
            )
        return self._positions[at - 1]

    # -- forward -------------------------------------------------------------------------------------------------

    def offer(self, position: int, state: State) -> None:
        """A new state, in order of position; kept if the schedule says so, in place of another where it must."""
        if position == self._positions[-1]:
            self._states[position] = state
        elif self._make_room(position):
            self._put(position, state)

    def _make_room(self, position: int) -> bool:
        if self.slots is None:
            return True
        if self._end is None:
            self._end = self.base + (self.horizon or 0)
            self._planned = Marks(places(self.base, self._end, self.slots))
        if position < self._end and not self._planned.due(position):
            return False
        if len(self._positions) < self.slots:
            return True
        lost = crowded_out(self._positions, position, self.slots)
        if lost != position:
            self._keep([p for p in self._positions if p != lost])
        return lost != position

    def limit(self, slots: int, within: Set[int] = frozenset()) -> None:
        """Allow no more than ``slots`` states from here on; those at positions ``within`` super-steps go first."""
        if within:
            self._keep([p for p in self._positions if p == self.base or p not in within])
        while len(self._positions) > slots:
            *kept, last = self._positions
            lost = crowded_out(kept, last, len(kept))
            self._keep([p for p in self._positions if p != lost])
        self.slots = slots

    # -- sweep ---------------------------------------------------------------------------------------------------

    def release(self, top: int) -> None:
        """A sweep has come down to ``top``: the slots above it are free."""
        if self.slots is not None and self._positions[-1] > top:
            self._keep([p for p in self._positions if p <= top])

    def marks(self, start: int, target: int) -> Marks:
        """Where to `put` states on the way from ``start``, which is held, to ``target``."""
        if self.slots is None:
            return Marks(range(start + 1, target))
        return Marks(places(start, target, self.slots - len(self._positions) + 1))

    def put(self, position: int, state: State) -> None:
        """Keep a state that `marks` has asked for."""
        self._put(position, state)

    def rebase(self, position: int, state: State | None = None) -> None:
        """Make ``position`` the initial one and drop everything below; its state is given if it is not held."""
        state = self._states[position] if state is None else state
        if self.horizon is not None:  # the end stays where it is
            self.horizon -= position - self.base
        self._keep([p for p in self._positions if p > position])
        self._put(position, state)

    # -- the container -------------------------------------------------------------------------------------------

    def _put(self, position: int, state: State) -> None:
        if position not in self._states:
            if self.slots is not None and len(self._positions) >= self.slots:
                raise AssertionError(f"no slot is free for position {position}: held are {self._positions}")
            insort(self._positions, position)
        self._states[position] = state

    def _keep(self, positions: list[int]) -> None:
        self._positions = positions
        self._states = {p: self._states[p] for p in positions}
