"""In-place operators in a window: what is known of the memory they write, and what they are in the recording."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from metaoptim.errors import CaptureError

from ...ir.operators import MASKED, OpInfo, written
from ...ir.values import Carried, External, Value
from .. import memory
from .recording import Recording, mask_counts, tensors_in

if TYPE_CHECKING:
    from .recorder import Recorder

aten = torch.ops.aten


def write(recorder: Recorder, op: Any, info: OpInfo, args: tuple, kwargs: dict) -> Any:
    """Make a call that writes into some of its arguments, as part of the recording where it belongs there."""
    targets = written(op, args, kwargs, Tensor)
    guard, recording = recorder.guard, recorder.recording
    grad, epoch = torch.is_grad_enabled(), recording.epoch
    if epoch.apart and any(t in epoch.apart for t in targets):
        raise CaptureError(
            "a tensor with a hook or retain_grad() was changed in place; clone it before the change"
        )
    memory.before_write(recorder, targets)
    hit = guard.before_write(targets, op)
    if hit:
        guard.preserve(targets)
        out = op(*args, **kwargs)
        guard.after_write(hit)
        return out
    if not recorder.record:
        guard.preserve(targets)
        return op(*args, **kwargs)
    reads = (*args, *kwargs.values())
    live = grad and not info.random and recording.touches(reads)
    recorded = any(recording.is_recorded(t) for t in targets)
    older = []
    for key, value, t in _sharing(recording, targets):
        if value.entry.epoch is not epoch:
            older.append(key)
        elif not recording.is_recorded(t):
            recorded = True
            other: Any = value.ref()
            if other._base is None or (t if t._base is None else t._base) is not other._base:
                recording.alias_of(t, other)
    if not live and not recorded:
        for key in older:
            del recording.values[key]
        guard.preserve(targets)
        out = op(*args, **kwargs)
        if not grad or recorder.taint.of_storage:
            recorder.taint.note(reads, targets, epoch.theta)
        return out
    adopted = [_adopt_target(recording, t) for t in targets]  # alive until the call refers to them
    tokens = recording.tokens(op, args)
    kw = {k: recording.token(v) for k, v in kwargs.items()}
    entry = recording.entry(op, tokens, kw, tensors_in(reads), grad)
    del adopted
    if grad:
        keep_histories(recorder, targets)
    if op in MASKED:
        entry.shape = mask_counts(args) or None
    guard.preserve(targets)
    out = op(*args, **kwargs)
    if info.random:
        # Its effect, not the drawing, is what the step repeats.
        (target,) = targets
        effect = target.detach().clone()
        entry.op, entry.args, entry.kwargs = (
            aten.copy_.default,
            (tokens[0], External(effect, recording.guard.hold(effect))),
            {},
        )
    for t in targets:
        known = epoch.writes.get(t)
        if known is None:
            epoch.writes[t] = [entry]
        else:
            known.append(entry)
    recording.bind_outputs(entry, out)
    return out


def _sharing(recording: Recording, targets: list[Tensor]) -> list[tuple[int, Value, Tensor]]:
    """What the recording knows of the memory of ``targets`` without autograd knowing it (``.data``, detach)."""
    at = {t.untyped_storage()._cdata: t for t in targets if not recording.is_recorded(t)}
    found = []
    for key, value in recording.values.items() if at else ():
        other = value.ref()
        target = None if other is None else at.get(other.untyped_storage()._cdata)
        if target is not None:
            found.append((key, value, target))
    return found


def _adopt_target(recording: Recording, t: Tensor) -> list[External]:
    """From now on what ``t`` holds is what the recording says: it is about to be written by a recorded call."""
    epoch = recording.epoch
    base = t._base if t._is_view() and t._base is not None else t
    if recording.is_recorded(t):
        if recording.known(t) is None and base is not t:
            recording.alias_of(t, base)
        storage = t.untyped_storage()._cdata
        read = [x for ref in epoch.externals.values() if (x := ref()) is not None]
        # of which ``t`` may be a recorded view
        touched = [x for x in read if (s := x.source) is not None and s.untyped_storage()._cdata == storage]
    else:
        found = recording.value_of(base)
        external = found.external if isinstance(found, Carried) else found
        if not isinstance(external, External):
            raise CaptureError("a tensor that autograd has saved was changed in place; clone it first")
        touched = [external]
    for x in touched:
        x.written = True
    return touched


def keep_histories(recorder: Recorder, targets: list[Tensor], dispatching: bool = True) -> None:
    """An in-place call gives its target a new history: what was read of it keeps the old one."""
    recording = recorder.recording
    storages = {t.untyped_storage()._cdata for t in targets}
    for x in recording.histories:
        source = x.source
        if source is not None and x.tensor is source and source.untyped_storage()._cdata in storages:
            # within an operator's dispatch autograd is off until it is asked back
            again = enable_reentrant_dispatch() if dispatching else nullcontext()
            with recorder.paused(), again, torch.enable_grad():
                x.tensor = source.clone()
