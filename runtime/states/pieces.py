"""A state taken apart into pieces of memory, and put together again: what tensors share is one piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import TensorWeakRef

from metaoptim.compiler.ir.tensors import memory_key

_ALIGNED = 64  # bytes; a piece begins at such a place, so that a view in it is aligned as it was


class Piece:
    """A stretch of memory that states in a lower tier consist of."""

    __slots__ = ("begin", "device", "nbytes", "number", "source", "storage", "tensor", "users")

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.device = nbytes, device
        self.users = 0  # how many of the states kept have it
        # what the tier keeps it in, once that is written, and its place in there
        self.source: Future[Any] = Future()
        self.number = 0
        # one of the tape's that lies in it: as long as it lives nobody changes its memory unheard; the address of the
        # storage, and the byte where the piece begins
        self.tensor: TensorWeakRef | None = None
        self.storage = self.begin = 0

    def at_hand(self) -> UntypedStorage | None:
        """The storage that has its bytes, if the tape has it still."""
        tensor = None if self.tensor is None else self.tensor()
        return None if tensor is None else tensor.untyped_storage()


class View(NamedTuple):
    """A tensor as a view of a piece; ``offset`` is in bytes."""

    piece: Piece | None  # None for a tensor without entries
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    conjugate: bool
    negative: bool

    def tensor(self, storage: UntypedStorage | None, begin: int) -> Tensor:
        """The tensor, its piece being found in ``storage`` from byte ``begin`` on."""
        if storage is None:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        t = torch.empty(0, dtype=self.dtype, device=self.device)
        t.set_(storage, (begin + self.offset) // t.element_size(), self.shape, self.stride)  # type: ignore[call-overload]
        t = t.conj() if self.conjugate else t
        return torch.ops.aten._neg_view.default(t) if self.negative else t


class Index:
    """Which pieces' bytes lie in which memory, so that nothing is written or read twice."""

    def __init__(self) -> None:
        self._at: dict[int, dict[tuple[int, int], Piece]] = {}  # storage -> (begin, end) -> piece

    def find(self, storage: int, begin: int, end: int) -> Piece | None:
        """The piece that has these bytes of ``storage``."""
        piece = self._at.get(storage, {}).get((begin, end))
        # a piece that no state has any more is being removed
        return piece if piece is not None and piece.users and piece.at_hand() is not None else None

    def add(self, piece: Piece, tensor: Tensor, begin: int) -> None:
        """The bytes of ``piece`` lie in the storage of ``tensor``, from ``begin`` on."""
        self.discard(piece)
        piece.tensor, piece.begin, piece.storage = TensorWeakRef(tensor), begin, memory_key(tensor)
        self._at.setdefault(piece.storage, {})[begin, begin + piece.nbytes] = piece

    def discard(self, piece: Piece) -> None:
        """Forget where the bytes of ``piece`` are."""
        at, span = self._at.get(piece.storage, {}), (piece.begin, piece.begin + piece.nbytes)
        # another storage may have come to that address
        if piece.tensor is not None and at.get(span) is piece:
            del at[span]
            if not at:
                del self._at[piece.storage]
        piece.tensor = None

    def holds(self, storage: int) -> bool:
        """Whether there is a tensor of the tape in ``storage``."""
        return any(piece.at_hand() is not None for piece in self._at.get(storage, {}).values())

    def overwritten(self, storage: int) -> bool:
        """``storage`` is about to have other bytes; whether there may be a piece in it."""
        found = self._at.pop(storage, {})
        for piece in found.values():
            piece.tensor = None
        return bool(found)


def taken_apart(state: Sequence[Any], index: Index) -> tuple[list[Any], list[tuple[Piece, Tensor]]]:
    """A state as views of pieces, and the pieces that are new to ``index``, with their bytes in the state's memory."""
    new: list[tuple[Piece, Tensor]] = []
    pieces: dict[int, list[tuple[int, int, Piece]]] = {}  # storage -> begin, end and piece
    for storage, begin, end, tensor in _stretches(t for t in state if isinstance(t, Tensor) and t.numel()):
        piece = index.find(storage, begin, end)
        if piece is None:
            piece = Piece(end - begin, tensor.device)
            index.add(piece, tensor, begin)
            memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            memory.set_(tensor.untyped_storage(), begin, (piece.nbytes,), (1,))  # type: ignore[call-overload]
            new.append((piece, memory))
        pieces.setdefault(storage, []).append((begin, end, piece))

    def entry(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        meta = t.dtype, tuple(t.shape), t.stride(), t.device, t.is_conj(), t.is_neg()
        if not t.numel():
            return View(None, 0, *meta)
        at = int(t.storage_offset()) * t.element_size()
        begin, piece = next(
            (begin, piece) for begin, end, piece in pieces[memory_key(t)] if begin <= at < end
        )
        return View(piece, at - begin, *meta)

    return [entry(t) for t in state], new


def _stretches(tensors: Iterable[Tensor]) -> list[tuple[int, int, int, Tensor]]:
    """Storage, begin, end and a tensor of each stretch of memory that tensors cover; those that overlap are one."""
    found: list[tuple[int, int, int, Tensor]] = []
    for t in tensors:
        size, first = t.element_size(), int(t.storage_offset()) * t.element_size()
        last = sum((int(n) - 1) * int(stride) for n, stride in zip(t.shape, t.stride(), strict=True))
        found.append((memory_key(t), first - first % _ALIGNED, first + (last + 1) * size, t))
    merged: list[tuple[int, int, int, Tensor]] = []
    for storage, begin, end, t in sorted(found, key=lambda s: s[:2]):
        if merged and merged[-1][0] == storage and begin < merged[-1][2]:
            _, begin, before, t = merged.pop()
            end = max(before, end)
        merged.append((storage, begin, end, t))
    return merged
