"""What calls of a step graph take: in numbers, or as formulas in the size of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from metaoptim.errors import WindowError

from ..derive.liveness import alive_bytes
from ..ir.step import Lowering, StepGraph
from ..lower.derivatives import derived, replayed, residuals
from .model import step_flops
from .polynomials import TIMES, Polynomial, batches, fitted, formula, largest
from .step import residual_cost, step_cost


@dataclass(frozen=True)
class CallSizes:
    """Of a call of one step graph: numbers, or formulas.

    Attributes:
        kept: bytes of its residuals.
        more: how much more it or its derivative takes where there are residuals.
        flops: operations of the call, of its derivative, and how many of both residuals save.
    """

    kept: Any
    more: Any
    flops: tuple[Any, ...]


def call_sizes(step: StepGraph, lowering: Lowering) -> CallSizes:
    """In numbers: as measured, else as the graphs say."""
    return CallSizes(*residual_cost(step, lowering), step_flops(step, lowering))


class CallByBatch:
    """A call with batches of several sizes, by what its graphs say.

    Attributes:
        sizes: formulas.
        vjp: the polynomials of which the largest is what its derivative allocates.
        allocated: for the call and for its derivative, the most bytes that it allocates with each of the batches, and
            the polynomials of which they are the largest.

    Args:
        steps: what it is a call of, with so many times the batch as `TIMES` says.
        size: of the batch.
        lowering: the backend and HVP mode of the step graphs.
        what: the call is, for errors.

    Raises:
        WindowError: where its graphs are others with another batch.
    """

    def __init__(self, steps: Sequence[StepGraph], size: int, lowering: Lowering, what: str) -> None:
        self.size, self.what = size, what
        replay = self._largest("its graph", [replayed(g).graph for g in steps])
        self.vjp = vjp = self._largest(
            "its derivative's graph", [derived(g, lowering.hvp).graph for g in steps]
        )
        costs = [step_cost(g, lowering) for g in steps]
        self.allocated = [
            (tuple(c.replay_bytes for c in costs), replay),
            (tuple(c.vjp_bytes for c in costs), vjp),
        ]
        flops = zip(*(step_flops(g, lowering) for g in steps), strict=True)
        operations = tuple(formula([fitted(f, size, f"the operations of {what}")]) for f in flops)
        divided = [d for g in steps if (d := residuals(g, lowering.hvp)) is not None]
        kept = more = sympy.Integer(0)
        if divided:
            kept = formula(
                [fitted([residual_cost(g, lowering)[0] for g in steps], size, f"residuals of {what}")]
            )
            forward = self._largest("its graph with residuals", [d.forward.graph for d in divided])
            backward = self._largest("its derivative's, with residuals", [d.backward.graph for d in divided])
            more = sympy.Max(0, formula(forward) - kept - formula(replay), formula(backward) - formula(vjp))
        self.sizes = CallSizes(kept, more, operations)

    def _largest(self, which: str, graphs: Sequence[fx.Graph]) -> list[Polynomial]:
        alive = [alive_bytes(graph) for graph in graphs]
        lengths = [len(found) for found in alive]
        if len(lengths) != len(TIMES) or len({*lengths}) != 1:
            raise WindowError(
                f"plan: {self.what}: {which} is another one with another batch: got {', '.join(map(str, lengths))} "
                f"nodes with {batches(self.size)}, expected as many with each. Plan without batch, or, if small "
                "batches alone are treated otherwise, with arguments of a larger one"
            )
        points = {*zip(*alive, strict=True)}
        return largest(fitted(values, self.size, f"bytes alive in {self.what}") for values in points)
