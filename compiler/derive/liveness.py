"""Bytes alive while an fx graph runs, from the shapes its trace has left on the nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx


def storages(node: fx.Node) -> Iterator[tuple[Any, int]]:
    """(identity, bytes) of the memory behind each tensor a node gives; views share it with what they are views of.

    ``node.meta["copies"]`` maps the memory that a node's original wrote to the memory that this copy of it writes.
    """
    memory = node.meta.get("memory")
    if memory is not None:
        yield from memory
        return
    value = node.meta.get("val")
    copies = node.meta.get("copies", {})
    for t in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(t, Tensor) and t.layout is torch.strided:
            storage = t.untyped_storage()
            yield copies.get(storage._cdata, storage._cdata), storage.nbytes()


def results_of(graph: fx.Graph) -> Sequence[Any]:
    """What a flat graph returns."""
    (output,) = graph.find_nodes(op="output")
    found = output.args[0]
    return found if isinstance(found, (tuple, list)) else (found,)


def peak_bytes(graph: fx.Graph, order: Sequence[fx.Node] | None = None) -> int:
    """Most bytes alive at once of what ``graph`` allocates; see `alive_bytes`."""
    return max(alive_bytes(graph, order), default=0)


def alive_bytes(graph: fx.Graph, order: Sequence[fx.Node] | None = None) -> list[int]:
    """Bytes alive while each node of ``graph`` runs, of what it allocates: not its inputs, but its outputs.

    Memory lives from the node that makes it to the last one that reads it or a view of it, as in an interpreter that
    forgets values after their last use.

    Args:
        graph: traced over fake tensors.
        order: the order its nodes run in; by default their own.
    """
    nodes = list(graph.nodes) if order is None else list(order)
    given: set[Any] = {s for n in nodes if n.op in ("placeholder", "get_attr") for s, _ in storages(n)}
    last: dict[Any, int] = {}
    made: dict[int, list[tuple[Any, int]]] = {}
    sizes: dict[Any, int] = {}
    for at, node in enumerate(nodes):
        for used in node.all_input_nodes:
            for s, _ in storages(used):
                last[s] = at
        for s, size in storages(node):
            last[s] = at
            if s not in given and s not in sizes:
                sizes[s] = size
                made.setdefault(at, []).append((s, size))
    ends: dict[int, int] = {}
    for s, size in sizes.items():
        ends[last[s]] = ends.get(last[s], 0) + size
    alive = 0
    found = []
    for at in range(len(nodes)):
        alive += sum(size for _, size in made.get(at, ()))
        found.append(alive)
        alive -= ends.get(at, 0)
    return found
