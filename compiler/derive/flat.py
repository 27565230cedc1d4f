"""A function of tensors, written down as a flat fx graph of the operators it calls."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import getitem
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from metaoptim.compiler.compat import (
    DisableAutocast,
    FakeTensor,
    TorchDispatchMode,
    called,
    disable_current_modes,
    tree_leaves,
    unset_fake_temporarily,
)
from metaoptim.errors import CaptureError

from ..capture.intercept import recording
from ..ir.operators import functional, op_info, shape_depends_on_values, shapes_known
from ..ir.tensors import tensor_spec

aten = torch.ops.aten
_LIFTED = (aten.lift_fresh.default, aten.lift.default)
_COPIED = aten.lift_fresh_copy.default
_NONE: Mapping[str, Any] = {}
_lock = RLock()  # of what is patched while a step is traced


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's cycle collector rests inside the block.

    A trace, or the states of a loop, are many objects, all of them alive, and no cycles: the collector would go through
    them, and through all that torch has loaded, again and again (more than half of the time that a capture of 1,000
    steps took, and a tenth of a compiled loop's).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The default dtype is ``dtype`` inside the block: integers become it where they meet a fraction, for instance."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def tracing(dtype: torch.dtype | None = None) -> Iterator[None]:
    """One trace at a time, outside the window, the user's modes, autocast and inference mode, with grad mode on."""
    recorder = recording.set(None)
    with (
        uncollected(),
        _lock,
        default_dtype(dtype or torch.get_default_dtype()),
        disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        DisableAutocast(),
        torch.autograd.set_detect_anomaly(False),
    ):
        try:
            yield
        finally:
            recording.reset(recorder)


class Unfollowed(Exception):
    """A trace over real tensors has met what only one over fake tensors understands, or refuses."""


class Traced(NamedTuple):
    """The operators a function has called, the tensors it has used besides its arguments, and what it returned."""

    graph: fx.Graph
    constants: dict[str, Tensor]
    results: tuple


def flat_graph(
    fn: Callable[..., tuple[Any, ...]],
    inputs: Sequence[Tensor],
    instead: Mapping[Any, Callable[..., Any]] = _NONE,
    real: bool = False,
    marks: Mapping[str, Any] = _NONE,
) -> Traced:
    """The operators that ``fn(*inputs)`` calls below autograd, those of its backward passes included.

    What torch's own make_fx gives for static shapes, in less time: no proxies, no symbolic numbers; and without
    detaches and views that change nothing, which mean nothing there, and in-place operators whose memory nobody shares.

    Args:
        fn: returns a tuple of tensors and None.
        inputs: distinct, fake under the caller's `FakeTensorMode` or real. All else that ``fn`` uses becomes constant.
        instead: operator -> what to call in its place.
        real: the results are wanted, and the graph must hold for other values: where it might not, `Unfollowed`.
        marks: what nodes are to hold in their ``meta``; ``fn`` may change it as it goes.
    """
    graph = fx.Graph()
    writer = _Writer(graph, instead, real, marks)
    for i, t in enumerate(inputs):
        writer.bind(t, graph.placeholder(f"input_{i}"))
    with writer:
        results = fn(*inputs)
    graph.output(tuple(writer.token(r) for r in results))
    return Traced(graph, writer.constants, results)


_memories = itertools.count()


def new_memory() -> int:
    """A name for a piece of memory that no graph of this process uses."""
    return next(_memories)


class _Memory:
    """A stretch of memory: what nodes call it now, and the tensors in it, with what stands for them."""

    __slots__ = ("key", "held", "within")

    def __init__(self, held: StorageWeakRef) -> None:
        self.key = new_memory()
        self.held = held  # keeps another storage from being born at its address
        self.within: list[tuple[weakref.ref[Tensor], fx.Node]] = []


def _same(view: Any, t: Any) -> bool:
    """Whether a view shows its tensor as it is."""
    return (
        isinstance(view, Tensor)
        and isinstance(t, Tensor)
        and view.layout is t.layout is torch.strided
        and tensor_spec(view) == tensor_spec(t)
        and (view.storage_offset(), view.is_conj(), view.is_neg())
        == (t.storage_offset(), t.is_conj(), t.is_neg())
    )


class _Writer(TorchDispatchMode):
    """Writes down every operator that reaches it."""

    def __init__(
        self, graph: fx.Graph, instead: Mapping[Any, Callable], real: bool, marks: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.graph, self.instead, self.real, self.marks = graph, instead, real, marks
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._memory: dict[int, _Memory] = {}  # by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.instead:
            with self:
                return self.instead[func](*args, **kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if self.real:
            self._check(func, args, kwargs)
        elif self._is_constant(func, args, kwargs):
            with unset_fake_temporarily():
                return called(func, args, kwargs)
        if self._instead_of_writing(func, args, kwargs):
            return args[0]
        out = called(func, args, kwargs)
        if func is aten.detach.default or (func.is_view and func not in _LIFTED and _same(out, args[0])):
            self.bind(out, self.token(args[0]), made=False)
            return out
        node = self._write(_COPIED if func in _LIFTED else func, args, kwargs)
        if isinstance(out, Tensor):
            self.bind(out, node)
        elif isinstance(out, (list, tuple)):
            for i, o in enumerate(out):
                if isinstance(o, Tensor):
                    self.bind(o, self._write(getitem, (node, i)))
        return out

    def _write(self, target: Any, args: tuple, kwargs: Mapping[str, Any] = _NONE) -> fx.Node:
        # fx would look through given arguments for symbolic numbers, for longer than all else takes
        node = self.graph.create_node("call_function", target, None, None, target.__name__.split(".")[0])
        node.args = self.token(args)
        if kwargs:
            node.kwargs = self.token(kwargs)
        node.meta.update(self.marks)
        return node

    def _check(self, func: Any, args: tuple, kwargs: dict) -> None:
        """That a call on real tensors says what calls on others will be."""
        if func in _LIFTED or func is _COPIED:  # a number or a list of Python's, made a tensor
            if self.known(args[0]) is None:
                self._hold(args[0], args[0].clone())  # which may be written into now
            return
        info = op_info(func)
        if info.random or (info.dynamic and shape_depends_on_values(func, args)) or not shapes_known(func):
            raise Unfollowed(func)
        for a in (*args, *kwargs.values()):
            for t in a if isinstance(a, (list, tuple)) else (a,):
                if isinstance(t, Tensor) and self.known(t) is None:
                    raise Unfollowed(func)

    def _is_constant(self, func: Any, args: tuple, kwargs: dict) -> bool:
        """Whether a call has tensors for arguments, and all of them are constants, whose values are known."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not given or any(isinstance(t, FakeTensor) or self.known(t) is not None for t in given):
            return False
        return not (op_info(func).writes or op_info(func).random or func in _LIFTED)

    def _instead_of_writing(self, func: Any, args: tuple, kwargs: dict) -> bool:
        """Make a new tensor where an operator would change one that nobody else sees; whether it was so."""
        if op_info(func).writes != (0,) or op_info(func).random:
            return False
        pure, written = functional(func), args[0]
        node = self.known(written)
        if pure is None or node is None or node.op != "call_function" or written.layout is not torch.strided:
            return False
        memory = self._memory[written.untyped_storage()._cdata]
        memory.within = [(ref, n) for ref, n in memory.within if ref() is not None]
        if any(n is not node for _, n in memory.within):
            return False
        new = pure(*args, **kwargs)
        if tensor_spec(new) != tensor_spec(written):
            return False
        node = self._write(pure, args, kwargs)
        func(*args, **kwargs)
        memory.key, sharing, memory.within = new_memory(), memory.within, []
        for ref, _ in sharing:
            if (t := ref()) is not None:
                self.bind(t, node)
        return True

    def known(self, t: Tensor) -> fx.Node | None:
        """What stands for the very tensor ``t``."""
        found = self._nodes.get(id(t))
        return found[1] if found is not None and found[0]() is t else None

    def bind(self, t: Tensor, node: fx.Node, made: bool = True) -> None:
        """Let ``node``, which has made it or another tensor like it, stand for ``t``."""
        ref = weakref.ref(t)
        self._nodes[id(t)] = ref, node
        if t.layout is torch.strided:
            storage = t.untyped_storage()
            memory = self._memory.get(storage._cdata)
            if memory is None:
                memory = self._memory[storage._cdata] = _Memory(StorageWeakRef(storage))
            memory.within.append((ref, node))
            if made:
                node.meta["memory"] = ((memory.key, storage.nbytes()),)

    def token(self, a: Any) -> Any:
        """``a`` with nodes in the place of tensors."""
        if isinstance(a, Tensor):
            node = self.known(a)
            return self._constant(a) if node is None else node
        if isinstance(a, (list, tuple)):
            return type(a)(self.token(b) for b in a)
        return {k: self.token(v) for k, v in a.items()} if isinstance(a, dict) else a

    def _constant(self, t: Tensor) -> fx.Node:
        if isinstance(t, FakeTensor):
            raise CaptureError(
                f"a tensor of shape {tuple(t.shape)} is used that is no argument: a custom Function is given an object "
                "with tensors in it, or a hook or update has kept one; pass tensors by themselves, or in a list, a "
                "tuple, a named tuple or a dict"
            )
        if self.real:
            raise Unfollowed("a constant")
        return self._hold(t, t)

    def _hold(self, t: Tensor, value: Tensor) -> fx.Node:
        """What stands for the constant ``t``, which has this value."""
        name = f"_tensor_constant{len(self.constants)}"
        self.constants[name] = value
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(name)
        self.bind(t, node)
        return node
