"""Slice of a recording + update plan -> StepGraph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .capture.entries import Function
from .capture.ops import SUBSTITUTES, op_info
from .capture.slicing import Keyed, Slice, hook_key
from .ir import Port, Role, StepGraph, gradient
from .segments import Body, Roles, Segment, roles_of, spec_of
from .update import UpdatePlan

aten = torch.ops.aten


class WithHooks:
    """Registers tensor hooks on a value and returns it."""

    def __init__(self, hooks: Sequence[Any]) -> None:
        self.hooks = tuple(hooks)
        self.__name__ = "with_hooks"

    def __call__(self, value: Tensor) -> Tensor:
        if value.requires_grad:
            for hook in self.hooks:
                value.register_hook(hook)
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

    def _key(self) -> tuple:
        return tuple(map(hook_key, self.hooks))

    def __call__(self, grad: Tensor) -> Tensor:
        for hook in self.hooks:
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad


def build_step(
    slice_: Slice,
    plan: UpdatePlan,
    params: Sequence[int],
    stale: bool,
    theta_specs: Sequence[tuple],
    param_specs: Sequence[tuple],
    state_specs: Sequence[dict[str, tuple]],
    new_state_specs: Sequence[dict[str, tuple]],
    lifted: Sequence[int],
    grad_hooks: Sequence[Sequence[Any]],
    first_order: bool,
    hooked: bool,
) -> StepGraph:
    """The StepGraph of a recorded step.

    Args:
        slice_: what the loss (first root) and the hyper-parameters (the other roots) depend on.
        plan: the update; its slots are the slice's roots after the first.
        params: for each updated parameter, its place among the slice's thetas.
        stale: whether the update finds other parameters than the loss read.
        theta_specs, param_specs: of the slice's thetas and the updated parameters.
        state_specs, new_state_specs: of the states of the updated parameters, before and after.
        lifted: which of the slice's numbers are inputs.
        grad_hooks: for each updated parameter, the hooks of the user's own parameter that change its gradient.
        first_order, hooked: see `StepGraph`.
    """
    builder = _Builder(slice_, lifted)
    thetas = [builder.input(Role.THETA, spec, f"theta_{i}") for i, spec in enumerate(theta_specs)]
    now = (
        [builder.input(Role.THETA_NOW, spec, f"now_{i}") for i, spec in enumerate(param_specs)]
        if stale
        else [thetas[i] for i in params]
    )
    states = [
        {k: builder.input(Role.OPT_STATE, spec, f"{k}_{i}") for k, spec in state.items()}
        for i, state in enumerate(state_specs)
    ]
    externals = [
        builder.input(Role.META if grad else Role.SCAN, spec, f"{'meta' if grad else 'scan'}_{i}")
        for i, (spec, grad) in enumerate(slice_.key[2])
    ]
    numbers = {i: builder.number(i) for i in lifted}
    builder.body(thetas, externals, numbers)
    loss, *slots = [builder.value(root) for root in slice_.roots]
    graph = builder.graph
    grads_node = graph.call_function(gradient, (loss, tuple(thetas[i] for i in params)))
    grads = [graph.call_function(operator.getitem, (grads_node, i)) for i in range(len(params))]
    grads = [
        graph.call_function(GradientHooks(h), (g,)) if h else g
        for g, h in zip(grads, grad_hooks, strict=True)
    ]
    grad_nodes = grads
    if first_order:
        grads = [graph.call_function(aten.detach.default, (g,)) for g in grads]
    update = graph.call_function(plan, (now, grads, states, slots))
    update.meta["update"] = True
    new_thetas, new_states = (graph.call_function(operator.getitem, (update, i)) for i in (0, 1))
    results = [graph.call_function(operator.getitem, (new_thetas, i)) for i in range(len(params))]
    for i, specs in enumerate(new_state_specs):
        new = graph.call_function(operator.getitem, (new_states, i))
        results += [graph.call_function(operator.getitem, (new, name)) for name in specs]
    outputs = [Port(Role.LOSS, (), "loss")]
    outputs += [Port(Role.THETA, spec, f"theta_{i}'") for i, spec in zip(params, param_specs, strict=True)]
    outputs += [
        Port(Role.OPT_STATE, spec, f"{name}_{i}'")
        for i, specs in enumerate(new_state_specs)
        for name, spec in specs.items()
    ]
    outputs += [Port(Role.GRADIENT, spec, f"g_{i}") for i, spec in zip(params, param_specs, strict=True)]
    graph.output((loss, *results, *grad_nodes))
    graph.lint()
    return StepGraph(
        graph,
        tuple(builder.inputs),
        tuple(outputs),
        slice_.opaque or any(grad_hooks),
        any(e.shape is not None for e in slice_.entries),
        first_order,
        hooked,
    )


def build_segment(
    segment: Segment, body: Body, lifted: Sequence[int], hooked: bool, roles: Roles | None = None
) -> StepGraph:
    """The StepGraph of a segment: what it passes on, from what it reads.

    Args:
        segment: one of the body's.
        body: which outputs are wanted, and what of all this carries a gradient.
        lifted: which of the segment's numbers are inputs.
        hooked: see `StepGraph`.
        roles: of its inputs and outputs; None for those of a part of a compiled function.
    """
    roles = roles or roles_of(segment, body)
    builder = _Builder(segment, lifted)
    nodes: dict[int, fx.Node] = {}
    for i in roles.order:
        role = roles.inputs[i]
        nodes[i] = builder.input(role, spec_of(segment.inputs[i]), f"{role.value}_{i}", i in body.active)
    numbers = {i: builder.number(i) for i in lifted}
    builder.body([], [nodes[i] for i in range(len(nodes))], numbers)
    results, outputs = [], []
    for k, (place, role) in enumerate(roles.outputs.items()):
        results.append(builder.value(("v", *place)))
        outputs.append(Port(role, body.outputs[place], f"{role.value}_{k}'", place in body.active_outputs))
    builder.graph.output(tuple(results))
    builder.graph.lint()
    return StepGraph(
        builder.graph, tuple(builder.inputs), tuple(outputs), segment.opaque, False, False, hooked
    )


class _Builder:
    def __init__(self, slice_: Keyed, lifted: Sequence[int]) -> None:
        self.slice: Any = slice_
        self.lifted = lifted
        self.graph = fx.Graph()
        self.inputs: list[Port] = []
        self.nodes: list[fx.Node] = []
        self.hooked: dict[tuple, fx.Node] = {}

    def input(self, role: Role, spec: tuple, name: str, active: bool = True) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["spec"] = spec
        self.inputs.append(Port(role, spec, name, active))
        return node

    def number(self, i: int) -> fx.Node:
        """An input for one of the numbers."""
        dtype = torch.float64 if isinstance(self.slice.numbers[i], float) else torch.int64
        return self.input(Role.SCAN, ((), dtype, (), torch.device("cpu")), f"number_{i}")

    def body(self, thetas: list[fx.Node], externals: list[fx.Node], numbers: dict[int, fx.Node]) -> None:
        if any(isinstance(e.op, torch._ops.OpOverload) and op_info(e.op).writes for e in self.slice.entries):
            # in-place operators must not reach what the tape holds
            thetas, externals = (
                [self.graph.call_function(aten.clone.default, (x,)) for x in xs] for xs in (thetas, externals)
            )
        self.thetas, self.externals, self.numbers = thetas, externals, numbers
        for k in range(len(thetas)):
            self._hook(("t", k), thetas[k])
        for k in range(len(externals)):
            self._hook(("x", k), externals[k])
        for i, (entry, key) in enumerate(zip(self.slice.entries, self.slice.key[0], strict=True)):
            node = self._emit(entry, key)
            node.meta["grad"] = entry.grad
            if isinstance(entry.op, UpdatePlan):
                node.meta["update"] = True
            self.nodes.append(node)
            for where in list(self.slice.hooks):
                if where[:2] == ("v", i):
                    self._hook(where, self.value(where))

    def _hook(self, where: tuple, node: fx.Node) -> None:
        spies = self.slice.hooks.get(where)
        if spies:
            self.hooked[where] = self.graph.call_function(WithHooks([s.hook for s in spies]), (node,))

    def _emit(self, entry: Any, key: tuple) -> fx.Node:
        op = entry.op
        if isinstance(op, Function):
            args = tuple(
                k if not isinstance(k, tuple) else a if k[:1] == ("o",) else self.value(k)
                for a, k in zip(entry.args, key[1], strict=True)
            )
            return self.graph.call_function(op, args, {k: self.value(v) for k, v in key[2]})
        args = key[1]
        if op is aten.select.int and isinstance(args[2], tuple) and args[2][0] == "n":
            return self._select(*args)
        if op is aten.slice.Tensor and len(args) > 3 and isinstance(args[2], tuple) and args[2][0] == "n":
            return self._slice(*args)
        values = [self.value(a) for a in args]
        for at, a in enumerate(args):
            if isinstance(a, tuple) and a[:1] == ("n",) and a[1] in self.lifted:
                # a wrapped number takes the dtype of the tensor it meets
                values[at] = self.graph.call_function(aten.type_as.default, (values[at], values[0]))
        return self.graph.call_function(
            SUBSTITUTES.get(op, op), tuple(values), {k: self.value(v) for k, v in key[2]}
        )

    def _select(self, source: Any, dim: int, at: tuple) -> fx.Node:
        call, source = self.graph.call_function, self.value(source)
        if at[1] not in self.lifted:
            return call(aten.select.int, (source, dim, self.slice.numbers[at[1]]))
        index = call(aten.view.default, (self.numbers[at[1]], [1]))
        return call(aten.squeeze.dim, (call(aten.index_select.default, (source, dim, index)), dim))

    def _slice(self, source: Any, dim: int, at: tuple, length: int, stride: int) -> fx.Node:
        call, source = self.graph.call_function, self.value(source)
        start = self.slice.numbers[at[1]]
        if at[1] not in self.lifted:
            return call(
                aten.slice.Tensor,
                (source, dim, start, start + (length - 1) * stride + 1 if length else start, stride),
            )
        offsets = call(aten.arange.default, (length,))
        index = call(aten.add.Tensor, (call(aten.mul.Tensor, (offsets, stride)), self.numbers[at[1]]))
        return call(aten.index_select.default, (source, dim, index))

    def value(self, token: Any) -> Any:
        """The node or constant behind a token of the slice."""
        if not isinstance(token, tuple):
            return token
        kind = token[0] if token and isinstance(token[0], str) else None
        if token in self.hooked if kind in ("v", "t", "x") else False:
            return self.hooked[token]
        if kind == "v":
            node = self.nodes[token[1]]
            return node if token[2] is None else self.graph.call_function(operator.getitem, (node, token[2]))
        if kind == "t":
            return self.thetas[token[1]]
        if kind == "x":
            return self.externals[token[1]]
        if kind == "n":
            return self.numbers[token[1]] if token[1] in self.lifted else self.slice.numbers[token[1]]
        if kind == "d":
            return {k: self.value(t) for k, t in token[1]}
        if kind == "c":
            return float.fromhex(token[1]) if len(token) == 2 else token[2]
        return tuple(self.value(t) for t in token)
