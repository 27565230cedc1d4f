"""Compilation in other processes, while this one goes on: none of its time is taken, and no lock of its interpreter."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading

from . import worker
from .worker import receive, send


class Job:
    """One graph on its way through the compiler.

    Attributes:
        path: where what becomes of it will lie.
        complaint: why nothing became of it, once that is known.
        seconds: how long it took.
    """

    def __init__(self, path: str) -> None:
        self.path, self.seconds = path, 0.0
        self.complaint: str | None = None
        self.payload = b""  # what it takes
        self._done, self._process = threading.Event(), os.getpid()

    def end(self, complaint: str | None, seconds: float = 0.0) -> None:
        """Note that it is done: compiled, or why not."""
        self.complaint, self.seconds = complaint, seconds
        self._done.set()

    @property
    def ended(self) -> bool:
        """Whether it is known what became of it."""
        if not self._done.is_set() and self._process != os.getpid():
            self.end("the process that had begun to compile has been forked")
        return self._done.is_set()

    def wait(self) -> None:
        """Wait until that is known."""
        if not self.ended:
            self._done.wait()


class Pool:
    """Processes that compile, started when there is something to do."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes] | None] = []
        self._closed = False

    def submit(self, job: Job, most: int) -> None:
        """Have a job done, by ``most`` processes at most."""
        with self._lock:
            self._waiting += 1
            if self._waiting > len(self._processes) < most:
                self._begin()
        self._jobs.put(job)

    def prepare(self) -> None:
        """Have a process that is ready to compile."""
        with self._lock:
            if not self._processes:
                self._begin()

    def _begin(self) -> None:
        self._processes.append(None)
        lane = len(self._processes) - 1
        threading.Thread(target=self._serve, args=(lane,), name="metaoptim-compile", daemon=True).start()

    def close(self) -> None:
        """End all processes, and start none any more."""
        self._closed = True
        for process in self._processes:
            _end(process)

    def _serve(self, lane: int) -> None:
        """One process's jobs, one after the other."""
        with contextlib.suppress(OSError, EOFError):  # the first job tries again
            self._process(lane)
        while True:
            job, process = self._jobs.get(), None
            try:
                process = self._process(lane)
                assert process.stdin is not None and process.stdout is not None
                send(process.stdin, (job.path, job.payload))
                job.end(*receive(process.stdout))
            except (
                OSError,
                EOFError,
                ValueError,
                pickle.UnpicklingError,
            ) as error:  # of a pipe that was closed
                _end(process)
                job.end(f"the process that compiles has ended ({type(error).__name__})")
            with self._lock:
                self._waiting -= 1

    def _process(self, lane: int) -> subprocess.Popen[bytes]:
        """A lane's process, started where there is none or it has ended."""
        process = self._processes[lane]
        if not self._closed and (process is None or process.poll() is not None):
            process = self._processes[lane] = _start()
        if process is None or self._closed:  # maybe since it was started
            _end(process)
            raise EOFError
        return process


def _end(process: subprocess.Popen[bytes] | None) -> None:
    """End a process at once, with the compilers that it has called."""
    if process is not None:
        with contextlib.suppress(OSError), process:  # what was on its way to it is lost
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # compilers then remove what they have begun
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _start() -> subprocess.Popen[bytes]:
    # the modules of this process, not those of the folder that a module's name would be looked for in first
    path = [p for p in sys.path if isinstance(p, str)]
    code = f"import sys; sys.path[:] = {path!r}; from {worker.__name__} import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


_pool: Pool | None = None


_coming: dict[str, Job] = {}


def job_for(path: str) -> tuple[Job, bool]:
    """The job whose result will lie at ``path``, and whether it is new: several steps may have equal graphs."""
    job = _coming.get(path)
    if job is not None and not job.ended:
        return job, False
    _coming[path] = job = Job(path)
    return job, True


def submit(job: Job, payload: bytes, waiting: bool) -> None:
    """Have a job done by processes of this one's: as many as there are cores, or one less if it goes on meanwhile."""
    job.payload = payload
    _the_pool().submit(job, max(1, (os.cpu_count() or 1) - (not waiting)))


def prepare() -> None:
    """Have a process start that will have something to compile: that takes two seconds."""
    _the_pool().prepare()


def _the_pool() -> Pool:
    global _pool
    if _pool is None:
        _pool = Pool()
        atexit.register(_pool.close)
    return _pool


def _forget() -> None:
    """A forked process has no threads of its parent's: it starts processes of its own."""
    global _pool
    if _pool is not None:
        atexit.unregister(_pool.close)
        _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
