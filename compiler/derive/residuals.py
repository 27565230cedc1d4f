"""A step and its derivative that share work: what the derivative needs of the step's forward is saved, not run again.

The VJP of a step runs the step's forward once more. Where memory allows, the forward saves residuals instead: the
values from which the rest of the derivative follows by views and pointwise operators alone, chosen so that their bytes
are fewest, which is a minimum cut of the VJP's graph (as in T. Chen et al., arXiv 1604.06174, and torch's own
partitioner).
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import networkx as nx
import torch
from torch import fx

from metaoptim.compiler.compat import OpOverload

from ..ir.step import FlatGraph, Split, StepGraph
from ..ir.text import operator_count
from .graphs import distinct, drop_dead, merge_equal, mutates, results_of, storages

_SOURCE, _SINK = "source", "sink"
aten = torch.ops.aten
#: Not tagged as pointwise, but as cheap: copies in another type, and tensors that are filled with one number.
_AS_CHEAP = {
    *(aten.expand.default, aten._to_copy.default, aten.rsub.Tensor),
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
}


def split(step: StepGraph, replay: FlatGraph, vjp: FlatGraph) -> Split | None:
    """Divide the work of a step's flat replay and VJP anew; None where nothing is to be saved.

    Nor is anything where an operator writes in place, or where mixed mode makes a part of the step again on purpose.
    """
    if any(mutates(n) or "phase" in n.meta for flat in (replay, vjp) for n in flat.graph.nodes):
        return None
    placeholders = list(vjp.graph.find_nodes(op="placeholder"))
    inputs, cotangents = placeholders[: len(step.inputs)], placeholders[len(step.inputs) :]
    after = set(cotangents)
    for node in vjp.graph.nodes:
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    saved = _cheapest(vjp.graph, after)
    if not saved:
        return None
    backward, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for kind, nodes in (("input", inputs), ("residual", saved), ("cotangent", cotangents)):
        for i, node in enumerate(nodes):
            env[node] = backward.placeholder(f"{kind}_{i}")
            env[node].meta = dict(node.meta)
    backward.output(backward.graph_copy(vjp.graph, env))
    drop_dead(backward)
    saves = operator_count(vjp.graph) - operator_count(backward)
    forward, places, fresh = _forward(replay, vjp, saved)
    results = list(results_of(forward.graph))
    others = {s for n in results[: len(results) - fresh] for s, _ in storages(n)}
    shared = any(s in others for i in places for s, _ in storages(results[i]))
    return Split(forward, FlatGraph(backward, vjp.constants), places, fresh, saves, shared)


def _cheapest(graph: fx.Graph, after: set[fx.Node]) -> list[fx.Node]:
    """Values of the part before the cotangents to save, in order; inputs are at hand anyway."""
    flow = nx.DiGraph()
    flow.add_nodes_from((_SOURCE, _SINK))
    before = [n for n in graph.nodes if n not in after and n.op in ("call_function", "placeholder")]
    for node in before:
        start, end = (node, "in"), (node, "out")
        if node.op == "placeholder":
            flow.add_edge(start, end, capacity=0)
        elif len(storages(node)) != 1 or _is_alias(node):  # to save it would be to save another value
            flow.add_edge(start, end)  # without a capacity: endless
        else:
            flow.add_edge(start, end, capacity=sum(size for _, size in storages(node)))
        if node.op == "placeholder" or not _cheap(node):
            flow.add_edge(_SOURCE, start)
        for user in node.users:
            flow.add_edge(end, _SINK if user in after or user.op == "output" else (user, "in"))
    _, (kept, _) = nx.minimum_cut(flow, _SOURCE, _SINK)
    return [n for n in before if n.op != "placeholder" and (n, "in") in kept and (n, "out") not in kept]


def _is_alias(node: fx.Node) -> bool:
    """Whether this value lies in the memory of one that it is computed from (a view, ``_unsafe_view``)."""
    memory = {s for s, _ in storages(node)}
    return any(memory & {s for s, _ in storages(n)} for n in node.all_input_nodes)


def _cheap(node: fx.Node) -> bool:
    """Whether to run it again costs next to nothing."""
    target: Any = node.target
    if target is getitem or not node.all_input_nodes or _is_alias(node):
        return True
    return isinstance(target, OpOverload) and (
        torch.Tag.pointwise in target.tags or target.is_view or target in _AS_CHEAP
    )


def _forward(
    replay: FlatGraph, vjp: FlatGraph, saved: list[fx.Node]
) -> tuple[FlatGraph, tuple[int, ...], int]:
    """The replay with what gives ``saved`` in the VJP; where these are among its results; how many are not replayed."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    outputs: Any = graph.graph_copy(replay.graph, copies)
    given = list(graph.find_nodes(op="placeholder"))
    env = dict(zip(vjp.graph.find_nodes(op="placeholder"), given, strict=False))
    same = {s: t for old, new in env.items() for (s, _), (t, _) in zip(storages(old), storages(new))}
    graph.graph_copy(vjp.graph, env)
    for old, new in env.items():
        new.meta["memory"] = tuple((same.get(s, s), size) for s, size in storages(old))
        if old.op == "get_attr":
            new.target = f"vjp{old.target}"
    graph.output((*outputs, *(env[n] for n in saved)))
    drop_dead(graph)
    for cotangent in list(graph.find_nodes(op="placeholder"))[len(given) :]:
        graph.erase_node(cotangent)
    merge_equal(graph)
    (output,) = graph.find_nodes(op="output")
    found = list(results_of(graph))
    made, wanted = found[: len(outputs)], found[len(outputs) :]
    fresh = [n for n in dict.fromkeys(wanted) if n not in made]
    output.args = ((*made, *fresh),)
    distinct(graph)
    constants = replay.constants | {f"vjp{name}": t for name, t in vjp.constants.items()}
    return FlatGraph(graph, constants), tuple((made + fresh).index(n) for n in wanted), len(fresh)
