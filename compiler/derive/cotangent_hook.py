"""`backward_hook`: a call out of a VJP graph into the user's Python, with the cotangent of an inner gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

TAKEN = 4  # most tensors of the size of its argument that a hook is assumed to make at a time

_hook: ContextVar[Callable[[Tensor], Tensor | None] | None] = ContextVar(
    "metaoptim_cotangent_hook", default=None
)


@torch.library.custom_op("metaoptim::cotangent_hook", mutates_args=())
def call_cotangent_hook(cotangent: Tensor) -> Tensor:
    """The active window's backward_hook, as an operator that tracing and compilers pass through."""
    hook = _hook.get()
    result = None if hook is None else hook(cotangent)
    if result is None:
        return cotangent.clone()
    if result.shape != cotangent.shape:
        raise ValueError(
            f"backward_hook: got a result of shape {tuple(result.shape)}, expected "
            f"{tuple(cotangent.shape)}; return a tensor like its argument, or None to keep it"
        )
    return result.to(cotangent.dtype).clone() if result is cotangent else result.to(cotangent.dtype)


@call_cotangent_hook.register_fake
def _(cotangent: Tensor) -> Tensor:
    return torch.empty_like(cotangent)


def stand_in(cotangent: Tensor) -> None:
    """A hook for runs that only measure: the user's is called once for each gradient, since it may count, log or raise.

    It takes as much memory as a hook is assumed to.
    """
    taken = [torch.empty_like(cotangent) for _ in range(TAKEN)]
    del taken


@contextmanager
def active(hook: Callable[[Tensor], Tensor | None] | None) -> Iterator[None]:
    """Make ``hook`` the one that VJP graphs run inside the block call."""
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)
