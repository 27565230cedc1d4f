"""The walk over autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from metaoptim.compiler.ir.values import reached


def nodes_below(tensors: Iterable[Any], ends: Callable[[Any], bool] = lambda node: False) -> Iterator[Any]:
    """Each node of autograd's graph that ``tensors`` depend on, once, down to where the walk ``ends``."""
    starts = [t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]

    def below(node: Any) -> Iterable[Any]:
        return () if ends(node) else [n for n, _ in node.next_functions if n is not None]

    return reached(starts, below)


def leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """The leaves that a gradient of ``tensor`` goes to; itself, if it is one."""
    if tensor.is_leaf:
        yield tensor
    for node in nodes_below([tensor]):
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            yield variable
