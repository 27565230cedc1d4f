"""Files that hold states: a folder for each process, a file for each state, checked when it is read."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

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
    """The files of one inner loop. All but `close` is called from one thread.

    Args:
        parent: the directory in which this process will have its folder.
    """

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self._folder: Folder | None = None
        self._files: set[Path] = set()
        self._lock = (
            threading.RLock()
        )  # the garbage collector may call `close` of one while another is in here
        self._closed = False

    def write(self, parts: Sequence[Tensor]) -> File:
        """A new file with ``parts``, tensors of bytes on the CPU.

        Raises:
            OSError: if it cannot be written; nothing of it stays.
        """
        with self._lock:  # not after `close` has looked which files there are
            if self._closed:
                raise OSError("the loop that the file was for has ended")
            if self._folder is None:
                self._folder = Folder.of(self.parent)
            path = self._folder.path / f"{next(_numbers)}.state"
            self._files.add(path)
        at, found = 0, []
        try:
            with open(path, "xb", buffering=0) as file:
                for part in parts:
                    found.append((at, part.nbytes, _write(file, _memory(part))))
                    at += part.nbytes
            if self._closed:
                raise OSError("the loop that the file was for has ended")
        except BaseException:
            self._remove(path)
            raise
        return File(path, found, at, len(found))

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
            self._remove(file.path)

    def close(self) -> None:
        """Remove all its files, and the process's folder if nobody else has files there."""
        with self._lock:
            self._closed = True
            for path in list(self._files):
                self._remove(path)
            if self._folder is not None:
                self._folder.leave()
                self._folder = None

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return  # `Folder.leave` or the next process to come tries again
        self._files.discard(path)


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


# -- folders of processes ----------------------------------------------------------------------------------------------


class Folder:
    """The folder of this process in a directory: there as long as somebody has files in it."""

    _all: ClassVar[dict[tuple[Path, int], Folder]] = {}
    _lock = threading.RLock()

    def __init__(self, parent: Path) -> None:
        self.parent, self.process, self.users = parent, os.getpid(), 0
        parent.mkdir(parents=True, exist_ok=True)
        clean(parent)
        prefix = f"metaoptim-{_machine()}-{self.process}-{began(self.process)}-"
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))

    @classmethod
    def of(cls, parent: Path) -> Folder:
        """That of the calling process, made if it has none; `leave` it in the end."""
        key = parent, os.getpid()  # a fork has one of its own
        with cls._lock:
            folder = cls._all.get(key)
            if folder is None:
                folder = cls._all[key] = cls(parent)
            folder.users += 1
            return folder

    def leave(self) -> None:
        """Say that one of its users has removed their files."""
        with Folder._lock:
            self.users -= 1
            if not self.users:
                Folder._all.pop((self.parent, self.process), None)
                shutil.rmtree(self.path, ignore_errors=True)


def clean(parent: Path) -> None:
    """Remove what processes of this machine that are gone have left in ``parent``."""
    for path in parent.glob(f"metaoptim-{_machine()}-*-*-*"):
        found = re.fullmatch(r"(\d+)-(\d+)-\w+", path.name.removeprefix(f"metaoptim-{_machine()}-"))
        if found is None:
            continue
        now = began(int(found[1]))
        if now < 0 or (now and now != int(found[2])):
            shutil.rmtree(path, ignore_errors=True)


def began(process: int) -> int:
    """When a process began, in clock ticks since the machine did; -1 if there is none, 0 where that is not known."""
    if os.name != "posix":
        return 0
    try:
        if not Path("/proc/self/stat").exists():
            os.kill(process, 0)  # asks whether there is one
            return 0
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except PermissionError:
        return 0
    except OSError:
        return -1
    return -1 if state in "ZX" else int(fields[18])


def _machine() -> str:
    """What numbers of processes refer to: the machine, and the namespace in it that containers have of their own."""
    try:
        space = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        space = "0"
    return re.sub(r"[^\w.]", "_", platform.node()) + f".{space}"
