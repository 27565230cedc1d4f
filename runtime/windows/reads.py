"""What joins the tape to autograd's graph: reads of theta, and the tensors behind the steps that they go back over."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.calls import StepCall
from metaoptim.compiler.ir.slices import Slice
from metaoptim.compiler.ir.tensors import memory_of
from metaoptim.compiler.ir.values import Epoch
from metaoptim.errors import CaptureError, WindowError

from ..engine.engine import Engine
from ..engine.implicit import Implicit
from ..engine.nodes import (
    Alias,
    Life,
    Link,
    Position,
    Read,
    Results,
    StepLoss,
    WindowedLoss,
    WindowedRead,
    new_token,
)
from ..engine.sweep import warn_cut


class _Reads:
    """What both ways to read have: numbers of the tensors that require grad and that steps have read."""

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


class WholeReads(_Reads):
    """Reads over all steps: a chain of tokens stands for what was read from outside so far.

    Attributes:
        truncates: whether there are steps that a read of now does not go back to.
        waiting: reads behind which there are losses, since a Link, at their super-steps.
    """

    truncates = False

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.waiting: weakref.WeakSet[Life] = weakref.WeakSet()
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

    def hold(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """State entries as they are now, to be gone back to."""
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


class SlidingReads(_Reads):
    """`window=W`: reads over the last W super-steps, each its own root; the tape forgets what none goes back to."""

    waiting: Collection[Life] = ()

    def __init__(self, engine: Engine, window: int, offline: bool, implicit: Implicit | None = None) -> None:
        super().__init__(engine)
        self.window, self.offline, self.implicit = window, offline, implicit
        self._superstep = 0
        self._starts: deque[int] = deque(maxlen=window)
        # number of a meta-parameter -> with its history then, and the last super-step that read it
        self._read: dict[int, tuple[Tensor, int]] = {}
        self._entered: dict[int, int] = {}  # state index -> the position where it was put on the tape
        # position, state index -> the tensor that theta was started from there, and how many super-steps were before
        self._started: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self._lives: weakref.WeakSet[Life] = weakref.WeakSet()  # at the lowest position each goes back to
        self._warned = False

    @property
    def truncates(self) -> bool:
        return self._superstep > self.window

    def enter(self, position: int, indices: tuple[int, ...], own: list[Tensor]) -> None:
        self._entered.update((index, position) for index in indices)

    def start(self, position: int, indices: tuple[int, ...], values: Sequence[Tensor]) -> None:
        for index, tensor in zip(indices, values, strict=True):
            if tensor.requires_grad:
                self._started[position, index] = tensor, self._superstep

    def hold(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Refused: W steps back from there are no W steps back from a loss."""
        raise WindowError(
            "extract_state by reference or copy, in a window with window=W: how far its gradient should reach has no "
            "answer. Use by='detached', or leave window= out"
        )

    def begin(self, position: int, superstep: int) -> None:
        self._superstep = superstep
        self._starts.append(position)

    def step(self, position: int, metas: list[Tensor]) -> tuple[int, ...]:
        numbers, _ = self._numbers(metas)
        for number, tensor in zip(numbers, metas, strict=True):
            known = self._read.get(number)
            with torch.enable_grad():
                tensor = tensor if tensor.is_leaf else Alias.apply(tensor) if known is None else known[0]
            self._read[number] = (tensor, self._superstep)  # type: ignore[assignment]
        self._known = {k: (n, t) for k, (n, t) in self._known.items() if n in self._read}
        return numbers

    def read(self, indices: list[int], own: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        engine, oldest = self.engine, self._superstep - self.window
        self._read = {n: (t, last) for n, (t, last) in self._read.items() if last > oldest}
        self._started = {k: (t, n) for k, (t, n) in self._started.items() if n >= oldest}
        whole = not self.truncates
        bottom = engine.program.start if whole else self._starts[0]
        first: dict[tuple[int, int], Tensor] = {
            (self._entered[index], index): p
            for index, p in zip(indices, own, strict=True)
            if (whole and self.offline) or index in engine.untrained
        }
        first.update((key, tensor) for key, (tensor, _) in self._started.items())
        life = Life(bottom)
        self._lives.add(life)
        on_cut = self._cut if self.offline and not whole and self.implicit is None else None
        fixed = tuple(indices), own, bottom, tuple(self._read), tuple(first), life, on_cut, self.implicit
        tensors = (new_token(), *(t for t, _ in self._read.values()), *first.values())
        with torch.enable_grad():
            shown: Any = WindowedRead.apply(engine, engine.position, *fixed, *tensors)
        return shown

    def loss(self, loss: Tensor, position: int, call: StepCall, sliced: Slice) -> Tensor | None:
        """The loss of a step that has been taken, with what it has read for its history.

        None where that is not known: theta that was written into since, or was read by two tensors.
        """
        thetas = [theta.tensor for theta in sliced.thetas]
        if sliced.twins or (call.back and any(t.is_leaf for t in thetas)):
            return None
        life = Life(position - call.back)
        self._lives.add(life)
        fixed = position, loss.detach(), call.theta, call.metas, life
        metas = [x.tensor for x in sliced.externals if x.grad]
        with torch.enable_grad():
            return WindowedLoss.apply(self.engine, *fixed, *thetas, *metas)  # type: ignore[return-value]

    def results(self, indices: list[int]) -> tuple[Tensor, ...]:
        """Refused: a result would need a root of its own."""
        raise CaptureError(
            "a compiled step that returns what depends on the parameters, in a window with window=W; return "
            "detached values, and compute outer losses outside the step"
        )

    def meta_params(self) -> list[tuple[int, Tensor]]:
        """What the last W super-steps have read that requires grad, with its number."""
        return [(n, t) for n, t in self._known.values() if n in self._read]

    def trim(self, epochs: list[Epoch]) -> None:
        """Let the tape forget what no read goes back to, and no loss that has not been stepped by."""
        oldest = min((e.position for e in epochs if e.read), default=self.engine.position)
        self.engine.trim(min([oldest, *(life.at for life in self._lives)]))

    def _cut(self) -> None:
        if not self._warned:
            self._warned = True
            warn_cut(self.window)

    def close(self) -> None:
        self._known.clear()
        self._read.clear()
        self._started.clear()


Reads: TypeAlias = WholeReads | SlidingReads
