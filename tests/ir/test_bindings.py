"""Flat graphs run by torch's own functions: they call the same operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from metaoptim.compiler.ir.bindings import BINDINGS, bound
from metaoptim.compiler.ir.step import FlatGraph

aten = torch.ops.aten
M, V, B = torch.randn(3, 3) + 4, torch.randn(3) + 2, torch.randn(2, 3, 3)

#: Arguments, in each of the ways that derivatives call an operator; others take one matrix.
GIVEN: dict[Any, list[tuple[Any, ...]]] = {
    **{
        op: [(M, V), (M, 2), (M, 0.5), (V, torch.tensor(2.0))]
        for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
    },
    **{op: [(M, V)] for op in (aten.maximum.default, aten.minimum.default, aten.pow.Tensor_Tensor)},
    **{op: [(M, 2), (M, 0.5)] for op in (aten.rsub.Scalar, aten.pow.Tensor_Scalar)},
    **{op: [(M, 0), (M, 0.5)] for op in (aten.eq.Scalar, aten.gt.Scalar, aten.le.Scalar)},
    **{op: [(M, [0], True), (M, [0, 1]), (M, [-1], False)] for op in (aten.sum.dim_IntList, aten.mean.dim)},
    aten.pow.Scalar: [(2, V), (0.9, torch.tensor(3.0))],
    aten.where.self: [(M > 4, M, V), (V > 2, V, torch.tensor(0.0))],
    aten.mm.default: [(M, M.t())],
    aten.addmm.default: [(V, M, M)],
    aten.bmm.default: [(B, B)],
    aten.transpose.int: [(B, 1, 2), (B, -1, 0)],
    aten.permute.default: [(B, [2, 0, 1])],
    aten.unsqueeze.default: [(M, 1), (V, -1)],
    aten.squeeze.dim: [(M[:1], 0)],
    aten.select.int: [(M, 0, 1)],
    aten.cat.default: [([M, M], 1), ([V, V],)],
    aten.view.default: [(M, [9]), (M, [-1, 1])],
    aten.expand.default: [(V, [2, 3])],
}
#: Options after the star that derivatives give.
OPTIONS: dict[Any, dict[str, Any]] = {
    aten.add.Tensor: {"alpha": 2},
    aten.sub.Tensor: {"alpha": 3},
    aten.addmm.default: {"alpha": 2, "beta": 0.5},
    aten.sum.dim_IntList: {"dtype": torch.float64},
    aten.sum.default: {"dtype": torch.float64},
    aten.clone.default: {"memory_format": torch.contiguous_format},
}


class Calls(TorchDispatchMode):
    """Writes down which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", BINDINGS, ids=str)
def test_a_binding_calls_its_operator_and_no_other(op: Any) -> None:
    given = [(args, {}) for args in GIVEN.get(op, [(M,)])]
    given += [(given[0][0], OPTIONS[op])] if op in OPTIONS else []
    for args, options in given:
        graph = fx.Graph()
        inputs = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
        places = iter([graph.placeholder(f"x{i}") for i in range(len(inputs))])
        taken = tree_map(lambda a, places=places: next(places) if isinstance(a, Tensor) else a, args)
        graph.output((graph.call_function(op, taken, options),))
        program = fx.GraphModule({}, bound(graph)).forward
        assert "ops" not in fx.GraphModule({}, bound(graph)).code
        with torch.no_grad(), Calls() as calls:
            (got,) = program(*inputs)
        assert calls.ops == [op]
        expected = op(*args, **options)
        assert torch.equal(got, expected) and got.dtype == expected.dtype
        assert got.stride() == expected.stride()


def test_a_flat_graph_stays_one_of_operators() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.t.default, (graph.call_function(aten.exp.default, (x,)),)),))
    flat = FlatGraph(graph, {})
    first, second = flat(M), flat(M)
    assert torch.equal(first[0], second[0]) and torch.equal(first[0], M.exp().t())
    assert [n.target for n in flat.graph.nodes if n.op == "call_function"] == [
        aten.exp.default,
        aten.t.default,
    ]
    assert "torch.ops.aten.exp.default" in flat.module.code
