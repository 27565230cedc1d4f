"""Results of calls, without the calls: fake ones, by the layout of the operands; values, where they are constants."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaoptim.compiler.compat import (
    DisableTorchDispatch,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    called,
    disable_fake_tensor_cache,
    unset_fake_temporarily,
)

from ...ir.operators import op_info
from ...ir.tensors import TensorSpec, tensor_spec
from ...ir.values import Entry, Number, Value, reached

aten = torch.ops.aten
# Room for the tangent of a view, in a storage as large as its base's: torch's own memory of fake results forgets that.
_TANGENT = aten._new_zeros_with_same_feature_meta.default
_NUMBERS = (bool, int, float, complex)
_OPTIONS = (str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


def mapped(fn: Callable[[Tensor], Any], a: Any) -> Any:
    """``a`` with ``fn`` of every tensor in it."""
    if isinstance(a, Tensor):
        return fn(a)
    if isinstance(a, (list, tuple)):
        return type(a)(mapped(fn, b) for b in a) if not hasattr(a, "_fields") else a
    return {k: mapped(fn, v) for k, v in a.items()} if isinstance(a, dict) else a


# -- fake results -----------------------------------------------------------------------------------------------------


class _Made(NamedTuple):
    """How one result is laid out.

    Attributes:
        spec: shape, dtype, strides and device.
        within: which of the operands it shares memory with; -1 for memory of its own.
        offset: how far after that operand it begins.
    """

    spec: TensorSpec
    within: int
    offset: int


class FakeCalls:
    """Runs operators on fake tensors; a call like an earlier one is given tensors like its results.

    torch remembers results too, but takes several times as long to look one up, and runs what it does not remember
    (decompositions of losses, for one) again in every step of a plain `for`.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self._known: dict[tuple, tuple[type, list[_Made | int | None]] | None] = {}

    def __call__(self, op: Any, args: tuple, kwargs: dict) -> Any:
        """``op(*args, **kwargs)``."""
        if op is _TANGENT:
            with disable_fake_tensor_cache(self.fake):
                return op(*args, **kwargs)
        parts: list[Any] = [op, torch.get_default_dtype()]
        operands: list[Tensor] = []
        if not _remembers(op) or not _describe((args, kwargs), parts, operands) or not operands:
            return op(*args, **kwargs)
        key = tuple(parts)
        if key not in self._known:
            out = op(*args, **kwargs)
            self._known[key] = self._layout(out, operands)
            return out
        known = self._known[key]
        if known is None:
            return op(*args, **kwargs)
        kind, made = known
        found = [operands[m] if isinstance(m, int) else m and self._made(m, operands) for m in made]
        return found[0] if kind is Tensor else kind(found)

    def empty(self, spec: TensorSpec) -> Tensor:
        """A fake tensor in memory of its own."""
        return self._made(_Made(spec, -1, 0), [])

    def _made(self, made: _Made, operands: list[Tensor]) -> Tensor:
        shape, dtype, stride, device = made.spec
        with DisableTorchDispatch():
            meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            if made.within >= 0:
                of = operands[made.within]
                meta.set_(of.untyped_storage(), of.storage_offset() + made.offset, shape, stride)
        return FakeTensor(self.fake, meta, device)

    def _layout(self, out: Any, operands: list[Tensor]) -> tuple[type, list[_Made | int | None]] | None:
        """How the result of a call is laid out, or which operand it is; None if that does not say all about it."""
        kind = Tensor if isinstance(out, Tensor) else type(out)
        if kind not in (Tensor, list, tuple):
            return None
        memory = {t.untyped_storage()._cdata: i for i, t in reversed(list(enumerate(operands)))}
        own: set[int] = set()
        made: list[_Made | int | None] = []
        for t in [out] if kind is Tensor else out:
            same = next((i for i, o in enumerate(operands) if o is t), None)
            if t is None or same is not None:
                made.append(same)
                continue
            if not isinstance(t, Tensor) or not _plain(t):
                return None
            storage, spec, offset = t.untyped_storage(), tensor_spec(t), t.storage_offset()
            within = memory.get(storage._cdata, -1)
            if within >= 0:
                offset -= operands[within].storage_offset()
            elif (
                offset
                or storage._cdata in own
                or storage.nbytes() != self.empty(spec).untyped_storage().nbytes()
            ):
                return None
            own.add(storage._cdata)
            made.append(_Made(spec, within, int(offset)))
        return kind, made


_REMEMBERED: dict[Any, bool] = {}


def _remembers(op: Any) -> bool:
    """Whether the layout of its operands decides that of an operator's results."""
    known = _REMEMBERED.get(op)
    if known is None:
        info = op_info(op)
        known = _REMEMBERED[op] = (
            op.namespace == "aten"
            and op is not aten.as_strided.default  # its offset does not count from its operand's
            and not (info.writes or info.random or info.dynamic)
            and torch.Tag.data_dependent_output not in op.tags
        )
    return known and not torch.is_inference_mode_enabled()


def _plain(t: Tensor) -> bool:
    return (
        isinstance(t, FakeTensor)
        and t.constant is None
        and t.layout is torch.strided
        and not (t.is_conj() or t.is_neg() or t.is_quantized or t.is_inference())
    )


def _describe(a: Any, parts: list[Any], operands: list[Tensor]) -> bool:
    """Append what decides on a result to ``parts``, and the tensors to ``operands``; False if it is not only that."""
    if isinstance(a, Tensor):
        operands.append(a)
        parts.append((a.shape, a.dtype, a.stride(), a.device) if _plain(a) else None)
        return parts[-1] is not None
    if isinstance(a, _NUMBERS):
        parts.append((type(a), a))  # 1, 1.0 and True promote differently
        return True
    if isinstance(a, (list, tuple)):
        parts.append(len(a))
        return all(_describe(b, parts, operands) for b in a)
    if isinstance(a, dict):
        parts.append(tuple(a))
        return all(_describe(b, parts, operands) for b in a.values())
    parts.append(a)
    return isinstance(a, _OPTIONS)


# -- constants --------------------------------------------------------------------------------------------------------


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
            if isinstance(a, Entry):
                return (*a.args, *a.kwargs.values())
            return a if isinstance(a, tuple) else ()

        needed: list[Entry] = []
        for a in reached([args, *kwargs.values()], onwards):
            if isinstance(a, Entry):
                if not _repeats(a):
                    return None
                needed.append(a)
            elif not isinstance(a, (Value, tuple, Number, *_NUMBERS, *_OPTIONS)):
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
        return called(op, self._given(args), {k: self._given(v) for k, v in kwargs.items()})

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
