"""Tables of what may die: of objects, and of what is known of memory.

Dead entries are dropped when a table has grown to twice what was left of it the last time. The tables of `weakref` run
Python code for each object that dies, which every step of a window would pay for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .tensors import memory_key

T = TypeVar("T")
_FEW = 4


class WeakTable(Generic[T]):
    """Keys -> objects, for as long as the objects live."""

    __slots__ = ("_at", "_sweep_at")

    def __init__(self) -> None:
        self._at: dict[int, weakref.ref[T]] = {}
        self._sweep_at = _FEW

    def __setitem__(self, key: int, value: T) -> None:
        at = self._at
        if len(at) >= self._sweep_at:
            at = self._at = {k: ref for k, ref in at.items() if ref() is not None}
            self._sweep_at = max(_FEW, 2 * len(at))
        at[key] = weakref.ref(value)

    def add(self, value: T) -> None:
        """Enter an object under its id."""
        self[id(value)] = value

    def get(self, key: int) -> T | None:
        """The object, if it lives."""
        ref = self._at.get(key)
        return None if ref is None else ref()

    def pop(self, key: int) -> T | None:
        """The same, and forget it."""
        ref = self._at.pop(key, None)
        return None if ref is None else ref()

    def __iter__(self) -> Iterator[T]:
        """The objects that live."""
        return iter([value for ref in self._at.values() if (value := ref()) is not None])

    def __len__(self) -> int:
        return sum(ref() is not None for ref in self._at.values())

    def clear(self) -> None:
        """Forget everything."""
        self._at.clear()


class ByStorage(Generic[T]):
    """The memory of a tensor -> what is known of it, for as long as the memory lives.

    An address alone does not tell one piece of memory from the next that lies there. As long as a weak reference to a
    storage is held, its address is not used again, so what is found for a tensor is of its own memory.
    """

    __slots__ = ("_at", "_sweep_at")

    def __init__(self) -> None:
        self._at: dict[int, tuple[StorageWeakRef, T]] = {}
        self._sweep_at = _FEW

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, t: Tensor) -> bool:
        return self.get(t) is not None

    def get(self, t: Tensor) -> T | None:
        """What is known of the memory of ``t``."""
        found = self._at.get(memory_key(t)) if t.layout is torch.strided else None
        return None if found is None else found[1]

    def __setitem__(self, t: Tensor, value: T) -> None:
        at = memory_key(t)
        known = self._at.get(at)
        if known is None and len(self._at) >= self._sweep_at:
            self._at = {k: found for k, found in self._at.items() if not found[0].expired()}
            self._sweep_at = max(_FEW, 2 * len(self._at))
        self._at[at] = (StorageWeakRef(t.untyped_storage()) if known is None else known[0], value)

    def clear(self) -> None:
        """Forget everything."""
        self._at.clear()
