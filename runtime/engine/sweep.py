"""Cotangents on their way back through the inner loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

LOSS = (
    -2
)  # in the place of a state index, at the position after a step: the loss of that step (-1 stands for none)


class Sweep:
    """Cotangents on their way back through the tape.

    Attributes:
        position: they have been pulled back to here.
        top: they came from there.
        cotangents: state index -> cotangent at `position`.
        deposits: tape position -> cotangents that join there.
        metas: meta-parameter (its number, or what else stands for it) -> its gradient so far.
        adopted: position, state index -> cotangent that arrived where that parameter was adopted, or started anew.
    """

    def __init__(self) -> None:
        self.position = self.top = -1
        self.cotangents: dict[int, Tensor] = {}
        self.deposits: dict[int, list[tuple[int, Tensor]]] = {}
        self.metas: dict[Any, Tensor] = {}
        self.adopted: dict[tuple[int, int], Tensor] = {}

    def deposit(self, position: int, index: int, grad: Tensor) -> None:
        """Let a cotangent of state entry ``index``, or of the `LOSS` of the step before, join at ``position``."""
        self.deposits.setdefault(position, []).append((index, grad))

    def add(self, index: int, grad: Tensor) -> None:
        """Accumulate at the current position."""
        known = self.cotangents.get(index)
        self.cotangents[index] = grad if known is None else known + grad

    def meta(self, key: Any, grad: Tensor) -> None:
        """Accumulate the gradient of a meta-parameter."""
        known = self.metas.get(key)
        self.metas[key] = grad if known is None else known + grad

    def arrive(self, position: int) -> None:
        """Move to ``position`` and merge what was deposited there."""
        self.position = position
        for index, grad in self.deposits.pop(position, ()):
            self.add(index, grad)
