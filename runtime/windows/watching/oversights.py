"""Backwards are looked at: partial gradients are refused, and mistakes told that no single call shows.

Steps are not on autograd's tape: they hang on meta-parameters and on theta_0. A tensor in between (a parameter as it
was after step 3, an activation, ``lr = raw.exp()`` computed in the block) has a part of its derivative there and a part
in the steps that have read it. Backward without ``inputs`` does not care; ``torch.autograd.grad(outer, tensor)`` does.

When a window has ended, the next backward and the next step of each optimizer of torch are looked at once. Each mistake
is told by a warning that points at the user's line.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.compiler.capture.eager.recorder import Taint
from metaoptim.compiler.capture.intercept import Patches, recording
from metaoptim.compiler.ir.programs.calls import Assign
from metaoptim.compiler.ir.programs.program import Tape
from metaoptim.compiler.ir.traces.slices import Slice
from metaoptim.errors import CaptureError, UnreachableWarning, user_name_of, warn

from ...engine.engine import Engine
from ...engine.estimators.tangents import TangentRead
from ...engine.function import Call
from ...engine.graph import leaves_of, nodes_below
from ...engine.nodes import (
    STEPPED,
    InnerParameter,
    Link,
    Position,
    Read,
    Results,
    StepLoss,
    WindowedLoss,
    WindowedRead,
)
from ..networks import Networks
from ..session import Session, current_session
from ..updates.update import parameters_of

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
        implicit: whether its gradient is that at a solution.
    """

    def __init__(
        self,
        offline: bool,
        own: Mapping[str, Tensor],
        asked: bool,
        learns: bool,
        reads: Sized,
        implicit: bool = False,
    ) -> None:
        self.offline, self.asked, self.learns, self._reads = offline, asked, learns, reads
        self._implicit = implicit
        self.unwatch: Callable[[], object] = lambda: None  # the next backward need not be looked at any more
        self._own = WeakIdKeyDictionary({p: name for name, p in own.items()})
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def backward(self, outputs: Iterable[Tensor]) -> None:
        """The first backward after it: is it of a loss that should have been computed inside?"""
        if self.asked:
            return
        self.asked = True
        self.unwatch()
        if self._reads:  # a loss of the block waits for its backward, which may come next
            return
        nodes = list(nodes_below(outputs))
        if any(isinstance(node, _OURS) for node in nodes) or not (self.offline or self.learns):
            return
        leaves = [node.variable for node in nodes if hasattr(node, "variable")]
        names = [name for t in leaves if (name := self._own.get(t)) is not None]
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
        own = {id(p): n for p in without if (n := self._own.get(p)) is not None}
        if own and (self._implicit or not self.offline):
            _told.update((p, True) for p in without if id(p) in own)
            why = (
                "had gradient=Implicit(...): a solution does not depend on where the loop began. To learn its first "
                "parameters, have the inner loss pull towards them (examples/few-shot/imaml.py), or take the exact "
                "gradient"
                if self.offline
                else "was online: there a network keeps what it has learnt, and only meta-parameters receive "
                "gradients. To learn its first parameters (MAML), open the window with offline=True"
            )
            warn(
                f"{name}.step: {names_text([*own.values()])} have no gradient, since the window before {why}",
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


def remember(window: Ended | None) -> None:
    """A window has ended, or (None) another one begins."""
    _ended.set(window)


last_ended = _ended.get  # the window that ended last in this thread, if no other has begun since


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all entries are finite; the device is waited for once, or twice where their sums are not."""
    real = [t for t in tensors if t.is_floating_point()]
    if not real:
        return True

    def together(seen: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([seen(t).to(real[0].device) for t in real])

    # a sum that is finite hides nothing; one that is not may have overflowed
    return bool(together(Tensor.sum).isfinite().all()) or bool(together(lambda t: t.isfinite().all()).all())


# -- partial gradients ---------------------------------------------------------------------------------------------


class _Mark(NamedTuple):
    """Where a tensor enters the tape."""

    engine: weakref.ref[Engine]  # of the tape
    steps: tuple[int, ...]  # positions of the steps that have read it; of theta, from which it was shown
    theta: int | None  # of theta, its state index


_marks = WeakIdKeyDictionary()
_OURS = tuple(
    f._backward_cls
    for f in (Read, WindowedRead, TangentRead, Results, Position, StepLoss, WindowedLoss, Link, Call)
)  # type: ignore[attr-defined]  # pyright: ignore
_READS = (Read._backward_cls, WindowedRead._backward_cls, TangentRead._backward_cls)  # type: ignore[attr-defined]  # pyright: ignore
_FORWARD = TangentRead._backward_cls  # type: ignore[attr-defined]  # pyright: ignore
_POSITION = Position._backward_cls  # type: ignore[attr-defined]  # pyright: ignore
_UNREAD = StepLoss._backward_cls  # type: ignore[attr-defined]  # pyright: ignore


def note_theta(t: Tensor, engine: Engine, position: int, index: int) -> None:
    """``t`` is a leaf that stands for state entry ``index`` from ``position`` on."""
    _marks[t] = _Mark(weakref.ref(engine), (position,), index)


def note_value(t: Tensor, engine: Engine, steps: tuple[int, ...]) -> None:
    """``t`` was read by the steps at these positions, and outlives the recording of them."""
    _marks[t] = _Mark(weakref.ref(engine), steps, None)


def is_noted(t: Tensor) -> bool:
    """Whether steps have read ``t``, which is no theta."""
    return bool(_marks) and (mark := _marks.get(t)) is not None and mark.theta is None


def _mark_of(t: Tensor, session: Session | None) -> _Mark | None:
    if isinstance(t, InnerParameter) and isinstance(t.grad_fn, _READS):
        node: Any = t.grad_fn
        return _Mark(weakref.ref(node.engine), (node.position,), node.indices[t.output_nr])
    found = None if session is None else session.steps_reading(t)
    if found is not None:
        return _Mark(weakref.ref(found[0]), found[1], None)
    return _marks.get(t) if _marks else None


def check(outputs: Iterable[Tensor], inputs: Iterable[Any], session: Session | None) -> None:
    """Raise if a derivative of ``outputs`` by ``inputs`` has a part in steps that autograd does not see."""
    reads: list[Any] | None = (
        None  # the nodes of theta, and of losses that have been stepped by, below ``outputs``
    )
    for t in inputs:
        mark = _mark_of(t, session) if isinstance(t, Tensor) else None
        engine = None if mark is None else mark.engine()
        if mark is None or engine is None:
            continue
        if reads is None:
            reads = [
                node for node in nodes_below(outputs) if isinstance(node, (*_READS, *STEPPED, _POSITION))
            ]
        for node in reads:
            if node.engine is engine and node is not t.grad_fn and _affects(engine.program, mark, node):
                raise _passed_by(t, mark, isinstance(node, STEPPED))


def _affects(program: Tape, mark: _Mark, node: Any) -> bool:
    """Whether what ``node`` shows depends on what is marked through the steps between, or by being replayed."""
    start, end = min(mark.steps), node.position
    if isinstance(node, _FORWARD) and start < program.start:
        return start < end  # the steps between are forgotten
    bottom = max(program.start, getattr(node, "bottom", 0))
    if isinstance(node, STEPPED):
        if mark.theta is None and node.position in mark.steps:
            return True
        if not isinstance(node, _UNREAD):  # the other hangs on reads, which are looked at by themselves
            return False
        call: Any = program[node.position]
        end, wanted = node.position - call.back, call.theta
        outside = start > end
    else:
        # what is gone back to later is what was shown there, by another node
        wanted, outside = node.indices, start > end if isinstance(node, _POSITION) else start >= end
    if outside or (mark.theta is not None and start < bottom):
        return False
    reached: set[int] = set() if mark.theta is None else {mark.theta}
    at: dict[int, set[int]] = {}
    for position in range(max(start, bottom), end):
        at[position] = reached
        call = program[position]
        if isinstance(call, Assign):
            reached = reached - (set(call.indices) - node.engine.untrained)
            continue
        results = set(call.writes)
        affected = (
            (mark.theta is None and position in mark.steps)
            or not at.get(position - call.back, set()).isdisjoint(call.theta)
            or not reached.isdisjoint((*call.updated, *call.reads[call.step.thetas :]))
        )
        reached = reached | results if affected else reached - results
    return not reached.isdisjoint(wanted)


def _passed_by(t: Tensor, mark: _Mark, stepped: bool) -> CaptureError:
    shape = tuple(t.shape)
    if stepped:
        return CaptureError(
            f"a gradient of a loss was asked for, after its inner step, by a tensor of shape {shape} that was computed "
            "inside the window. After its step a loss has given up its graph, and its gradient comes out of the steps, "
            "by initial parameters and meta-parameters. Ask before the step, or keep loss.clone() from before it."
        )
    if mark.theta is not None:
        return CaptureError(
            f"a gradient was asked for by a parameter of shape {shape} as it was before later inner steps: what flows "
            "through those steps would be missing. Ask for the gradient by the initial parameters (taken before an "
            "offline window) or by meta-parameters, or open the window with strategy='full_tape'."
        )
    return CaptureError(
        f"a gradient was asked for by a tensor of shape {shape} that was computed inside the window and read by an "
        "inner step: what flows through that step would be missing. Compute it before the window, or, if it does not "
        "depend on the networks, call its retain_grad() right after computing it."
    )


def _run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    inputs = args[3] if len(args) > 3 else kwargs.get("inputs")
    session = current_session()
    if inputs:
        recorder = recording.get()
        if recorder is None or not recorder.depth:
            check(outputs, inputs, session)
    elif session is not None:
        session.note_backward(outputs)
    elif (ended := last_ended()) is not None:
        ended.backward(outputs)
    return _backward.original["_engine_run_backward"](outputs, *args, **kwargs)


# torch's one way into the engine
_backward = Patches((torch.autograd, "_engine_run_backward", _run_backward))


def watch_backward(of: Engine | Ended) -> Callable[[], Any]:
    """Look at every backward for as long as ``of`` lives, or until the result is called."""
    _backward.install()
    release = weakref.finalize(of, _backward.uninstall)
    release.atexit = False
    return release
