"""Memory, measured: what allocators hand out while a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import add
from typing import Any

import torch

from metaoptim.compiler import compat

_NOTED = 50  # steps after which events are added up: each takes some 300 bytes


class AllocatorMeter:
    """Bytes that PyTorch's allocators give out inside a `with` block, from the profiler's allocation events.

    Every allocation of the block's thread counts, also those of compiled code; each takes half a microsecond. No other
    profiler may be active; see `profiling`. Operators are hidden from observers meanwhile.

    What an earlier meter has seen allocated counts as given back when it is freed in the block. So does what is freed
    from an address where such memory once lay, though it is from before the block: the events name no addresses, and
    torch forgets none that are freed while nobody measures. A block that frees nothing older than itself is exact.

    Attributes:
        peak: most bytes alive at once, of those allocated inside the block.
        held: bytes still alive at the end of the block.

    Example:
        >>> with AllocatorMeter() as meter:
        ...     x = torch.zeros(1000, dtype=torch.uint8)
        >>> meter.held >= 1000
        True
    """

    peak: int
    held: int

    def __enter__(self) -> AllocatorMeter:
        self.peak = self.held = 0
        compat.begin_profile()
        return self

    def __exit__(self, *error: Any) -> None:
        self._add(compat.end_profile())

    def note(self) -> None:
        """Forget the events so far but for what they come to: they take some memory themselves.

        Not within a backward, whose events wait for its end.
        """
        if compat.current_autograd_node() is not None:
            return  # after a node autograd brings back the profiler from before it, which must not have ended by then
        threads = compat.end_profile()
        compat.begin_profile()  # at once: what is freed meanwhile is not seen
        self._add(threads)

    def watch(self, done: int, total: int) -> None:
        """`note`, every so many steps: to be passed to `metaoptim.progress`."""
        if done % _NOTED == 0:
            self.note()

    def _add(self, threads: Sequence[Sequence[Any]]) -> None:
        most = self.held
        for events in threads:  # of several, each at its own highest: their order is not known
            levels = list(accumulate(_sizes(events), initial=0))
            self.held += levels[-1]
            most += max(levels)
        self.peak = max(self.peak, most)


def _sizes(events: Sequence[Any]) -> Iterator[int]:
    """Bytes that each event has taken; below zero for those given back."""
    host = map(compat.ProfilerEvent.cpu_memory_usage, events)
    if not torch.cuda.is_initialized():
        return host
    return map(add, host, map(compat.ProfilerEvent.cuda_memory_usage, events))
