"""Memory that changes, or may change, without an operator or a version counter telling autograd.

What a loss has read may have been saved by autograd; if it changes unseen before the step, the inner gradient is that
of neither value. Such tensors are `suspect`: the gradient of a step on them is compared with what the recording gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from metaoptim.compiler.compat import storage_users
from metaoptim.errors import CaptureError

from ..ir.values import Carried, External, Theta, Value

if TYPE_CHECKING:
    from .eager.recorder import Recorder


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata if t.layout is torch.strided else 0


def note_loose(recorder: Recorder, t: Tensor) -> None:
    """``t`` shares memory with another tensor, and no version counter (``.data``)."""
    recorder.loose[id(t)] = t


def before_write(recorder: Recorder, targets: Iterable[Tensor]) -> None:
    """An operator is about to write into ``targets``: does autograd know?"""
    if recorder.loose:
        _suspect(recorder, [t for t in targets if _is_loose(recorder, t)])


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
        found = next((v for v in recording.values.values() if _lies_in(v, storage)), None)
    if found is None or not _is_outside(found, storage):
        return found is not None
    recording.values = {k: v for k, v in recording.values.items() if not _lies_in(v, storage)}
    _suspect(recorder, [t])
    return False


def _is_loose(recorder: Recorder, t: Tensor) -> bool:
    base = t._base if t._is_view() else None
    return any(x is not None and recorder.loose.get(id(x)) is x for x in (t, base))


def _suspect(recorder: Recorder, targets: list[Tensor]) -> None:
    storages = {_storage(t) for t in targets}
    if not storages or not recorder.record:
        return
    for epoch in (*recorder.recording.guard.epochs, recorder.recording.epoch):
        read = [(x, x.source) for ref in epoch.externals.values() if (x := ref()) is not None]
        read += [(theta, theta.tensor) for theta in epoch.theta.values()]
        for x, t in read:
            if t is not None and _storage(t) in storages:
                x.suspect = True
    for value in recorder.recording.values.values():
        t = value.ref()
        if t is not None and _storage(t) in storages:
            value.suspect = True


def _lies_in(value: Value, storage: int) -> bool:
    t = value.ref()
    return t is not None and _storage(t) == storage


def _is_outside(value: Value, storage: int) -> bool:
    """Whether ``value`` is a view of a tensor from outside."""
    found: Any = value
    while isinstance(found, (Value, Carried)):
        found = found.value if isinstance(found, Carried) else next(iter(found.entry.args), None)
    if not isinstance(found, External) or found.written:
        return False
    source = found.source
    return source is not None and _storage(source) == storage
