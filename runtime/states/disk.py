"""States in files, checked when they are read, by a thread of their own; and which tier `offload` names."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaoptim.errors import StoreError

from .pieces import Piece
from .tier import Damaged, Tier

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

_numbers = itertools.count()


def tier_for(value: str | os.PathLike[str] | None) -> Tier | None:
    """The tier that the ``offload`` of a `Retention` names."""
    if value is None:
        return None
    if value == "host":
        return Tier()
    directory = Path(tempfile.gettempdir() if value == "disk" else value)
    return DiskTier(directory.expanduser().absolute())


def check_device(value: str | os.PathLike[str] | None, devices: Iterable[torch.device]) -> None:
    """Raise a ValueError if ``offload="host"`` would move states of ``devices`` to where they are."""
    if value == "host" and all(d.type == "cpu" for d in devices):
        raise ValueError(
            "offload='host': the networks are on the CPU, so their states are in the host's memory already; "
            "offload='disk', or a directory's path, frees memory there"
        )


class DiskTier(Tier):
    """A lower tier in files, which lie in a directory of their own in ``directory``."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._files = Files(directory)
        self._worker: ThreadPoolExecutor | None = None
        self._threads: list[int] = []  # its only one

    def _submit(self, job: Callable[[], Any]) -> Future[Any]:
        if self._worker is None:
            threads = self._threads  # the thread must not keep the tier alive
            self._worker = ThreadPoolExecutor(
                1, "metaoptim-disk", lambda: threads.append(threading.get_ident())
            )
        return self._worker.submit(job)

    def _on_host(self, part: Tensor) -> Tensor:
        return part if part.device.type == "cpu" else super()._on_host(part)

    # What the thread is given does not keep the tier alive. It lets go of tensors before the caller learns that it is
    # done, so that it is never the last to have them: memory is given back where it was taken.

    def _put(self, parts: list[Tensor], copied: list[Any]) -> Future[Any]:
        files, own = self._files, list(parts)

        def write() -> File:
            try:
                for event in copied:
                    event.synchronize()
                return files.write(own)
            finally:
                own.clear()

        return self._submit(write)

    def _get(self, piece: Piece) -> tuple[Tensor, Future[Any]]:
        pinned = piece.device.type == "cuda"
        memory = torch.empty(piece.nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        files, source, number, into = self._files, piece.source, piece.number, [memory]

        def read() -> None:
            try:
                files.read(source.result(), number, into[0])
            finally:
                into.clear()

        reading = self._submit(read)
        # at once, if it is cancelled: its turn may be far off
        reading.add_done_callback(lambda _: into.clear())
        return memory, reading

    def _remove(self, piece: Piece) -> None:
        files, source = self._files, piece.source
        self._submit(lambda: files.drop(source.result()))

    def _failed(self, error: BaseException, position: int, piece: Piece | None) -> StoreError:
        state = f"the state at position {position} of the inner loop"
        if piece is None:
            return StoreError(
                f"offload: {state} could not be written to {self._files.parent}: {error}. Make room there, name "
                "another directory (offload='/a/path'), or keep more states on the device (slots=)"
            )
        written = piece.source
        if written.cancelled() or written.exception() is not None:
            return StoreError(f"offload: {state} is not there, since it could not be written: {error}")
        damaged = "is damaged" if isinstance(error, Damaged) else "cannot be read"
        return StoreError(
            f"offload: {written.result().path}, which holds (a part of) {state}, {damaged}: {error}. Nothing of it was "
            "used. Run the inner loop again; if this happens again, offload to another disk, or keep more states on "
            "the device (slots=)"
        )

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        try:
            if worker is not None:
                # the garbage collector may call this from the very thread
                worker.shutdown(wait=threading.get_ident() not in self._threads, cancel_futures=True)
        finally:
            self._files.close()


@dataclass(eq=False)
class File:
    """A file and what was written to it."""

    path: Path
    parts: list[tuple[int, int]]  # place and checksum of each
    nbytes: int
    used: int  # how many of its parts are needed still


class Files:
    """The files of one inner loop, in a temporary directory with a file ``lock``. Only its thread uses them.

    The lock is held as long as the process lives: what a killed process has left is what nobody has locked, and `clean`
    removes it. Where there are no such locks (on Windows, on some file systems) it stays.
    """

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self._directory: Path | None = None
        self._lock = -1
        self._closed = False

    def write(self, parts: Sequence[Tensor]) -> File:
        """A new file with ``parts``, tensors of bytes on the CPU; nothing of it stays if it cannot be written."""
        self._check_open()
        if self._directory is None:
            self._directory = self._made()
        path, at = self._directory / f"{next(_numbers)}.state", 0
        found: list[tuple[int, int]] = []
        try:
            with open(path, "xb") as file:
                for memory in map(_memory, parts):
                    found.append((at, zlib.crc32(memory)))
                    at += file.write(memory)
            self._check_open()
        except BaseException:
            _remove(path)
            raise
        return File(path, found, at, len(found))

    def _check_open(self) -> None:
        if self._closed:  # the garbage collector may do so in the middle of `write`
            raise OSError("the loop that the file was for has ended")

    def _made(self) -> Path:
        self.parent.mkdir(parents=True, exist_ok=True)
        clean(self.parent)
        while True:
            path = Path(tempfile.mkdtemp(prefix=f"metaoptim-{os.getpid()}-", dir=self.parent))
            self._lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR)
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
            if path.exists():
                return path
            os.close(self._lock)  # another process came in between, and has removed it

    def read(self, file: File, number: int, into: Tensor) -> None:
        """Fill ``into``, a tensor of bytes on the CPU, with a part of a file, or raise `Damaged` or an OSError."""
        at, checksum = file.parts[number]
        memory = _memory(into)
        with open(file.path, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != file.nbytes:
                raise Damaged(f"it has {size} bytes, expected {file.nbytes}")
            opened.seek(at)
            got = opened.readinto(memory)
        if got != len(memory):
            raise Damaged(f"it ends {len(memory) - got} bytes too early")
        if (found := zlib.crc32(memory)) != checksum:
            raise Damaged(f"the checksum of bytes {at} to {at + got} is {found:08x}, expected {checksum:08x}")

    def drop(self, file: File) -> None:
        """A part of a file is not needed any more."""
        file.used -= 1
        if not file.used:
            _remove(file.path)

    def close(self) -> None:
        """Remove all its files."""
        self._closed = True
        directory, self._directory = self._directory, None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(self._lock)


def _remove(path: Path) -> None:
    with suppress(OSError):  # `Files.close` tries again
        path.unlink(missing_ok=True)


def _memory(part: Tensor) -> memoryview:
    """The bytes of a tensor; they are its own."""
    return memoryview((ctypes.c_char * part.nbytes).from_address(part.data_ptr())).cast("B")


def clean(parent: Path) -> None:
    """Remove the directories in ``parent`` whose processes are gone."""
    if fcntl is None:
        return
    for path in parent.glob("metaoptim-*/lock"):
        with suppress(OSError), open(path, "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody has locked it
            shutil.rmtree(path.parent, ignore_errors=True)
