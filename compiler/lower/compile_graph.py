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

from metaoptim.compiler.compat import disable_current_modes

from .rounding import agree, noise_of, precision_of, size_of
from .waiting import waiting

_log = logging.getLogger("metaoptim.recompiles")


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
    with disable_current_modes(), torch.no_grad(), backends.options():
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
    largest = max((size_of(t) for t in expected if t is not None), default=0.0)
    precision = precision_of(graph.graph, inputs)
    noise: list[float] = []
    for attempt in ("first", "second"):
        given = [t.clone() for t in inputs]
        for i, (got, want) in enumerate(zip(program(*given), expected, strict=True)):
            if (got is None) != (want is None):
                return f"output {i} is {got!r}, expected {want!r}"
            if want is not None and not agree(got, want, precision, largest):
                noise = noise or noise_of(graph, inputs, expected, precision)
                if not agree(got, want, precision, largest, noise[i]):
                    return f"output {i} differs in the {attempt} call"
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(given, inputs, strict=True)):
            return "an input is overwritten"
    return None


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
