"""The batch among the arguments of a function: its size, and calls with larger ones, on shapes alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..compiler.capture import intercept
from ..compiler.capture.symbolic.tracer import Tracer


class Batch:
    """Which dimensions of a call's arguments are the batch.

    Attributes:
        names: of the arguments that have it.
        size: b.

    Args:
        fn: the function.
        args, kwargs: what it is called with.
        dims: name of a parameter -> the dimension, of every tensor in it.

    Raises:
        ValueError: for names without a tensor, dimensions that a tensor lacks, and those of several sizes.
    """

    def __init__(self, fn: Callable, args: tuple, kwargs: dict[str, Any], dims: Mapping[str, int]) -> None:
        self._fn, self._args, self._kwargs = fn, args, kwargs
        self.names = list(dims)
        self._dims: dict[int, tuple[Tensor, int]] = {}
        sizes: dict[str, int] = {}
        for name, t, dim in _named(inspect.signature(fn).bind(*args, **kwargs).arguments, dims):
            _, known = self._dims.setdefault(id(t), (t, dim))
            if known != dim:
                raise ValueError(
                    f"batch: got dimensions {known} and {dim} of one tensor of shape {tuple(t.shape)} (the latter for "
                    f"{name!r}), expected one; pass a clone"
                )
            sizes[f"{name}: {tuple(t.shape)}[{dim}]"] = t.shape[dim]
        if len({*sizes.values()}) != 1 or 0 in sizes.values():
            raise ValueError(f"batch: got {', '.join(sizes)}, expected dimensions of one size, at least 1")
        self.size = next(iter(sizes.values()))

    def enlarged(self, times: int) -> Callable[[], Any]:
        """The call with so many times the batch, to be captured: its tensors are symbolic, and take no memory."""

        def call() -> Any:
            tracer = intercept.recording.get()
            with tracer.paused():
                larger = {key: _larger(tracer, t, dim, times) for key, (t, dim) in self._dims.items()}
            args = [_replaced(a, larger) for a in self._args]
            return self._fn(*args, **{name: _replaced(a, larger) for name, a in self._kwargs.items()})

        return call


def _named(arguments: Mapping[str, Any], dims: Mapping[str, int]) -> Iterator[tuple[str, Tensor, int]]:
    if not dims:
        raise ValueError(
            f"batch: got no names, expected some of those of the arguments: {', '.join(arguments)}"
        )
    for name, dim in dims.items():
        if name not in arguments:
            raise ValueError(
                f"batch: got {name!r}, expected names of arguments given: {', '.join(arguments)}"
            )
        tensors = [t for t in tree_leaves(arguments[name]) if isinstance(t, Tensor)]
        if not tensors:
            raise ValueError(
                f"batch: {name!r} got a {type(arguments[name]).__name__}, expected a tensor, or lists, tuples or dicts "
                "of them; give what has the batch as an argument of its own"
            )
        for t in tensors:
            if isinstance(dim, bool) or not isinstance(dim, int) or not -t.dim() <= dim < t.dim():
                raise ValueError(
                    f"batch: {name!r} got {dim!r}, expected a dimension of its tensor of shape {tuple(t.shape)}"
                )
            if t.layout is not torch.strided:
                raise ValueError(f"batch: {name!r} got a tensor of layout {t.layout}, expected a strided one")
            yield name, t, dim % t.dim()


def _replaced(value: Any, larger: Mapping[int, Tensor]) -> Any:
    leaves, spec = tree_flatten(value)
    if not any(id(x) in larger for x in leaves):
        return value  # the same object: the function may tell by it
    return tree_unflatten([larger.get(id(x), x) for x in leaves], spec)


def _larger(tracer: Tracer, t: Tensor, dim: int, times: int) -> Tensor:
    """What stands for ``t`` with so many times the entries along ``dim``, its dimensions laid out in the same order."""
    shape = tuple(n * times if d == dim else n for d, n in enumerate(t.shape))
    at = (t.stride(dim), -dim)
    stride = tuple(s * times if t.stride(dim) and (s, -d) > at else s for d, s in enumerate(t.stride()))
    fake = tracer.fakes.empty((shape, t.dtype, stride, t.device)).requires_grad_(t.requires_grad)
    if isinstance(t, nn.Parameter):
        fake._is_param = True  # type: ignore[attr-defined]
    tracer.bind_input(fake)
    return fake
