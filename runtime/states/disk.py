"""States in files, written and read by a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaoptim.errors import StoreError

from .files import Damaged, File, Files
from .pieces import Piece
from .tier import Tier


class DiskTier(Tier):
    """A lower tier in files.

    Args:
        directory: where the directory of its files will be.
    """

    kind = "disk"

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self._files = Files(directory)
        self._worker: ThreadPoolExecutor | None = None
        self._threads: list[int] = []  # its only one

    def _submit(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._worker is None:
            threads = self._threads  # the thread must not keep the tier alive
            self._worker = ThreadPoolExecutor(
                1, "metaoptim-disk", lambda: threads.append(threading.get_ident())
            )
        return self._worker.submit(job, self._files, *arguments)

    def _put(self, parts: list[Tensor], copied: list[Any]) -> Future[Any]:
        return self._submit(_write, list(parts), copied)

    def _get(self, piece: Piece) -> tuple[Tensor, Future[Any]]:
        memory = torch.empty(
            piece.nbytes, dtype=torch.uint8, device="cpu", pin_memory=piece.device.type == "cuda"
        )
        into = [memory]
        reading = self._submit(_read, piece.source, piece.number, into)
        reading.add_done_callback(
            lambda _: into.clear()
        )  # at once, if it is cancelled: its turn may be far off
        return memory, reading

    def _remove(self, piece: Piece) -> None:
        self._submit(_drop, piece.source)

    def _failed(self, error: BaseException, position: int, piece: Piece | None) -> StoreError:
        state = f"the state at position {position} of the inner loop"
        if piece is None:
            return StoreError(
                f"offload: {state} could not be written to {self.directory}: {error}. Make room there, name another "
                "directory (offload='/a/path'), or keep more states on the device (slots=)"
            )
        written = piece.source
        if written is None or written.cancelled() or written.exception() is not None:
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


# What the thread does. It lets go of tensors before the caller learns that it is done, so that it is never the last to
# have them: memory is given back where it was taken.


def _write(files: Files, parts: list[Tensor], copied: list[Any]) -> File:
    try:
        for event in copied:
            event.synchronize()
        return files.write(parts)
    finally:
        parts.clear()


def _read(files: Files, written: Future[File], number: int, into: list[Tensor]) -> None:
    try:
        files.read(written.result(), number, into[0])
    finally:
        into.clear()


def _drop(files: Files, written: Future[File]) -> None:
    files.drop(written.result())
