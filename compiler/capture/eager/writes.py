"""Memory that changes: by in-place operators, and without an operator or a version counter telling autograd.

What a loss has read may have been saved by autograd; if it changes unseen before the step, the inner gradient is that
of neither value. Such tensors are `suspect`: the gradient of a step on them is compared with what the recording gives.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import enable_reentrant_dispatch

from metaoptim.compiler.compat import storage_users
from metaoptim.errors import CaptureError

from ...ir.operators import MASKED, OpInfo, written
from ...ir.values import Carried, External, Theta, Value
from .recording import Recording, mask_counts, tensors_in

if TYPE_CHECKING:
    from .recorder import Recorder

aten = torch.ops.aten


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata if t.layout is torch.strided else 0


def write(recorder: Recorder, op: Any, info: OpInfo, args: tuple, kwargs: dict) -> Any:
    """Make a call that writes into some of its arguments, as part of the recording where it belongs there."""
    targets = written(op, args, kwargs, Tensor)
    guard, recording = recorder.guard, recorder.recording
    grad, epoch = torch.is_grad_enabled(), recording.epoch
    if epoch.apart and any(t in epoch.apart for t in targets):
        raise CaptureError(
            "a tensor with a hook or retain_grad() was changed in place; clone it before the change"
        )
    if loose := recorder.loose:
        families = [(t, (t, t._base) if t._is_view() else (t,)) for t in targets]
        _suspect(recorder, [t for t, family in families if any(loose.get(id(x)) is x for x in family)])
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
    if info.random:  # its effect, not the drawing, is what the step repeats
        (target,) = targets
        effect = target.detach().clone()
        held = External(effect, recording.guard.hold(effect))
        entry.op, entry.args, entry.kwargs = aten.copy_.default, (tokens[0], held), {}
    for t in targets:
        if (known := epoch.writes.get(t)) is None:
            epoch.writes[t] = known = []
        known.append(entry)
    recording.bind_outputs(entry, out)
    return out


def _sharing(recording: Recording, targets: list[Tensor]) -> list[tuple[int, Value, Tensor]]:
    """What the recording knows of the memory of ``targets`` without autograd knowing it (``.data``, detach)."""
    at = {t.untyped_storage()._cdata: t for t in targets if not recording.is_recorded(t)}
    live = [(k, v, t) for k, v in recording.values.items() if (t := v.ref()) is not None] if at else []
    return [(k, v, at[s]) for k, v, t in live if (s := t.untyped_storage()._cdata) in at]


def _adopt_target(recording: Recording, t: Tensor) -> list[External]:
    """From now on what ``t`` holds is what the recording says: it is about to be written by a recorded call."""
    epoch = recording.epoch
    base = t._base if t._is_view() and t._base is not None else t
    if recording.is_recorded(t):
        if recording.known(t) is None and base is not t:
            recording.alias_of(t, base)
        read = list(epoch.externals)
        # of which ``t`` may be a recorded view
        touched = [x for x in read if x.source is not None and _lies_in(x.source, _storage(t))]
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


# -- what no operator shows -------------------------------------------------------------------------------------------


def before_swap(recorder: Recorder, t: Tensor) -> None:
    """Refuse ``t.data = value`` where the recording says what ``t`` holds."""
    if is_lazy(t):
        return
    if recorder.record and (
        isinstance(recorder.recording.known(t), Value) or (t.requires_grad and not t.is_leaf)
    ):
        raise CaptureError(
            f"t.data = ... on a tensor of shape {tuple(t.shape)} that was computed: got other values behind the back "
            "of the recording, expected an operator. Write t = t + (value - t).detach() for the same values and "
            "gradient, or t = value for a constant."
        )
    _suspect(recorder, [t])


def relies_on(recorder: Recorder, t: Tensor) -> bool:
    """Whether the recording or the tape takes for granted what the memory of ``t`` holds.

    Memory from outside is not: it is copied or watched. What is known of it as a value is forgotten, so that it will be
    read anew.
    """
    if not recorder.record or t.layout is not torch.strided:
        return False
    storage, recording = _storage(t), recorder.recording
    found = recording.known(t)
    if isinstance(found, Theta) or recorder.recording.guard.on_tape(storage):
        return True
    if found is None:
        handle = t.untyped_storage()
        if storage_users(handle._cdata) <= 2:  # that of ``t`` and ours
            return False
        found = next((v for v in recording.values.values() if _lies_in(v.ref(), storage)), None)
    if found is None or not _is_outside(found, storage):
        return found is not None
    recording.values = {k: v for k, v in recording.values.items() if not _lies_in(v.ref(), storage)}
    _suspect(recorder, [t])
    return False


def _suspect(recorder: Recorder, targets: list[Tensor]) -> None:
    storages, recording = {_storage(t) for t in targets}, recorder.recording
    if not storages or not recorder.record:
        return
    read: list[tuple[Any, Tensor | None]] = [(v, v.ref()) for v in recording.values.values()]
    for epoch in (*recording.guard.epochs, recording.epoch):
        read += [(x, x.source) for x in epoch.externals]
        read += [(theta, theta.tensor) for theta in epoch.theta.values()]
    for x, t in read:
        if t is not None and _storage(t) in storages:
            x.suspect = True


def _lies_in(t: Tensor | None, storage: int) -> bool:
    return t is not None and _storage(t) == storage


def _is_outside(value: Value, storage: int) -> bool:
    """Whether ``value`` is a view of a tensor from outside."""
    found: Any = value
    while isinstance(found, (Value, Carried)):
        found = found.value if isinstance(found, Carried) else next(iter(found.entry.args), None)
    if not isinstance(found, External) or found.written:
        return False
    return _lies_in(found.source, storage)
