"""Flat graphs as bytes, for another process."""

from __future__ import annotations

import io
import pickle
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from metaoptim.compiler.compat import OpOverload

from ...derive.flat import new_memory

_NOTES = ("memory", "phase")  # of what nodes hold in their ``meta``


class _Writer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[str, ...] | None:
        if isinstance(obj, fx.Node):
            return "node", obj.name
        return ("operator", obj.name()) if isinstance(obj, OpOverload) else None


class _Reader(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.nodes: dict[str, fx.Node] = {}
        self.memories: dict[Hashable, Hashable] = {}

    def persistent_load(self, pid: tuple[str, str]) -> Any:
        kind, name = pid
        if kind == "node":
            return self.nodes[name]
        name, _, overload = name.partition(".")
        namespace, _, name = name.partition("::")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")

    def memory(self, key: Hashable) -> Hashable:
        """What a piece of memory is called in this process."""
        return self.memories.setdefault(key, new_memory())


def written(graph: fx.Graph, header: Any) -> bytes:
    """A graph, with what else its reader must know. A module would not do: pickled, it is traced anew.

    Raises:
        Exception: what pickling raises, for arguments that cannot be sent.
    """
    stream = io.BytesIO()
    writer = _Writer(stream)
    writer.dump((header, len(graph.nodes)))
    for n in graph.nodes:
        notes = {name: n.meta[name] for name in _NOTES if name in n.meta}
        writer.dump((n.name, n.op, n.target, n.args, n.kwargs, notes))
    return stream.getvalue()


def read(data: bytes) -> tuple[fx.Graph, Any]:
    """What has been `written`: the graph, and what came with it."""
    graph, reader = fx.Graph(), _Reader(io.BytesIO(data))
    header, nodes = reader.load()
    for _ in range(nodes):
        name, op, target, args, kwargs, notes = reader.load()
        node = reader.nodes[name] = graph.create_node(op, target, args, kwargs, name)
        if "memory" in notes:
            notes["memory"] = tuple([(reader.memory(key), size) for key, size in notes["memory"]])
        node.meta.update(notes)
    return graph, header
