"""Small matrix products as sums of products, in kernels on a CPU.

A call of MKL takes microseconds, and ends a kernel. Products by vectors, and by few columns, take less as loops of the
kernel that they are in: an actor-critic's step with layers of 32 takes a fifth less. Compiling takes no longer.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
_FEW = 10  # columns
_MOST = 1 << 18  # multiplications; beyond, MKL's blocks pay


def sum_small_products(graph: fx.Graph) -> None:
    """Rewrite ``a @ b`` to ``(a[:, :, None] * b[None]).sum(1)`` where that takes less."""
    for op in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=op):
            if _is_small(node):
                _rewrite(graph, node)


def _is_small(node: fx.Node) -> bool:
    a, b = (n.meta["val"] for n in node.args[-2:])  # type: ignore[union-attr]
    if node.kwargs or not a.is_cpu or a.dtype not in (torch.float32, torch.float64):
        return False
    (rows, inner), columns = a.shape, b.shape[1]
    return 0 < rows * inner * columns <= _MOST and (columns <= _FEW or rows == 1 or inner == 1)


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    def call(op: torch._ops.OpOverload, *args: object) -> fx.Node:
        made = graph.call_function(op, args)  # type: ignore[arg-type]
        made.meta["val"] = op(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        return made

    *bias, a, b = node.args
    with graph.inserting_before(node), node.meta["val"].fake_mode:
        parts = call(aten.mul.Tensor, call(aten.unsqueeze.default, a, 2), call(aten.unsqueeze.default, b, 0))
        product = call(aten.sum.dim_IntList, parts, [1])
        if bias:
            product = call(aten.add.Tensor, product, bias[0])
    node.replace_all_uses_with(product)
    graph.erase_node(node)
