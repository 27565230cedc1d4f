"""An fx graph through a backend of torch.compile, checked against itself on first use."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import disable_current_modes

from ..derive.graphs import copied
from ..derive.interpret import hooking, measuring_hook
from ..ir.step import FlatGraph
from ..ir.tensors import in_the_layout, tensor_spec
from .processes.handover import Handover, elsewhere
from .rounding import agree, noise_of, precision_of, size_of

_log = logging.getLogger("metaoptim.recompiles")
SECONDS = 2.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say ``what`` is going on if the block has not ended after two seconds and stderr is a terminal."""

    def tell() -> None:
        if sys.stderr.isatty():
            print(f"metaoptim: {what}", file=sys.stderr, flush=True)

    timer = threading.Timer(SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def compiled(
    flat: FlatGraph, inputs: Sequence[Tensor], backend: str, cotangents: int, check: bool
) -> Callable[..., Any]:
    """``flat`` compiled for ``inputs`` by ``backend``, or as it is where the compiled one is found to be wrong.

    The graph holds its derivative already, so it is compiled for inference, without guards: whoever calls it has
    checked shapes and types. With ``check``, it is compared with itself on the inputs of its first call, where the last
    ones, so many ``cotangents``, are replaced by random ones.
    """
    graph, program = flat.module, None
    size, begun = len(graph.graph.nodes), time.perf_counter()
    what = f"{backend} compiles a graph of {size} nodes; the next process finds it in the cache ..."
    with disable_current_modes(), torch.no_grad():
        with waiting(what):
            if backend == "inductor" and elsewhere(inputs):
                program = Handover(flat, [tensor_spec(t) for t in inputs]).program()
            if program is None:
                from . import backends  # takes a second

                own = fx.GraphModule(graph, copied(graph.graph))  # the backend may take it apart
                program = backends.call_backend(backend, own, inputs)
        seconds = time.perf_counter() - begun
        _log.info("a graph of %d nodes runs compiled by %s, after a wait of %.1f s", size, backend, seconds)
        if not check:
            return program
        given = [*inputs[: len(inputs) - cotangents], *map(_random_like, inputs[len(inputs) - cotangents :])]
        with hooking(measuring_hook):  # the user's may count
            complaint = difference(graph, program, given)
    if complaint is None:
        return program
    where = os.path.join(tempfile.mkdtemp(prefix="metaoptim-"), "reproduction.pt")
    torch.save({"code": graph.code, "inputs": [t.detach().clone() for t in given]}, where)
    warnings.warn(
        f"the backend {backend!r} compiled a part of the inner loop wrongly: {complaint}. That part runs uncompiled. "
        f"Please report it with {where}: torch.load(...) gives its code and inputs.",
        RuntimeWarning,
        stacklevel=2,
    )
    return graph.forward


def difference(graph: fx.GraphModule, program: Callable[..., Any], inputs: Sequence[Tensor]) -> str | None:
    """What is wrong with ``program``, a compilation of ``graph``, on ``inputs``; None if nothing is found."""
    expected = graph(*map(in_the_layout, inputs))
    largest = max((size_of(t) for t in expected if t is not None), default=0.0)
    precision = precision_of(graph.graph, inputs)
    noise: list[float] = []
    for attempt in ("first", "second"):
        given = list(map(in_the_layout, inputs))
        try:
            results = program(*given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiled graph that cannot run, although the graph can
            return f"it raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        for i, (got, want) in enumerate(zip(results, expected, strict=True)):
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

    def drawn(span: Tensor) -> Tensor:
        return torch.randn(span.shape, generator=generator, dtype=t.dtype).to(t.device)

    return in_the_layout(t, drawn)
