"""Flat graphs: the memory that their nodes make and how long it lives, and what may be dropped or merged."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from metaoptim.compiler.compat import OpOverload

from ..ir.operators import EMPTY, op_info

_t = torch.ops.aten.t.default
_AS_AN_OPERATOR = 16 << 10  # bytes


def storages(node: fx.Node) -> Sequence[tuple[Any, int]]:
    """(identity, bytes) of the memory behind the tensor a node gives; views share it with what they are views of."""
    return node.meta.get("memory", ())


def results_of(graph: fx.Graph) -> Sequence[Any]:
    """What a flat graph returns."""
    (output,) = graph.find_nodes(op="output")
    found = output.args[0]
    return found if isinstance(found, (tuple, list)) else (found,)


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy, to be changed."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def peak_bytes(graph: fx.Graph) -> int:
    """Most bytes alive at once of what ``graph`` allocates: not its inputs, but its outputs.

    Memory lives from the node that makes it to the last one that reads it or a view of it, as in an interpreter that
    forgets values after their last use.
    """
    given = {s for n in graph.nodes if n.op in ("placeholder", "get_attr") for s, _ in storages(n)}
    return max(alive_bytes(list(graph.nodes), given), default=0)


def alive_bytes(nodes: Sequence[fx.Node], given: Collection[Any], *, after: bool = False) -> list[int]:
    """Bytes alive while each of the nodes runs, or after it has, of memory that they make and that is not ``given``."""
    lives: dict[Any, list[int]] = {}
    for at, node in enumerate(nodes):
        for used in node.all_input_nodes:
            for s, _ in storages(used):
                if s in lives:
                    lives[s][1] = at
        for s, size in storages(node):
            if s not in given:
                lives.setdefault(s, [at, at, size])[1] = at
    change = [0] * (len(nodes) + 1)
    for begin, end, size in lives.values():
        change[begin] += size
        change[end if after else end + 1] -= size
    return list(accumulate(change[:-1]))


def work_of(graph: fx.Graph) -> int:
    """About how long ``graph`` takes to run as it is, in operators on small tensors, of 3 to 5 µs each on a CPU.

    What it allocates counts, too: measured from an MLP's to a transformer's derivative, 16 KiB take as long.
    """
    given = {s for n in graph.nodes if n.op in ("placeholder", "get_attr") for s, _ in storages(n)}
    made = {s: size for n in graph.nodes for s, size in storages(n) if s not in given}
    return len(graph.nodes) + sum(made.values()) // _AS_AN_OPERATOR


def mutates(node: fx.Node) -> bool:
    """Whether it is an operator that changes an argument in place."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def drop_dead(graph: fx.Graph) -> None:
    """Drop what nothing needs. What writes in place stays."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not mutates(node):
            graph.erase_node(node)


def undo_transposes(graph: fx.Graph) -> None:
    """Without transposes of transposes, of which derivatives of matrix products are full: in graphs without writes."""
    for node in graph.find_nodes(op="call_function", target=_t):
        source = node.args[0]
        if source.target is _t and all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(source.args[0])
    drop_dead(graph)


def merge_equal(graph: fx.Graph, held: bool = False) -> None:
    """One node for all that compute the same. For graphs in which nothing is written in place.

    With ``held``, only where a value is held until it is computed again, so that no memory lives longer for it.
    """
    nodes = list(graph.nodes)
    ends = {s: at for at, n in enumerate(nodes) for used in n.all_input_nodes for s, _ in storages(used)}
    first: dict[Any, fx.Node] = {}
    for at, node in enumerate(nodes):
        target: Any = node.target
        if node.op != "call_function" or target in EMPTY:
            continue
        if isinstance(target, OpOverload) and op_info(target).random:
            continue
        key = (target, _frozen(node.args), _frozen(node.kwargs))
        same = first.setdefault(key, node)
        if same is node:
            continue
        memory = [s for s, _ in storages(same)]
        if held and (not memory or any(ends.get(s, 0) < at for s in memory)):
            first[key] = node
            continue
        end = max((ends.get(s, 0) for s, _ in storages(node)), default=0)
        ends |= {s: max(end, ends.get(s, 0)) for s in memory}
        node.replace_all_uses_with(same)
        graph.erase_node(node)


def _frozen(a: Any) -> Any:
    """Equal for equal arguments, to the bit."""
    if isinstance(a, (list, tuple)):
        return tuple(map(_frozen, a))
    if isinstance(a, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(a.items()))
    return (type(a), repr(a)) if isinstance(a, (int, float, complex, slice)) else a


def distinct(graph: fx.Graph) -> None:
    """A tensor of its own for every result: equal ones have become one, and the user will see two states."""
    (output,) = graph.find_nodes(op="output")
    seen: set[fx.Node] = set()
    results = []
    with graph.inserting_before(output):
        for node in results_of(graph):
            if node in seen:
                original, node = node, graph.call_function(torch.ops.aten.clone.default, (node,))
                memory = tuple((("again", id(node)), size) for _, size in storages(original))
                node.meta = {**original.meta, "memory": memory}
            seen.add(node)
            results.append(node)
    output.args = (tuple(results),)
