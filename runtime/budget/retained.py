"""What a window's steps were given that nobody else holds, in bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.compiler.compat import storage_users
from metaoptim.compiler.ir.tensors import memory_bytes

from ..engine.inputs import Memory, Snapshot, Watch
from ..engine.noise import GENERATOR_BYTES


class _Kept:
    """What is held of one piece of memory.

    Attributes:
        memories: what refers to it, each by one tensor.
        sure: bytes of it that count.
        recent: bytes of it that count until the next step.
    """

    __slots__ = ("memories", "recent", "sure")

    def __init__(self, memory: Memory) -> None:
        self.memories = WeakSet([memory])
        self.sure = self.recent = 0

    def others(self, tensor: Tensor) -> int:
        """How many tensors of somebody else's refer to it, of which ``tensor`` is one of ours."""
        return storage_users(tensor.untyped_storage()._cdata) - 1 - len(self.memories)


class Retained:
    """Bytes of step inputs that only the window holds; copies, which are the window's anyway, are counted elsewhere.

    What somebody else refers to when a step is taken may be dropped later. It is looked at again when the tensor that
    the user has had dies, and less and less often until then, for views of it may live on. What this step was given
    counts until the next.

    Args:
        let_go: memory to look at; see `Ledger`.
    """

    def __init__(self, let_go: deque[Watch]) -> None:
        self._sure = self._recent = 0
        self._step = 0
        self._let_go = let_go
        self._memories: dict[int, _Kept] = {}
        # step -> what to look at, and for how many steps nobody has looked
        self._due: dict[int, list[tuple[int, _Kept, int]]] = {}
        self._sparse = WeakIdKeyDictionary()

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return self._sure + self._recent

    def take(self, inputs: Sequence[Any]) -> None:
        """A step reads ``inputs``."""
        self._step += 1
        self._recent = 0
        self.look()
        for key, kept, age in self._due.pop(self._step, ()):
            self._look(key, kept, age)
        for held in inputs:
            if not isinstance(held, Snapshot):
                self._sure += 0 if held.k else GENERATOR_BYTES  # from which all of the step's are drawn again
                continue
            if held.private:
                continue
            tensor = held.memory.tensor
            if tensor.layout is not torch.strided:
                self._take_sparse(tensor)
                continue
            key = tensor.untyped_storage()._cdata
            kept = self._memories.get(key)
            if kept is not None and not kept.memories:  # other memory in the same place
                self._forget(key, kept)
                kept = None
            if kept is None:
                kept = self._memories[key] = _Kept(held.memory)
                self._look(key, kept, 1)
            else:
                kept.memories.add(held.memory)

    def look(self) -> None:
        """Look at what seems to have been dropped."""
        while self._let_go:
            key = self._let_go.popleft().key
            if (kept := self._memories.get(key)) is not None:
                self._look(key, kept)

    def _look(self, key: int, kept: _Kept, age: int = 0) -> None:
        if self._memories.get(key) is not kept:
            return
        memory = next(iter(kept.memories), None)
        if memory is None:
            self._forget(key, kept)
            return
        if kept.sure:
            return
        size, others = memory.tensor.untyped_storage().nbytes(), kept.others(memory.tensor)
        if not others:
            kept.sure = size
            self._sure += size
            if kept.recent == self._step:
                self._recent -= size
        elif age:
            if age == 1 and others == 1:  # a variable, perhaps, about to be bound to something else
                kept.recent = self._step
                self._recent += size
            self._due.setdefault(self._step + age, []).append((key, kept, 2 * age))

    def _forget(self, key: int, kept: _Kept) -> None:
        """No step holds it any more, or it was overwritten, and there are copies."""
        self._sure -= kept.sure
        del self._memories[key]

    def _take_sparse(self, tensor: Tensor) -> None:
        """Nobody can tell who refers to the parts of it."""
        if tensor not in self._sparse:
            self._sparse[tensor] = True
            self._sure += memory_bytes(tensor)
