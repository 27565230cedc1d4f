"""A state taken apart into pieces of memory, and put together again: what tensors share is one piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import TensorWeakRef

_ALIGNED = 64  # bytes; a piece begins at such a place, so that a view in it is aligned as it was


class Piece:
    """A stretch of memory that states in a lower tier consist of.

    Attributes:
        nbytes: its size.
        device: where it belongs.
        users: how many of the states kept have it.
        source: what the backend keeps it in, once that is written, and ``number``, its place in there.
        tensor: one of the tape's that lies in it; as long as it lives nobody changes its memory unheard.
        storage: the address of its storage. ``begin``: the byte of it where the piece begins.
    """

    __slots__ = ("begin", "device", "nbytes", "number", "source", "storage", "tensor", "users")

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.device = nbytes, device
        self.users = 0
        self.source: Future[Any] | None = None
        self.number = -1
        self.tensor: TensorWeakRef | None = None
        self.begin = self.storage = 0

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

    def find(self, storage: UntypedStorage, begin: int, end: int) -> Piece | None:
        """The piece that has these bytes of ``storage``."""
        piece = self._at.get(storage._cdata, {}).get((begin, end))
        # a piece that no state has any more is being removed
        return piece if piece is not None and piece.users and piece.at_hand() is not None else None

    def add(self, piece: Piece, tensor: Tensor, begin: int) -> None:
        """The bytes of ``piece`` lie in the storage of ``tensor``, from ``begin`` on."""
        self.discard(piece)
        piece.tensor, piece.begin, piece.storage = (
            TensorWeakRef(tensor),
            begin,
            tensor.untyped_storage()._cdata,
        )
        self._at.setdefault(piece.storage, {})[begin, begin + piece.nbytes] = piece

    def discard(self, piece: Piece) -> None:
        """Forget where the bytes of ``piece`` are."""
        at = self._at.get(piece.storage, {})
        span = piece.begin, piece.begin + piece.nbytes
        if (
            piece.tensor is not None and at.get(span) is piece
        ):  # another storage may have come to that address
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
    """A state as views of pieces.

    Args:
        state: tensors; whatever else it holds is kept as it is.
        index: of the pieces there are.

    Returns:
        The entries, each a `View` or what is no tensor; and the pieces that are new, with their bytes (which share the
        state's memory).
    """
    tensors = [t for t in state if isinstance(t, Tensor) and t.numel()]
    found = {span: index.find(span.storage, span.begin, span.end) for span in _spans(tensors)}
    new: list[tuple[Piece, Tensor]] = []
    for span, piece in found.items():
        if piece is None:
            device = torch.device(span.storage.device)
            piece = found[span] = Piece(span.end - span.begin, device)
            index.add(piece, span.tensor, span.begin)
            memory = torch.empty(0, dtype=torch.uint8, device=device)
            memory.set_(span.storage, span.begin, (piece.nbytes,), (1,))  # type: ignore[call-overload]
            new.append((piece, memory))
    by_storage: dict[int, list[Any]] = {}
    for span, piece in found.items():
        by_storage.setdefault(span.storage._cdata, []).append((span, piece))

    def entry(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        meta = t.dtype, tuple(t.shape), t.stride(), t.device, t.is_conj(), t.is_neg()
        if not t.numel():
            return View(None, 0, *meta)
        begin = t.storage_offset() * t.element_size()
        where = by_storage[t.untyped_storage()._cdata]
        span, piece = next((s, p) for s, p in where if s.begin <= begin < s.end)
        return View(piece, begin - span.begin, *meta)

    return [entry(t) for t in state], new


class _Span:
    """Bytes of a storage, of which ``tensor`` is a view."""

    __slots__ = ("begin", "end", "storage", "tensor")

    def __init__(self, tensor: Tensor, begin: int, end: int) -> None:
        self.tensor, self.storage = tensor, tensor.untyped_storage()
        self.begin, self.end = begin, end


def _spans(tensors: Iterable[Tensor]) -> list[_Span]:
    """The stretches of memory that tensors cover; those that overlap are one."""
    found = []
    for t in tensors:
        size, first = t.element_size(), int(t.storage_offset()) * t.element_size()
        last = sum((int(n) - 1) * int(stride) for n, stride in zip(t.shape, t.stride(), strict=True))
        begin = first - first % _ALIGNED
        found.append(_Span(t, begin, first + (last + 1) * size))
    found.sort(key=lambda s: (s.storage._cdata, s.begin))
    merged: list[_Span] = []
    for s in found:
        if merged and merged[-1].storage._cdata == s.storage._cdata and s.begin < merged[-1].end:
            merged[-1].end = max(merged[-1].end, s.end)
        else:
            merged.append(s)
    return merged
