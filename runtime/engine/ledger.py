"""Bytes of what a window holds for its steps: copies, and what nobody else holds any more."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.compiler.compat import storage_users
from metaoptim.compiler.ir.tensors import memory_bytes

from .noise import GENERATOR_BYTES, Redrawn

_LOOKS = 8  # at memory that may be nobody else's, at each step


class Memory:
    """What refers to a piece of memory for all that is held of it: a tensor of our own, not the user's object."""

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Kept:
    """What is held of one piece of memory."""

    __slots__ = ("memories", "recent", "sure")

    def __init__(self, memory: Memory) -> None:
        self.memories = weakref.WeakSet([memory])  # what refers to it, each by one tensor
        self.sure = 0  # bytes of it that count
        self.recent = -1  # the step until the end of which it counts anyway


class Ledger:
    """Bytes that only the window holds for its steps; weakly, for objects may die at any moment and in any thread.

    What somebody else refers to when a step is taken may be dropped later: it is looked at when the user's tensor dies,
    and, since views of it may live on, at later steps until it is nobody else's. What one variable of the user's refers
    to counts until the next step, since that is about to be bound to something else. Nothing is noted unless it is
    ``counted``.
    """

    def __init__(self, counted: bool) -> None:
        self.counted = counted
        # memory that the user seems to have dropped, or has overwritten
        self._let_go: deque[weakref.KeyedRef[int, Tensor]] = deque()
        self._watches: dict[int, weakref.KeyedRef[int, Tensor]] = {}
        self._copied = 0
        self._dead: deque[int] = deque()  # bytes of copies that are forgotten
        self.restart()

    def restart(self) -> None:
        """Forget what steps have read, to `take` it again."""
        self._sure = self._recent = self._step = 0
        self._memories: dict[int, _Kept] = {}
        self._shared: deque[int] = deque()  # keys of memory to look at again
        self._sparse = WeakIdKeyDictionary()

    # -- what inputs tell ------------------------------------------------------------------------------------------

    def watch(self, tensor: Tensor, key: int) -> None:
        """Look out for the death of the tensor that the user has: ``tensor`` may be a view made for a moment."""
        if self.counted:
            base = tensor._base
            own = tensor if base is None else base
            self._watches[key] = weakref.KeyedRef(own, self._let_go.append, key)

    def overwritten(self, key: int) -> None:
        """There are copies of all that was held of this memory."""
        if (watch := self._watches.pop(key, None)) is not None:
            self._let_go.append(watch)

    def watch_only(self, keys: Container[int]) -> None:
        """Of other memory nothing is held any more."""
        self._watches = {k: w for k, w in self._watches.items() if k in keys}
        for key in [k for k, kept in self._memories.items() if not kept.memories]:
            self._forget(key)

    def add(self, copy: Memory) -> None:
        """A copy was made."""
        if self.counted:
            size = memory_bytes(copy.tensor)
            self._copied += size
            weakref.finalize(copy, self._dead.append, size).atexit = False

    # -- what a budget asks ----------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Bytes in all; of copies also those that no step has read yet, and none that are forgotten."""
        while self._dead:
            self._copied -= self._dead.popleft()
        return self._sure + self._recent + self._copied

    def take(self, inputs: Iterable[Any]) -> None:
        """A step reads ``inputs``."""
        self._step += 1
        self._recent = 0
        self.look()
        for held in inputs:
            if isinstance(held, Redrawn):
                self._sure += 0 if held.k else GENERATOR_BYTES  # from which all of the step's are drawn again
            elif not held.private:
                self._take(held.memory)

    def _take(self, memory: Memory) -> None:
        tensor = memory.tensor
        if tensor.layout is not torch.strided:
            if tensor not in self._sparse:  # nobody can tell who refers to the parts of it
                self._sparse[tensor] = True
                self._sure += memory_bytes(tensor)
            return
        key = tensor.untyped_storage()._cdata
        kept = self._memories.get(key)
        if kept is not None and not kept.memories:  # other memory in the same place
            self._forget(key)
            kept = None
        if kept is not None:
            kept.memories.add(memory)
            return
        kept = self._memories[key] = _Kept(memory)
        others, watch = self._look(key), self._watches.get(key)
        if others == 1:
            kept.recent = self._step
            self._recent += memory_bytes(tensor)
        if others and (watch is None or watch() is None):
            self._shared.append(key)

    def look(self) -> None:
        """Look at what seems to have been dropped, and at some of what was when others referred to it still."""
        again = [self._shared.popleft() for _ in range(min(_LOOKS, len(self._shared)))]
        while self._let_go:
            again.append(self._let_go.popleft().key)
        self._shared += [key for key in again if self._look(key)]

    def _look(self, key: int) -> int:
        """Count a piece of memory if it is nobody else's; how many tensors of somebody else's refer to it, if any."""
        kept = self._memories.get(key)
        memory = None if kept is None else next(iter(kept.memories), None)
        if kept is None or kept.sure or memory is None:
            if kept is not None and memory is None:  # no step holds it any more, or there are copies
                self._forget(key)
            return 0
        others = storage_users(key) - 1 - len(kept.memories)
        if not others:
            kept.sure = memory_bytes(memory.tensor)
            self._sure += kept.sure
            if kept.recent == self._step:
                self._recent -= kept.sure
        return others

    def _forget(self, key: int) -> None:
        self._sure -= self._memories.pop(key).sure
