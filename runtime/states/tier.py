"""Where states go that have no slot on the device: memory of the host, or (`disk`) files."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaoptim.compiler.compat import disable_current_modes  # pyright: ignore[reportPrivateUsage]
from metaoptim.compiler.ir.tensors import memory_key
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.errors import StoreError

from .pieces import Index, Piece, View, taken_apart
from .slots import State

WRITING = 2  # states handed over to be written, at most


class Damaged(Exception):
    """What was written has not come back."""


class _Reading(NamedTuple):
    """A state on its way up."""

    position: int
    entries: list[Any]
    # a tensor that a piece is read into, and when that is done; or the storage that has its bytes, and from where on
    pieces: dict[Piece, tuple[Any, Future[Any] | int | None]]

    def stop(self) -> None:
        """Wait until nobody writes into its memory any more."""
        for _, future in self.pieces.values():
            if isinstance(future, Future) and not future.cancel():
                wait([future])


class Tier:
    """States by tape position, below the slots of the device. What they share is kept once.

    A state is written behind the back of the loop, and may be read ahead of it. Where it waits to be written, in files,
    its tensors are referred to, not copied: whoever changes one says so before (`overwritten`).

    This one is page-locked memory of the host, for a device that has a memory of its own: copies are asked of the
    device's current stream, in order with what else is, and the host does not wait for them. Another kind of tier
    defines where pieces go anew, the four methods at the end.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[Any]] = {}
        self._index = Index()
        self._writing: deque[tuple[int, Future[Any], list[Tensor]]] = deque()
        self._ahead: _Reading | None = None
        self._closed = ""  # why there is nothing here any more
        self._process = os.getpid()

    def save(self, position: int, state: State) -> None:
        """Keep a state; a `StoreError` is raised if an earlier one could not be written, or this one cannot be."""
        self._look()
        while len(self._writing) >= WRITING:
            self._written()
        with disable_current_modes(), unaffected():
            for t in state:
                if isinstance(t, Tensor) and t.layout is not torch.strided:
                    raise StoreError(
                        f"the state at position {position} of the inner loop holds a tensor of layout {t.layout}, of "
                        f"shape {tuple(t.shape)}; only dense tensors can be offloaded. Carry a dense one from step to "
                        "step, or leave offload= out"
                    )
            entries, new = taken_apart(state, self._index)
            if new:
                parts = [self._on_host(part) for _, part in new]
                devices = {part.device for _, part in new if part.device.type == "cuda"}
                copied = [torch.cuda.current_stream(d).record_event() for d in devices]
                future = self._put(parts, copied)
                self._writing.append((position, future, parts))
                for number, (piece, _) in enumerate(new):
                    piece.source, piece.number = future, number
        for piece in _pieces(entries):
            piece.users += 1
        self._kept[position] = entries

    def load(self, position: int) -> State:
        """A state that is kept; a `StoreError` is raised if it cannot be read, or is not what was written."""
        self._look()
        reading = self.prefetch(position)
        with disable_current_modes(), unaffected():
            found = {piece: self._arrived(piece, position, *of) for piece, of in reading.pieces.items()}
            state = [self._built(e, found) if isinstance(e, View) else e for e in reading.entries]
        self._ahead = None
        return state

    def prefetch(self, position: int) -> _Reading:
        """Begin to read a state; one at a time is read ahead."""
        if self._ahead is not None and self._ahead.position == position:
            return self._ahead
        self._look()
        self.rest()
        reading = self._ahead = _Reading(position, self._kept[position], {})
        with disable_current_modes(), unaffected():
            for piece in _pieces(reading.entries):
                storage = piece.at_hand()
                reading.pieces[piece] = self._get(piece) if storage is None else (storage, piece.begin)
        return reading

    def _arrived(self, piece: Piece, position: int, memory: Any, at: Any) -> tuple[Any, int]:
        """The storage that has a piece's bytes, and where they begin in it."""
        if not isinstance(memory, Tensor):
            return memory, at
        if at is not None:
            try:
                at.result()
            except (OSError, Damaged, CancelledError) as error:
                self.rest()
                raise self._failed(error, position, piece) from error
        return memory.to(piece.device, non_blocking=True).untyped_storage(), 0

    def _built(self, view: View, found: dict[Piece, tuple[Any, int]]) -> Tensor:
        if view.piece is None:
            return view.tensor(None, 0)
        t = view.tensor(*found[view.piece])
        self._index.add(view.piece, t, found[view.piece][1])
        return t

    def rest(self) -> None:
        """Nothing that was read ahead is needed."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.stop()

    def forget(self, positions: Iterable[int]) -> None:
        """States that are not needed any more."""
        for position in positions:
            if self._ahead is not None and self._ahead.position == position:
                self.rest()
            for piece in _pieces(self._kept.pop(position)):
                piece.users -= 1
                if not piece.users:
                    self._index.discard(piece)
                    self._remove(piece)

    def holds(self, storage: int) -> bool:
        """Whether a state that was brought back lies in ``storage``."""
        return self._index.holds(storage)

    def overwritten(self, storage: int) -> bool:
        """Have what is kept of ``storage`` written before somebody overwrites it; whether a state may lie in it."""
        self.rest()
        for _, future, parts in self._writing:
            if any(memory_key(part) == storage for part in parts):
                wait([future])
        return self._index.overwritten(storage)

    def settle(self) -> None:
        """Wait until all is written."""
        while self._writing:
            self._written()

    def close(self, why: str = "the window, or the call, that it was for has ended") -> None:
        """Remove everything: there will be nothing here any more, and ``why``."""
        if self._closed or os.getpid() != self._process:  # a fork's parent still needs it
            return
        self._closed = why
        try:
            self._end()
        finally:
            self._kept.clear()
            self._writing.clear()
            self._ahead = None

    def _look(self) -> None:
        """Raise if something has gone wrong."""
        if os.getpid() != self._process:
            raise StoreError(
                "an inner loop with offload= was gone on with in a forked process, which has none of its threads; run "
                "its backward in the process that ran its steps"
            )
        if self._closed:
            raise StoreError(
                f"the states that were offloaded are gone: {self._closed}; run the inner loop again"
            )
        while self._writing and self._writing[0][1].done():
            self._written()

    def _written(self) -> None:
        """Wait for the state that was handed over first."""
        position, future, _ = self._writing[0]
        wait([future])
        self._writing.popleft()
        error = CancelledError() if future.cancelled() else future.exception()
        if error is not None:
            raise self._failed(error, position, None) from error

    def _on_host(self, part: Tensor) -> Tensor:
        """Bytes of the device, on the host; a copy, since what lies there anyway (a counter, say) may be changed."""
        if part.device.type != "cuda":
            return part.clone() if part.device.type == "cpu" else part.cpu()
        host = torch.empty(part.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        return host.copy_(part, non_blocking=True)

    def _failed(self, error: BaseException, position: int, piece: Piece | None) -> StoreError:
        """What to raise when the state at ``position`` could not be written, or a piece of it not be read."""
        raise AssertionError("nothing is written behind the loop's back") from error

    # -- where pieces go -------------------------------------------------------------------------------------------

    def _put(self, parts: list[Tensor], copied: list[Any]) -> Future[Any]:
        """Keep ``parts``, tensors of bytes on the host; they are there when the events ``copied`` have happened."""
        kept: Future[Any] = Future()
        kept.set_result((list(parts), copied))
        return kept

    def _get(self, piece: Piece) -> tuple[Tensor, Future[Any] | None]:
        """The bytes of a piece, on the host; they are there when the future is."""
        parts, copied = piece.source.result()
        for event in copied:
            event.synchronize()
        return parts[piece.number], None

    def _remove(self, piece: Piece) -> None:
        """No state has ``piece`` any more."""
        piece.source.result()[0][piece.number] = None

    def _end(self) -> None:
        """Let go of everything."""


def _pieces(entries: Iterable[Any]) -> list[Piece]:
    return list(dict.fromkeys(e.piece for e in entries if isinstance(e, View) and e.piece is not None))
