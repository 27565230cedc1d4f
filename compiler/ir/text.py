"""What a compiled function is between passes, as text: how many calls, in which parts, who reads what of whom."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import fx

from .operators import is_operator
from .step import Port, StepGraph
from .tensors import TensorSpec, nbytes
from .traces.trace import Part, Partition, Trace, arguments
from .update import UpdatePlan
from .values import Input, Noise, ScanItem, Value, identity

_MOST_LINES = 40
_MOST_SHAPES = 6  # of one role and dtype that are written out


def trace_text(trace: Trace) -> str:
    """A trace: its calls by kind, its windows and loops."""
    kinds = Counter(kind_of(e.op) for e in trace.entries)
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(8))
    rest = len(trace.entries) - sum(n for _, n in kinds.most_common(8))
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
    letters = {id(b): chr(65 + i) if i < 26 else f"kind {i}" for i, b in enumerate(partition.kinds)}
    parts = partition.parts
    total = sum(len(u.segment.entries) for u in parts)
    lines = [f"{total} calls in {len(parts)} parts, {len(partition.kinds)} of them distinct"]
    reads = [_sources(partition, part.segment.inputs, n) for n, part in enumerate(parts)]
    alike = groupby(range(len(parts)), key=lambda n: (id(parts[n].kind), reads[n]))
    runs = [list(group) for _, group in alike]
    for run in runs[:_MOST_LINES]:
        first, part = run[0], parts[run[0]]
        numbers = f"part {first}" if len(run) == 1 else f"parts {first}-{run[-1]}"
        lines.append(f"  {numbers}: {letters[id(part.kind)]}, {_part_text(part)}; reads {reads[first]}")
    if len(runs) > _MOST_LINES:
        lines.append(f"  and {len(runs) - _MOST_LINES} more")
    lines.append(f"  results: {_sources(partition, partition.finals(), len(parts))}")
    return "\n".join(lines)


def kind_of(op: Any) -> str:
    """A short name for what is called."""
    if isinstance(op, UpdatePlan):
        return "update"
    if is_operator(op):
        return op.name().partition("::")[2].partition(".")[0]
    return getattr(op, "__name__", type(op).__name__)


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


def _sources(partition: Partition, refs: list[Any], n: int) -> str:
    """Where values come from, relative to part ``n``."""
    counts: Counter[str] = Counter()
    for ref in {identity(r): r for r in refs}.values():
        if isinstance(ref, Value):
            back = n - partition.part_of[id(ref.entry)]
            # far back and fixed is a place of its own; near is the same for every repetition
            counts["of the part before" if back == 1 else f"of part {n - back}"] += 1
        elif isinstance(ref, Input):
            counts["inputs that require grad" if ref.grad else "inputs"] += 1
        elif isinstance(ref, ScanItem):
            counts["slices"] += 1
        elif isinstance(ref, Noise):
            counts["random numbers"] += 1
    return ", ".join(f"{k} {where}" for where, k in counts.items()) or "nothing"


def step_name(i: int) -> str:
    """step_a, step_b, ..., step_26, ..."""
    return f"step_{chr(97 + i)}" if i < 26 else f"step_{i}"


def plural(count: int | None, word: str) -> str:
    """1 call, 2 calls, 2 entries."""
    many = word[:-1] + "ies" if word.endswith("ry") else word + "s"
    return f"{count} {word if count == 1 else many}"


def readable_bytes(size: float) -> str:
    """``size`` bytes, as people write it."""
    if abs(size) < 1024:
        return f"{size:.0f} B"
    power = next((p for p in (1, 2) if abs(size) < 1024 ** (p + 1)), 3)
    return f"{size / 1024**power:.1f} {' KMG'[power]}iB"


def shapes_text(specs: Iterable[TensorSpec]) -> str:
    """Dtypes and shapes, equal ones once: ``float32 4×3, 4 (2 of them)``."""
    groups: dict[torch.dtype, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.dtype, []).append(spec)
    parts: list[str] = []
    for dtype, group in groups.items():
        counts = Counter("×".join(map(str, s.shape)) or "scalar" for s in group)
        shown = [name + (f" ({n} of them)" if n > 1 else "") for name, n in counts.items()]
        if len(shown) > _MOST_SHAPES:
            shown[_MOST_SHAPES:] = [f"{len(shown) - _MOST_SHAPES} more shapes"]
        parts.append(f"{str(dtype).removeprefix('torch.')} {', '.join(shown)}")
    return "; ".join(parts)


def signature(step: StepGraph, name: str) -> str:
    """What a step graph takes and gives, by role, with shapes and bytes."""
    operators = operator_count(step.graph)
    lines = [f"{name}: {plural(step.steps, 'inner step')}, {plural(operators, 'operator')}"]
    for verb, ports in (("takes", step.inputs), ("gives", step.outputs)):
        for role, group in by_role(ports).items():
            size = readable_bytes(sum(nbytes(p.spec) for p in group))
            lines.append(
                f"  {verb} {len(group):>3} {role:<9} {size:>10}  {shapes_text(p.spec for p in group)}"
            )
    return "\n".join(lines)


def operator_count(graph: fx.Graph) -> int:
    """How many of its nodes compute something."""
    return sum(n.op == "call_function" and n.target is not operator.getitem for n in graph.nodes)


def by_role(ports: Sequence[Port]) -> dict[str, list[Port]]:
    """Ports by the name of their role, in order of appearance."""
    found: dict[str, list[Port]] = {}
    for port in ports:
        found.setdefault(port.role.value, []).append(port)
    return found


def registers_text(registers: Sequence[int]) -> str:
    """r0-r4 r7 r3-r1: runs, up or down, are shortened; what is dropped (-1) is an underscore."""
    runs: list[list[int]] = []
    for r in registers:
        run: list[int] = runs[-1] if runs else []
        step = r - run[-1] if run else 0
        if run and abs(step) == 1 and min(r, run[-1]) >= 0 and (len(run) == 1 or run[1] - run[0] == step):
            run.append(r)
        else:
            runs.append([r])
    texts: list[str] = []
    for run in runs:
        names = ["_" if r < 0 else f"r{r}" for r in run]
        texts.append(f"{names[0]}-{names[-1]}" if len(run) > 2 else " ".join(names))
    return " ".join(texts)
