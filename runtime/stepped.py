"""Losses that have been stepped by: they leave eager's graph, so that who collects them holds no activations.

The user's tensor stays the object it is, and gets another history: its gradient comes out of replay (`bridge.StepLoss`,
`bridge.WindowedLoss`). It keeps eager's as long as another optimizer's step may still need that: until the parameters
that it has read have changed, or a new super-step has begun.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..compiler.capture.entries import Theta
from .bridge import stepped


class _Waiting(NamedTuple):
    loss: weakref.ref[Tensor]
    after: Tensor
    version: int
    thetas: list[tuple[int, object, weakref.ref[Tensor]]]


class Stepped:
    """The losses of the super-step at hand that have been stepped by.

    Args:
        versions: state index -> version of the theta shown.

    Attributes:
        behind: whether a loss has left its graph although parameters that it has read are still shown.
    """

    def __init__(self, versions: Mapping[int, object]) -> None:
        self._versions = versions
        self._waiting: list[_Waiting] = []
        self.behind = False

    @staticmethod
    def takes(loss: Tensor) -> bool:
        """Whether ``loss`` can get another history."""
        # hooks are of the tensor and its node; the impl of a subclass may be special
        return type(loss) is Tensor and not (loss._backward_hooks or loss.retains_grad or stepped(loss))

    def add(self, loss: Tensor, after: Tensor, thetas: list[Theta]) -> None:
        """A step has been taken by ``loss``, computed from ``thetas``; ``after``: the same with its later history."""
        if any(self._versions.get(t.index) is t.version for t in thetas):
            read = [(t.index, t.version, weakref.ref(t.tensor)) for t in thetas]
            self._waiting.append(_Waiting(weakref.ref(loss), after, loss._version, read))
        else:
            torch._C._swap_tensor_impl(loss, after)

    def settle(self, over: bool) -> None:
        """Let losses leave their graphs, all if the super-step is ``over``."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            loss = one.loss()
            if loss is None or loss._version != one.version or not loss.requires_grad or not self.takes(loss):
                continue
            shown = [ref for index, version, ref in one.thetas if self._versions.get(index) is version]
            if shown and not over:
                self._waiting.append(one)
                continue
            if shown:
                self.behind = True
                one.after.grad_fn.current = {0: shown}  # type: ignore[union-attr]  # of `dependence`
            torch._C._swap_tensor_impl(loss, one.after)
