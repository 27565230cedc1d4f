"""An fx graph through a backend of torch.compile, checked against itself on first use."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from .waiting import waiting

_log = logging.getLogger("metaoptim.recompiles")
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def compiled(
    graph: fx.GraphModule, inputs: Sequence[Tensor], backend: str, cotangents: int, check: bool
) -> Callable[..., Any]:
    """``graph`` compiled for ``inputs`` by ``backend``, or as it is where the compiled one is found to be wrong.

    The graph holds its derivative already, so it is compiled for inference, without guards: whoever calls it has
    checked shapes and types.

    Args:
        graph: flat, over ATen operators.
        inputs: what it will be called with first.
        backend: a backend of torch.compile.
        cotangents: how many of the last inputs are cotangents; the check uses random ones.
        check: whether to compare the compiled graph with the graph itself, output by output, on these inputs.
    """
    from . import backends  # takes a second, which windows that compile nothing do not wait for

    begun = time.perf_counter()
    with _disable_current_modes(), torch.no_grad(), backends.options():
        size = len(graph.graph.nodes)
        with waiting(
            f"{backend} compiles a graph of {size} nodes; the next process finds it in the cache ..."
        ):
            program = backends.call_backend(backend, _copied(graph), inputs)
        _log.info(
            "%s compiled a graph of %d nodes in %.1f s",
            backend,
            size,
            time.perf_counter() - begun,
        )
        if not check:
            return program
        given = [*inputs[: len(inputs) - cotangents], *map(_random_like, inputs[len(inputs) - cotangents :])]
        complaint = difference(graph, program, given)
    if complaint is None:
        return program
    where = _reproduction(graph, given)
    warnings.warn(
        f"the backend {backend!r} compiled a part of the inner loop wrongly: {complaint}. That part runs uncompiled. "
        f"Please report it with {where}: torch.load(...) gives its code and inputs.",
        RuntimeWarning,
        stacklevel=2,
    )
    return graph.forward


def difference(graph: fx.GraphModule, program: Callable[..., Any], inputs: Sequence[Tensor]) -> str | None:
    """What is wrong with ``program``, a compilation of ``graph``, on ``inputs``; None if nothing is found."""
    expected = graph(*[t.clone() for t in inputs])
    largest = max((_size(t) for t in expected if t is not None), default=0.0)
    noise: list[float] = []
    for attempt in ("first", "second"):
        given = [t.clone() for t in inputs]
        for i, (got, want) in enumerate(zip(program(*given), expected, strict=True)):
            if (got is None) != (want is None):
                return f"output {i} is {got!r}, expected {want!r}"
            if want is not None and not agree(got, want, largest):
                noise = noise or _noise(graph, inputs, expected)
                if not agree(got, want, largest, noise[i]):
                    return f"output {i} differs in the {attempt} call"
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(given, inputs, strict=True)):
            return "an input is overwritten"
    return None


def _noise(graph: fx.GraphModule, inputs: Sequence[Tensor], expected: Sequence[Tensor | None]) -> list[float]:
    """How far each output moves when inputs move by a rounding error: as far may two right programs be apart.

    Adam's second moments are next to zero in its first steps, and its derivative is as large as that.
    """
    generator = torch.Generator().manual_seed(0)
    moved = [0.0] * len(expected)
    for _ in range(4):
        given = [
            t * (1 + torch.finfo(t.dtype).eps * torch.randn(t.shape, generator=generator).to(t))
            if t.is_floating_point()
            else t
            for t in inputs
        ]
        for i, (a, b) in enumerate(zip(graph(*given), expected, strict=True)):
            if a is not None and b is not None and a.is_floating_point():
                moved[i] = max(moved[i], _size(a - b))
    return moved


def _size(t: Tensor) -> float:
    """The largest finite entry."""
    finite = t[t.isfinite()] if t.is_floating_point() or t.is_complex() else t.new_empty(0)
    return float(finite.abs().max()) if finite.numel() else 0.0


def agree(got: Tensor, want: Tensor, largest: float, noise: float = 0.0) -> bool:
    """Equal but for rounding.

    Args:
        got, want: one output.
        largest: the size of all outputs together: some are zero but for rounding.
        noise: what rounding errors of the inputs do to it.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.numel():
        return True
    if not (want.is_floating_point() or want.is_complex()):
        return torch.equal(got, want)
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    worst = float((got[finite] - want[finite]).abs().max()) if bool(finite.any()) else 0.0
    return worst <= _TOLERANCE.get(want.dtype, 1e-3) * (_size(want) + 1e-3 * largest) + 10 * noise + 1e-30


def _random_like(t: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the user's stays where it is
    return torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator, dtype=t.dtype))


def _reproduction(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> str:
    path = os.path.join(tempfile.mkdtemp(prefix="metaoptim-"), "reproduction.pt")
    torch.save({"code": graph.code, "inputs": [t.detach().clone() for t in inputs]}, path)
    return path


def _copied(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy for the backend to take apart."""
    copy = fx.GraphModule(graph, fx.Graph())
    copy.graph.output(copy.graph.graph_copy(graph.graph, {}))
    copy.recompile()
    return copy
