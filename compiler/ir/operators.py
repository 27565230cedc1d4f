"""What a capture must know about an operator: what it writes, whether it is random, what a custom Function is given."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from metaoptim.compiler.compat import (
    ONCE,
    OpOverload,
    TreeSpec,
    has_meta_kernel,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from metaoptim.errors import CaptureError

aten = torch.ops.aten
T = TypeVar("T")


class OpInfo(NamedTuple):
    """Facts about one operator overload."""

    op: Any
    writes: tuple[int | str, ...]  # positions / keyword names of the arguments it mutates
    random: bool
    dynamic: bool  # output shape depends on values
    lifts_number: bool  # a Python number among its two operands may become an input
    particular: bool  # it is in one of the sets below, which captures go by
    in_lists: bool  # it mutates tensors in lists, whose versions torch does not move under a dispatch mode


# Python numbers become inputs beside these; elsewhere one counts more digits than a tensor would.
LIFTS = (torch.float32, torch.float64)
_TWO_OPERANDS = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar),
    *(aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor),
}
# What takes a part that a number says out of a tensor.
INDEXING = {aten.select.int, aten.slice.Tensor}
# Where among their arguments an offset is that counts from the start of an operand's memory, not of the operand.
OFFSETS = {aten.as_strided.default: 3, aten.as_strided_copy.default: 3, aten.as_strided_scatter.default: 4}
PARTING = {aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default}
# The formula of its derivative reads the lengths that it is given.
PACK = aten._pack_padded_sequence.default
# Their results hold nothing yet.
EMPTY = {
    *(aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default),
    *(aten.empty.memory_format, aten.empty_strided.default),
}


# Fused attention. Its operators are tagged as random, which they are with dropout alone, and that is refused.
ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
)


_infos: dict[int, OpInfo] = {}  # by the id of the operator: its hash is a call of Python


def op_info(op: Any) -> OpInfo:
    """Facts about ``op``, computed once."""
    found = _infos.get(id(op))
    if found is None:
        found = _infos[id(op)] = _looked_up(op)
    return found


def _looked_up(op: Any) -> OpInfo:
    writes: list[int | str] = []
    in_lists = False
    for position, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.append(argument.name if argument.kwarg_only else position)
            in_lists |= isinstance(argument.type, torch.ListType)
    return OpInfo(
        op,
        tuple(writes),
        torch.Tag.nondeterministic_seeded in op.tags and op not in ATTENTION,
        torch.Tag.dynamic_output_shape in op.tags or op is PACK,
        op in _TWO_OPERANDS,
        op in {*INDEXING, *OFFSETS, *PARTING, *EMPTY, *MASKED, *BATCH_NORM, *RRELU, *WRONG_IN_FORWARD_MODE},
        in_lists,
    )


def shape_depends_on_values(op: Any, args: Sequence[Any]) -> bool:
    """Whether that of a dynamic operator's results does: of an indexed tensor, where one of the indices is a mask."""
    if op is not aten.index.Tensor:
        return True
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def is_operator(op: object) -> bool:
    """Whether it is one of torch's, and no other function."""
    return isinstance(op, OpOverload)


def is_several(a: object) -> TypeGuard[Sequence[Any]]:
    """Whether it is a tuple or a list."""
    return isinstance(a, (tuple, list))


def is_named(a: object) -> TypeGuard[dict[Any, Any]]:
    """Whether it is a dictionary."""
    return isinstance(a, dict)


def op_text(op: Any) -> str:
    """What is called, as text."""
    return str(op) if is_operator(op) or isinstance(op, Function) else getattr(op, "__name__", str(op))


@functools.cache
def shapes_known(op: Any) -> bool:
    """Whether what results are like follows from what arguments are like: it has a kernel without data."""
    return torch.Tag.data_dependent_output not in op.tags and has_meta_kernel(op)


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
    places = op_info(op).writes if is_operator(op) else ()
    if not places:  # as most operators
        return []
    found: list[Any] = []
    for where in places:
        a = kwargs.get(where) if isinstance(where, str) else args[where] if where < len(args) else None
        found += a if is_several(a) else [a]
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


# Torch differentiates their derivatives in forward mode wrongly.
WRONG_IN_FORWARD_MODE = {
    *(aten.native_layer_norm.default, *BATCH_NORM),
    *(aten._linalg_solve_ex.default, aten._linalg_det.default, aten._linalg_slogdet.default),
    aten.linalg_householder_product.default,
}
PLAIN_NORM = "(x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()"

# Leaky ReLUs whose slopes are drawn in training mode, and fixed otherwise: operators of their own that say neither.
RRELU = {
    aten.rrelu_with_noise.default: (aten.leaky_relu.default, aten.mul.Tensor),
    aten.rrelu_with_noise_.default: (aten.leaky_relu_.default, aten.mul_.Tensor),
}


def slopes_of(
    x: Any,
    noise: Any,
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
    return tuple([None if i in where[:2] else a for i, a in enumerate(args)])


def from_the_front(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All arguments of an index, counted from the front: (tensor, dim, index) or (tensor, dim, start, end, step)."""
    if op is aten.select.int:
        t, dim, index = args
        return t, dim, index % t.shape[dim]
    given: list[Any] = [*args, *(None, 0, None, None, None)[len(args) :]]
    return *given[:2], *slice(*given[2:]).indices(given[0].shape[given[1]])


def parts(op: Any, args: tuple[Any, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
    """What gives one by one the parts that a call takes a tensor apart into: operators and their arguments."""
    given: tuple[Any, ...] = (*args, 0)  # the dimension may be left out
    if op is aten.unbind.int:
        t, dim = given[:2]
        return [(aten.select.int, (t, dim, i)) for i in range(t.shape[dim])]
    t, sizes, dim = given[:3]
    if isinstance(sizes, int):
        sizes = [sizes] * max(1, -(-t.shape[dim] // max(1, sizes)))
    ends = itertools.accumulate(sizes)
    return [(aten.slice.Tensor, (t, dim, end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def lifts(info: OpInfo, args: tuple[Any, ...]) -> bool:
    """Whether the second argument of a call is a Python number that may be another in otherwise equal steps."""
    return info.lifts_number and type(args[1]) in (int, float) and args[0].dtype in LIFTS


# -- custom autograd Functions: one call each, whose arguments may be of any structure --------------------------------

_TENSOR = object()
_PLAIN = (Tensor, int, float, str, type(None))


def flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], TreeSpec | None]:
    """What arguments hold, and how it lies in them; None for positional ones without containers, found out quickly."""
    if not kwargs and all(isinstance(a, _PLAIN) for a in args):
        return args, None
    # torch would make a plain tuple of a Size
    return tree_flatten((args, kwargs), is_leaf=lambda a: isinstance(a, torch.Size))


class Function:
    """A user's `autograd.Function` with all it is given besides tensors, applied again whenever a recording is run.

    Called with the tensors one by one, it puts them where they were: in lists, tuples, named tuples and dictionaries
    made anew, since ``forward`` may keep or change them. Equal ones do the same to the same tensors.
    """

    def __init__(self, cls: Any, leaves: Iterable[Any], spec: TreeSpec | None) -> None:
        """A call of ``cls.apply`` with arguments that have been `flattened`.

        Raises:
            CaptureError: for a container that cannot be made anew, and for reentrant checkpointing.
        """
        if cls is CheckpointFunction:
            raise CaptureError(
                "reentrant activation checkpointing cannot be differentiated twice; call checkpoint(..., "
                "use_reentrant=False)"
            )
        self.cls, self.__name__ = cls, cls.__name__
        self._leaves = [_TENSOR if isinstance(a, Tensor) else a for a in leaves]
        self._spec = spec
        self._key = (cls, spec, *[a if a is _TENSOR else _key(cls, a) for a in self._leaves])
        self._hash = hash(self._key)

    def arguments(self, tensors: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with these tensors."""
        given = iter(tensors)
        leaves = [next(given) if a is _TENSOR else a for a in self._leaves]
        return (tuple(leaves), {}) if self._spec is None else tree_unflatten(leaves, self._spec)

    def __call__(self, *tensors: Tensor) -> Any:
        once = self.cls.__name__ in ONCE
        args, kwargs = self.arguments(map(_once.apply, tensors) if once else tensors)
        return self.cls.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        args, kwargs = self.arguments(itertools.repeat(_Blank()))
        return f"{self.__name__}({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})"


class _NoMore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return g.view_as(g)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError(
            "linear_cross_entropy with `options` has no second derivative, and plain PyTorch takes a wrong one; leave "
            "`options` out"
        )


_no_more: Any = _NoMore


class _Once(torch.autograd.Function):
    """Identity whose gradient has none: it depends on the argument, and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return _no_more.apply(g, *ctx.saved_tensors)


_once: Any = _Once


class _Blank:
    def __repr__(self) -> str:
        return "·"


def _key(cls: Any, a: Any) -> tuple[Any, ...]:
    """What must be equal for another argument to do the same."""
    if isinstance(a, float):
        return (type(a), a.hex())  # -0.0 is not 0.0, and nan is nan
    if isinstance(a, complex):
        return (type(a), a.real.hex(), a.imag.hex())
    try:
        hash(a)
        hashable = True
    except TypeError:
        hashable = False
    if issubclass(type(a), (list, tuple, dict, set, frozenset)):  # of a type that torch takes for a leaf
        if not hashable or any(isinstance(b, Tensor) for b in tree_leaves(list(a))):
            raise CaptureError(
                f"{cls.__name__}.apply is given a {type(a).__name__}, which cannot be made anew when the inner step is "
                "run again; pass a list, a tuple, a named tuple or a dict of the same"
            )
    return (type(a), a if hashable else id(a))  # pyright: ignore[reportUnknownVariableType]
