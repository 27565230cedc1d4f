"""A part of a trace -> StepGraph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import OpOverload

from ..ir.step import Port, Role, StepGraph
from ..ir.tensors import TensorSpec
from ..ir.traces.slices import hook_key, restored
from ..ir.traces.trace import Part, Roles, Segment, roles_of, spec_of
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
        self.hooks, self.key = tuple(hooks), tuple(map(hook_key, hooks))
        self.__name__ = "gradient_hooks"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GradientHooks) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __call__(self, grad: Tensor) -> Tensor:
        for hook in self.hooks:
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad


def build_step_graph(
    part: Part, lifted: Sequence[int], hooked: bool, roles: Roles | None = None, first_order: bool = False
) -> StepGraph:
    """The StepGraph of a part: what it passes on, from what it reads.

    The ``lifted`` ones of its numbers are inputs. Without ``roles``, it is a part of a compiled function.
    """
    segment, kind = part.segment, part.kind
    roles = roles or roles_of(segment, kind)
    builder = _Builder(segment, lifted)
    for i in roles.order:
        role = roles.inputs[i]
        spec = spec_of(segment.inputs[i])
        builder.values["x", i] = builder.input(role, spec, f"{role.value}_{i}", i in kind.active)
    for i in lifted:  # a number is an input too
        dtype = torch.float64 if isinstance(segment.numbers[i], float) else torch.int64
        spec = TensorSpec((), dtype, (), torch.device("cpu"))
        builder.values["n", i] = builder.input(Role.SCAN, spec, f"number_{i}")
    builder.calls()
    builder.graph.output(tuple(builder.value(("v", *place)) for place in roles.outputs))
    builder.graph.lint()
    outputs = tuple(
        Port(role, kind.outputs[place], f"{role.value}_{k}'", place in kind.active_outputs)
        for k, (place, role) in enumerate(roles.outputs.items())
    )
    dynamic = any(e.shape is not None for e in segment.entries)
    return StepGraph(
        builder.graph, tuple(builder.ports), outputs, segment.opaque, dynamic, first_order, hooked
    )


class _Builder:
    """A segment as a graph; ``values``: token of a value, an input or a number -> its node, or the number itself."""

    def __init__(self, segment: Segment, lifted: Sequence[int]) -> None:
        self.segment, self.lifted = segment, lifted
        self.graph = fx.Graph()
        self.ports: list[Port] = []
        self.values: dict[tuple[Any, ...], Any] = {("n", i): n for i, n in enumerate(segment.numbers)}

    def input(self, role: Role, spec: TensorSpec, name: str, active: bool = True) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["spec"] = spec
        self.ports.append(Port(role, spec, name, active))
        return node

    def calls(self) -> None:
        segment = self.segment
        for k, ref in enumerate(segment.inputs):
            if (
                segment.memory_of(ref) in segment.written
            ):  # in-place operators must not reach what the tape holds
                self.values["x", k] = self._call(aten.clone.default, self.values["x", k])
        for k in range(len(segment.inputs)):
            self._hook(("x", k))
        for i, (entry, key) in enumerate(zip(segment.entries, segment.key[0], strict=True)):
            node = self.values["v", i, None] = self._emit(entry.op, key[1], dict(key[2]))
            node.meta["grad"] = entry.grad
            for where in segment.hooks:
                if where[:2] == ("v", i):
                    self._hook(where)

    def _call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(op, args, kwargs)

    def _hook(self, where: tuple[Any, ...]) -> None:
        if spies := self.segment.hooks.get(where):
            self.values[where] = self._call(WithHooks([s.hook for s in spies]), self.value(where))

    def _emit(self, op: Any, tokens: tuple[Any, ...], keywords: dict[str, Any]) -> fx.Node:
        args = [self.value(a) for a in tokens]
        kwargs = {k: self.value(v) for k, v in keywords.items()}
        numbers = [at for at, a in enumerate(tokens) if isinstance(a, tuple) and a[:1] == ("n",)]
        if op is aten.slice.Tensor and 2 in numbers and len(args) > 3:
            return self._slice(*args)
        inputs = [at for at in numbers if tokens[at][1] in self.lifted]
        if op is aten.select.int and inputs:
            source, dim, index = args
            row = self._call(
                aten.index_select.default, source, dim, self._call(aten.view.default, index, [1])
            )
            return self._call(aten.squeeze.dim, row, dim)
        for at in inputs:  # a wrapped number takes the dtype of the tensor it meets
            args[at] = self._call(aten.type_as.default, args[at], args[0])
        if op is aten.rsub.Scalar and inputs:
            op = aten.rsub.Tensor
        if not isinstance(op, OpOverload):
            return self._call(op, *args, **kwargs)
        function, in_place = stand_in(op)  # pyright: ignore[reportUnknownArgumentType]
        if not in_place:
            return self._call(function, *args, **kwargs)
        # it may keep what it is given for its derivative
        made = self._call(function, self._call(aten.clone.default, args[0]), *args[1:], **kwargs)
        return self._call(aten.copy_.default, args[0], made)

    def _slice(self, source: Any, dim: int, start: Any, length: int, stride: int) -> fx.Node:
        """A slice that begins where a number says, which may be an input."""
        if not isinstance(start, fx.Node):
            return self._call(aten.slice.Tensor, source, dim, start, start + length * stride, stride)
        offsets = self._call(aten.mul.Tensor, self._call(aten.arange.default, length), stride)
        index = self._call(aten.add.Tensor, offsets, start)
        return self._call(aten.index_select.default, source, dim, index)

    def value(self, token: Any) -> Any:
        """The node or constant behind a token of the segment."""
        return restored(token, self._found)

    def _found(self, token: tuple[Any, ...]) -> Any:
        if token not in self.values:  # one of several outputs
            self.values[token] = self._call(operator.getitem, self.value((*token[:2], None)), token[2])
        return self.values[token]
