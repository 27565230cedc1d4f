"""Which leaves were read where no gradient flows (under no_grad, through detach), for the user to be told."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .recording import tensors_in


class Taint:
    """Leaves by the memory that depends on them.

    Attributes:
        of_storage: storage -> (its weak reference, weak references to the leaves by their ids).
    """

    def __init__(self) -> None:
        self.of_storage: dict[int, tuple[StorageWeakRef, dict[int, weakref.ref[Tensor]]]] = {}

    def note(self, args: Iterable, out: Any, theta: Container[int]) -> None:
        """``out`` was computed from ``args`` where no gradient flows; ``theta``: ids of leaves that do not count."""
        leaves: dict[int, weakref.ref[Tensor]] = {}
        for t in tensors_in(args):
            if t.requires_grad and t.is_leaf and id(t) not in theta:
                leaves[id(t)] = weakref.ref(t)
            elif self.of_storage:
                leaves.update(self.of(t))
        if leaves:
            for t in tensors_in(out if isinstance(out, (list, tuple)) else (out,)):
                storage = t.untyped_storage()
                self.of_storage[storage._cdata] = (StorageWeakRef(storage), {**self.of(t), **leaves})

    def of(self, t: Tensor) -> dict[int, weakref.ref[Tensor]]:
        """The leaves that were read into ``t``."""
        found = self.of_storage.get(t.untyped_storage()._cdata)
        return {} if found is None or found[0].expired() else found[1]
