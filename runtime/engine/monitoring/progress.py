"""Progress of what takes long: callbacks from the engine, and a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watch = Callable[[int, int], object]
current: ContextVar[Watch | None] = ContextVar("metaoptim_progress", default=None)  # whom to tell, if anyone


@contextmanager
def progress(watch: Watch | None = None) -> Iterator[None]:
    """Show the progress of compiled functions that are called, and of windows that are opened, in a block.

    A compiled function makes its calls (those of its steps, and some before and after them) forward, and its backward
    pulls cotangents back through each: twice as many in all. In an ordinary window the user's own code runs forward, so
    only the backward is told of. Steps that are run again count nothing, so the pace changes.

    Args:
        watch: called with how many are done, and of how many; None for a bar, by tqdm. A backward may run in another
            thread.

    Raises:
        ImportError: for a bar, where tqdm is not installed.

    Example:
        >>> seen = []
        >>> net = torch.nn.Linear(3, 1)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1)
        >>> with metaoptim.progress(lambda done, total: seen.append((done, total))):
        ...     with metaoptim.SlidingWindow(offline=True):
        ...         for _ in range(2):
        ...             inner.step(net(torch.ones(2, 3)).square().mean())
        ...         net(torch.ones(2, 3)).square().mean().backward()
        >>> seen  # two steps, and the adoption of the network
        [(1, 3), (2, 3), (3, 3)]
    """
    bar = None
    if watch is None:
        try:
            from tqdm import tqdm  # pyright: ignore[reportMissingModuleSource]
        except ImportError as error:
            raise ImportError("progress: a bar needs tqdm (pip install tqdm); or pass a function") from error
        bar = tqdm(desc="inner steps", unit="step", disable=None)

        def show(done: int, total: int) -> None:
            if total != bar.total:
                bar.reset(total)
            bar.update(done - bar.n)

        watch = show
    token = current.set(watch)
    try:
        yield
    finally:
        current.reset(token)
        if bar is not None:
            bar.close()
