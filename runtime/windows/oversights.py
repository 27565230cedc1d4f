"""Ordinary mistakes that no single call shows: what reaches no step, and what comes after a window.

When a window has ended, the next backward and the next step of each optimizer of torch are looked at once. Each mistake
is told by a warning that points at the user's line.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.compiler.capture.eager.recorder import Taint
from metaoptim.compiler.ir.slices import Slice
from metaoptim.errors import UnreachableWarning, user_name_of, warn

from ..engine.graph import leaves_of, nodes_below
from .networks import Networks
from .update import parameters_of

_SHOWN = 3  # names that a message lists
_told: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensors that a warning after a window has named
_unreached: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensors that a warning of a step has named
_ended: ContextVar[Ended | None] = ContextVar("metaoptim_ended", default=None)


def names_text(names: Sequence[str]) -> str:
    """'0.weight', '0.bias' and 4 more."""
    text = ", ".join(map(repr, names[:_SHOWN]))
    return text + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def tell_unreachable(sliced: Slice, taint: Taint, networks: Networks) -> bool:
    """Warn of what requires grad and reaches a step only where no gradient flows; whether anything does."""
    told = False
    reached = {id(x.source) for x in sliced.externals if x.grad}
    for x in (x for x in sliced.externals if not x.grad):
        for ref in taint.of(x.held.tensor if x.source is None else x.source).values():
            leaf = ref()
            if (
                leaf is None
                or id(leaf) in reached
                or leaf in _unreached
                or networks.index_of(leaf) is not None
            ):
                continue
            _unreached[leaf] = True
            name = user_name_of(leaf)
            below = (a for y in sliced.externals if y.tensor is not None for a in leaves_of(y.tensor))
            if name is not None and not any(leaf is a for a in below):
                told = True
                warn(
                    f"{name!r} requires grad, but reaches the inner loss only where no gradient flows (under "
                    "torch.no_grad() or through .detach()), so it receives no meta-gradient from it. Compute what "
                    f"depends on {name!r} outside no_grad.",
                    UnreachableWarning,
                )
    return told


class Ended:
    """A window that has ended.

    Args:
        offline: its mode.
        own: its networks' parameters, by name.
        asked: whether a gradient through its steps was asked for inside the block.
        learns: whether anything besides its networks can receive one.
        reads: of its networks, behind losses that are still there and that no step was taken by.
    """

    def __init__(
        self, offline: bool, own: Mapping[str, Tensor], asked: bool, learns: bool, reads: Collection[Any]
    ) -> None:
        self.offline, self.asked, self.learns, self._reads = offline, asked, learns, reads
        self.unwatch: Callable[[], object] = lambda: None  # the next backward need not be looked at any more
        self._own = {id(p): (weakref.ref(p), name) for name, p in own.items()}
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def name_of(self, t: Tensor) -> str | None:
        """The name of one of its networks' own parameters."""
        ref, name = self._own.get(id(t), (None, None))
        return name if ref is not None and ref() is t else None

    def backward(self, outputs: Iterable[Tensor], ours: tuple[type, ...]) -> None:
        """The first backward after it: is it of a loss that should have been computed inside?"""
        if self.asked:
            return
        self.asked = True
        self.unwatch()
        if self._reads:  # a loss of the block waits for its backward, which may come next
            return
        leaves = _leaves_below(outputs, ours)
        if leaves is None or not (self.offline or self.learns):
            return
        names = [name for t in leaves if (name := self.name_of(t)) is not None]
        if not names or (not self.offline and len(names) < len(leaves)):
            return
        state = "back at its first parameters" if self.offline else "cut off from its history"
        warn(
            f"this loss depends on {names_text(names)} of a network whose window has ended, and nobody has asked for a "
            f"gradient through that window: after it the network is {state}. Compute the outer loss inside the "
            "window's block; its backward may come later",
            UnreachableWarning,
        )

    def step(self, optimizer: Optimizer) -> None:
        """The first step of an optimizer of torch after it: has what it moves received a gradient?"""
        if optimizer in self._optimizers:
            return
        self._optimizers.add(optimizer)
        moved = parameters_of(optimizer)
        without = [p for p in moved if p.grad is None and p.requires_grad and p not in _told]
        if not without or (len(without) == len(moved) and not self.asked):
            return
        name = type(optimizer).__name__
        own = {id(p): n for p in without if (n := self.name_of(p)) is not None}
        if own and not self.offline:
            _told.update((p, True) for p in without if id(p) in own)
            warn(
                f"{name}.step: {names_text([*own.values()])} have no gradient, since the window before was online: "
                "there a network keeps what it has learnt, and only meta-parameters receive gradients. To learn its "
                "first parameters (MAML), open the window with offline=True",
                UnreachableWarning,
            )
        others = [(p, user_name_of(p)) for p in without if id(p) not in own]
        told = [(p, f"{found!r} has no gradient") for p, found in others if found is not None]
        if not told and len(others) == len(moved):  # in no variable, say in a module or a list
            p = others[0][0]
            many = f"none of its {len(moved)} parameters, the first of shape {tuple(p.shape)},"
            told = [(p, f"{many} has a gradient")]
        for p, what in told:
            _told[p] = True
            warn(
                f"{name}.step: {what}: neither the inner steps nor the outer loss of the window before depend "
                "on it, or only through .detach(), float(), .item() or torch.no_grad(). Hand the tensor itself on",
                UnreachableWarning,
            )


def _leaves_below(outputs: Iterable[Tensor], ours: tuple[type, ...]) -> list[Tensor] | None:
    """The leaves that ``outputs`` depend on; None if they depend on nodes of ``ours``."""
    leaves = []
    for node in nodes_below(outputs):
        if isinstance(node, ours):
            return None
        if hasattr(node, "variable"):
            leaves.append(node.variable)
    return leaves


def remember(window: Ended | None) -> None:
    """A window has ended, or (None) another one begins."""
    _ended.set(window)


last_ended = _ended.get  # the window that ended last in this thread, if no other has begun since


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all entries are finite; the device is waited for once."""
    found = [t.isfinite().all() for t in tensors if t.is_floating_point()]
    return not found or bool(torch.stack([f.to(found[0].device) for f in found]).all())
