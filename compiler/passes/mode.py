"""mode: offline and online windows, and their truncation, as a rewrite of what is returned and where gradients end."""

from __future__ import annotations

from typing import Any

import torch

from metaoptim.errors import CaptureError

from ..ir.trace import Trace
from ..ir.values import Value
from .options import Options

aten = torch.ops.aten


def mode(trace: Trace, options: Options) -> tuple[Trace, str]:
    """Say what is written back, and where gradients are truncated.

    Online, the parameters that a window adopts are cut off from the user's own, and what it leaves is written back.
    Offline, neither.
    """
    stated = {mark.window for mark in trace.windows}
    if len(stated) > 1:
        raise CaptureError(
            f"windows of one compiled function must agree on window=: got {sorted(map(str, stated))}"
        )
    if len({mark.backward_hook for mark in trace.windows}) > 1:
        raise CaptureError("windows of one compiled function must have the same backward_hook")
    writes: dict[Any, tuple[Any, Value]] = {}
    online = [mark for mark in trace.windows if not mark.offline]
    for mark in online:
        for entry in mark.adopted:
            entry.op = aten.detach.default
        for target, value in mark.last:
            key: Any = id(target)
            if isinstance(target, tuple):
                optimizer, tensor, name = target  # pyright: ignore[reportUnknownVariableType]
                key = (id(optimizer), id(tensor), name)  # pyright: ignore[reportUnknownArgumentType]
            writes[key] = (target, value)
    writes.update((id(target), (target, value)) for target, value in trace.left)
    trace.writes = list(writes.values())
    window = next(iter(stated), None)
    trace.window = options.window if window is None else window
    cut = sum(len(mark.adopted) for mark in online)
    note = f"{cut} parameters cut off at entry, {len(writes)} tensors written back"
    return trace, note + (f", truncated to {window} super-steps" if window else "")
