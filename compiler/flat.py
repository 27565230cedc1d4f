"""A function of tensors, written down as a flat fx graph of the operators it calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metaoptim.errors import CaptureError

from .capture.ops import functional, op_info
from .capture.slicing import tensor_spec

aten = torch.ops.aten
_LIFTED = (aten.lift_fresh.default, aten.lift.default)


def flat_graph(
    fn: Callable[..., tuple], inputs: Sequence[Tensor], instead: Mapping[Any, Callable] | None = None
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The operators that ``fn(*inputs)`` calls below autograd, those of its backward passes included.

    What torch's own make_fx gives for static shapes, in less time: no proxies, no functorch, no symbolic numbers; and
    without detaches, which mean nothing there, and in-place operators whose memory nobody shares.

    Args:
        fn: returns a tuple of tensors and None.
        inputs: distinct tensors, fake ones under the caller's `FakeTensorMode` or real ones. Every other tensor that
            ``fn`` uses becomes a constant of the graph.
        instead: operator -> what to call in its place.

    Returns:
        The graph, and its constants: a root for a `GraphModule`, which is not made before the graph is as it shall be,
        for it compiles its code every time.
    """
    graph = fx.Graph()
    writer = _Writer(graph, instead or {})
    for i, t in enumerate(inputs):
        writer.bind(t, graph.placeholder(f"input_{i}"))
    with writer:
        results = fn(*inputs)
    graph.output(tuple(writer.token(r) for r in results))
    return graph, writer.constants


class _Writer(TorchDispatchMode):
    """Writes down every operator that reaches it."""

    def __init__(self, graph: fx.Graph, instead: Mapping[Any, Callable]) -> None:
        super().__init__()
        self.graph, self.instead = graph, instead
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}  # the tensor is held: its id stays its own
        self._memory: dict[int, Any] = {}  # storage -> what is in its place since it was to be written into

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.instead:
            with self:
                return self.instead[func](*args, **kwargs)
        if func.namespace != "prim" and self._is_constant(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace != "prim" and self._instead_of_writing(func, args, kwargs):
            return args[0]
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        if func is aten.detach.default:
            self._nodes[id(out)] = out, self.token(args[0])
            return out
        target = aten.lift_fresh_copy.default if func in _LIFTED else func
        node = self.graph.call_function(target, self.token(args), self.token(kwargs))
        if isinstance(out, Tensor):
            self.bind(out, node)
        elif isinstance(out, (list, tuple)):
            for i, o in enumerate(out):
                if isinstance(o, Tensor):
                    self.bind(o, self.graph.call_function(getitem, (node, i)))
        return out

    def _is_constant(self, func: Any, args: tuple, kwargs: dict) -> bool:
        """Whether a call has tensors for arguments, and all of them are constants, whose values are known."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not given or any(isinstance(t, FakeTensor) or id(t) in self._nodes for t in given):
            return False
        return not (op_info(func).writes or op_info(func).random or func in _LIFTED)

    def _instead_of_writing(self, func: Any, args: tuple, kwargs: dict) -> bool:
        """Make a new tensor where an operator would change one that nobody else sees; whether it was so."""
        if op_info(func).writes != (0,):
            return False
        pure, known = functional(func), self._nodes.get(id(args[0]))
        if (
            pure is None
            or known is None
            or known[1].op != "call_function"
            or args[0].layout is not torch.strided
        ):
            return False
        written, node = known
        storage = written.untyped_storage()._cdata
        sharing = [
            (t, n)
            for t, n in self._nodes.values()
            if t.layout is torch.strided and t.untyped_storage()._cdata == storage
        ]
        new = pure(*args, **kwargs)
        if any(n is not node for _, n in sharing) or tensor_spec(new) != tensor_spec(written):
            return False
        node = self.graph.call_function(pure, self.token(args), self.token(kwargs))
        func(*args, **kwargs)
        self._memory[storage] = ("instead", node)
        for t, _ in sharing:
            self.bind(t, node)
        return True

    def bind(self, t: Tensor, node: fx.Node) -> None:
        """Let ``node`` stand for ``t``."""
        self._nodes[id(t)] = t, node
        if t.layout is torch.strided:
            storage = t.untyped_storage()
            node.meta["memory"] = ((self._memory.get(storage._cdata, storage._cdata), storage.nbytes()),)

    def token(self, a: Any) -> Any:
        """``a`` with nodes in the place of tensors."""
        if isinstance(a, Tensor):
            found = self._nodes.get(id(a))
            return self._constant(a) if found is None else found[1]
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
        name = f"_tensor_constant{len(self.constants)}"
        self.constants[name] = t
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(name)
        self.bind(t, node)
        return node
