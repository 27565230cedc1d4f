"""Losses: which versions of theta they have read, and what becomes of them once they have been stepped by.

A loss that has been stepped by leaves eager's graph, so that who collects losses holds no activations. The user's
tensor stays the object it is, and gets another history: its gradient comes out of replay (`StepLoss`, `WindowedLoss`).
It keeps eager's as long as another optimizer's step may still need that: until the parameters that it has read have
changed, or a new super-step has begun.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from metaoptim.compiler.capture.eager.recording import Recording
from metaoptim.compiler.compat import swap_tensors
from metaoptim.compiler.ir.programs.calls import StepCall
from metaoptim.compiler.ir.traces.slices import Slice
from metaoptim.compiler.ir.values import Epoch, Theta
from metaoptim.errors import CaptureError

from ...engine.engine import Engine
from ...engine.graph import nodes_below
from ...engine.nodes import STEPPED, stepped
from ..rooted_reads import Reads


class Versions:
    """Versions of theta in the super-step at hand.

    Attributes:
        epochs: the epochs of the super-step, oldest first.
        superstep: how many have begun.
        current: state index -> equal for all that is shown for one value.
        late: id of the user's own parameter -> its theta, while the loss at hand may have read it itself.
    """

    def __init__(self, recording: Recording, window: int | None) -> None:
        self.recording, self.window = recording, window
        self.epochs: list[Epoch] = [recording.epoch]
        self.superstep = 0
        self.current: dict[int, object] = {}
        self.late: dict[int, Theta] = {}
        self._since: dict[int, int] = {}  # state index -> the position from which on it is there
        self._overlapping: set[int] = set()  # where rounds begin that this super-step has swallowed

    @property
    def read(self) -> bool:
        """Whether a loss of the super-step at hand may have read theta."""
        return any(epoch.read for epoch in self.epochs)

    def enter(self, theta: Theta, index: int, position: int) -> None:
        """What is shown as ``theta`` is on the tape from ``position`` on, at state ``index``."""
        theta.index = index
        self.current[index], self._since[index] = theta.version, position

    def show(self, position: int, shown: Iterable[tuple[int, Tensor]], changed: Sequence[int]) -> None:
        """An epoch begins at ``position``, where ``changed`` are new values.

        ``shown``: state index and tensor of all parameters, -1 for those that nothing has read. What is shown for a new
        value may be the tensor of the old one, written into.
        """
        for index in changed:
            self.current[index] = object()
        old, theta, new = self.recording.epoch.theta, {}, set(changed)
        for index, t in shown:
            known = None if index in new else old.get(id(t))
            theta[id(t)] = known or Theta(index, t, self.current[index])
        epoch = self.recording.epoch = Epoch(position, self.superstep, theta)
        self.epochs.append(epoch)
        self.late = {}

    def begins(self, epoch: Epoch) -> bool:
        """A step reads ``epoch``: whether it begins a super-step, which is then the one at hand."""
        if epoch is not self.epochs[-1] and self.superstep:
            return False
        self.superstep += 1
        epoch.superstep = self.superstep
        self._keep([epoch])
        self.recording.keep_only(epoch)
        self._overlapping.clear()
        return True

    def close(self) -> None:
        """Drop every reference to the user's graph."""
        self._keep([])
        self.late = {}

    def _keep(self, kept: list[Epoch]) -> None:
        """Drop the others, with the circle of calls that write and the epoch they were made in."""
        for epoch in self.epochs:
            if epoch not in kept:
                epoch.writes.clear()
        self.epochs = kept

    def slice(self, roots: list[Any]) -> tuple[Slice, Epoch]:
        """The ancestor slice of a loss (first root) and hyper-parameters, and the epoch whose theta it read."""
        for carry in (True, False):
            sliced = Slice(list(roots), self.late, carry)
            epoch = self._epoch_of(sliced) if sliced.consistent else None
            if epoch is not None:
                self._check_parted(epoch)
                return sliced, epoch
        raise CaptureError(
            "the loss reads parameters of several inner steps in a way that cannot be told apart; compute "
            "each loss from the networks as they are at one step"
        )

    def unchanged(self, theta: Theta) -> bool:
        """Whether this version is still the one shown."""
        return self._is_of(theta, self.recording.epoch)

    def _epoch_of(self, sliced: Slice) -> Epoch | None:
        """The epoch in which a loss first read theta, or a later one if what it read there was not yet the same.

        So a compiled function divides its steps, too.
        """
        first = sliced.entries[0].epoch
        begun = self.epochs.index(first) if first in self.epochs else 0
        for epoch in self.epochs[begun:]:
            if all(self._is_of(t, epoch) for t in sliced.thetas):
                break
        else:
            return None
        oldest = self.epochs[0]
        if self.window is None and epoch is self.epochs[-1] and all(_same(t, oldest) for t in sliced.thetas):
            return oldest  # the super-step goes on where it can: losses may be left that were computed before
        return epoch

    def _check_parted(self, epoch: Epoch) -> None:
        """Raise where a sliding window finds no end of a super-step that has swallowed more than W rounds."""
        if self.window is None or not self.superstep or epoch in (self.epochs[0], self.epochs[-1]):
            return
        self._overlapping.add(epoch.position)
        if len(self._overlapping) < self.window:
            return
        raise CaptureError(
            f"window={self.window}: this loss was computed before the last step of another optimizer, or "
            "before values were written into parameters, but after the round of losses before it had been stepped "
            "by; such rounds overlap, and cannot be told apart. Step by all losses of a round before the next one is "
            "computed, and write into parameters before the loss or after the step"
        )

    def _is_of(self, theta: Theta, epoch: Epoch) -> bool:
        if epoch.position < self._since[theta.index]:
            return False
        return id(theta.tensor) in self.late or _same(theta, epoch)


def _same(theta: Theta, epoch: Epoch) -> bool:
    """Whether the networks showed this version in ``epoch``, on the tape or not yet."""
    if epoch.theta.get(id(theta.tensor)) is theta:
        return True
    return any(t.index == theta.index and t.version is theta.version for t in epoch.theta.values())


def _can_leave(loss: Tensor) -> bool:
    # hooks belong to the tensor and its node; a subclass may be more than its memory
    return type(loss) is Tensor and not (loss._backward_hooks or loss.retains_grad or stepped(loss))


class _Waiting(NamedTuple):
    """A loss that still has its graph."""

    loss: weakref.ref[Tensor]
    after: Tensor  # the loss with its later history
    version: int  # of its memory at its step
    thetas: list[tuple[int, object, weakref.ref[Tensor]]]  # that it has read: index, version, tensor


class Stepped:
    """The losses of the super-step at hand that have been stepped by.

    Attributes:
        behind: whether a loss has left its graph although parameters that it has read are still shown.
    """

    def __init__(self, engine: Engine, reads: Reads, versions: Mapping[int, object]) -> None:
        self._engine, self._reads, self._versions = engine, reads, versions
        self._waiting: list[_Waiting] = []
        self.behind = False

    def leave(self, loss: Tensor, call: StepCall, sliced: Slice) -> None:
        """``loss``, of which ``sliced`` is what it has read, was stepped by in the ``call`` that was taken last."""
        if not _can_leave(loss):
            return
        after = self._reads.loss(loss, self._engine.position - 1, call, sliced)
        if after is None:
            return
        if any(self._versions.get(t.index) is t.version for t in sliced.thetas):
            read = [(t.index, t.version, weakref.ref(t.tensor)) for t in sliced.thetas]
            self._waiting.append(_Waiting(weakref.ref(loss), after, loss._version, read))
            if self._engine.particles is not None:  # which look at the loss itself
                self.settle(over=True)
        else:
            swap_tensors(loss, after)

    def settle(self, over: bool) -> None:
        """Let losses leave their graphs, all if the super-step is ``over``."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            loss = one.loss()
            if loss is None or loss._version != one.version or not loss.requires_grad or not _can_leave(loss):
                continue
            shown = [ref for index, version, ref in one.thetas if self._versions.get(index) is version]
            if shown and not over:
                self._waiting.append(one)
                continue
            if shown:
                self.behind = True
                one.after.grad_fn.current = {0: shown}  # type: ignore[union-attr]  # for `depends_on`
            swap_tensors(loss, one.after)

    @staticmethod
    def check(loss: Tensor, shown: list[Tensor]) -> None:
        """Raise if ``loss`` reads one of ``shown`` through a loss of an earlier super-step.

        Eager's graph would have given the inner gradient that path; the step has it as a tensor from outside.
        """
        current = {id(t) for t in shown}
        for node in nodes_below([loss], lambda node: isinstance(getattr(node, "engine", None), Engine)):
            left = isinstance(node, STEPPED)
            if left and any(id(ref()) in current for ref in getattr(node, "current", {}).get(0, ())):
                raise CaptureError(
                    "the loss was computed from the loss of an earlier step, which depends on parameters that this "
                    "step trains and that have not changed since: the inner gradient would miss that path. Compute it "
                    "anew, or detach it"
                )
