"""What tensors are like, and what is known of the memory they lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from metaoptim.compiler.compat import storage_address


class TensorSpec(NamedTuple):
    """What must be equal for one program to serve two tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    device: torch.device

    @property
    def row(self) -> TensorSpec:
        """That of a row along the leading axis."""
        return TensorSpec(self.shape[1:], self.dtype, self.stride[1:], self.device)

    @property
    def dense(self) -> bool:
        """Whether elements lie one behind the other, in whatever order of the dimensions."""
        expected = 1
        for stride, size in sorted((d, n) for n, d in zip(self.shape, self.stride, strict=True) if n != 1):
            if stride != expected:
                return False
            expected *= size
        return True

    def empty(self) -> Tensor:
        """An uninitialised tensor like this."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        return f"{self.outline} (strides {self.stride}, {self.device})"

    @property
    def outline(self) -> str:
        """Dtype and shape: float32 4×3, float64 scalar."""
        return f"{str(self.dtype).removeprefix('torch.')} {'×'.join(map(str, self.shape)) or 'scalar'}"


def tensor_spec(t: Tensor) -> TensorSpec:
    """The spec of a tensor."""
    return TensorSpec(tuple(t.shape), t.dtype, t.stride(), t.device)


def nbytes(spec: TensorSpec) -> int:
    """Bytes of memory that a tensor of this spec spans."""
    shape, dtype, stride, _ = spec
    if 0 in shape:
        return 0
    stride = stride if len(stride) == len(shape) else torch.empty(shape, device="meta").stride()
    return dtype.itemsize * (1 + sum((size - 1) * s for size, s in zip(shape, stride, strict=True)))


def in_the_layout(t: Tensor, values: Callable[[Tensor], Tensor] = Tensor.clone) -> Tensor:
    """A copy laid out like ``t``, gaps and overlaps too; ``values`` are made of the memory that it spans."""
    t = t.detach()
    if t.layout is not torch.strided:
        return values(t)
    return values(spanned(t)).as_strided(t.shape, t.stride())


def spanned(t: Tensor) -> Tensor:
    """The memory from the first element of ``t`` to its last, as a vector."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.as_strided((span,), (1,))


def memory_bytes(t: Tensor) -> int:
    """Bytes of the memory that ``t`` keeps alive, of which it may be a small part."""
    if t.layout is torch.strided:
        return t.untyped_storage().nbytes()
    if t.layout is torch.sparse_coo:
        return t._indices().nbytes + t._values().nbytes
    return t.numel() * t.element_size()


def memory_key(t: Tensor) -> int:
    """Equal for tensors that are alive and lie in the same memory."""
    return storage_address(t) if t.layout is torch.strided else id(t)


def memory_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors keep alive; what they share counts once."""
    return sum({memory_key(t): memory_bytes(t) for t in tensors}.values())
