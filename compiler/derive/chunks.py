"""Nodes of a step graph run in order, and the gradient of several losses: a chunk of the batch at a time.

What a chunk's loss has computed is gone before the next one is. So it is in the derivative, where each chunk is run
again, with a second-order tape of its own alone: the memory is that of a chunk, the work that of one forward and
backward pass more.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.operators import is_several, written
from ..ir.step import gradient, show
from ..ir.values import reached, shares_memory

Env = dict[fx.Node, Any]
Evaluate = Callable[[Sequence[fx.Node], Mapping[fx.Node, Any]], list[Any]]


def in_order(wanted: Iterable[fx.Node], known: Container[fx.Node]) -> list[fx.Node]:
    """The nodes to run for the values of ``wanted``, from those of ``known``.

    With what writes in place into memory that one of them lies in. What only the losses of chunks need is left out.
    """
    wanted = [n for n in wanted if isinstance(n, fx.Node)]
    if not wanted:
        return []
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in wanted[0].graph.nodes:
        if node.op == "call_function":
            into: list[fx.Node] = written(
                node.target, node.args, node.kwargs, fx.Node
            )  # several, by a _foreach_
            for changed in into:
                writers.setdefault(_home(changed), []).append(node)
    last = max(wanted)

    def onwards(node: fx.Node) -> list[fx.Node]:
        if node in known:
            return []
        more = [w for w in writers.get(_home(node), ()) if w < last] if writers else []
        return [*reads(node), *more]

    return sorted(n for n in reached(wanted, onwards) if n not in known)


def reads(node: fx.Node) -> Sequence[fx.Node]:
    """What a node's value is made of."""
    return Chunks(node).given if is_chunked(node) else node.all_input_nodes


def is_chunked(node: fx.Node) -> bool:
    """Whether a node is the gradient of several losses."""
    return node.target is gradient and is_several(node.args[0])


def dropped(nodes: Sequence[fx.Node], wanted: Container[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> those whose values nobody needs after it."""
    last = {used: node for node in nodes for used in (*reads(node), node)}
    found: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last.items():
        if used not in wanted:
            found.setdefault(node, []).append(used)
    return found


def _home(node: fx.Node) -> fx.Node:
    """The node that made the memory that another lies in."""
    while node.op == "call_function":
        into: list[Any] = written(node.target, node.args, node.kwargs, fx.Node)
        shares = node.target is getitem or shares_memory(node.target)
        source: Any = into[0] if len(into) == 1 else node.args[0] if shares else None
        if source is None:
            break
        node = source
    return node


class Chunks:
    """The gradient by ``thetas`` of the sum of ``losses``.

    Attributes:
        given: the nodes whose values it is a function of, thetas first.
    """

    def __init__(self, node: fx.Node) -> None:
        losses, thetas = node.args
        self.losses: tuple[fx.Node, ...] = losses  # type: ignore[assignment]  # pyright: ignore
        self.thetas: tuple[fx.Node, ...] = thetas  # type: ignore[assignment]  # pyright: ignore
        before = {n for n in node.graph.nodes if n.op == "placeholder" or n.target is show} | {*self.thetas}
        inside = in_order(self.losses, before)
        self.given = list(
            dict.fromkeys([*self.thetas, *(r for n in inside for r in reads(n) if r in before)])
        )

    def gradients(self, evaluate: Evaluate, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradient, for ``values`` of what is given."""
        count, total = len(self.thetas), _Sums(values[: len(self.thetas)])
        for loss in self.losses:
            leaves = [v.detach().requires_grad_(k < count) for k, v in enumerate(values)]
            total.add(range(count), self._gradients_of(loss, evaluate, leaves, create_graph=False))
        return tuple(total.found(zeros=True))

    def pulled_back(
        self, evaluate: Evaluate, values: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Cotangents of what is given, by those of the gradient."""
        count, total = len(self.thetas), _Sums(values)
        wanted = [k for k, v in enumerate(values) if v.requires_grad]
        for loss in self.losses:
            leaves = [v.detach().requires_grad_(k < count or v.requires_grad) for k, v in enumerate(values)]
            grads = self._gradients_of(loss, evaluate, leaves, create_graph=True)
            pairs = [
                (g, c)
                for g, c in zip(grads, cotangents, strict=True)
                if g is not None and g.requires_grad and c is not None
            ]
            if pairs and wanted:
                of, by = [g for g, _ in pairs], [c for _, c in pairs]
                found = torch.autograd.grad(of, [leaves[k] for k in wanted], by, allow_unused=True)
                total.add(wanted, found)
        return total.found(zeros=False)

    def _gradients_of(
        self, loss: fx.Node, evaluate: Evaluate, leaves: Sequence[Tensor], create_graph: bool
    ) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            (value,) = evaluate([loss], dict(zip(self.given, leaves, strict=True)))
            by = leaves[: len(self.thetas)]
            return torch.autograd.grad(value, by, create_graph=create_graph, allow_unused=True)


class _Sums:
    """Sums of tensors like some others."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._like = like
        self._sums: list[Tensor | None] = [None] * len(like)

    def add(self, places: Iterable[int], values: Sequence[Tensor | None]) -> None:
        for k, value in zip(places, values, strict=True):
            known = self._sums[k]
            self._sums[k] = value if known is None else known if value is None else known + value

    def found(self, zeros: bool) -> list[Any]:
        """The sums; where there is nothing, None or ``zeros``."""
        pairs = zip(self._sums, self._like, strict=True)
        return [torch.zeros_like(of) if s is None and zeros else s for s, of in pairs]


class GradientOfChunks(torch.autograd.Function):
    """`Chunks` as one node of autograd's graph, which keeps nothing of the losses."""

    @staticmethod
    def forward(ctx: Any, chunks: Chunks, evaluate: Evaluate, *given: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.chunks, ctx.evaluate, ctx.given = chunks, evaluate, given
        return chunks.gradients(evaluate, given)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        return None, None, *ctx.chunks.pulled_back(ctx.evaluate, ctx.given, cotangents)
