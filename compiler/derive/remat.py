"""Rematerialisation: the forward half of a graph is cut at narrow places, and each part run again for its backward.

Between two cuts only what crosses them stays alive. Where to cut is found by trying: candidates are the places where
least is alive, and the number of cuts is the one with the lowest peak (`liveness`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import fx

from ..ir.step import FlatGraph
from ..ir.values import reached
from .liveness import peak_bytes, storages

_WIDTHS = 6  # how many widths of cuts are tried


def rematerialised(flat: FlatGraph) -> FlatGraph:
    """``flat`` with the nodes of a forward phase made again, part by part, for those of its backward phase.

    Nodes say in ``meta["phase"]`` where they belong; both pairs of phases are looked at.
    """
    best, least = flat.graph, peak_bytes(flat.graph)
    for forward, backward in (("first forward", "first backward"), ("forward", "backward")):
        graph = best
        for cuts in _proposals(graph, forward):
            tried = _cut(graph, forward, backward, cuts)
            peak = peak_bytes(tried)
            if peak < 0.95 * least:
                best, least = tried, peak
    return FlatGraph(best, flat.constants)


def _proposals(graph: fx.Graph, phase: str) -> list[list[int]]:
    """Sets of places to cut at: those up to some width, all of them or every second."""
    places = _narrow_places(graph, phase)
    found: dict[tuple[int, ...], None] = {}
    for limit in sorted({width for _, width in places})[:_WIDTHS]:
        chosen = [at for at, width in places if width <= limit]
        for stride in (1, 2):
            found[tuple(chosen[::stride])] = None
    return [list(cuts) for cuts in found if cuts]


def _narrow_places(graph: fx.Graph, phase: str) -> list[tuple[int, int]]:
    """Ordinals of nodes of ``phase`` after which less of it is alive than around, with how much."""
    nodes = [n for n in graph.nodes if n.meta.get("phase") == phase]
    at = {n: i for i, n in enumerate(nodes)}
    home = _makers(graph)
    made: dict[Any, tuple[int, int]] = {}
    last: dict[Any, int] = {}
    for i, node in enumerate(nodes):
        for s, size in storages(node):
            if home[s] not in at:
                continue  # a view of what lives anyway
            made.setdefault(s, (i, size))
            last[s] = max([last.get(s, i), *(at[u] for u in node.users if u in at)])
    change = [0] * (len(nodes) + 1)
    for s, (begin, size) in made.items():
        change[begin] += size
        change[last[s]] -= size
    alive = list(accumulate(change))[: len(nodes)]
    inner = range(1, len(nodes) - 1)
    return [(i, alive[i]) for i in inner if 0 < alive[i] < alive[i - 1] and alive[i] <= alive[i + 1]]


def _makers(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Which node makes each piece of memory."""
    return {s: n for n in reversed(graph.nodes) for s, _ in storages(n)}


def _cut(graph: fx.Graph, forward: str, backward: str, cuts: Sequence[int]) -> fx.Graph:
    """A copy of ``graph`` in which every backward node that reads a forward value reads one made again."""
    nodes = [n for n in graph.nodes if n.meta.get("phase") == forward]
    part: dict[fx.Node, int] = {}
    k = 0
    for i, node in enumerate(nodes):
        part[node] = k
        if k < len(cuts) and i == cuts[k]:
            k += 1
    home = _makers(graph)
    crossing = {n for n in nodes if any(part.get(u, part[n]) != part[n] for u in n.users)}
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    again: dict[fx.Node, fx.Node] = {}

    def dropped(node: fx.Node) -> bool:
        return node in part and node not in crossing and part[node] != k

    def made_again(node: fx.Node) -> fx.Node:
        if not dropped(node):
            return env[node]
        missing = reached([node], lambda n: [a for a in n.all_input_nodes if dropped(a) and a not in again])
        for top in sorted(n for n in missing if n not in again):
            copy = new.node_copy(top, lambda a: again.get(a, env[a]))
            copy.meta = dict(top.meta)
            remade = [s for s, _ in storages(top) if home[s] in again or home[s] is top]
            copy.meta["copies"] = {**top.meta.get("copies", {}), **{s: ("again", s) for s in remade}}
            again[top] = copy
        return again[node]

    for node in graph.nodes:
        reader = node.meta.get("phase") == backward or node.op == "output" or node not in part
        lookup: Any = made_again if reader and node not in part else (lambda a: env[a])
        if node.op == "output":
            new.output(fx.map_arg(node.args[0], lookup))
            continue
        copy = new.node_copy(node, lookup)
        copy.meta = dict(node.meta)
        if lookup is made_again:  # it may be a view of what was made again
            views = {s: ("again", s) for s, _ in storages(node) if home[s] in again}
            copy.meta["copies"] = {**node.meta.get("copies", {}), **views}
        env[node] = copy
    new.lint()
    return new
