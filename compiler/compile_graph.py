"""An fx graph through a backend of torch.compile, checked against itself on first use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import _disable_current_modes

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def compiled(
    graph: fx.GraphModule, inputs: Sequence[Tensor], backend: str, check: bool = True
) -> Callable[..., Any]:
    """``graph`` compiled for ``inputs`` by ``backend``, or run as it is where the compiled one is found to be wrong.

    The graph holds its derivative already, so it is compiled for inference, without guards: whoever calls it has
    checked shapes and types. With ``check``, the first call is compared with the graph's own result, output by output.
    """
    with _disable_current_modes(), torch.no_grad():
        program = lookup_backend(backend)(_copied(graph), [t.detach() for t in inputs])
    if not check:
        return program
    with _disable_current_modes(), torch.no_grad():
        complaint = difference(graph, program, inputs)
    if complaint is None:
        return program
    warnings.warn(
        f"the backend {backend!r} compiled a step wrongly ({complaint}); the step runs uncompiled. Please report it, "
        "with the graph: print(graph.code)",
        RuntimeWarning,
        stacklevel=2,
    )
    return graph.forward


def difference(graph: fx.GraphModule, program: Callable[..., Any], inputs: Sequence[Tensor]) -> str | None:
    """What is wrong with ``program``, a compilation of ``graph``, on ``inputs``; None if nothing is found."""
    before = [t.clone() for t in inputs]
    given = [t.clone() for t in inputs]
    expected = graph(*given)
    for attempt in (1, 2):
        given = [t.clone() for t in inputs]
        results = program(*given)
        for i, (got, want) in enumerate(zip(results, expected, strict=True)):
            if (got is None) != (want is None):
                return f"output {i} is {got!r}, expected {want!r}"
            if want is not None and not agree(got, want):
                return f"output {i} differs in call {attempt}"
        if not all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(given, before, strict=True)):
            return "an input is overwritten"
    return None


def agree(got: Tensor, want: Tensor) -> bool:
    """Equal but for rounding."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.numel():
        return True
    if not (want.is_floating_point() or want.is_complex()):
        return torch.equal(got, want)
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    scale = float(want[finite].abs().max()) if bool(finite.any()) else 0.0
    worst = float((got[finite] - want[finite]).abs().max()) if bool(finite.any()) else 0.0
    return worst <= _TOLERANCE.get(want.dtype, 1e-3) * scale + 1e-30


def _copied(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy for the backend to take apart."""
    copy = fx.GraphModule(graph, fx.Graph())
    copy.graph = fx.Graph()
    output = copy.graph.graph_copy(graph.graph, {})
    copy.graph.output(output)
    copy.recompile()
    return copy
