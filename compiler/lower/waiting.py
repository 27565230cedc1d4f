"""A line on the terminal for whoever waits longer than two seconds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 2.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say ``what`` is going on if the block has not ended after two seconds and stderr is a terminal."""

    def tell() -> None:
        if sys.stderr.isatty():
            print(f"metaoptim: {what}", file=sys.stderr, flush=True)

    timer = threading.Timer(SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
