"""Several steps of a loop as one graph, and their derivative: made of the graphs of one step, one behind the other.

What one step leaves the next one finds without the engine in between, and what a step's derivative needs of the states
between them are residuals of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from metaoptim.compiler.compat import FakeTensorMode

from ..ir.programs.calls import Operand, StepCall
from ..ir.step import FlatGraph, Port, Split, StepGraph
from ..ir.tensors import TensorSpec, nbytes
from .flat import new_memory
from .graphs import distinct, drop_dead, storages

aten = torch.ops.aten


def block_of(call: StepCall, count: int, hvp: str, divided: Split) -> StepCall:
    """A call that takes ``count`` iterations of a loop at once.

    Args:
        call: the only one of the loop, in its first iteration; the loop does not draw random numbers.
        count: more than one.
        hvp: how its derivative was asked for.
        divided: its step's two graphs.
    """
    step, states = call.step, call.step.states
    ports, operands = list(step.inputs[:states]), list[Operand]()
    places: list[Sequence[int]] = [[i] * count for i in range(states)]  # of each input, by step
    for port, given in zip(step.inputs[states:], call.inputs, strict=True):
        copies = count if given.stride else 1
        places.append(range(len(ports), len(ports) + count) if given.stride else [len(ports)] * count)
        ports += [replace(port, name=f"{port.name}_{j}") for j in range(copies)] if given.stride else [port]
        operands += [replace(given.after(j), stride=count * given.stride) for j in range(copies)]
    split = _Steps(call, count, divided, ports, places).split()
    replay = _without_residuals(split.forward, len(step.outputs))
    made = StepGraph(
        replay.graph,
        tuple(ports),
        step.outputs,
        first_order=step.first_order,
        given=True,
        default_dtype=step.default_dtype,
    )
    # its graph has no gradient node to be looked at
    vars(made).update(steps=count * step.steps, chunked=False)
    made.derived.replay, made.derived.vjp[hvp] = replay, _joined(split)
    made.derived.splits[hvp] = split
    made.derivatives[hvp] = f"{step.derivatives.get(hvp, '')}, for {count} steps at once"
    return replace(call, step=made, inputs=operands)


class _Steps:
    """Steps one behind the other: which inputs of the block each of them is given, besides the state (``places``)."""

    def __init__(
        self, call: StepCall, count: int, divided: Split, ports: Sequence[Port], places: list[Sequence[int]]
    ) -> None:
        self.step, self.reads, self.writes = call.step, call.reads, call.writes
        self.count, self.divided, self.ports, self.places = count, divided, ports, places

    def split(self) -> Split:
        """The two graphs of the block."""
        graph, divided, outputs = fx.Graph(), self.divided, len(self.step.outputs)
        inputs = [_placeholder(graph, f"input_{i}", port.spec) for i, port in enumerate(self.ports)]
        state = dict(zip(self.reads, inputs, strict=False))
        given: list[list[fx.Node]] = []  # to each step
        saved: list[list[fx.Node]] = []  # by each step
        results: list[Any] = []
        for j in range(self.count):
            of_input = [inputs[at[j]] for at in self.places[len(self.reads) :]]
            given.append([*(state[r] for r in self.reads), *of_input])
            results = _inlined(graph, divided.forward, given[-1])
            saved.append([results[i] for i in divided.residuals])
            state.update(zip(self.writes, results[:outputs], strict=True))
        placeholders = list(divided.backward.graph.find_nodes(op="placeholder"))
        read = [i for i in range(len(self.step.inputs)) if placeholders[i].users]
        wanted = [n for nodes in saved for n in nodes] + [nodes[i] for nodes in given for i in read]
        residuals = [n for n in dict.fromkeys(wanted) if n not in inputs]
        made = results[:outputs]
        fresh = [n for n in residuals if n not in made]
        graph.output((*made, *fresh))
        distinct(graph)
        return Split(
            FlatGraph(graph, divided.forward.constants),
            FlatGraph(self._backward(inputs, residuals, given, saved), divided.backward.constants),
            tuple((made + fresh).index(n) for n in residuals),
            len(fresh),
            self.count * divided.saves,
            True,
        )

    def _backward(
        self,
        inputs: Sequence[fx.Node],
        residuals: Sequence[fx.Node],
        given: Sequence[Sequence[fx.Node]],
        saved: Sequence[Sequence[fx.Node]],
    ) -> fx.Graph:
        graph, step, states = fx.Graph(), self.step, len(self.reads)
        env: dict[fx.Node, fx.Node] = {}
        for kind, nodes in (("input", inputs), ("residual", residuals)):
            for i, node in enumerate(nodes):
                env[node] = graph.placeholder(f"{kind}_{i}")
                env[node].meta = dict(node.meta)
        # of what the steps that are still to come have left, by register
        specs = {i: step.outputs[i].spec for i in step.cotangents}
        arrived = {self.writes[i]: _placeholder(graph, f"cotangent_{i}", spec) for i, spec in specs.items()}
        found: dict[int, fx.Node] = {}  # gradients of the block's inputs
        layouts = _layouts(self.divided, step)

        def added(known: fx.Node | None, grad: fx.Node, spec: TensorSpec) -> fx.Node:
            if known is None:
                return grad
            return _in_new_memory(graph.call_function(aten.add.Tensor, (known, grad)), spec)

        for j in reversed(range(self.count)):
            # what the derivative does not read may be anything
            operands = [env.get(n, env[inputs[0]]) for n in given[j]] + [env[n] for n in saved[j]]
            for i, spec in specs.items():
                cotangent = arrived.pop(self.writes[i], None)
                operands.append(_zeros(graph, spec) if cotangent is None else cotangent)
            for i, grad in enumerate(_inlined(graph, self.divided.backward, operands)):
                if grad is None:
                    continue
                spec = step.inputs[i].spec
                # the derivative of the step before is made for that of the parameters
                if i < states and layouts[i] != spec.stride:
                    grad = _laid_out(graph, grad, spec)
                into, key = (arrived, self.reads[i]) if i < states else (found, self.places[i][j])
                into[key] = added(into.get(key), grad, spec)
        graph.output((*map(arrived.get, self.reads), *map(found.get, range(states, len(self.ports)))))
        drop_dead(graph)
        return graph


def _inlined(graph: fx.Graph, flat: FlatGraph, given: Sequence[fx.Node]) -> list[Any]:
    """Write a flat graph down in another one, with ``given`` for its inputs: its results."""
    env = dict(zip(flat.graph.find_nodes(op="placeholder"), given, strict=True))
    memory = {s: t for old, new in env.items() for (s, _), (t, _) in zip(storages(old), storages(new))}
    found: Any = graph.graph_copy(flat.graph, env)
    for old, new in env.items():
        if old.op == "call_function":
            new.meta = {"memory": tuple((memory.setdefault(s, new_memory()), n) for s, n in storages(old))}
        elif old.op == "get_attr":
            memory |= {s: s for s, _ in storages(old)}
    return list(found)


def _placeholder(graph: fx.Graph, name: str, spec: TensorSpec) -> fx.Node:
    return _in_new_memory(graph.placeholder(name), spec)


def _in_new_memory(node: fx.Node, spec: TensorSpec) -> fx.Node:
    node.meta = {"memory": ((new_memory(), nbytes(spec)),)}
    return node


def _layouts(divided: Split, step: StepGraph) -> list[tuple[int, ...] | None]:
    """The strides of the gradients that a step's backward gives."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [port.spec.empty() for port in step.inputs]
        made = divided.forward(*inputs)
        cotangents = [step.outputs[i].spec.empty() for i in step.cotangents]
        grads = divided.backward(*inputs, *(made[i] for i in divided.residuals), *cotangents)
    return [None if g is None else g.stride() for g in grads]


def _zeros(graph: fx.Graph, spec: TensorSpec) -> fx.Node:
    like = {"dtype": spec.dtype, "device": spec.device}
    zeros = graph.call_function(aten.full.default, (list(spec.shape), 0), like)
    return _laid_out(graph, _in_new_memory(zeros, spec), spec)


def _laid_out(graph: fx.Graph, value: fx.Node, spec: TensorSpec) -> fx.Node:
    """A copy of a tensor with the strides of ``spec``, which has no gaps."""
    order = sorted(range(len(spec.shape)), key=lambda d: -spec.stride[d])
    turned = graph.call_function(aten.permute.default, (value, order))
    contiguous: Any = {"memory_format": torch.contiguous_format}
    copy = _in_new_memory(graph.call_function(aten.clone.default, (turned,), contiguous), spec)
    back = graph.call_function(aten.permute.default, (copy, [order.index(d) for d in range(len(order))]))
    turned.meta, back.meta = dict(value.meta), dict(copy.meta)
    return back


def _without_residuals(forward: FlatGraph, outputs: int) -> FlatGraph:
    """The replay that is a part of a forward."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    results: Any = graph.graph_copy(forward.graph, env)
    graph.output(tuple(results[:outputs]))
    drop_dead(graph)
    return FlatGraph(graph, forward.constants)


def _joined(split: Split) -> FlatGraph:
    """The VJP: a forward, and the backward that goes on from it."""
    graph = fx.Graph()
    given = [graph.node_copy(p) for p in split.forward.graph.find_nodes(op="placeholder")]
    made = _inlined(graph, split.forward, given)
    placeholders = list(split.backward.graph.find_nodes(op="placeholder"))
    cotangents = [graph.node_copy(p) for p in placeholders[len(given) + len(split.residuals) :]]
    before = set(graph.find_nodes(op="get_attr"))
    grads = _inlined(graph, split.backward, [*given, *(made[i] for i in split.residuals), *cotangents])
    for node in set(graph.find_nodes(op="get_attr")) - before:  # two graphs may have used one name
        node.target = f"backward{node.target}"
    graph.output(tuple(grads))
    drop_dead(graph)
    constants = {f"backward{name}": t for name, t in split.backward.constants.items()}
    return FlatGraph(graph, split.forward.constants | constants)
