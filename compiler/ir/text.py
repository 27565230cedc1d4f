"""What a compiled function is between passes, as text: how many calls, in which parts, who reads what of whom."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

from metaoptim.compiler.compat import OpOverload

from .program import nbytes, plural, readable_bytes
from .segments import Part, Partition, arguments
from .step import gradient, show
from .trace import Input, Noise, ScanItem, Trace
from .update import UpdatePlan
from .values import Value, identity

_MOST_LINES = 40


def trace_text(trace: Trace) -> str:
    """A trace: its calls by kind, its windows and loops."""
    kinds = Counter(map(kind_of, (e.op for e in trace.entries)))
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(8))
    rest = sum(kinds.values()) - sum(n for _, n in kinds.most_common(8))
    rows = sum(isinstance(a, ScanItem) for e in trace.entries for a in arguments(e))
    read = f"{plural(len(trace.inputs), 'tensor')} read" + (f", rows of them {rows} times" if rows else "")
    lines = [
        f"{len(trace.entries)} calls, {plural(len(trace.steps), 'inner step')} captured, {read}",
        f"  {listed}{f', {rest} others' if rest else ''}",
    ]
    for window in trace.windows:
        truncated = f", window={window.window}" if window.window else ""
        lines.append(
            f"  {'offline' if window.offline else 'online'} window{truncated}: {len(window.adopted)} parameters taken "
            f"in, {len(window.last)} tensors with a last value"
        )
    for scan in trace.scans:
        lines.append(f"  scan of {scan.count} iterations, {len(scan.begins)} of them captured")
    return "\n".join(lines)


def partition_text(partition: Partition) -> str:
    """A partition: its parts in order, equal ones in one line, with what each reads and gives."""
    letters = {id(b): _letter(i) for i, b in enumerate(partition.kinds)}
    total = sum(len(u.segment.entries) for u in partition.parts)
    lines = [f"{total} calls in {len(partition.parts)} parts, {len(partition.kinds)} of them distinct"]
    runs: list[list[Any]] = []
    for _, group in groupby(
        range(len(partition.parts)),
        key=lambda n: (letters[id(partition.parts[n].kind)], _reads(partition, n)),
    ):
        parts = list(group)
        runs.append([parts[0], len(parts)])
    for first, count in runs[:_MOST_LINES]:
        part = partition.parts[first]
        numbers = f"part {first}" if count == 1 else f"parts {first}-{first + count - 1}"
        lines.append(
            f"  {numbers}: {letters[id(part.kind)]}, {_part_text(part)}; reads {_reads(partition, first)}"
        )
    if len(runs) > _MOST_LINES:
        lines.append(f"  and {len(runs) - _MOST_LINES} more")
    lines.append(f"  results: {_sources(partition, partition.finals(), len(partition.parts))}")
    return "\n".join(lines)


def kind_of(op: Any) -> str:
    """A short name for what is called."""
    if op is show or op is gradient:
        return op.__name__
    if isinstance(op, UpdatePlan):
        return "update"
    if isinstance(op, OpOverload):
        return op._schema.name.partition("::")[2]
    return getattr(op, "__name__", type(op).__name__)


def _letter(i: int) -> str:
    return chr(65 + i) if i < 26 else f"kind {i}"


def _part_text(part: Part) -> str:
    kind = part.kind
    text = f"{len(part.segment.entries)} calls"
    if part.steps:
        text += f", {plural(part.steps, 'inner step')}"
    if part.scan is not None:
        text += ", in a scan"
    if kind.outputs:
        size = readable_bytes(sum(map(nbytes, kind.outputs.values())))
        text += f"; gives {plural(len(kind.outputs), 'value')} ({size}), {len(kind.active_outputs)} with a gradient"
    return text


def _reads(partition: Partition, n: int) -> str:
    return _sources(partition, partition.parts[n].segment.inputs, n)


def _sources(partition: Partition, refs: list[Any], n: int) -> str:
    """Where values come from, relative to part ``n``."""
    counts: Counter[str] = Counter()
    for ref in {identity(r): r for r in refs}.values():
        if isinstance(ref, Value):
            back = n - partition.part_of[id(ref.entry)]
            # far back and fixed is a place of its own; near is the same for every repetition
            counts["the part before" if back == 1 else f"part {n - back}"] += 1
        elif isinstance(ref, Input):
            counts["inputs that require grad" if ref.grad else "inputs"] += 1
        elif isinstance(ref, ScanItem):
            counts["slices"] += 1
        elif isinstance(ref, Noise):
            counts["random numbers"] += 1
    return (
        ", ".join(
            f"{k} {where}" if not where.startswith(("part", "the part")) else f"{k} of {where}"
            for where, k in counts.items()
        )
        or "nothing"
    )
