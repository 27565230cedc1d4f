"""Losses that have been stepped by: they leave eager's graph, so that who collects them holds no activations.

The user's tensor stays the object it is, and gets another history: its gradient comes out of replay (`bridge.StepLoss`,
`bridge.WindowedLoss`). It keeps eager's as long as another optimizer's step may still need that: until the parameters
that it has read have changed, or a new super-step has begun.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaoptim.compiler.compat import swap_tensors
from metaoptim.compiler.ir.calls import StepCall
from metaoptim.compiler.ir.slices import Slice
from metaoptim.errors import CaptureError

from ..engine.engine import Engine
from ..engine.graph import nodes_below
from ..engine.nodes import STEPPED, StepLoss, stepped
from .sliding import Sliding


def _can_leave(loss: Tensor) -> bool:
    # hooks belong to the tensor and its node; a subclass may be more than its memory
    return type(loss) is Tensor and not (loss._backward_hooks or loss.retains_grad or stepped(loss))


class _Waiting(NamedTuple):
    """A loss that still has its graph.

    Attributes:
        loss: it.
        after: the same with its later history.
        version: of its memory at its step.
        thetas: state index, version and tensor of all theta that it has read.
    """

    loss: weakref.ref[Tensor]
    after: Tensor
    version: int
    thetas: list[tuple[int, object, weakref.ref[Tensor]]]


class Stepped:
    """The losses of the super-step at hand that have been stepped by.

    Args:
        engine: the tape.
        sliding: as of the window.
        versions: state index -> version of the theta shown.

    Attributes:
        behind: whether a loss has left its graph although parameters that it has read are still shown.
    """

    def __init__(self, engine: Engine, sliding: Sliding | None, versions: Mapping[int, object]) -> None:
        self._engine, self._sliding, self._versions = engine, sliding, versions
        self._waiting: list[_Waiting] = []
        self.behind = False

    def leave(self, loss: Tensor, call: StepCall, sliced: Slice, token: Tensor) -> None:
        """``loss``, of which ``sliced`` is what it has read, was stepped by in the ``call`` that was taken last."""
        if not _can_leave(loss):
            return
        position = self._engine.position - 1
        with torch.enable_grad():
            if self._sliding is None:
                after: Any = StepLoss.apply(self._engine, position, loss.detach(), token)
            else:
                after = self._sliding.loss(loss, position, call, sliced)
        if after is None:
            return
        if any(self._versions.get(t.index) is t.version for t in sliced.thetas):
            read = [(t.index, t.version, weakref.ref(t.tensor)) for t in sliced.thetas]
            self._waiting.append(_Waiting(weakref.ref(loss), after, loss._version, read))
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
                one.after.grad_fn.current = {0: shown}  # type: ignore[union-attr]  # of `dependence`
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
