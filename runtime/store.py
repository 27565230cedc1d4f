"""Slots: which states of the inner loop are kept."""

from __future__ import annotations

from bisect import bisect_right

from torch import Tensor

State = list[Tensor]


class SlotStore:
    """States by tape position; at most ``slots`` of them, counting the initial one.

    While the horizon is unknown, states are offered in order and kept at a stride that doubles whenever the slots run
    out. During a sweep, slots above the position reached are free for states in between.

    Args:
        slots: how many states may be kept; None keeps all.
    """

    def __init__(self, slots: int | None) -> None:
        self.slots = slots
        self._states: dict[int, State] = {0: []}
        self._positions = [0]
        self._stride = 1

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

    def offer(self, position: int, state: State) -> None:
        """A new state, in order of position; kept if its turn has come."""
        if position == self._positions[-1]:
            self._states[position] = state
            return
        if self.slots is None:
            self._put(position, state)
            return
        if self.slots > 1 and position - self._positions[-1] >= self._stride:
            self._put(position, state)
            while len(self._positions) > self.slots:
                self._stride *= 2
                base = self._positions[0]
                kept, last = [base], base
                for p in self._positions[1:]:
                    if p - last >= self._stride:
                        kept.append(p)
                        last = p
                self._keep(kept)

    def _put(self, position: int, state: State) -> None:
        self._states[position] = state
        at = bisect_right(self._positions, position)
        if not at or self._positions[at - 1] != position:
            self._positions.insert(at, position)

    def _keep(self, positions: list[int]) -> None:
        self._positions = positions
        self._states = {p: self._states[p] for p in positions}

    def marks(self, start: int, target: int) -> set[int]:
        """Where to keep states on the way from ``start`` to ``target``, after freeing what lies above ``target``."""
        if self.slots is None:
            return set(range(start + 1, target))
        self._keep([p for p in self._positions if p <= target])
        free, marks = self.slots - len(self._positions), set()
        at = start
        while free > 0:
            at += (target - at + 1) // 2
            if at >= target:
                break
            marks.add(at)
            free -= 1
        return marks

    def put(self, position: int, state: State) -> None:
        """Keep a state at a position that `marks` has given."""
        self._put(position, state)

    def rebase(self, position: int, state: State) -> None:
        """Make ``position`` the initial one and drop everything below."""
        self._put(position, state)
        self._keep([p for p in self._positions if p >= position])
