"""Slots on the device above a lower tier: every few steps a state goes there instead of being given up.

The loop is cut into segments of c + 1 steps, c being the number of slots. The state at the beginning of each goes to
the lower tier; a sweep brings it back, one segment ahead, and replays the segment's other states into the slots. Of
c + 2 states from one beginning to the next, the first takes a slot, c − 1 take the others, the last but one is worked
on, and the last belongs to the next segment: so a step is replayed once at most, whatever T.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Set
from pathlib import Path

import torch

from .disk import DiskTier
from .host import HostTier
from .schedule import Marks
from .slots import SlotStore, State
from .tier import Tier


def tier_for(value: str | os.PathLike[str] | None) -> Tier | None:
    """The tier that the ``offload`` of a `Retention` names."""
    if value is None:
        return None
    if value == "host":
        return HostTier()
    directory = Path(tempfile.gettempdir() if value == "disk" else value)
    return DiskTier(directory.expanduser().absolute())


def check_device(value: str | os.PathLike[str] | None, devices: Iterable[torch.device]) -> None:
    """Raise if ``offload="host"`` would move states of ``devices`` to where they are.

    Raises:
        ValueError: likewise.
    """
    if value == "host" and all(d.type == "cpu" for d in devices):
        raise ValueError(
            "offload='host': the networks are on the CPU, so their states are in the host's memory already; "
            "offload='disk', or a directory's path, frees memory there"
        )


class TieredStore:
    """A `SlotStore` for the segment at hand, over a tier that holds the beginnings of all segments.

    Args:
        slots: c, how many states may be kept on the device; None keeps all, until there is a `limit`.
        tier: what holds the others.
    """

    def __init__(self, slots: int | None, tier: Tier) -> None:
        self.slots, self.tier = slots, tier
        self._near = SlotStore(slots)
        self._far: list[int] = []  # positions in the tier, ascending

    def __contains__(self, position: int) -> bool:
        return position in self._near or position in self.tier

    def __len__(self) -> int:
        return len(self._near)

    def __getitem__(self, position: int) -> State:
        if position not in self._near:
            self._enter(position, self.tier.load(position))
        return self._near[position]

    @property
    def base(self) -> int:
        """The lowest position held."""
        return min([self._near.base, *self._far[:1]])

    @property
    def positions(self) -> list[int]:
        """The positions held on the device, ascending."""
        return self._near.positions

    @property
    def states(self) -> list[State]:
        """All states held on the device."""
        return self._near.states

    def nearest(self, position: int) -> int:
        """The highest position held that is not above ``position``."""
        far = self._far[: bisect_right(self._far, position)][-1:]
        near = [self._near.nearest(position)] if self._near.base <= position or not far else []
        return max(near + far)

    # -- forward -------------------------------------------------------------------------------------------------

    def offer(self, position: int, state: State) -> None:
        """A new state, in order of position."""
        near = self._near
        forward = not self._far or near.base >= self._far[-1]  # no sweep has gone down from here
        if forward and (self.slots is None or position <= near.base + self.slots):
            near.offer(position, state)
        else:
            self._keep_begin()
            self._spill(position, state)
            self._enter(position, state)

    def limit(self, slots: int, within: Set[int] = frozenset()) -> None:
        """As of `SlotStore`, on the device."""
        self._near.limit(slots, within)
        self.slots = slots

    # -- sweep ---------------------------------------------------------------------------------------------------

    def release(self, top: int) -> None:
        """A sweep has come down to ``top``: the slots above it are free, and the next segment will be needed."""
        near = self._near
        if near.base <= top:
            near.release(top)
        below = bisect_left(self._far, near.base)
        if below:
            self.tier.prefetch(self._far[below - 1])

    def marks(self, start: int, target: int) -> Marks:
        """Where to `put` states on the way from ``start``, which is held, to ``target``."""
        if start not in self._near:
            self._enter(start, self.tier.load(start))
        return self._near.marks(start, target)

    def put(self, position: int, state: State) -> None:
        """Keep a state that `marks` has asked for."""
        self._near.put(position, state)

    def rebase(self, position: int, state: State | None = None) -> None:
        """Make ``position`` the initial one and drop everything below; its state is given if it is not held."""
        near = self._near
        if near.base > position:
            if state is not None:
                self._spill(position, state)
        else:
            if state is None and position not in near:
                state = self.tier.load(position)
            near.rebase(position, state)
        below = bisect_left(self._far, position)
        self.tier.forget(self._far[:below])
        del self._far[:below]

    # -- segments ------------------------------------------------------------------------------------------------

    def _enter(self, begin: int, state: State) -> None:
        """Have the slots for the segment that begins there."""
        self._keep_begin()
        self._near = SlotStore(self.slots)
        self._near.rebase(begin, state)

    def _keep_begin(self) -> None:
        """The slots will be another segment's: its beginning must not be lost."""
        self._spill(self._near.base, self._near[self._near.base])

    def _spill(self, position: int, state: State) -> None:
        if position not in self.tier:
            self.tier.save(position, state)
            self._far.insert(bisect_left(self._far, position), position)
