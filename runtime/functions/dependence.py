"""What tensors depend on, found in autograd's graph; above all, whether they do on the parameters as they are.

The inner gradient of a compiled step is taken by the parameters that it reads itself. A path that leads to them through
an argument would be missed, where the same code without the decorator follows it: such arguments must be found.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.ir.step import gradient, show
from metaoptim.compiler.ir.trace import arguments
from metaoptim.compiler.ir.values import Entry, Value, identity, reached

from ..engine.engine import Engine
from ..engine.graph import nodes_below

aten = torch.ops.aten


def depends_on(tensor: Tensor, shown: Sequence[Tensor]) -> bool:
    """Whether a gradient of ``tensor`` reaches one of ``shown``, the parameters as they are, other than by the tape."""
    current = {id(p) for p in shown}
    if tensor.grad_fn is None:
        return id(tensor) in current
    edges = {(id(p.grad_fn), p.output_nr) for p in shown if p.grad_fn is not None}
    # what was computed before the parameters were shown cannot depend on them; leaves have been there from the start
    oldest = min((0 if p.grad_fn is None else p.grad_fn._sequence_nr() for p in shown), default=0)

    def ends(node: Any) -> bool:
        return node._sequence_nr() < oldest or isinstance(getattr(node, "engine", None), Engine)

    def leads(node: Any, number: int) -> bool:
        marked = getattr(node, "current", {}).get(number, ())
        met = (id(node), number) in edges or id(getattr(node, "variable", None)) in current
        return met or any(id(ref()) in current for ref in marked)

    below = (edge for node in nodes_below([tensor], ends) if not ends(node) for edge in node.next_functions)
    return leads(tensor.grad_fn, tensor.output_nr) or any(leads(*edge) for edge in below)


def mark(results: Sequence[Tensor], shown: Sequence[Sequence[Tensor]]) -> None:
    """Note of ``results``, outputs of one node of ours, from which of the parameters shown now each was computed."""
    node: Any = results[0].grad_fn
    node.current = {t.output_nr: [weakref.ref(p) for p in of] for t, of in zip(results, shown, strict=True)}


def shown_in(value: Value, last: dict[int, Tensor]) -> list[Tensor]:
    """Parameters from whose last version ``value`` was computed; ``last``: id of the call that shows it -> whose."""
    return [last[id(e)] for e in _ancestors(value) if id(e) in last]


def loss_inputs(entries: Sequence[Entry]) -> set[Any]:
    """Identities of what inner losses among ``entries`` depend on and that was not computed by them."""
    inside = {id(e) for e in entries}
    found = set()
    for taken in (e for e in entries if e.op is gradient):
        for entry in _ancestors(taken.args[0]):
            for a in arguments(entry):
                if not (isinstance(a, Value) and id(a.entry) in inside):
                    found.add(identity(a))
        if not (isinstance(taken.args[0], Value) and id(taken.args[0].entry) in inside):
            found.add(identity(taken.args[0]))
    return found


def _ancestors(value: Any) -> list[Entry]:
    """The calls that a gradient of ``value`` passes, down to those that show parameters."""

    def carrying(calls: Iterable[Entry]) -> list[Entry]:
        return [e for e in calls if e.grad and e.op is not aten.detach.default]

    def before(entry: Entry) -> list[Entry]:
        computed = [a.entry for a in arguments(entry) if isinstance(a, Value)]
        return [] if entry.op is show else carrying([*computed, *entry.deps])

    return list(reached(carrying([value.entry] if isinstance(value, Value) else []), before))
