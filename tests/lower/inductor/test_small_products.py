"""Small matrix products as sums, in what inductor lowers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import run_by_inductor
from metaoptim.compiler.ir.tensors import tensor_spec
from metaoptim.compiler.lower.inductor.cpp import options
from metaoptim.compiler.lower.inductor.rewrites import Rewrites
from metaoptim.compiler.lower.inductor.small_products import sum_small_products

aten = torch.ops.aten
F64 = torch.float64


def made(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.arange(math.prod(shape), dtype=F64).sin().reshape(shape).to(dtype)


def traced(f: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    return make_fx(f, tracing_mode="fake")(*inputs)


def left(graph: fx.Graph) -> int:
    """How many products of matrices there are."""
    return sum(n.target in (aten.mm.default, aten.addmm.default) for n in graph.nodes)


SMALL: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "one column": (torch.mm, (made(264, 32), made(32, 1))),
    "ten columns": (torch.mm, (made(64, 128), made(128, 10))),
    "of a transposed weight": (torch.mm, (made(64, 12), made(3, 12).t())),
    "one row": (torch.mm, (made(1, 264), made(264, 32))),
    "an outer product": (torch.mm, (made(264, 1), made(1, 32))),
    "with a bias": (torch.addmm, (made(3), made(7, 5), made(5, 3))),
    "with a bias for each row": (torch.addmm, (made(7, 1), made(7, 5), made(5, 3))),
    "in single precision": (torch.mm, (made(6, 5, dtype=torch.float32), made(5, 2, dtype=torch.float32))),
}
LEFT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "many columns": (torch.mm, (made(64, 4), made(4, 64))),
    "large": (torch.mm, (made(600, 600), made(600, 1))),
    "in half precision": (torch.mm, (made(6, 5, dtype=torch.bfloat16), made(5, 2, dtype=torch.bfloat16))),
    "integers": (torch.mm, (torch.arange(6).reshape(2, 3), torch.arange(3).reshape(3, 1))),
    "empty": (torch.mm, (made(0, 3), made(3, 1))),
    "scaled": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=3), (made(3), made(7, 5), made(5, 3))),
}


@pytest.mark.parametrize("case", SMALL)
def test_what_is_small_becomes_a_sum(case: str) -> None:
    f, inputs = SMALL[case]
    graph = traced(f, *inputs)
    assert left(graph.graph) == 1
    want = graph(*inputs)
    sum_small_products(graph.graph)
    graph.recompile()
    assert not left(graph.graph)
    torch.testing.assert_close(graph(*inputs), want)
    (out,) = graph.graph.output_node().all_input_nodes
    assert tensor_spec(out.meta["val"]) == tensor_spec(want)  # inductor goes by it


@pytest.mark.parametrize("case", LEFT)
def test_the_rest_is_left(case: str) -> None:
    f, inputs = LEFT[case]
    graph = traced(f, *inputs)
    before = str(graph.graph)
    sum_small_products(graph.graph)
    assert str(graph.graph) == before
    assert left(graph.graph) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")  # by inductor
def test_compiled_they_give_the_same(tmp_path: Path) -> None:
    def f(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        h = torch.addmm(b, x, w.t()).tanh()
        y = h @ v
        return y, y.t() @ h, y @ v.t(), x.t() @ (y @ v.t())

    inputs = made(33, 4), made(8, 4), made(8), made(8, 1)
    for got, want in zip(run_by_inductor(f, inputs, tmp_path), f(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_pass_of_the_users_own_is_kept() -> None:
    class Own(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            """Nothing."""

        def uuid(self) -> object:
            return "own"

    own = Own()
    with inductor_config.patch(post_grad_custom_pre_pass=own), options():
        assert inductor_config.post_grad_custom_pre_pass is own
    with options():
        assert isinstance(inductor_config.post_grad_custom_pre_pass, Rewrites)
    assert inductor_config.post_grad_custom_pre_pass is None
