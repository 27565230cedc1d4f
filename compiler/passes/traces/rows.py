"""rows: whoever reads a row of an input, x[t], is given that row, as in a scan."""

from __future__ import annotations

from typing import Any

import torch

from ...ir.step import gradient
from ...ir.traces.trace import Trace
from ...ir.values import Entry, Input, ScanItem, Value, changed, owner
from ..options import Options


def rows(trace: Trace, options: Options) -> tuple[Trace, str]:
    """Replace slices of inputs along the leading axis, taken one by one or all at once, by the slices themselves.

    Steps over ``xs[t]``, ``for x in xs`` and ``zip(xs, ys)`` become alike but for t, nothing is passed on from where a
    tensor was taken apart, and the gradients of its rows gather in one tensor. Iterations of a scan are left alone:
    there, what is a row of a scanned tensor moves.
    """
    taken = (t.entry for e in trace.entries if e.op is gradient for t in e.args[1])
    apart = {id(entry) for entry in taken} | set(trace.hooks)
    written = {id(owner(ref)) for e in trace.entries for ref in changed(e)}
    items: dict[tuple[int, int], ScanItem] = {}  # by the id of the input, and the place in it
    reads = 0

    def row(entry: Entry) -> ScanItem | None:
        if entry.op is not torch.ops.aten.select.int or id(entry) in apart:
            return None
        source, dim, at = entry.args
        if not isinstance(source, Input) or id(source) in written or dim != 0:
            return None
        if source.grad and not entry.grad:  # taken under no_grad
            return None
        if len(source.spec.stride) != len(source.spec.shape):
            return None
        return items.setdefault((id(source), at), ScanItem(source, at))

    def replaced(a: Any) -> Any:
        nonlocal reads
        if isinstance(a, tuple):
            return tuple([replaced(b) for b in a])  # pyright: ignore[reportUnknownVariableType]
        item = row(a.entry) if isinstance(a, Value) else None
        reads += item is not None
        return a if item is None else item

    scanned = {n for scan in trace.scans for n in range(scan.begins[0], scan.end)}
    for n, entry in enumerate(trace.entries):
        if n not in scanned:
            entry.args = replaced(entry.args)
            entry.kwargs = {k: replaced(v) for k, v in entry.kwargs.items()}
    return trace, f"{reads} reads of {len(items)} rows of inputs"
