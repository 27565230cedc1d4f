"""The one walk over autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes_below(tensors: Iterable[Any], ends: Callable[[Any], bool] = lambda node: False) -> Iterator[Any]:
    """Each node of autograd's graph that ``tensors`` depend on, once.

    Args:
        tensors: where it begins; what is no tensor is passed over.
        ends: whether the walk goes no further than a node.
    """
    stack: list[Any] = [t.grad_fn for t in tensors if isinstance(t, Tensor)]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not ends(node):
            stack += [before for before, _ in node.next_functions]
