"""What a step read from outside: held by reference and watched, or copied where it is meant to change."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.compiler.compat import is_zero_tensor
from metaoptim.compiler.ir.tensors import TensorSpec, in_the_layout, tensor_spec
from metaoptim.compiler.ir.weak import WeakTable
from metaoptim.errors import StaleInputError

from .ledger import Ledger, Memory

_CHUNK = 1 << 20
_LARGE = 1 << 14  # bytes that are not copied without need


def checksum(t: Tensor) -> int | Tensor:
    """A 64-bit digest of the bytes of ``t`` (a tensor, unsynchronised, off the CPU).

    Version counters do not move for ``.data`` writes, memory shared with numpy and fused optimizers; bytes do.
    """
    if t.layout is not torch.strided:
        if t.layout is torch.sparse_coo:
            return hash((t._version, checksum(t._indices()), checksum(t._values())))
        return t._version
    if not t.is_cpu:
        with torch.no_grad():
            return torch.hash_tensor(t)
    if not t.is_contiguous():
        t = t.detach()
        t = (_in_order(t) if t.nbytes > _LARGE else t).contiguous()
    start, size = t.data_ptr(), t.nbytes
    if size <= _CHUNK:
        return hash(ctypes.string_at(start, size))
    chunks = range(0, size, _CHUNK)
    return hash(tuple([hash(ctypes.string_at(start + at, min(_CHUNK, size - at))) for at in chunks]))


def _in_order(t: Tensor) -> Tensor:
    """Each element of ``t`` once, as they lie in memory, so that what is transposed or expanded need not be copied."""
    for dim in [d for d, stride in enumerate(t.stride()) if not stride and t.shape[d] > 1]:
        t = t.narrow(dim, 0, 1)
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))


def _copy(t: Tensor) -> Tensor:
    """A copy with the very strides of ``t``: step graphs are traced for them."""
    with torch.no_grad():
        plain = t.layout is not torch.strided or t.is_conj() or t.is_neg() or t.is_contiguous()
        return t.detach().clone() if plain else in_the_layout(t)


class Snapshot:
    """The value of a tensor as a step read it.

    Views of one tensor (`xs[t]`) are kept as the place they have in its memory: as objects they are ten times as large.
    The ``digest`` of the value tells whether it was overwritten.
    """

    __slots__ = ("memory", "layout", "offset", "digest", "label", "private", "__weakref__")

    def __init__(
        self, tensor: Tensor | Memory, digest: int | Tensor | None, label: str, private: bool = False
    ) -> None:
        self.memory = (
            Memory(tensor) if isinstance(tensor, Tensor) else tensor
        )  # the user's, or a ``private`` copy
        # shape and strides of a view of it, equal ones being one object, and its offset; None for all of it
        self.layout: tuple | None = None
        self.offset = 0
        self.digest, self.label, self.private = digest, label, private

    @property
    def spec(self) -> TensorSpec:
        """Shape, dtype, strides and device of what is held, without making it."""
        of = self.memory.tensor
        if self.layout is None:
            return tensor_spec(of)
        shape, strides = self.layout
        return TensorSpec(tuple(shape), of.dtype, strides, of.device)

    @property
    def tensor(self) -> Tensor:
        """What is held."""
        if self.layout is None:
            return self.memory.tensor
        shape, strides = self.layout
        return self.memory.tensor.as_strided(shape, strides, self.offset)

    def get(self) -> Tensor:
        """The tensor, or `StaleInputError` if it was overwritten since."""
        if self.digest is None or (self.private and not isinstance(self.digest, Tensor)):
            return self.tensor
        try:
            tensor = self.tensor
        except RuntimeError as error:  # its storage has shrunk
            raise StaleInputError(
                f"{self.label} is gone: the memory it lay in was given back after the step had read it ({error}). "
                "Call backward before that, or give each step a tensor of its own"
            ) from error
        now = checksum(tensor)
        same = bool((now == self.digest).all()) if isinstance(now, Tensor) else now == self.digest
        if not same:
            raise StaleInputError(
                f"{self.label}, a tensor of shape {tuple(tensor.shape)}, was overwritten after the step had "
                "read it, so the step cannot be differentiated any more. Give each step a tensor of its own (clone "
                "what is reused), or call backward before overwriting it."
            )
        return tensor

    def is_current(self, source: Tensor) -> bool:
        """Whether another read of ``source``, at the same version, may share this hold."""
        if not self.private or isinstance(self.digest, Tensor):
            return True  # a difference is found when the value is used
        return bool(checksum(source) == self.digest)

    def keep(self) -> None:
        """The user's memory is about to be overwritten: copy it."""
        if not self.private:
            self.memory, self.layout, self.private = Memory(_copy(self.get())), None, True


def snapshot(tensor: Tensor, copied: bool) -> Snapshot:
    """``tensor`` as it is now: by reference, and watched, or ``copied`` where it is meant to change."""
    label = "a meta-parameter" if tensor.requires_grad else "an input of an inner step"
    held = tensor.detach() if tensor.layout is torch.strided else tensor  # whose version counter is its own
    return Snapshot(_copy(tensor) if copied else held, checksum(tensor), label, copied)


class _Holds:
    """Holds by reference on one piece of memory."""

    __slots__ = ("holds", "memory")

    def __init__(self) -> None:
        self.memory: weakref.ref[Memory]  # of which views are kept as places in it
        self.holds = WeakTable[Snapshot]()


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that share memory differ by sizes, strides and offset alone."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and not (t.is_conj() or t.is_neg()) for t in (a, b))
    return plain and a.dtype == b.dtype and a.is_inference() == b.is_inference()


class Inputs:
    """Holds on everything that the steps of a window read from outside.

    Meta-parameters and buffers are expected to change: they are copied, once per value. Everything else is held by
    reference, copied when an operator is about to overwrite it, and watched for overwriting that no operator shows. The
    ``ledger`` knows what they come to, if that is ``counted``.
    """

    def __init__(self, is_buffer: Callable[[Tensor], bool], counted: bool = False) -> None:
        self.is_buffer = is_buffer
        self.ledger = Ledger(counted)
        self._copies = WeakIdKeyDictionary()  # tensor -> its version then, the copy
        self._at: dict[int, _Holds] = {}  # storage -> holds by reference
        self._layouts: dict[tuple, tuple] = {}  # to itself
        self._prune_at = 64

    def hold(self, tensor: Tensor) -> Snapshot:
        """``tensor`` as it is now."""
        if tensor.requires_grad:
            return self._copied(tensor, "a meta-parameter")
        if self.is_buffer(tensor):
            return self._copied(tensor, "a buffer")
        label = "an input of an inner step"
        if is_zero_tensor(tensor):
            tensor = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if tensor.is_neg():  # compiled graphs read memory as it lies there
            return self._copied(tensor, label)
        if tensor.layout is not torch.strided:
            return Snapshot(tensor, checksum(tensor), label)
        storage = tensor.untyped_storage()._cdata
        holds = self._at.get(storage)
        memory = None if holds is None else holds.memory()
        if memory is not None and _lie_alike(memory.tensor, tensor):
            held = Snapshot(memory, checksum(tensor), label)
            layout = (tensor.shape, tensor.stride())
            held.layout, held.offset = self._layouts.setdefault(layout, layout), int(tensor.storage_offset())
        else:
            held = Snapshot(tensor.detach(), checksum(tensor), label)
        if holds is None:
            if len(self._at) >= self._prune_at:
                self._at = {k: v for k, v in self._at.items() if v.memory() is not None or v.holds}
                self.ledger.watch_only(self._at)
                self._prune_at = max(64, 2 * len(self._at))
            holds = self._at[storage] = _Holds()
        if memory is None:
            holds.memory = weakref.ref(held.memory)
            self.ledger.watch(tensor, storage)
        holds.holds.add(held)
        return held

    def _copied(self, tensor: Tensor, label: str) -> Snapshot:
        digest, version = checksum(tensor), 0 if tensor.is_inference() else tensor._version
        known = self._copies.get(tensor)
        if known is not None and known[0] == version:
            copy = known[1]
            if isinstance(digest, Tensor):  # compared when it is used: no synchronisation here
                return Snapshot(copy.memory, digest, label, True)
            if digest == copy.digest:
                return copy
        held = Snapshot(_copy(tensor), digest, label, True)
        self.ledger.add(held.memory)
        self._copies[tensor] = version, held
        return held

    def preserve(self, targets: list[Tensor]) -> bool:
        """An operator is about to overwrite ``targets``: copy what is held of their memory; whether anything was."""
        copied = False
        for t in targets:
            if self._at and t.layout is torch.strided:
                storage = t.untyped_storage()._cdata
                holds = self._at.pop(storage, None)
                for held in () if holds is None else holds.holds:
                    held.keep()
                    self.ledger.add(held.memory)
                    copied = True
                self.ledger.overwritten(storage)
        return copied

    def clear(self) -> None:
        """Drop every reference to the user's tensors."""
        self._copies.clear()
