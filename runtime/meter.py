"""Memory, measured: what allocators hand out while a block runs."""

from __future__ import annotations

from typing import Any

import torch


class AllocatorMeter:
    """Bytes that PyTorch's CPU allocator gives out inside a `with` block, from the profiler's allocation events.

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
        self._profiler: Any = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)
        events = [
            (e.start_ns(), e.nbytes())
            for e in self._profiler.profiler.kineto_results.events()
            if e.name() == "[memory]"
        ]
        self.peak = self.held = 0
        for _, nbytes in sorted(events, key=lambda e: e[0]):
            self.held += nbytes
            self.peak = max(self.peak, self.held)
