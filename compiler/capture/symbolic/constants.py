"""Values that are known although a function is only being captured: they depend on nothing that it is given."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.compat import FakeTensor, OpOverload, unset_fake_temporarily

from ...ir.operators import op_info
from ...ir.tensors import tensor_spec
from ...ir.values import Entry, Number, Value, reached

_OPTIONS = (
    *(bool, int, float, complex, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class Constants:
    """What calls on constants give, computed when somebody asks."""

    def __init__(self) -> None:
        self._results: dict[int, Any] = {}  # id of an entry, which the trace holds
        self._shared: dict[tuple, Tensor] = {}

    def shared(self, t: Tensor) -> Tensor:
        """A constant, or one met before of the same values: one input for all of them."""
        if isinstance(t, FakeTensor):
            return t
        with unset_fake_temporarily():
            here = t.cpu().contiguous()
        key = (tensor_spec(t), ctypes.string_at(here.data_ptr(), here.nbytes))
        return self._shared.setdefault(key, t)

    def add(self, value: Value, tensor: Tensor) -> None:
        """``value`` is that of a real tensor which nobody else can change."""
        self._results[id(value.entry)] = tensor

    def call(self, op: Any, args: tuple, kwargs: dict) -> Any:
        """What a call gives, or None if it depends on an input or on random numbers; ``args`` are tokens."""

        def onwards(a: Any) -> Iterable[Any]:
            if isinstance(a, Value):
                return () if id(a.entry) in self._results else (a.entry,)
            return (
                (*a.args, *a.kwargs.values()) if isinstance(a, Entry) else a if isinstance(a, tuple) else ()
            )

        needed: list[Entry] = []
        for a in reached([args, *kwargs.values()], onwards):
            if isinstance(a, Entry):
                if not _repeats(a):
                    return None
                needed.append(a)
            elif not isinstance(a, (Value, tuple, Number, *_OPTIONS)):
                return None
        with unset_fake_temporarily(), torch.no_grad():
            for entry in sorted(needed, key=lambda e: e.seq):
                self._results[id(entry)] = self._run(entry.op, entry.args, entry.kwargs)
            return self._run(op, args, kwargs)

    def places(self, mask: Any) -> list[Tensor] | None:
        """Where a mask holds, by dimension, or None if that depends on an input."""
        found = self.call(torch.ops.aten.nonzero.default, (mask,), {})
        with unset_fake_temporarily():
            return None if found is None else [places.clone() for places in found.unbind(1)]

    def _run(self, op: Any, args: tuple, kwargs: dict) -> Any:
        return op(*self._given(args), **{k: self._given(v) for k, v in kwargs.items()})

    def _given(self, a: Any) -> Any:
        if isinstance(a, Value):
            result = self._results[id(a.entry)]
            return result if a.index is None else result[a.index]
        if isinstance(a, tuple):
            return tuple(map(self._given, a))
        return a.value if isinstance(a, Number) else a


def _repeats(entry: Entry) -> bool:
    """Whether a call gives the same whenever it is made."""
    if not isinstance(entry.op, OpOverload) or entry.deps:
        return False
    return not (op_info(entry.op).writes or op_info(entry.op).random)
