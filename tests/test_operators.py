"""PyTorch's own operator database: every operator with a second derivative, inside an inner loss, against eager.

The operator is fed from the parameters; two inner steps; the loss is a weighted sum of what it returns. Leave out with
``-m "not slow"``.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten

import metaoptim

OPS = [
    op
    for op in op_db
    if op.supports_autograd and op.supports_gradgrad and torch.float64 in op.supported_dtypes("cpu")
]

SAMPLES = 3  # of which the first that is differentiable twice is checked

# Refused by name: a gradient through random numbers.
REFUSED = {"normal", "bernoulli", "linalg.lstsq"}


class Net(nn.Module):
    """The parameters an operator is fed from."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.linspace(0.3, 0.9, size, dtype=torch.float64))


def value_of(op: Any, sample: Any, p: Tensor, shift: float) -> Tensor | None:
    """A scalar of the operator's output at an input that depends on ``p``."""
    base = sample.input[0] if isinstance(sample.input, (list, tuple)) else sample.input
    fed = base.detach() * (1 + 0.1 * p.view(base.shape)) + 0.01 * shift * p.view(base.shape)
    given = [fed, *sample.input[1:]] if isinstance(sample.input, (list, tuple)) else fed
    outputs = [t for t in tree_flatten(op(given, *sample.args, **sample.kwargs))[0] if isinstance(t, Tensor)]
    total = None
    for out in outputs:
        if out.requires_grad and out.numel():
            out = torch.view_as_real(out.resolve_conj()) if out.is_complex() else out
            weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
            total = (out * weight).sum() + (0 if total is None else total)
    return total


def check(op: Any, sample: Any) -> str:
    """ "exact", "wrong", "refused: ..." or "skipped" (no second derivative in eager, or not differentiable)."""
    base = sample.input[0] if isinstance(sample.input, (list, tuple)) else sample.input
    if not isinstance(base, Tensor) or base.dtype != torch.float64 or not base.numel():
        return "skipped"
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    net = Net(base.numel())
    try:
        theta = net.p * 1
        for t in range(2):
            torch.manual_seed(t)
            loss = value_of(op, sample, theta, 1.0)
            if loss is None:
                return "skipped"
            (g,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - lr * g
        torch.manual_seed(9)
        expected = torch.autograd.grad(value_of(op, sample, theta, 5.0), [net.p, lr], allow_unused=True)
    except (RuntimeError, NotImplementedError):
        return "skipped"
    if not all(e is None or bool(e.isfinite().all()) for e in expected):
        return "skipped"
    inner = metaoptim.MetaSGD([net], lr=lr)
    try:
        with metaoptim.SlidingWindow(offline=True, slots=1):
            for t in range(2):
                torch.manual_seed(t)
                inner.step(value_of(op, sample, net.p, 1.0))
            torch.manual_seed(9)
            value_of(op, sample, net.p, 5.0).backward()
    except metaoptim.CaptureError as error:
        return f"refused: {error}"
    for got, e in zip((net.p.grad, lr.grad), expected, strict=True):
        got = torch.zeros(()) if got is None else got
        e = torch.zeros(()) if e is None else e
        if float((got - e).abs().max()) > 1e-8 * float(e.abs().max()) + 1e-12:
            return "wrong"
    return "exact"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.formatted_name)
def test_operator(op: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = itertools.islice(op.sample_inputs("cpu", torch.float64, requires_grad=False), SAMPLES)
        result = next((r for r in (check(op, sample) for sample in samples) if r != "skipped"), "skipped")
    if op.name not in REFUSED:
        assert result in ("exact", "skipped"), result
