"""What flat graphs are without what they need not hold."""

from __future__ import annotations

import torch
from torch import fx

from metaoptim.compiler.derive.flat import flat_graph
from metaoptim.compiler.derive.graphs import merge_equal, undo_transposes, work_of
from metaoptim.compiler.ir.step import FlatGraph

aten = torch.ops.aten


def test_transposes_of_transposes_go_but_a_result_stays_what_it_was() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")

    def t(of: fx.Node) -> fx.Node:
        return graph.call_function(aten.t.default, (of,))

    once = t(x)
    thrice = t(t(once))
    graph.output((graph.call_function(aten.mm.default, (t(thrice), thrice)), t(once)))
    given = torch.randn(2, 3)
    expected = fx.GraphModule({}, graph)(given)
    undo_transposes(graph)
    merge_equal(graph)
    targets = [n.target for n in graph.nodes if n.op == "call_function"]
    assert targets == [aten.t.default, aten.mm.default, aten.t.default]
    for got, want in zip(fx.GraphModule({}, graph)(given), expected, strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()


def test_views_that_change_nothing_are_left_out() -> None:
    def views(x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        same = aten.alias(x).view(2, 3)[:].expand(2, 3)
        return same.mul(2), same[:, 1:], x.view(3, 2), z.conj(), z.conj().conj()

    given = torch.randn(2, 3), torch.randn(2, dtype=torch.complex128)
    traced = flat_graph(views, given)
    targets = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert targets == [aten.mul.Tensor, aten.slice.Tensor, aten.view.default, *3 * [aten._conj.default]]
    for got, want in zip(fx.GraphModule({}, traced.graph)(*given), views(*given), strict=True):
        assert torch.equal(got, want) and got.is_conj() == want.is_conj()


def test_work_grows_with_what_is_allocated_and_not_with_views() -> None:
    def twice(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.view(-1).sin().cos().view(x.shape),)

    small, large = (
        work_of(flat_graph(twice, [torch.ones(n, 4, dtype=torch.float64)]).graph) for n in (1, 4096)
    )
    assert small == 6 and large == 6 + 2 * 8  # two results of 128 KiB


def test_constants_are_made_anew_by_each_run() -> None:
    """What Python's numbers become is a view to torch, of which each run needs a copy: it may be written into."""

    def decayed(x: torch.Tensor) -> tuple[torch.Tensor]:
        decay = torch.tensor(0.9)
        return (decay.mul_(0.5) * x,)

    x = torch.randn(3)
    traced = flat_graph(decayed, [x], real=True)
    graph = FlatGraph(traced.graph, traced.constants)
    for _ in range(3):
        torch.testing.assert_close(graph(x)[0], 0.45 * x)
