"""mode: offline and online windows, and their truncation, as a rewrite of what is returned and where gradients end."""

from __future__ import annotations

from typing import Any

import torch

from metaoptim.errors import CaptureError

from ..ir.trace import Trace
from ..ir.values import Value

aten = torch.ops.aten


def mode(trace: Trace) -> tuple[list[tuple[Any, Value]], int | None, str]:
    """Rewrite ``trace`` for the modes of its windows.

    Online, the parameters that a window adopts are cut off from the user's own, and what it leaves is written back.
    Offline, neither.

    Returns:
        What is written back, W where gradients are truncated, and what was changed.
    """
    limits = {window.window for window in trace.windows}
    if len(limits) > 1:
        raise CaptureError(
            f"windows of one compiled function must agree on window=: got {sorted(map(str, limits))}"
        )
    hooks = {window.backward_hook for window in trace.windows}
    if len(hooks) > 1:
        raise CaptureError("windows of one compiled function must have the same backward_hook")
    writes: dict[Any, tuple[Any, Value]] = {}
    cut = 0
    for window in trace.windows:
        if window.offline:
            continue
        for entry in window.adopted:
            cut += 1
            entry.op = aten.detach.default
        for target, value in window.last:
            key = tuple(map(id, target[:2])) + target[2:] if isinstance(target, tuple) else id(target)
            writes[key] = (target, value)
    writes.update((id(target), (target, value)) for target, value in trace.left)
    window = limits.pop() if limits else None
    done = f"{cut} parameters cut off at entry, {len(writes)} tensors written back"
    return list(writes.values()), window, done + (f", truncated to {window} super-steps" if window else "")
