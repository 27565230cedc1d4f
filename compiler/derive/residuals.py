"""A step and its derivative that share work: what the derivative needs of the step's forward is saved, not run again.

The VJP of a step runs the step's forward once more. Where memory allows, the forward saves residuals instead: the
values from which the rest of the derivative follows by views and pointwise operators alone, chosen so that their bytes
are fewest, which is a minimum cut of the VJP's graph (as in T. Chen et al., arXiv 1604.06174, and torch's own
partitioner).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import getitem
from typing import Any

import networkx as nx
import torch
from torch import fx

from metaoptim.compiler.compat import OpOverload

from ..ir.step import FlatGraph, Split, StepGraph
from .flat import drop_dead, merge_equal
from .liveness import storages
from .reverse import distinct, mutates

_SOURCE, _SINK = "source", "sink"


def split(step: StepGraph, replay: FlatGraph, vjp: FlatGraph) -> Split | None:
    """Divide the work of a step's replay and VJP anew; None where nothing is to be saved.

    Args:
        step: the step.
        replay: its replay, flat.
        vjp: its VJP, flat.
    """
    if any(mutates(n) for flat in (replay, vjp) for n in flat.graph.nodes):
        return None
    placeholders = list(vjp.graph.find_nodes(op="placeholder"))
    inputs, cotangents = placeholders[: len(step.inputs)], placeholders[len(step.inputs) :]
    after = _reached(vjp.graph, cotangents)
    saved = _cheapest(vjp.graph, after)
    if not saved:
        return None
    backward, run = _backward(vjp, inputs, cotangents, saved)
    saves = sum(n.op == "call_function" and n.target is not getitem for n in vjp.graph.nodes) - run
    forward, places, fresh = _forward(replay, vjp, saved)
    return Split(forward, backward, places, fresh, saves)


def _reached(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    reached = set(sources)
    for node in graph.nodes:
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return reached


def _cheapest(graph: fx.Graph, after: set[fx.Node]) -> list[fx.Node]:
    """Values of the part before the cotangents to save, in order; inputs are at hand anyway."""
    flow = nx.DiGraph()
    flow.add_nodes_from((_SOURCE, _SINK))
    before = [n for n in graph.nodes if n not in after and n.op in ("call_function", "placeholder")]
    for node in before:
        start, end = (node, "in"), (node, "out")
        if node.op == "placeholder":
            flow.add_edge(start, end, capacity=0)
        elif _shares(node):
            flow.add_edge(start, end)  # without a capacity: endless
        else:
            flow.add_edge(start, end, capacity=sum(size for _, size in storages(node)))
        if node.op == "placeholder" or not _cheap(node):
            flow.add_edge(_SOURCE, start)
        for user in node.users:
            flow.add_edge(end, _SINK if user in after or user.op == "output" else (user, "in"))
    _, (kept, _) = nx.minimum_cut(flow, _SOURCE, _SINK)
    return [n for n in before if n.op != "placeholder" and (n, "in") in kept and (n, "out") not in kept]


def _shares(node: fx.Node) -> bool:
    """Whether saving this value means to save another one: a view, or several values."""
    return len({s for s, _ in storages(node)}) != 1 or _is_alias(node)


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
        torch.Tag.pointwise in target.tags or target.is_view or target is torch.ops.aten.expand.default
    )


def _backward(
    vjp: FlatGraph, inputs: list[fx.Node], cotangents: list[fx.Node], saved: list[fx.Node]
) -> tuple[FlatGraph, int]:
    """The VJP with ``saved`` for inputs, and how many operators it runs."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for kind, nodes in (("input", inputs), ("residual", saved), ("cotangent", cotangents)):
        for i, node in enumerate(nodes):
            env[node] = graph.placeholder(f"{kind}_{i}")
            env[node].meta = dict(node.meta)
    _copy(vjp.graph, graph, env)
    (output,) = vjp.graph.find_nodes(op="output")
    graph.output(fx.map_arg(output.args[0], env.__getitem__))
    drop_dead(graph)
    run = sum(n.op == "call_function" and n.target is not getitem for n in graph.nodes)
    return FlatGraph(graph, vjp.constants), run


def _forward(
    replay: FlatGraph, vjp: FlatGraph, saved: list[fx.Node]
) -> tuple[FlatGraph, tuple[int, ...], int]:
    """The replay, and what gives ``saved`` in the VJP; what both compute is computed once.

    Returns:
        The graph; where among its results those of ``saved`` are; how many results are not the replay's.
    """
    graph = fx.Graph()
    constants: dict[str, Any] = {}
    given = [graph.placeholder(n.name) for n in replay.graph.find_nodes(op="placeholder")]
    results: list[Any] = []
    outputs = next(iter(replay.graph.find_nodes(op="output"))).args[0]
    for flat, prefix, wanted in ((replay, "replay", outputs), (vjp, "vjp", saved)):
        env = dict(zip(flat.graph.find_nodes(op="placeholder"), given, strict=False))
        same: dict[Any, Any] = {}  # memory in the trace -> memory in the graph
        for old, new in env.items():
            if flat is replay:
                new.meta = dict(old.meta)
            same |= {s: t for (s, _), (t, _) in zip(storages(old), storages(new), strict=False)}
        _copy(flat.graph, graph, env, lambda name, p=prefix: f"{p}{name}")
        for old, new in env.items():
            if old.op != "placeholder":  # two traces may have had memory in the same place
                memory = tuple((same.get(s, (prefix, s)), size) for s, size in storages(old))
                new.meta = {**new.meta, "memory": memory}
        constants |= {f"{prefix}{name}": t for name, t in flat.constants.items()}
        results += [env[n] for n in wanted]  # type: ignore[union-attr]
    graph.output(tuple(results))
    drop_dead(graph)
    merge_equal(graph)
    (output,) = graph.find_nodes(op="output")
    found: list[Any] = list(output.args[0])
    made = found[: len(outputs)]  # type: ignore[arg-type]
    fresh = [n for n in dict.fromkeys(found[len(made) :]) if n not in made]
    places = tuple((made + fresh).index(n) for n in found[len(made) :])
    output.args = (tuple(made + fresh),)
    distinct(graph)
    return FlatGraph(graph, constants), places, len(fresh)


def _copy(
    source: fx.Graph, graph: fx.Graph, env: dict[fx.Node, fx.Node], rename: Callable[[str], str] = str
) -> None:
    """Append the nodes of ``source`` to ``graph`` where all they read is in ``env``, and that do not stand there."""
    for node in source.nodes:
        if node in env or node.op in ("placeholder", "output"):
            continue
        if all(n in env for n in node.all_input_nodes):
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "get_attr":
                env[node].target = rename(str(node.target))
