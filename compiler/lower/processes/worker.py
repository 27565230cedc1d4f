"""A process that compiles graphs: jobs come in on stdin, and what became of each goes out on stdout.

`background` starts it in a session of its own, so that Ctrl-C at the terminal does not reach it, and the compilers that
it calls end with it.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import time
from typing import IO, Any


def send(pipe: IO[bytes], message: Any) -> None:
    """Write a message."""
    pickle.dump(message, pipe)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """Read a message; raises EOFError where there is no more."""
    return pickle.load(pipe)


def main() -> None:
    """Compile what comes in, until nobody asks any more."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # what has been begun is removed
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print is no result
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while True:
        path, payload = jobs.get()
        begun = time.perf_counter()
        try:
            from .. import backends  # takes seconds
            from ..files.artifacts import read_payload

            backends.compile_to(path, *read_payload(payload))
            complaint = None
        except Exception as error:  # whatever a compiler raises is for the process that asked
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            told = " ... ".join(
                dict.fromkeys([lines[0], lines[-1]])
            )  # between them lies all that a compiler says
            complaint = f"{type(error).__name__}: {told}"
        send(results, (complaint, time.perf_counter() - begun))


def _listen(jobs: queue.SimpleQueue[Any]) -> None:
    """Take in jobs; when the process that asked has gone, this one ends, with the compilers that it has called."""
    try:
        while True:
            jobs.put(receive(sys.stdin.buffer))
    finally:
        os.killpg(os.getpgrp(), signal.SIGTERM)
