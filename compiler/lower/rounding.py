"""Whether two ways to compute the same tensors agree but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import tree_leaves

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_TRIALS = 4


def _is_real(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)


def _coarsest(dtypes: Iterable[Any]) -> torch.dtype:
    return max(
        (d.to_real() for d in dtypes if _is_real(d)), key=lambda d: torch.finfo(d).eps, default=torch.float64
    )


def precision_of(graph: fx.Graph, inputs: Iterable[Tensor]) -> torch.dtype:
    """The coarsest type in which ``graph`` computes on ``inputs``: autocast's casts are calls like others."""
    named = (a for n in graph.nodes for a in tree_leaves((n.args, n.kwargs)))
    return _coarsest([*(t.dtype for t in inputs), *named])


def size_of(t: Tensor) -> float:
    """The largest finite entry."""
    finite = t[t.isfinite()] if _is_real(t.dtype) else t.new_empty(0)
    return float(finite.abs().max()) if finite.numel() else 0.0


def agree(
    got: Tensor, want: Tensor, precision: torch.dtype, largest: float = 0.0, noise: float = 0.0
) -> bool:
    """Equal but for rounding, in the coarsest type that was computed in, and ``noise``, what rounded inputs do to it.

    ``largest`` is the size of all results: some are zero but for rounding, such as the gradient by a key's bias.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.numel():
        return True
    if not _is_real(want.dtype):
        return torch.equal(got, want)
    worst, size = float((got - want).abs().max()), float(want.abs().max())
    if not (isfinite(worst) and isfinite(size)):
        finite = want.isfinite()
        if not torch.equal(got.isfinite(), finite):
            return False
        worst, size = size_of(got[finite] - want[finite]), size_of(want)
    tolerance = _TOLERANCE.get(_coarsest((precision, want.dtype)), 5e-2)
    return worst <= tolerance * (size + 1e-3 * largest) + 10 * noise + 1e-30


def noise_of(
    run: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor],
    expected: Sequence[Tensor | None],
    precision: torch.dtype,
) -> list[float]:
    """How far each result moves when inputs move by a rounding error: as far may two right programs be apart.

    Adam's second moments are next to zero in its first steps, and its derivative is as large as that; what cancels
    altogether is nothing but such errors.
    """
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(precision).eps
    moved = [0.0] * len(expected)
    for _ in range(_TRIALS):
        given = [
            t * (1 + eps * torch.randn(t.shape, generator=generator).to(t)) if t.is_floating_point() else t
            for t in inputs
        ]
        for i, (a, b) in enumerate(zip(run(*given), expected, strict=True)):
            if a is not None and b is not None and a.is_floating_point():
                moved[i] = max(moved[i], size_of(a - b))
    return moved
