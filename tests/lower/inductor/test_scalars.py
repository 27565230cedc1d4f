"""Numbers that tensors are computed with are made once in a kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import run_by_inductor
from metaoptim.compiler.lower.inductor.scalars import make_scalars_once

aten = torch.ops.aten
F64 = torch.float64


def kept(f: object, *inputs: Tensor) -> tuple[fx.Graph, list[object]]:
    """The graph of ``f`` with its numbers kept, and what has made these."""
    traced = make_fx(f, tracing_mode="fake")(*inputs)  # type: ignore[arg-type]
    want = traced(*inputs)
    make_scalars_once(traced.graph)
    traced.recompile()
    for got, expected in zip(traced(*inputs), want, strict=True):
        assert torch.equal(got, expected)
    graph = traced.graph
    views = graph.find_nodes(op="call_function", target=aten.as_strided.default)
    return graph, [view.args[0].target for view in views]


def adam(step: Tensor, lr: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """An update, the count as float and as double."""
    count = step + 1
    high = count.to(F64)
    down, up = 1 - 0.9**high, (1 - 0.999**high).sqrt()
    return count, m / down, v / (v.sqrt() / up + 1e-8), m * lr, m * lr.exp()


INPUTS = (torch.tensor(3.0), torch.tensor(0.4), torch.linspace(-1, 2, 40), torch.linspace(0.1, 2, 40))


def test_only_what_is_slow_to_make_is_kept_and_only_for_larger_tensors() -> None:
    _, made = kept(adam, *INPUTS)
    assert made == [aten.rsub.Scalar, aten.sqrt.default, aten.exp.default]
    _, made = kept(lambda a, b: (a.exp() * b, a.exp() + 1), torch.tensor(2.0), torch.ones(()))
    assert not made
    _, made = kept(lambda a, b: (a.exp() * b, (a + 1) * b), torch.ones(4), torch.ones(4))
    assert not made


def test_a_number_that_is_shaped_or_expanded_is_kept_before() -> None:
    _, made = kept(
        lambda a, b: (a.sin().view(1, 1).expand(3, 4) * b, a.sin().reshape(1) * b),
        *map(torch.ones, ([1], [3, 4])),
    )
    assert len(made) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")  # by inductor
def test_compiled_they_give_the_same(tmp_path: Path) -> None:
    inputs = [t.to(F64) for t in INPUTS]
    for got, want in zip(run_by_inductor(adam, inputs, tmp_path), adam(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
