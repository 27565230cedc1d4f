"""The one walk over graphs: of autograd's nodes, of recorded calls, of fx nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def reached(starts: Iterable[T], onwards: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """Each object that is reached from ``starts``, once; depth first, the last ones first.

    Args:
        starts: where the walk begins; they are reached.
        onwards: what one step from an object leads to.
    """
    stack = list(starts)
    seen: dict[int, T] = {}  # held, so that no other object comes to lie at its address
    while stack:
        a = stack.pop()
        if id(a) not in seen:
            seen[id(a)] = a
            yield a
            stack += onwards(a)
