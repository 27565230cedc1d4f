"""Numbers that tensors are computed with, made once, in kernels on a CPU.

Adam's 1 - β^t, or the rate of a schedule, is a tensor of one element. Inductor writes its formula into the loops that
read it, and the C++ compiler cannot move it out of them: as far as it knows, they write what it reads. So β^t was
computed for every sixteen elements of a parameter, which took an eighth to a fifth of Adam's graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten
# A number is worth keeping if one of these has made it.
_SLOW = {
    *(aten.pow.Scalar, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.sqrt.default, aten.rsqrt.default),
    *(aten.exp.default, aten.exp2.default, aten.expm1.default, aten.sigmoid.default, aten.tanh.default),
    *(aten.log.default, aten.log2.default, aten.log1p.default, aten.sin.default, aten.cos.default),
}


def make_scalars_once(graph: fx.Graph) -> None:
    """Have inductor keep such numbers, where tensors of more elements are computed with them."""
    slow: dict[fx.Node, None] = {}
    for node in graph.nodes:
        made = node.target in _SLOW or any(n in slow for n in node.all_input_nodes)
        if made and node.op == "call_function" and _size(node) == 1 and node.meta["val"].is_cpu:
            slow[node] = None
    for node in slow:
        readers = [user for user in node.users if _size(user) > 1 and user.meta["val"].is_cpu]
        if readers:
            value: Tensor = node.meta["val"]
            with graph.inserting_after(node):
                # a view of memory, which inductor has to fill before
                kept = graph.call_function(aten.as_strided.default, (node, value.shape, value.stride()))
            kept.meta["val"] = value
            for reader in readers:
                reader.replace_input_with(node, kept)


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0
