"""A part of a trace -> StepGraph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import OpOverload

from ..ir.slices import hook_key, restored
from ..ir.step import Port, Role, StepGraph
from ..ir.tensors import TensorSpec
from ..ir.trace import PartKind, Roles, Segment, roles_of, spec_of
from ..ir.update import UpdatePlan
from .substitutes import stand_in

aten = torch.ops.aten


class WithHooks:
    """Registers tensor hooks on a value and returns it."""

    def __init__(self, hooks: Sequence[Any]) -> None:
        self.hooks = tuple(hooks)
        self.__name__ = "with_hooks"

    def __call__(self, value: Tensor) -> Tensor:
        if value.requires_grad:
            for hook in self.hooks:
                value.register_hook(hook)  # pyright: ignore[reportUnknownMemberType]
        return value


class GradientHooks:
    """Applies the hooks of the user's own parameter to its inner gradient, as a training loop's backward would."""

    def __init__(self, hooks: Sequence[Any]) -> None:
        self.hooks = tuple(hooks)
        self.__name__ = "gradient_hooks"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GradientHooks) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return tuple(map(hook_key, self.hooks))

    def __call__(self, grad: Tensor) -> Tensor:
        for hook in self.hooks:
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad


def build_segment(
    segment: Segment,
    kind: PartKind,
    lifted: Sequence[int],
    hooked: bool,
    roles: Roles | None = None,
    first_order: bool = False,
) -> StepGraph:
    """The StepGraph of a segment: what it passes on, from what it reads.

    Args:
        segment: one of the segments of the kind.
        kind: which outputs are wanted, and what of all this carries a gradient.
        lifted: which of the segment's numbers are inputs.
        hooked, first_order: see `StepGraph`.
        roles: of its inputs and outputs; None for those of a part of a compiled function.
    """
    roles = roles or roles_of(segment, kind)
    builder = _Builder(segment, lifted)
    nodes: dict[int, fx.Node] = {}
    for i in roles.order:
        role = roles.inputs[i]
        nodes[i] = builder.input(role, spec_of(segment.inputs[i]), f"{role.value}_{i}", i in kind.active)
    numbers = {i: builder.number(i) for i in lifted}
    builder.calls([nodes[i] for i in range(len(nodes))], numbers)
    results: list[fx.Node] = []
    outputs: list[Port] = []
    for k, (place, role) in enumerate(roles.outputs.items()):
        results.append(builder.value(("v", *place)))
        outputs.append(Port(role, kind.outputs[place], f"{role.value}_{k}'", place in kind.active_outputs))
    builder.graph.output(tuple(results))
    builder.graph.lint()
    dynamic = any(e.shape is not None for e in segment.entries)
    return StepGraph(
        builder.graph, tuple(builder.inputs), tuple(outputs), segment.opaque, dynamic, first_order, hooked
    )


class _Builder:
    def __init__(self, segment: Segment, lifted: Sequence[int]) -> None:
        self.segment = segment
        self.lifted = lifted
        self.graph = fx.Graph()
        self.inputs: list[Port] = []
        self.nodes: list[fx.Node] = []
        self.hooked: dict[tuple[Any, ...], fx.Node] = {}
        self.parts: dict[tuple[Any, ...], fx.Node] = {}

    def input(self, role: Role, spec: TensorSpec, name: str, active: bool = True) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["spec"] = spec
        self.inputs.append(Port(role, spec, name, active))
        return node

    def number(self, i: int) -> fx.Node:
        """An input for one of the numbers."""
        dtype = torch.float64 if isinstance(self.segment.numbers[i], float) else torch.int64
        return self.input(Role.SCAN, TensorSpec((), dtype, (), torch.device("cpu")), f"number_{i}")

    def calls(self, inputs: list[fx.Node], numbers: dict[int, fx.Node]) -> None:
        # in-place operators must not reach what the tape holds
        inputs = [
            self.graph.call_function(aten.clone.default, (x,))
            if self.segment.memory_of(ref) in self.segment.written
            else x
            for ref, x in zip(self.segment.inputs, inputs, strict=True)
        ]
        self.given, self.numbers = inputs, numbers
        for k, node in enumerate(inputs):
            self._hook(("x", k), node)
        for i, (entry, key) in enumerate(zip(self.segment.entries, self.segment.key[0], strict=True)):
            node = self._emit(entry, key)
            node.meta["grad"] = entry.grad
            if isinstance(entry.op, UpdatePlan):
                node.meta["update"] = True
            self.nodes.append(node)
            for where in list(self.segment.hooks):
                if where[:2] == ("v", i):
                    self._hook(where, self.value(where))

    def _hook(self, where: tuple[Any, ...], node: fx.Node) -> None:
        spies = self.segment.hooks.get(where)
        if spies:
            self.hooked[where] = self.graph.call_function(WithHooks([s.hook for s in spies]), (node,))

    def _emit(self, entry: Any, key: tuple[Any, ...]) -> fx.Node:
        op, args = entry.op, key[1]
        if op is aten.select.int and isinstance(args[2], tuple) and args[2][0] == "n":
            return self._select(*args)
        if op is aten.slice.Tensor and len(args) > 3 and isinstance(args[2], tuple) and args[2][0] == "n":
            return self._slice(*args)
        if op is aten.rsub.Scalar and args[1][0] == "n" and args[1][1] in self.lifted:
            op = aten.rsub.Tensor
        values = [self.value(a) for a in args]
        for at, a in enumerate(args):
            if isinstance(a, tuple) and a[:1] == ("n",) and a[1] in self.lifted:
                # a wrapped number takes the dtype of the tensor it meets
                values[at] = self.graph.call_function(aten.type_as.default, (values[at], values[0]))
        call, kwargs = self.graph.call_function, {k: self.value(v) for k, v in key[2]}
        if not isinstance(op, OpOverload):
            return call(op, tuple(values), kwargs)
        function, in_place = stand_in(op)  # pyright: ignore[reportUnknownArgumentType]
        if not in_place:
            return call(function, tuple(values), kwargs)
        # it may keep what it is given for its derivative
        made = call(function, (call(aten.clone.default, (values[0],)), *values[1:]), kwargs)
        return call(aten.copy_.default, (values[0], made))

    def _select(self, source: Any, dim: Any, at: tuple[str, int]) -> fx.Node:
        call, source, dim = self.graph.call_function, self.value(source), self.value(dim)
        if at[1] not in self.lifted:
            return call(aten.select.int, (source, dim, self.segment.numbers[at[1]]))
        index = call(aten.view.default, (self.numbers[at[1]], [1]))
        return call(aten.squeeze.dim, (call(aten.index_select.default, (source, dim, index)), dim))

    def _slice(self, source: Any, dim: Any, at: tuple[str, int], length: Any, stride: Any) -> fx.Node:
        call, source = self.graph.call_function, self.value(source)
        dim, length, stride = map(self.value, (dim, length, stride))
        start = self.segment.numbers[at[1]]
        if at[1] not in self.lifted:
            return call(aten.slice.Tensor, (source, dim, start, start + length * stride, stride))
        offsets = call(aten.arange.default, (length,))
        index = call(aten.add.Tensor, (call(aten.mul.Tensor, (offsets, stride)), self.numbers[at[1]]))
        return call(aten.index_select.default, (source, dim, index))

    def value(self, token: Any) -> Any:
        """The node or constant behind a token of the segment."""
        return restored(token, self._found)

    def _found(self, token: tuple[Any, ...]) -> Any:
        kind: str = token[0]
        at: int = token[1]
        if kind == "n":
            return self.numbers[at] if at in self.lifted else self.segment.numbers[at]
        if token in self.hooked:
            return self.hooked[token]
        if kind == "x":
            return self.given[at]
        assert kind == "v", token
        if token[2] is None:
            return self.nodes[at]
        if token not in self.parts:
            self.parts[token] = self.graph.call_function(operator.getitem, (self.nodes[at], token[2]))
        return self.parts[token]
