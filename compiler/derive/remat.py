"""Rematerialisation: the forward half of a graph is cut at narrow places, and each part run again for its backward.

Between two cuts only what crosses them stays alive. Where to cut is found by trying: candidates are the places where
least is alive, and the number of cuts is the one with the lowest peak (`graphs`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..ir.values import reached
from .graphs import alive_bytes, copied, peak_bytes, storages

_WIDTHS = 6  # how many widths of cuts are tried


def rematerialised(graph: fx.Graph) -> fx.Graph:
    """``graph`` with the nodes of a forward phase made again, part by part, for those that read them later.

    Nodes say in ``meta["phase"]`` where they belong; both forward phases are looked at.
    """
    best, least = graph, peak_bytes(graph)
    for phase in ("first forward", "forward"):
        start = best
        for cuts in _proposals(start, phase):
            tried = _cut(start, phase, cuts)
            peak = peak_bytes(tried)
            if peak < 0.95 * least:
                best, least = tried, peak
    return best


def _of_phase(graph: fx.Graph, phase: str) -> list[fx.Node]:
    return [n for n in graph.nodes if n.meta.get("phase") == phase]


def _makers(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Which node makes each piece of memory."""
    return {s: n for n in reversed(graph.nodes) for s, _ in storages(n)}


def _proposals(graph: fx.Graph, phase: str) -> list[tuple[int, ...]]:
    """Ordinals of nodes of ``phase`` to cut after: where less is alive than around, up to some width, all or half."""
    nodes = _of_phase(graph, phase)
    elsewhere = {s for s, n in _makers(graph).items() if n.meta.get("phase") != phase}
    alive = alive_bytes(nodes, elsewhere, after=True)
    inner = range(1, len(nodes) - 1)
    narrow = [i for i in inner if 0 < alive[i] < alive[i - 1] and alive[i] <= alive[i + 1]]
    found: dict[tuple[int, ...], None] = {}
    for limit in sorted({alive[i] for i in narrow})[:_WIDTHS]:
        chosen = [i for i in narrow if alive[i] <= limit]
        found |= {tuple(chosen[::stride]): None for stride in (1, 2)}
    return list(found)


def _cut(graph: fx.Graph, phase: str, cuts: Sequence[int]) -> fx.Graph:
    """A copy of ``graph`` in which all that reads a value of ``phase`` from outside of it reads one made again."""
    new = copied(graph)
    home = _makers(new)
    part = {n: bisect_left(cuts, i) for i, n in enumerate(_of_phase(new, phase))}
    crossing = {n for n in part if any(part.get(u, part[n]) != part[n] for u in n.users)}
    dropped = {n for n in part if n not in crossing and part[n] != len(cuts)}
    again: dict[fx.Node, fx.Node] = {}

    def name_memory(node: fx.Node, of: fx.Node) -> None:
        """``node`` lies where ``of`` does, or where that has been made again."""
        node.meta["memory"] = tuple(
            (("again", s) if home[s] in again else s, size) for s, size in storages(of)
        )

    for node in list(new.nodes):
        if node in part:
            continue
        reads = [a for a in node.all_input_nodes if a in dropped]
        missing = reached(reads, lambda n: [a for a in n.all_input_nodes if a in dropped])
        with new.inserting_before(node):
            for top in sorted(n for n in missing if n not in again):
                again[top] = new.node_copy(top, lambda a: again.get(a, a))
                name_memory(again[top], top)
        for used in reads:
            node.replace_input_with(used, again[used])
        name_memory(node, node)
    new.lint()
    return new
