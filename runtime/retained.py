"""What a window's steps were given that nobody else holds, in bytes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .inputs import Held, Memory
from .noise import GENERATOR_BYTES


class _Kept:
    """What is held of one piece of memory.

    Attributes:
        memories: ids of what refers to it, each by one tensor.
        last: the one that came last, weakly.
    """

    __slots__ = ("last", "memories")

    def __init__(self) -> None:
        self.memories: set[int] = set()
        self.last: Any = None

    def add(self, memory: Memory) -> None:
        self.memories.add(id(memory))
        self.last = weakref.ref(memory)

    def others(self, tensor: Tensor) -> int:
        """How many tensors of somebody else's refer to it, of which ``tensor`` is one of ours."""
        return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1 - len(self.memories)


class Retained:
    """Bytes of step inputs that only the window holds.

    What somebody else refers to when a step is taken may be dropped later (the variable of a loop), so it is looked at
    again, less and less often. What this step was given counts until it is.
    """

    def __init__(self) -> None:
        self._sure = self._recent = 0
        self._step = 0
        self._memories: dict[int, _Kept | int] = {}  # bytes: they are counted
        self._due: dict[
            int, list[tuple[int, int]]
        ] = {}  # step -> (memory, steps since it was last looked at)

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return self._sure + self._recent

    def take(self, inputs: Sequence[Any]) -> None:
        """A step reads ``inputs``."""
        self._step += 1
        self._recent = 0
        for key, age in self._due.pop(self._step, ()):
            self._look(key, age)
        for held in inputs:
            if not isinstance(held, Held):
                self._sure += 0 if held.k else GENERATOR_BYTES  # from which all of the step's are drawn again
                continue
            tensor = held.memory.tensor
            if tensor.layout is not torch.strided:
                self._sure += tensor.nbytes
                continue
            key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
            kept = self._memories.get(key)
            if isinstance(kept, int):  # in a sliding window, it may be other memory in the same place
                self._sure += size - kept
                self._memories[key] = size
            elif kept is None:
                self._memories[key] = kept = _Kept()
                kept.add(held.memory)
                self._look(key, 1)
            else:
                kept.add(held.memory)

    def keep(self, values: Sequence[Tensor]) -> None:
        """These are the window's own."""
        self._sure += sum(v.nbytes for v in values)

    def _look(self, key: int, age: int) -> None:
        kept = self._memories.get(key)
        if not isinstance(kept, _Kept):
            return
        memory = kept.last()
        if memory is None:  # forgotten
            del self._memories[key]
            return
        size, others = memory.tensor.untyped_storage().nbytes(), kept.others(memory.tensor)
        if not others:
            self._memories[key] = size
            self._sure += size
        else:  # a single other one may be a variable, about to be bound to something else
            self._recent += size if age == 1 and others == 1 else 0
            self._due.setdefault(self._step + age, []).append((key, 2 * age))
