"""Batches in chunks: how they are cut, and what each chunk counts in a step's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from metaoptim.compiler.compat import tree_flatten, tree_unflatten

_WHOLE = (bool, int, float, complex, str, type(None))  # what every chunk is given as it is


class Cut(NamedTuple):
    """A loss function of a batch, and the sizes of the chunks that it is called with."""

    loss_fn: Callable[..., Any]
    batch: tuple[Any, ...]
    sizes: list[int]
    mean: bool

    def losses(self) -> Iterator[tuple[Any, float]]:
        """The loss of each chunk, computed when it is asked for, and the factor that it counts with."""
        leaves, spec = tree_flatten(self.batch)
        start, total = 0, sum(self.sizes)
        for size in self.sizes:
            chunk = [t[start : start + size] if _is_cut(t) else t for t in leaves]
            yield self.loss_fn(*tree_unflatten(chunk, spec)), size / total if self.mean else 1.0
            start += size


def cut(name: str, loss_fn: Any, batch: tuple[Any, ...], chunks: int, reduction: str) -> Cut:
    """A batch in ``chunks``, for the step that errors call ``name``.

    Raises:
        TypeError: for what is no function, or no batch.
        ValueError: for a number of chunks or a reduction that there is not, or tensors of unlike sizes.
    """
    if not callable(loss_fn):
        is_loss = isinstance(loss_fn, Tensor)
        hint = "; a loss that has been computed is stepped by with step(loss)" if is_loss else ""
        raise TypeError(
            f"{name}: got a {'tensor' if is_loss else type(loss_fn).__name__}, expected a function of a chunk that "
            f"returns its loss, as in {name}(lambda x, y: F.cross_entropy(net(x), y), x, y, chunks=4){hint}"
        )
    if type(chunks) is not int or chunks < 1:
        raise ValueError(
            f"{name}: chunks: got {chunks!r}, expected a positive integer; for one chunk take step(loss)"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction: got {reduction!r}, expected 'mean' or 'sum'")
    batch = tuple([dict(b) if isinstance(b, Mapping) else b for b in batch])  # of a tokenizer, for one
    leaves, _ = tree_flatten(batch)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_WHOLE)):
            raise TypeError(
                f"{name}: got a {type(leaf).__name__} in the batch, expected tensors, by themselves or in lists, "
                "tuples and dicts; make tensors of what is part of the batch, and let the loss function find the rest"
            )
    sizes = {t.shape[0] for t in leaves if _is_cut(t)}
    if not sizes or 0 in sizes:
        raise ValueError(
            f"{name}: got {'an empty batch' if sizes else 'no batch'}, expected tensors with the examples along their "
            f"first dimension, as in {name}(loss_fn, x, y, chunks=4)"
        )
    if len(sizes) != 1:
        shapes = [tuple(t.shape) for t in leaves if isinstance(t, Tensor)]
        raise ValueError(
            f"{name}: got a batch of tensors of shapes {shapes}, expected the same number of examples, along the first "
            "dimension, in each; what has no examples is no part of the batch, and the loss function finds it itself"
        )
    (size,) = sizes
    if chunks > size:
        raise ValueError(f"{name}: got chunks={chunks} for a batch of {size}, expected at most {size} chunks")
    least, larger = divmod(size, chunks)
    return Cut(loss_fn, batch, [least + (k < larger) for k in range(chunks)], reduction == "mean")


def _is_cut(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
