"""Custom `autograd.Function`s: one call each, whose arguments may be of any structure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from metaoptim.compiler.compat import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from metaoptim.errors import CaptureError

_TENSOR = object()
_PLAIN = (Tensor, int, float, str, type(None))


def flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], TreeSpec | None]:
    """What arguments hold, and how it lies in them; None for positional ones without containers, found out quickly."""
    if not kwargs and all(isinstance(a, _PLAIN) for a in args):
        return args, None
    # torch would make a plain tuple of a Size
    return tree_flatten((args, kwargs), is_leaf=lambda a: isinstance(a, torch.Size))


class Function:
    """A user's `autograd.Function` with all it is given besides tensors, applied again whenever a recording is run.

    Called with the tensors one by one, it puts them where they were: in lists, tuples, named tuples and dictionaries
    made anew, since ``forward`` may keep or change them. Equal ones do the same to the same tensors.
    """

    def __init__(self, cls: Any, leaves: Iterable[Any], spec: TreeSpec | None) -> None:
        """A call of ``cls.apply`` with arguments that have been `flattened`.

        Raises:
            CaptureError: for a container that cannot be made anew, and for reentrant checkpointing.
        """
        if cls is CheckpointFunction:
            raise CaptureError(
                "reentrant activation checkpointing cannot be differentiated twice; call checkpoint(..., "
                "use_reentrant=False)"
            )
        self.cls, self.__name__ = cls, cls.__name__
        self._leaves = [_TENSOR if isinstance(a, Tensor) else a for a in leaves]
        self._spec = spec
        self._key = (cls, spec, *[a if a is _TENSOR else _key(cls, a) for a in self._leaves])
        self._hash = hash(self._key)

    def arguments(self, tensors: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with these tensors."""
        given = iter(tensors)
        leaves = [next(given) if a is _TENSOR else a for a in self._leaves]
        return (tuple(leaves), {}) if self._spec is None else tree_unflatten(leaves, self._spec)

    def __call__(self, *tensors: Tensor) -> Any:
        args, kwargs = self.arguments(tensors)
        return self.cls.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        args, kwargs = self.arguments(itertools.repeat(_Blank()))
        return f"{self.__name__}({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})"


class _Blank:
    def __repr__(self) -> str:
        return "·"


def _key(cls: Any, a: Any) -> tuple[Any, ...]:
    """What must be equal for another argument to do the same."""
    if isinstance(a, float):
        return (type(a), a.hex())  # -0.0 is not 0.0, and nan is nan
    if isinstance(a, complex):
        return (type(a), a.real.hex(), a.imag.hex())
    try:
        hash(a)
        hashable = True
    except TypeError:
        hashable = False
    if isinstance(a, (list, tuple, dict, set, frozenset)):  # of a type that torch takes for a leaf
        if not hashable or any(isinstance(b, Tensor) for b in tree_leaves(list(a))):
            raise CaptureError(
                f"{cls.__name__}.apply is given a {type(a).__name__}, which cannot be made anew when the inner step is "
                "run again; pass a list, a tuple, a named tuple or a dict of the same"
            )
    return (type(a), a if hashable else id(a))
