"""What joins the tape to autograd's graph: reads of theta, and the tensors behind the steps that they go back over."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.programs.calls import StepCall
from metaoptim.compiler.ir.tensors import memory_of
from metaoptim.compiler.ir.traces.slices import Slice
from metaoptim.compiler.ir.values import Epoch
from metaoptim.compiler.ir.weak import WeakTable
from metaoptim.errors import WindowError

from ..engine.engine import Engine
from ..engine.nodes import Life, Link, Position, Read, Results, StepLoss, new_token


class CommonReads:
    """What all ways to read have: numbers of the tensors that require grad and that steps have read."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._known: dict[tuple, tuple[int, Tensor]] = {}
        self._count = 0

    def _numbers(self, metas: list[Tensor]) -> tuple[tuple[int, ...], dict[int, Tensor]]:
        """The number of each of ``metas``, and those that are new."""
        numbers: list[int] = []
        new: dict[int, Tensor] = {}
        for t in metas:
            key = (id(t), None if t.is_leaf else t._version)  # in-place calls change where it leads
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = (self._count, t)
                new[self._count] = t
                self._count += 1
            numbers.append(found[0])
        return tuple(numbers), new

    def prepare(self, call: StepCall, metas: list[Tensor]) -> None:
        """A ``call`` that reads ``metas`` is about to be taken: raise where it cannot be differentiated."""


class WholeReads(CommonReads):
    """Reads over all steps: a chain of tokens stands for what was read from outside so far.

    Attributes:
        truncates: whether there are steps that a read of now does not go back to.
        waiting: reads behind which there are losses, since a Link, at their super-steps.
    """

    truncates = False

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.waiting = WeakTable[Life]()
        self._token = new_token()
        self._superstep = 0
        self._unlinked: list[tuple[int, tuple[int, ...], list[Tensor]]] = []

    def enter(self, position: int, indices: tuple[int, ...], own: list[Tensor]) -> None:
        """Linked not before a step, since losses may be computed where autograd does not look."""
        self._unlinked.append((position, indices, own))

    def start(self, position: int, indices: tuple[int, ...], values: Sequence[Tensor]) -> None:
        """Theta goes on from ``values``, which receive its gradient, at ``position``."""
        self._link_entered()
        self._link(position, (), indices, values)

    def prepare(self, call: StepCall, metas: list[Tensor]) -> None:
        if self.engine.particles is not None:
            self.engine.particles.check(metas)

    def hold(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """State entries as they are now, to be gone back to."""
        if self.engine.particles is not None:
            raise WindowError(
                "extract_state by reference or copy, in a window with gradient=Evolution(...): the perturbed runs "
                "would have to go back to states of their own; use by='detached'"
            )
        self._link_entered()
        with torch.enable_grad():
            return Position.apply(self.engine, self.engine.position, indices, self._token)

    def begin(self, position: int, superstep: int) -> None:
        """A super-step begins; where losses of some steps ago wait for their backward, a Link parts reads from theirs.

        So the cotangents of many losses do not have to be there at once. A super-step is never parted, of which a sweep
        makes some states once for all its steps.
        """
        self._superstep, engine = superstep, self.engine
        self._link_entered()
        older = superstep - 3  # the last losses are there in any case
        if any(life.at < older for life in self.waiting):
            self._link(position, (), (), ())
            if engine.streaming is not None:
                theta = memory_of(engine.state[i] for i in engine.thetas)
                engine.streaming.waiting = max(engine.streaming.waiting, (1 + len(self.waiting)) * theta)
            self.waiting.clear()

    def step(self, position: int, metas: list[Tensor]) -> tuple[int, ...]:
        """A step at ``position`` has read ``metas``, which require grad; their numbers."""
        self._link_entered()
        numbers, new = self._numbers(metas)
        if new:
            self._link(position, tuple(new), (), new.values())
        return numbers

    def _link_entered(self) -> None:
        if self._unlinked:
            for position, indices, own in self._unlinked:
                self._link(position, (), indices, own)
            self._unlinked.clear()

    def _link(
        self, position: int, metas: tuple[int, ...], thetas: tuple[int, ...], tensors: Collection[Tensor]
    ) -> None:
        if self.engine.particles is not None:
            self.engine.particles.enter([*metas, *((position, i) for i in thetas)], tensors)
        with torch.enable_grad():
            self._token = Link.apply(self.engine, position, metas, thetas, self._token, *tensors)

    def read(self, indices: list[int], own: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        """Theta at these state indices, as parameters."""
        life = Life(self._superstep)
        self.waiting.add(life)
        with torch.enable_grad():
            return Read.apply(self.engine, self.engine.position, indices, own, life, self._token)

    def loss(self, loss: Tensor, position: int, call: StepCall, sliced: Slice) -> Tensor | None:
        """The loss of a step that has been taken, with the steps so far for its history."""
        with torch.enable_grad():
            return StepLoss.apply(self.engine, position, loss.detach(), self._token)  # type: ignore[return-value]

    def results(self, indices: list[int]) -> tuple[Tensor, ...]:
        """State entries that a compiled step has just left, as tensors of the user's."""
        return Results.apply(self.engine, self.engine.position, indices, self._token)

    def meta_params(self) -> list[tuple[int, Tensor]]:
        """What steps have read that requires grad, with its number."""
        return list(self._known.values())

    def trim(self, epochs: list[Epoch]) -> None:
        """Nothing is forgotten."""

    def close(self) -> None:
        """Drop the user's tensors."""
        self._known.clear()
        self._unlinked.clear()
        self._token = new_token()
