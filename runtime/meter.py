"""Memory, measured: what allocators hand out while a block runs."""

from __future__ import annotations

from typing import Any

from torch._C import _autograd as autograd
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig


def profiling() -> bool:
    """Whether a profiler is active, beside which nothing can be measured."""
    return autograd._profiler_enabled()


class AllocatorMeter:
    """Bytes that PyTorch's CPU allocator gives out inside a `with` block, from the profiler's allocation events.

    No other profiler may be active; see `profiling`.

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
        self._begin()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end()

    def note(self) -> None:
        """Forget the events so far but for what they come to: they take some memory themselves."""
        self._end()
        self._begin()

    def _begin(self) -> None:
        # The profiler before kineto: it starts in no time, says nothing on stderr, and keeps events in order.
        autograd._enable_profiler_legacy(
            ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
        )

    def _end(self) -> None:
        most = self.held
        for thread in autograd._disable_profiler_legacy():
            held = peak = 0
            for event in thread:
                if event.kind() == "memory_alloc":
                    held += event.cpu_memory_usage() + event.cuda_memory_usage()
                    peak = max(peak, held)
            self.held += held
            most += peak
        self.peak = max(self.peak, most)
