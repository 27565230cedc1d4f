"""Gradients by tensors inside the loop, which autograd would give without what flows through the steps: refused.

Steps are not on autograd's tape: they hang on meta-parameters and on theta_0. A tensor in between (a parameter as it
was after step 3, an activation, ``lr = raw.exp()`` computed in the block) has a part of its derivative there and a part
in the steps that have read it. Backward without ``inputs`` does not care; ``torch.autograd.grad(outer, tensor)`` does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.compiler.capture.intercept import recording
from metaoptim.compiler.ir.calls import Assign
from metaoptim.compiler.ir.program import Tape
from metaoptim.errors import CaptureError

from ..engine.engine import Engine
from ..engine.graph import nodes_below
from ..engine.nodes import STEPPED, InnerParameter, Link, Read, Results, StepLoss, WindowedLoss, WindowedRead
from .ordinary_session import OrdinarySession
from .oversights import Ended, last_ended
from .session import Session, current_session


@dataclass(frozen=True)
class _Mark:
    """Where a tensor enters the tape.

    Attributes:
        engine: of the tape.
        steps: positions of the steps that have read it; for theta, the one position from which it was shown.
        index: for theta, its state index.
    """

    engine: weakref.ref[Engine]
    steps: tuple[int, ...]
    index: int | None


_marks = WeakIdKeyDictionary()
_OURS = tuple(f._backward_cls for f in (Read, WindowedRead, Results, StepLoss, WindowedLoss, Link))  # type: ignore[attr-defined]  # pyright: ignore
_READS = (Read._backward_cls, WindowedRead._backward_cls)  # type: ignore[attr-defined]  # pyright: ignore
_UNREAD = StepLoss._backward_cls  # type: ignore[attr-defined]  # pyright: ignore


def note_theta(t: Tensor, engine: Engine, position: int, index: int) -> None:
    """``t`` is a leaf that stands for state entry ``index`` from ``position`` on."""
    _marks[t] = _Mark(weakref.ref(engine), (position,), index)


def note_value(t: Tensor, engine: Engine, steps: tuple[int, ...]) -> None:
    """``t`` was read by the steps at these positions, and outlives the recording of them."""
    _marks[t] = _Mark(weakref.ref(engine), steps, None)


def is_noted(t: Tensor) -> bool:
    """Whether steps have read ``t``, which is no theta."""
    return bool(_marks) and (mark := _marks.get(t)) is not None and mark.index is None


def _mark_of(t: Tensor, session: Session | None) -> _Mark | None:
    if isinstance(t, InnerParameter) and isinstance(t.grad_fn, _READS):
        node: Any = t.grad_fn
        return _Mark(weakref.ref(node.engine), (node.position,), node.indices[t.output_nr])
    found = session.steps_reading(t) if isinstance(session, OrdinarySession) else None
    if found is not None:
        return _Mark(weakref.ref(found[0]), found[1], None)
    return _marks.get(t) if _marks else None


def check(outputs: Iterable[Tensor], inputs: Iterable[Any], session: Session | None) -> None:
    """Raise if a derivative of ``outputs`` by ``inputs`` has a part in steps that autograd does not see.

    Raises:
        CaptureError: naming the tensor's shape and what to do instead.
    """
    reads: list[Any] | None = None
    for t in inputs:
        mark = _mark_of(t, session) if isinstance(t, Tensor) else None
        engine = None if mark is None else mark.engine()
        if mark is None or engine is None:
            continue
        if reads is None:
            reads = _reads_below(outputs)
        for node in reads:
            if node.engine is engine and node is not t.grad_fn and _affects(engine.program, mark, node):
                raise _passed_by(t, mark, isinstance(node, STEPPED))


def _reads_below(outputs: Iterable[Tensor]) -> list[Any]:
    """The nodes of theta, and of losses that have been stepped by, that ``outputs`` depend on."""
    return [node for node in nodes_below(outputs) if isinstance(node, (*_READS, *STEPPED))]


def _affects(program: Tape, mark: _Mark, node: Any) -> bool:
    """Whether what ``node`` shows depends on what is marked through the steps between, or by being replayed."""
    start, end = min(mark.steps), node.position
    bottom = max(program.start, getattr(node, "bottom", 0))
    if isinstance(node, STEPPED):
        if mark.index is None and node.position in mark.steps:
            return True
        if not isinstance(node, _UNREAD):  # the other hangs on reads, which are looked at by themselves
            return False
        call: Any = program[node.position]
        end, wanted = node.position - call.back, call.theta
        outside = start > end
    else:
        wanted, outside = node.indices, start >= end
    if outside or (mark.index is not None and start < bottom):
        return False
    reached: set[int] = set() if mark.index is None else {mark.index}
    at: dict[int, set[int]] = {}
    for position in range(max(start, bottom), end):
        at[position] = reached
        call = program[position]
        if isinstance(call, Assign):
            reached = reached - (set(call.indices) - node.engine.untrained)
            continue
        results = set(call.writes)
        affected = (
            (mark.index is None and position in mark.steps)
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
    if mark.index is not None:
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


# -- torch's one way into the engine ----------------------------------------------------------------------------------

_lock = threading.RLock()  # the collector may call `_release` within `watch_backward`
_tapes: set[int] = set()
_autograd: Any = torch.autograd
_original: Any = None
_installed = False


def _run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    inputs = args[3] if len(args) > 3 else kwargs.get("inputs")
    session = current_session()
    if inputs:
        recorder = recording.get()
        if recorder is None or not recorder.depth:
            check(outputs, inputs, session)
    elif isinstance(session, OrdinarySession):
        session.note_backward(outputs)
    elif session is None and (ended := last_ended()) is not None:
        ended.backward(outputs, _OURS)
    return _original(outputs, *args, **kwargs)


def watch_backward(of: Engine | Ended) -> Callable[[], Any]:
    """Look at every backward for as long as a tape, or the memory of a window that has ended, lives.

    Returns:
        What ends that before.
    """
    global _installed, _original
    with _lock:
        _tapes.add(id(of))
        release = weakref.finalize(of, _release, id(of))
        release.atexit = False
        if not _installed:
            _original = _autograd._engine_run_backward
            _autograd._engine_run_backward = _run_backward
            _installed = True
    return release


def _release(tape: int) -> None:
    global _installed
    with _lock:
        _tapes.discard(tape)
        if not _tapes and _autograd._engine_run_backward is _run_backward:
            _autograd._engine_run_backward = _original
            _installed = False
