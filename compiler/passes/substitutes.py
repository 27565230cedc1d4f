"""Operators whose own derivatives will not do in a step graph, written with others that have all of them.

Some formulas look at values (for zeros in a product, for the true entries of a mask), which a graph for all values
cannot; some operators have no derivative at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.compat import OpOverload
from metaoptim.errors import CaptureError

from ..ir.operators import ATTENTION, functional

aten = torch.ops.aten


@functools.cache
def stand_in(op: OpOverload) -> tuple[Callable[..., Any], bool]:
    """What a step graph calls for ``op``, and whether the result is to be written into its first argument."""
    pure = None if op is aten.copy_.default else functional(op)
    return (SUBSTITUTES[pure], True) if pure in SUBSTITUTES else (SUBSTITUTES.get(op, op), False)


def copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``source`` in a tensor like ``x``: torch gives the operator no derivative where it does not write in place."""
    return _laid_out(source.to(x.dtype).expand(x.shape), x)


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """A copy of ``t`` in the order in memory of ``like``: views that are taken of it depend on that."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    there = t.permute(order).clone(memory_format=torch.contiguous_format)
    return there.permute([order.index(d) for d in range(like.dim())])


def filled(x: Tensor, dim: int, index: Tensor, value: Tensor) -> Tensor:
    """`index_fill` with a learnt value: torch's formula looks for the different ones among the indices."""
    chosen = torch.zeros(x.shape[dim] if x.dim() else 1, dtype=torch.bool, device=x.device)
    chosen = chosen.index_fill(0, index.reshape(-1), True)
    return torch.where(chosen.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())]), value, x)


def put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """`index_put`, whose derivative by what one mask puts everywhere looks for the mask's true entries."""
    at, mask = next(((i, m) for i, m in enumerate(indices) if m is not None), (0, None))
    if mask is None or mask.dtype is not torch.bool or sum(m is not None for m in indices) > 1:
        return aten.index_put(x, indices, values, accumulate)
    after = x.dim() - at - mask.dim()  # dimensions that the mask says nothing about, and the value may
    if values.dim() > after:
        before = values.dim() - 1 - after
        if values.shape[before] != 1:
            return aten.index_put(x, indices, values, accumulate)
        values = values.reshape(*values.shape[:before], *[1] * mask.dim(), *values.shape[before + 1 :])
    return torch.where(mask.view(*mask.shape, *[1] * after), x + values if accumulate else values, x)


def scatter_reduced(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """`scatter_reduce`, whose derivative of a product counts zeros."""
    if reduce != "prod" or not index.numel():
        return aten.scatter_reduce(x, dim, index, source, reduce, include_self=include_self)
    if not x.dim():
        x, index, source = x.reshape(1), index.reshape(1), source.reshape(1)
        return scatter_reduced(x, 0, index, source, reduce, include_self=include_self).reshape(())
    dim %= x.dim()
    rows = tuple(slice(None) if d == dim else slice(n) for d, n in enumerate(index.shape))
    target = _places(x)[rows].gather(dim, index)
    source = source[tuple(map(slice, index.shape))]
    return _multiplied(x, target, source, include_self, index.shape[dim])


def index_reduced(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """`index_reduce`, whose derivative of a product counts zeros."""
    if reduce != "prod" or not index.numel():
        return aten.index_reduce(x, dim, index, source, reduce, include_self=include_self)
    if x.dim():  # every element of the source has an index of its own
        index = (
            index.long().view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())]).expand(source.shape)
        )
    return scatter_reduced(x, dim, index, source, reduce, include_self=include_self)


def _places(x: Tensor) -> Tensor:
    """The position of each element."""
    return torch.arange(x.numel(), device=x.device).view(x.shape)


def _multiplied(x: Tensor, target: Tensor, source: Tensor, include_self: bool, most: int) -> Tensor:
    """``x`` where each element of ``source`` has been multiplied into the element at its ``target``, at most ``most``.

    Products of neighbours, of neighbours' products and so on, so that no derivative divides by a factor.
    """
    target, source, first = target.reshape(-1), source.reshape(-1), x.reshape(-1)
    if not include_self:
        hit = torch.zeros_like(first, dtype=torch.bool).index_fill(0, target, True)
        first = torch.where(hit, 1, first)
    places = _places(first)
    place, order = torch.cat([places, target]).sort(stable=True)
    product, reach = torch.cat([first, source]).index_select(0, order), 1
    while reach <= most:  # each is the product of the last ``reach`` elements of its place, itself included
        further = torch.where(place[reach:] == place[:-reach], product[:-reach], 1)
        product = torch.cat([product[:reach], product[reach:] * further])
        reach *= 2
    last = torch.searchsorted(place, places, right=True) - 1
    return _laid_out(product.index_select(0, last).view(x.shape), x)


def _by_math(op: Any) -> Callable[..., tuple[Tensor, None]]:
    """Scaled-dot-product attention from differentiable parts: the fused kernels have no second derivative."""
    names: list[str] = [a.name for a in op._schema.arguments]

    def attention_by_math(*args: Any, **options: Any) -> tuple[Tensor, None]:
        given: dict[str, Any] = dict(zip(names, args)) | options
        if given.get("dropout_p"):
            raise CaptureError(
                "dropout inside a fused kernel of scaled_dot_product_attention cannot be repeated; call it within "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or put the dropout outside"
            )
        query, key, value = args[:3]
        mask = given.get("attn_mask", given.get("attn_bias"))
        grouped = query.shape[-3] != key.shape[-3]  # several heads of the query share one of the key
        causal, scale = given.get("is_causal", False), given.get("scale")
        out: Tensor = aten._scaled_dot_product_attention_math(
            query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped
        )[0]
        # laid out in memory like the query, as the fused kernels do it: the views taken of it depend on that
        order = sorted(range(query.dim()), key=query.stride, reverse=True)
        if op is aten._scaled_dot_product_efficient_attention.default:  # however the query is laid out
            order = [0, 2, 1, 3]
        return out.permute(order).contiguous().permute([order.index(d) for d in range(query.dim())]), None

    return attention_by_math


def lstm_by_parts(
    input: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    hx: Tensor,
    cx: Tensor,
    reverse: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """One LSTM layer, step by step: the derivative of oneDNN's fused layer cannot be traced.

    i, f, g, o = split(x W_ih^T + b_ih + h W_hh^T + b_hh); c' = σ(f) c + σ(i) tanh(g); h' = σ(o) tanh(c').
    """
    h, c = hx.reshape(input.shape[1], -1), cx.reshape(input.shape[1], -1)
    outputs: list[Tensor] = []
    steps = range(input.shape[0])
    for t in reversed(steps) if reverse else steps:
        gates = torch.nn.functional.linear(input[t], w0, w2) + torch.nn.functional.linear(h, w1, w3)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    if reverse:
        outputs.reverse()
    return torch.stack(outputs), h.reshape(hx.shape), c.reshape(cx.shape), None


def trace_by_sum(x: Tensor) -> Tensor:
    """The trace: the second derivative of torch's own looks at values."""
    return x.diagonal().sum()


#: Operators without a second derivative, or without one that can be traced, and what stands for them in a step graph.
SUBSTITUTES: dict[Any, Callable[..., Any]] = {op: _by_math(op) for op in ATTENTION} | {
    aten.mkldnn_rnn_layer.default: lstm_by_parts,
    aten.trace.default: trace_by_sum,
    aten.copy.default: copied,
    aten.index_fill.int_Tensor: filled,
    aten.index_put.default: put,
    aten.scatter_reduce.two: scatter_reduced,
    aten.index_reduce.default: index_reduced,
}
