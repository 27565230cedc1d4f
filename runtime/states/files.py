"""Files that hold states: a directory for each inner loop, a file for each state, checked when it is read."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

_CHUNK = 16 << 20  # bytes that are written, or read, and digested at a time
_numbers = itertools.count()


class Damaged(Exception):
    """A file does not hold what was written to it."""


@dataclass(eq=False)
class File:
    """A file and what was written to it.

    Attributes:
        path: where it is.
        parts: place, size and checksum of each of its parts.
        nbytes: its size.
        used: how many of its parts are needed still.
    """

    path: Path
    parts: list[tuple[int, int, int]]
    nbytes: int
    used: int


class Files:
    """The files of one inner loop, in a directory of their own. All but `close` is called from one thread.

    Args:
        parent: where the directory will be.
    """

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self._directory: _Directory | None = None
        self._guard = threading.RLock()  # the garbage collector may call `close` in the middle of `write`
        self._closed = False

    def write(self, parts: Sequence[Tensor]) -> File:
        """A new file with ``parts``, tensors of bytes on the CPU.

        Raises:
            OSError: if it cannot be written; nothing of it stays.
        """
        with self._guard:
            self._check_open()
            if self._directory is None:
                self._directory = _Directory(self.parent)
            path = self._directory.path / f"{next(_numbers)}.state"
        at, found = 0, []
        try:
            with open(path, "xb", buffering=0) as file:
                for part in parts:
                    found.append((at, part.nbytes, _write(file, _memory(part))))
                    at += part.nbytes
            self._check_open()
        except BaseException:
            _remove(path)
            raise
        return File(path, found, at, len(found))

    def _check_open(self) -> None:
        if self._closed:
            raise OSError("the loop that the file was for has ended")

    def read(self, file: File, number: int, into: Tensor) -> None:
        """Fill ``into``, a tensor of bytes on the CPU, with a part of a file.

        Raises:
            Damaged: if the file is shorter than it was, or the checksum of the part is another one.
            OSError: if it cannot be read.
        """
        at, _, checksum = file.parts[number]
        with open(file.path, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != file.nbytes:
                raise Damaged(f"it has {size} bytes, expected {file.nbytes}")
            opened.seek(at)
            found = _read(opened, _memory(into))
        if found != checksum:
            raise Damaged(
                f"the checksum of bytes {at} to {at + into.nbytes} is {found:08x}, expected {checksum:08x}"
            )

    def drop(self, file: File) -> None:
        """A part of a file is not needed any more."""
        file.used -= 1
        if not file.used:
            _remove(file.path)

    def close(self) -> None:
        """Remove all its files."""
        with self._guard:
            self._closed = True
            if self._directory is not None:
                self._directory.remove()
                self._directory = None


def _remove(path: Path) -> None:
    with suppress(OSError):  # `Files.close` tries again
        path.unlink(missing_ok=True)


def _memory(part: Tensor) -> memoryview:
    """The bytes of a tensor; they are its own."""
    return memoryview((ctypes.c_char * part.nbytes).from_address(part.data_ptr())).cast("B")


def _write(file: Any, memory: memoryview) -> int:
    """Write all of ``memory``; its checksum."""
    checksum = 0
    for at in range(0, len(memory), _CHUNK):
        rest = memory[at : at + _CHUNK]
        checksum = zlib.crc32(rest, checksum)
        while rest:
            rest = rest[file.write(rest) :]
    return checksum


def _read(file: Any, memory: memoryview) -> int:
    """Fill ``memory``; its checksum."""
    checksum = 0
    for at in range(0, len(memory), _CHUNK):
        chunk = rest = memory[at : at + _CHUNK]
        while rest:
            got = file.readinto(rest)
            if not got:
                raise Damaged(f"it ends {len(rest)} bytes too early")
            rest = rest[got:]
        checksum = zlib.crc32(chunk, checksum)
    return checksum


# -- directories -------------------------------------------------------------------------------------------------------


class _Directory:
    """A temporary directory with a file ``lock`` that is locked as long as the process lives.

    What a killed process has left is what nobody has locked: `clean` removes it. Where there are no such locks (on
    Windows, on some file systems) it stays.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        clean(parent)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f"metaoptim-{os.getpid()}-", dir=parent))
            self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR)
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self.path.exists():
                return
            os.close(self._lock)  # another process came in between, and has removed it

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def clean(parent: Path) -> None:
    """Remove the directories in ``parent`` whose processes are gone."""
    if fcntl is None:
        return
    for path in parent.glob("metaoptim-*/lock"):
        with suppress(OSError), open(path, "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody has locked it
            shutil.rmtree(path.parent, ignore_errors=True)
