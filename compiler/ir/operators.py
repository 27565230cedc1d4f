"""What the recorder must know about an ATen operator: what it writes, whether it is random, what can be lifted."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from metaoptim.compiler.compat import OpOverload, has_meta_kernel
from metaoptim.errors import CaptureError

aten = torch.ops.aten
T = TypeVar("T")


class OpInfo(NamedTuple):
    """Facts about one operator overload."""

    writes: tuple[int | str, ...]  # positions / keyword names of the arguments it mutates
    random: bool
    dynamic: bool  # output shape depends on values
    lifts_number: bool  # a Python number among its two operands may become an input


_INFO: dict[Any, OpInfo] = {}
# Python numbers become inputs beside these; elsewhere one counts more digits than a tensor would.
LIFTS = (torch.float32, torch.float64)
_TWO_OPERANDS = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar),
    *(aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor),
}
# What takes a part that a number says out of a tensor.
INDEXING = {aten.select.int, aten.slice.Tensor}
PARTING = {aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default}
# Their results hold nothing yet.
EMPTY = {
    *(aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default),
    *(aten.empty.memory_format, aten.empty_strided.default),
}


def op_info(op: Any) -> OpInfo:
    """Facts about ``op``, computed once."""
    info = _INFO.get(op)
    if info is None:
        writes: list[int | str] = []
        for position, argument in enumerate(op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                writes.append(argument.name if argument.kwarg_only else position)
        info = _INFO[op] = OpInfo(
            tuple(writes),
            torch.Tag.nondeterministic_seeded in op.tags and op not in SUBSTITUTES,
            torch.Tag.dynamic_output_shape in op.tags or op is aten._pack_padded_sequence.default,
            op in _TWO_OPERANDS,
        )
    return info


def op_text(op: Any) -> str:
    return str(op) if isinstance(op, OpOverload) else getattr(op, "__name__", None) or str(op)


@functools.cache
def shapes_known(op: Any) -> bool:
    """Whether what results are like follows from what arguments are like: it has a kernel without data."""
    return torch.Tag.data_dependent_output not in op.tags and (has_meta_kernel(op))


@functools.cache
def functional(op: Any) -> Any:
    """The overload that returns what an in-place ``op`` writes, if there is one."""
    name = op._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        if not found._schema.is_mutable and _types(found) == _types(op):  # pow_.Scalar is pow.Tensor_Scalar
            return found
    return None


def _types(op: Any) -> list[str]:
    return [str(a.type) for a in op._schema.arguments]


def written(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], kind: type[T]) -> list[T]:
    """The arguments of a ``kind`` that a call changes in place: tensors, or what stands for them."""
    found: list[Any] = []
    for where in op_info(op).writes if isinstance(op, OpOverload) else ():
        a = kwargs.get(where) if isinstance(where, str) else args[where] if where < len(args) else None
        found += a if isinstance(a, (list, tuple)) else [a]
    return [a for a in found if a is not None and isinstance(a, kind)]


# Their outputs have fixed shapes, but where an index is a boolean mask their derivatives look for its true entries.
MASKED = {aten.index_put_.default, aten.index_put.default}

# In training mode the output does not depend on the running statistics, and these operators update them in place
# without saying so in their schema: the recorded call does without them. (position of the two, position of `training`)
BATCH_NORM = {
    aten.native_batch_norm.default: (3, 4, 5),
    aten.cudnn_batch_norm.default: (3, 4, 5),
    aten.miopen_batch_norm.default: (3, 4, 5),
}


# Leaky ReLUs whose slopes are drawn in training mode, and fixed otherwise: operators of their own that say neither.
RRELU = {
    aten.rrelu_with_noise.default: (aten.leaky_relu.default, aten.mul.Tensor),
    aten.rrelu_with_noise_.default: (aten.leaky_relu_.default, aten.mul_.Tensor),
}


def slopes_of(
    x: Tensor,
    noise: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> float | None:
    """The slope that such an operator, given these, has below zero; None where it is drawn for every element."""
    return None if training else (lower + upper) / 2


def without_running_stats(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` of a training-mode batch norm with its running statistics left out."""
    where = BATCH_NORM.get(op)
    if where is None or not args[where[2]]:
        return args
    args_list = list(args)
    args_list[where[0]] = args_list[where[1]] = None
    return tuple(args_list)


def from_the_front(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All arguments of an index, counted from the front: (tensor, dim, index) or (tensor, dim, start, end, step)."""
    if op is aten.select.int:
        t, dim, index = args
        return t, dim, index % t.shape[dim]
    return _sliced(*args)


def _sliced(
    t: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> tuple[Any, ...]:
    return t, dim, *slice(start, end, step).indices(t.shape[dim])


def parts(op: Any, args: tuple[Any, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
    """What gives one by one the parts that a call takes a tensor apart into: operators and their arguments."""
    if op is aten.unbind.int:
        return _rows(*args)
    return _split(*args)


def _rows(t: Tensor, dim: int = 0) -> list[tuple[Any, tuple[Any, ...]]]:
    return [(aten.select.int, (t, dim, i)) for i in range(t.shape[dim])]


def _split(t: Tensor, sizes: int | list[int], dim: int = 0) -> list[tuple[Any, tuple[Any, ...]]]:
    if isinstance(sizes, int):
        sizes = [sizes] * max(1, -(-t.shape[dim] // max(1, sizes)))
    ends = itertools.accumulate(sizes)
    return [(aten.slice.Tensor, (t, dim, end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def lifts(info: OpInfo, args: tuple[Any, ...]) -> bool:
    """Whether the second argument of a call is a Python number that may be another in otherwise equal steps."""
    return info.lifts_number and type(args[1]) in (int, float) and args[0].dtype in LIFTS


def attention_by_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, None]:
    """Scaled-dot-product attention from differentiable parts: the fused kernels have no second derivative."""
    if dropout_p:
        raise CaptureError(
            "dropout inside a fused kernel of scaled_dot_product_attention cannot be repeated; call it within "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or put the dropout outside"
        )
    grouped = query.shape[-3] != key.shape[-3]  # several heads of the query share one of the key
    out = aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
    )[0]
    # laid out in memory like the query, as the fused kernel does it: the views taken of it depend on that
    order = sorted(range(query.dim()), key=query.stride, reverse=True)
    return out.permute(order).contiguous().permute([order.index(d) for d in range(query.dim())]), None


def _cuda_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    p: float = 0.0,
    causal: bool = False,
    _debug: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    return attention_by_math(query, key, value, p, causal, **options)


def _cuda_cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    _logsumexp: bool,
    p: float = 0.0,
    causal: bool = False,
    _debug: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    return attention_by_math(query, key, value, p, causal, attn_mask=bias, **options)


def _cuda_efficient(*args: Any, **options: Any) -> tuple[Tensor, None]:
    out = _cuda_cudnn(*args, **options)[0]
    return out.transpose(1, 2).contiguous().transpose(1, 2), None  # however the query is laid out


def lstm_by_parts(
    input: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    hx: Tensor,
    cx: Tensor,
    reverse: bool,
    batch_sizes: list[int],
    mode: int,
    hidden_size: int,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """One LSTM layer, step by step: the derivative of oneDNN's fused layer cannot be traced.

    i, f, g, o = split(x W_ih^T + b_ih + h W_hh^T + b_hh); c' = σ(f) c + σ(i) tanh(g); h' = σ(o) tanh(c').
    """
    h, c = hx.reshape(input.shape[1], -1), cx.reshape(input.shape[1], -1)
    outputs = []
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


# Operators without a second derivative, or without one that can be traced, and what stands for them in a step graph.
SUBSTITUTES: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: attention_by_math,
    aten._scaled_dot_product_flash_attention.default: _cuda_flash,
    aten._scaled_dot_product_cudnn_attention.default: _cuda_cudnn,
    aten._scaled_dot_product_efficient_attention.default: _cuda_efficient,
    aten.mkldnn_rnn_layer.default: lstm_by_parts,
    aten.trace.default: trace_by_sum,
}
