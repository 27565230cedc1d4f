"""Which leaves were read where no gradient flows (under no_grad, through detach), for the user to be told."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor

from ...ir.tensors import ByStorage
from .recording import tensors_in

Leaves = dict[int, weakref.ref[Tensor]]


def _both(a: Leaves, b: Leaves) -> Leaves:
    if a is b or not b:
        return a
    return {k: ref for k, ref in (*a.items(), *b.items()) if ref() is not None} if a else b


class Taint:
    """Leaves by the memory that depends on them.

    Attributes:
        of_storage: memory -> weak references to the leaves by their ids, shared by all that has just these.
    """

    def __init__(self) -> None:
        self.of_storage: ByStorage[Leaves] = ByStorage()

    def note(self, args: Iterable, out: Any, theta: Container[int]) -> None:
        """``out`` was computed from ``args`` where no gradient flows; ``theta``: ids of leaves that do not count."""
        leaves: Leaves = {}
        for t in tensors_in(args):
            if t.requires_grad and t._is_view() and t._base is not None:
                t = t._base  # under no_grad, views of parameters that are no leaves say that they are
            if t.requires_grad and t.is_leaf and id(t) not in theta:
                leaves = _both(leaves, {id(t): weakref.ref(t)})
            else:
                leaves = _both(leaves, self.of(t))
        if leaves:
            for t in tensors_in(out if isinstance(out, (list, tuple)) else (out,)):
                if t.layout is torch.strided:
                    self.of_storage[t] = _both(self.of(t), leaves)

    def of(self, t: Tensor) -> Leaves:
        """The leaves that were read into ``t``."""
        return (self.of_storage.get(t) if self.of_storage else None) or {}
