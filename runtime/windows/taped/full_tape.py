"""The full tape, plain eager PyTorch with `create_graph=True`: the oracle, and a way out of what cannot be recorded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import enable_reentrant_dispatch

from metaoptim.compiler.capture.eager.recorder import Recorder
from metaoptim.compiler.derive.norms import FORMULAS
from metaoptim.compiler.ir.operators import PLAIN_NORM
from metaoptim.errors import CaptureError

from ...engine.engine import Held
from ...engine.graph import nodes_below
from ...engine.nodes import Begin, as_parameter
from ..networks import Networks
from ..ordinary_session import OrdinarySession
from ..session import Options, Place, refuse_overwritten, refuse_write
from ..updates.hyper import Scheduled, hyper_of
from ..updates.update import InnerOptimizer, added, gradient, trained, update_by

# The fused attention kernels have no second derivative: none is taken while a full tape is open, in the whole process.
_lock = Lock()
_open = 0
_KERNELS = ("flash", "mem_efficient", "cudnn", "math")
_switches: dict[str, bool] = {}


def open_tapes(more: int) -> None:
    """``more`` full tapes are open now: the first of them sets torch's switches, the last puts them back.

    They may be of several threads, so `sdpa_kernel` will not do: what one thread has entered no other may leave.
    """
    global _open
    backends = torch.backends.cuda
    with _lock:
        if not _open:
            _switches.update((k, getattr(backends, f"{k}_sdp_enabled")()) for k in _KERNELS)
        before, _open = _open, _open + more
        for kernel in _KERNELS if not before or not _open else ():
            getattr(backends, f"enable_{kernel}_sdp")(kernel == "math" if _open else _switches[kernel])


# How many versions back a loss may have read: steps that other optimizers took since it was computed.
_LOOK_BACK = 8


class _Show(torch.autograd.Function):
    """A tensor as a parameter of its own, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, own: list[nn.Parameter], level: int) -> Tensor:  # type: ignore[override]
        ctx.level = level
        return as_parameter(value.detach().clone(), own[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


def show(value: Tensor, own: nn.Parameter, level: int) -> Tensor:
    """``value`` as a parameter with its history; ``own``: the user's behind it; ``level``: of windows around."""
    # the parameter behind is no differentiable input: hand it over out of autograd's sight
    return _Show.apply(value, [own], level)


_SHOWN = (Begin._backward_cls, _Show._backward_cls)  # type: ignore[attr-defined]  # pyright: ignore


def _key(t: Tensor) -> Any:
    return id(t) if t.grad_fn is None else t.grad_fn


def _shown_below(loss: Tensor, level: int) -> set[Any]:
    """What ``loss`` has read of what was shown, itself and not by way of later steps: nodes, and ids of leaves.

    What windows further inside have shown, beyond ``level``, is a part of it.
    """
    found: set[Any] = set()
    ends = lambda node: isinstance(node, _SHOWN) and getattr(node, "level", 0) <= level
    for node in nodes_below([loss], ends):
        found.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
    return found


#: What autograd calls the derivatives of these, whose own derivatives are wrong.
_NORMS = {
    "".join(word.capitalize() for word in op._schema.name.partition("::")[2].split("_")) + "Backward0"
    for op in FORMULAS
}


def _check_norms(read: Collection[Any]) -> None:
    """Raise for a loss with weight norm or the derivative of another norm, where its gradient is differentiated."""
    found = {node.name() for node in read if not isinstance(node, int)} & _NORMS
    if found:
        raise CaptureError(
            f"autograd's tape would give a wrong meta-gradient by {found.pop()}: PyTorch gets the second derivative of "
            "weight norm wrong, and the third one of layer norm and batch norm (a loss with a derivative of these in "
            "it). Leave strategy='full_tape' out; in a window inside another one, write the norm in plain operators: "
            f"{PLAIN_NORM}"
        )


class FullTapeSession(OrdinarySession):
    """A window whose inner steps stay on autograd's tape; ``level``: how many windows are around it."""

    level = 0

    def __init__(
        self, options: Options, recorder: Recorder | None = None, networks: Networks | None = None
    ) -> None:
        super().__init__(options, recorder or Recorder(self, record=False), networks or Networks())
        # what the networks have shown, oldest first, with numbers that are equal where the values are
        self._versions: list[tuple[list[Tensor], list[int]]] = []
        self._count = 0
        self._cuts: set[int] = set()  # ids of parameters that steps train: an earlier write was a cut too
        self._cut: list[tuple[int, Any]] = []  # overwritten parameters, and what had shown them

    def open(self) -> None:
        open_tapes(+1)
        super().open()

    def _offer(self, ordinals: list[int]) -> None:
        for i in ordinals:
            p = self.networks.originals[i]
            with torch.enable_grad():
                (shown,) = Begin.apply(self.closed, [p.detach().clone()], p)
            self.networks.show(i, shown)
        self._shown_anew(ordinals)

    def _join(self, ordinals: list[int], late: list[int]) -> None:
        own = self.networks.originals
        self._cuts.update(id(own[i]) for i in ordinals)
        if late:
            before = [own[i] if i in late else shown for i, shown in enumerate(self.networks.shown)]
            self._versions.insert(-1, (before, list(self._versions[-1][1])))

    def _start(self, ordinals: list[int], values: list[Tensor]) -> None:
        own = self.networks.originals
        with torch.enable_grad():
            for i, v in zip(ordinals, values, strict=True):
                shown = self._shown_for(v, own[i])
                self.networks.show(i, shown if v.requires_grad else shown.requires_grad_())
            self._show_again(ordinals)
        self._shown_anew(ordinals)

    def _hold(self, places: Sequence[Place], linked: bool, copied: bool) -> Held:
        now = list(map(self.tensor_at, places))
        with torch.enable_grad():
            roots = [
                self._copy(t if linked else t.detach()) for t in now
            ]  # in-place writes would cut them off
        return Held(roots, roots)

    def _go_on(self, places: Sequence[Place], held: Held) -> None:
        thetas = [
            (self.ordinal(p), t) for p, t in zip(places, held.roots, strict=True) if p.optimizer is None
        ]
        self._start([i for i, _ in thetas], [t for _, t in thetas])
        with torch.enable_grad():
            for place, t in zip(places, held.roots, strict=True):
                place.put(self._copy(t))

    def _shown_for(self, value: Tensor, own: nn.Parameter) -> Tensor:
        """What networks show for ``value``, in the place of the user's ``own``."""
        return show(value, own, self.level)

    def _copy(self, value: Tensor) -> Tensor:
        """A tensor of its own, with the history of ``value``."""
        return value.clone()

    def _shown_anew(self, changed: Sequence[int]) -> None:
        """Note what the networks show, where ``changed`` are new values."""
        before = self._versions[-1][1] if self._versions else []
        values = [*before, *[0] * (len(self.networks.shown) - len(before))]
        for i in changed:
            self._count += 1
            values[i] = self._count
        self._versions.append((list(self.networks.shown), values))

    def _added(
        self,
        optimizer: InnerOptimizer,
        schedules: Scheduled,
        loss: Tensor,
        losses: list[Tensor | None] | None,
    ) -> list[Tensor | None]:
        self.refuse_strangers()
        ordinals, create_graph = self.ordinals(optimizer), self._differentiable(optimizer)
        grads = self._inner_gradient(loss, ordinals, create_graph)
        with torch.set_grad_enabled(create_graph):
            return grads if losses is None else added(losses, grads)

    def _differentiable(self, optimizer: InnerOptimizer) -> bool:
        """Whether inner gradients are differentiated."""
        return not (optimizer.first_order or self.options.first_order)

    def _step(
        self,
        optimizer: InnerOptimizer,
        schedules: Scheduled,
        losses: list[Tensor | None],
        loss: Tensor,
        allow_unused: bool,
    ) -> None:
        networks, members = self.networks, trained(optimizer, self.networks)
        create_graph, hook = self._differentiable(optimizer), self.options.backward_hook
        hyper = hyper_of(optimizer, schedules, lambda t: t, lifts=False)
        options: Any = {"allow_unused": allow_unused, "create_graph": create_graph}
        with torch.enable_grad():
            update = update_by(optimizer, networks, members, losses, hyper, **options)
            inner = update.grads
            if hook is not None:
                inner = [g.view_as(g) for g in inner]
                for g in inner:
                    if g.requires_grad:
                        g.register_hook(hook)
            thetas = [networks.shown[i] for i in update.ordinals]
            # schedulers write into tensors that autograd saves here: copies, where that changes no gradient
            hyper_values = [
                h.clone() if isinstance(h, Tensor) and not h.requires_grad else h for h in update.hyper_values
            ]
            new, new_states = update.plan(thetas, inner, update.states, hyper_values)
            for i, value in zip(update.ordinals, new, strict=True):
                own = networks.originals[i]
                learnt = value.requires_grad
                networks.show(
                    i, self._shown_for(value, own) if learnt else as_parameter(value, own).requires_grad_()
                )
            self._show_again(update.ordinals)
        for i, state in zip(update.ordinals, new_states, strict=True):
            optimizer.state[networks.originals[i]] = state
        self._shown_anew(update.ordinals)

    def _show_again(self, but: Collection[int]) -> None:
        """Show the other parameters anew: from now on they are not what past steps have read.

        So an inner gradient is the derivative at this state alone, as in any training loop.
        """
        for i in set(range(len(self.networks.shown))) - set(but):
            self.networks.show(i, self._shown_for(self.networks.shown[i], self.networks.originals[i]))

    def _inner_gradient(self, loss: Tensor, ordinals: list[int], create_graph: bool) -> list[Tensor | None]:
        """∇ loss by the parameters as the loss has read them, all that was shown besides held fixed.

        A loss may have read what was shown at several times (before and after another optimizer's step). Where the
        value was the same, both count; where an older value led to a newer one through a step, that way does not.
        """
        read = _shown_below(loss, self.level)
        if create_graph:
            _check_norms(read)
        for i, node in self._cut:
            if i in ordinals and node in read:
                refuse_overwritten(self.networks.names[i])
        self._cut = [(i, node) for i, node in self._cut if i not in ordinals]
        options: Any = {"retain_graph": True, "create_graph": create_graph}
        newer: list[tuple[Tensor, Tensor]] = []  # what the loss has read, with its gradient by that alone
        found: dict[int, tuple[int, Tensor]] = {}  # ordinal -> the value it was read at, gradient
        for shown, values in reversed(self._versions[-_LOOK_BACK:]):
            at = [i for i, t in enumerate(shown) if _key(t) in read and not any(t is m for m, _ in newer)]
            tensors = [shown[i] for i in at]
            if not at:
                continue
            grads = gradient(loss, tensors, **options)
            through: Sequence[Tensor | None] = [None] * len(at)
            if joints := [(t, g) for t, g in newer if t.grad_fn is not None]:
                through = gradient([t for t, _ in joints], tensors, [g for _, g in joints], **options)
            for i, t, g, h in zip(at, tensors, grads, through, strict=True):
                if g is None:
                    continue
                g = g if h is None else g - h
                newer.append((t, g))
                if i not in found:
                    found[i] = values[i], g
                elif found[i][0] == values[i]:
                    found[i] = values[i], found[i][1] + g
        return [found[i][1] if i in found else None for i in ordinals]

    def _close(self, failed: bool) -> None:
        open_tapes(-1)
        self._versions.clear()
        self._cut.clear()
        self.recorder.release()

    def statistics(self, stats: Sequence[Tensor], training: bool) -> list[Tensor]:
        return self.networks.statistics(stats, training)

    def preserve(self, targets: list[Tensor]) -> None:
        """What steps have read is held by autograd, which watches versions itself."""
        self.networks.back_up(targets)

    def before_write(self, targets: list[Tensor], op: Any) -> list[int]:
        hit = [i for t in targets if (i := self.networks.at(t)) is not None]
        if hit and torch.is_grad_enabled() and any(t.requires_grad for t in targets):
            refuse_write(self.networks.names[hit[0]], op)
        return hit

    def after_write(self, hit: list[int]) -> None:
        """A history cut: the overwritten parameters are new leaves."""
        with self.recorder.paused(), enable_reentrant_dispatch():
            for i in hit:
                self._count += 1
                self._versions[-1][1][i] = self._count
                shown = self.networks.shown[i]
                if i not in self.networks.joined:
                    with torch.enable_grad():  # an ordinary network's, so far
                        (anew,) = Begin.apply(self._cuts, [shown.detach()], self.networks.originals[i])
                    self.networks.show(i, anew)
                    self._versions[-1][0][i] = anew
                elif not shown.is_leaf:
                    self._cut.append((i, shown.grad_fn))
                    Tensor.detach_(shown)
                    shown.requires_grad_()
