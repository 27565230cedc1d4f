"""Whose memory a value lies in, and which calls write into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from metaoptim.compiler.compat import OpOverload

from .operators import op_info
from .step import again
from .values import Entry, Value

aten = torch.ops.aten
# Views that autograd takes for tensors of their own.
_SHARING = {
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unsafe_chunk.default,
    aten._unsafe_view.default,
}


def changed(entry: Entry) -> Iterator[Any]:
    """What a call changes in place."""
    if isinstance(entry.op, OpOverload):
        for where in op_info(entry.op).writes:
            found = entry.kwargs.get(where) if isinstance(where, str) else entry.args[where]
            yield from found if isinstance(found, tuple) else () if found is None else (found,)


def identity(ref: Any) -> Any:
    """Equal for what stands for the same tensor."""
    return (id(ref.entry), ref.index) if isinstance(ref, Value) else id(ref)


def origin(entry: Entry) -> Any:
    """What a call is given that its results lie in the memory of; None where that is their own."""
    written = list(changed(entry))
    if len(written) == 1:
        return written[0]
    shares = entry.op is again or entry.op in _SHARING or getattr(entry.op, "is_view", False)
    return entry.args[0] if shares else None


def owner(ref: Any, inside: Callable[[Entry], bool] = lambda entry: True) -> Any:
    """What made the memory that ``ref`` lies in, as far back as calls are ``inside``."""
    while isinstance(ref, Value) and inside(ref.entry) and (of := origin(ref.entry)) is not None:
        ref = of
    return ref
