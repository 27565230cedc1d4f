"""rows: whoever reads a row of an input, x[t], is given that row, as in a scan."""

from __future__ import annotations

from typing import Any

import torch

from ..ir.step import gradient
from ..ir.trace import Trace
from ..ir.values import Entry, Input, ScanItem, Value, changed, owner
from .options import Options

aten = torch.ops.aten


def rows(trace: Trace, options: Options) -> tuple[Trace, str]:
    """Replace slices of inputs along the leading axis, taken one by one or all at once, by the slices themselves.

    Steps over ``xs[t]``, ``for x in xs`` and ``zip(xs, ys)`` become alike but for t, nothing is passed on from where a
    tensor was taken apart, and the gradients of its rows gather in one tensor. Iterations of a scan are left alone:
    there, what is a row of a scanned tensor moves.
    """
    reader = _Rows(trace)
    scanned = {n for scan in trace.scans for n in range(scan.begins[0], scan.end)}
    for n, entry in enumerate(trace.entries):
        if n not in scanned:
            entry.args = reader.replaced(entry.args)
            entry.kwargs = {k: reader.replaced(v) for k, v in entry.kwargs.items()}
    return trace, f"{reader.reads} reads of {len(reader.items)} rows of inputs"


class _Rows:
    """The rows met so far.

    Attributes:
        items: (id of the input, place) -> what stands for the row.
        reads: how many have been replaced.
    """

    def __init__(self, trace: Trace) -> None:
        self.items: dict[tuple[int, int], ScanItem] = {}
        self.reads = 0
        taken = (t.entry for e in trace.entries if e.op is gradient for t in e.args[1])
        self._apart = {id(entry) for entry in taken} | set(trace.hooks)
        self._written = {id(owner(ref)) for e in trace.entries for ref in changed(e)}

    def replaced(self, a: Any) -> Any:
        """``a`` with rows in the place of values that are some."""
        if isinstance(a, tuple):
            return tuple([self.replaced(b) for b in a])  # pyright: ignore[reportUnknownVariableType]
        item = self._item(a.entry) if isinstance(a, Value) else None
        self.reads += item is not None
        return a if item is None else item

    def _item(self, entry: Entry) -> ScanItem | None:
        if entry.op is not aten.select.int or id(entry) in self._apart:
            return None
        source, dim, at = entry.args
        if not isinstance(source, Input) or id(source) in self._written or dim != 0:
            return None
        if source.grad and not entry.grad:  # taken under no_grad
            return None
        if len(source.spec.stride) != len(source.spec.shape):
            return None
        if (id(source), at) not in self.items:
            self.items[id(source), at] = ScanItem(source, at)
        return self.items[id(source), at]
