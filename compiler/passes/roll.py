"""roll: equal parts become calls of one step graph, a scan becomes a Loop, values passed on get registers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from metaoptim.errors import CaptureError

from ..ir.calls import Loop, Operand, StepCall
from ..ir.program import Program
from ..ir.step import StepGraph
from ..ir.text import plural
from ..ir.trace import Part, Partition, PartKind, roles_of
from ..ir.values import Input, Noise, ScanItem, Value, exact, identity
from ..lower.library import Library
from .build import build_segment
from .options import Options


def roll(partition: Partition, options: Options) -> tuple[Program, str]:
    """Turn parts into calls. Equal parts, also of other functions, have the same step graph from the library."""
    library = Library(0) if "roll" in options.skip else options.library
    program = Program(window=partition.trace.window, offline=any(w.offline for w in partition.trace.windows))
    for window in partition.trace.windows:
        program.retention = program.retention if program.retention.given else window.retention
        program.backward_hook = window.backward_hook or program.backward_hook
    hooked = program.backward_hook is not None
    scans = {u.scan: n for n, u in enumerate(partition.parts) if u.scan is not None}
    templates: set[int] = set()  # parts that stand for all further iterations of a scan
    moved: dict[int, tuple[Any, list[Part]]] = {}  # parts captured for a later iteration than they are run in
    for s, scan in enumerate(partition.trace.scans):
        places = [scans[s, k] for k in range(len(scan.labels)) if (s, k) in scans]
        if scan.count > len(scan.labels) and places:
            _check_scan(partition, scan, places)
            templates.add(places[-1])
            moved.update((n, (scan, [partition.parts[m] for m in places])) for n in places[-2:])
    lifted = {id(b): _lifted(b) for b in partition.kinds}
    registers = _Registers(partition, templates)
    for n, part in enumerate(partition.parts):
        numbers = part.segment.numbers
        key = (
            part.segment.key,
            tuple(part.kind.outputs.items()),
            frozenset(part.kind.active),
            frozenset(part.kind.active_outputs),
            lifted[id(part.kind)],
            tuple(None if i in lifted[id(part.kind)] else x for i, x in enumerate(exact(numbers))),
            hooked,
        )
        step = library.step(key, lambda u=part: build_segment(u.segment, u.kind, lifted[id(u.kind)], hooked))
        call = _call(part, step, lifted[id(part.kind)], *registers.assign(n))
        if n in moved and part.scan is not None:
            scan, parts = moved[n]
            strides = _strides(call, scan, parts, lifted[id(part.kind)])
            k = len(scan.labels) - 1 if n in templates else part.scan[1]
            call = _moved(call, strides, k - _shift(part, scan), n in templates)
            program.calls.append(Loop((call,), scan.count - k) if n in templates else call)
        else:
            program.calls.append(call)
    program.registers = registers.count
    program.outputs = [registers.where(v) for v in partition.trace.outputs]
    program.dead = tuple(
        i
        for i, v in enumerate(partition.trace.outputs)
        if not isinstance(v, Value)
        or _place(partition, v) not in partition.parts[partition.part_of[id(v.entry)]].kind.active_outputs
    )
    program.writes = [(target, registers.where(v)) for target, v in partition.trace.writes]
    loops = sum(isinstance(c, Loop) for c in program.calls)
    return program, (
        f"{plural(len(partition.parts), 'part')}, {plural(len(program.step_graphs), 'step graph')}, "
        f"{plural(loops, 'scan')}, {plural(program.registers, 'register')}"
    )


def _lifted(kind: PartKind) -> tuple[int, ...]:
    """Numbers that differ between the segments of a kind."""
    columns = zip(*(exact(u.segment.numbers) for u in kind.parts), strict=True)
    return tuple(i for i, column in enumerate(columns) if len(set(column)) > 1)


def _call(
    part: Part, step: StepGraph, lifted: tuple[int, ...], read: dict[str, Any], written: list[int]
) -> StepCall:
    segment = part.segment
    state: list[int] = []
    given: list[Operand] = []
    for at in roles_of(segment, part.kind).order:
        ref = segment.inputs[at]
        if isinstance(ref, Value):
            state.append(read[identity(ref)])
        elif isinstance(ref, ScanItem):
            given.append(Operand("scan", ref.source, ref.position))
        else:
            given.append(Operand("noise" if isinstance(ref, Noise) else "input", ref))
    given += [Operand("number", segment.numbers[i]) for i in lifted]
    return StepCall(step, tuple(state), tuple(written), given, part.location)


# -- loops -----------------------------------------------------------------------------------------------------------


def _check_scan(partition: Partition, scan: Any, places: list[int]) -> None:
    where = f" (the scan at {scan.location})"
    before, last = partition.parts[places[-2]], partition.parts[places[-1]]
    if before.kind is not last.kind:
        raise CaptureError(
            "the iterations of a scan differ in what they do, so that one cannot stand for all; use a plain `for` over "
            f"the tensors, or make what differs a tensor that is scanned too{where}"
        )
    part_of = partition.part_of
    for a, b in zip(before.segment.inputs, last.segment.inputs, strict=True):
        if isinstance(b, Value) and part_of[id(b.entry)] == places[-2]:
            same = (
                isinstance(a, Value)
                and part_of[id(a.entry)] == places[-3]
                and _place(partition, a) == _place(partition, b)
            )
        elif isinstance(b, ScanItem):
            same = isinstance(a, ScanItem) and a.source is b.source
        else:
            same = isinstance(b, Noise) or identity(a) == identity(b)
        if not same:
            raise CaptureError(
                "an iteration of a scan reads values of more than one iteration back, or other tensors than the "
                f"iteration before it; use a plain `for`, or carry what is needed in one tensor{where}"
            )
    middle = set(places[:-1])
    later = [v for u in partition.parts[places[-1] + 1 :] for v in u.segment.inputs] + partition.finals()
    if any(isinstance(v, Value) and part_of[id(v.entry)] in middle for v in later):
        raise CaptureError(
            "a value from the middle of a scan is used after it, such as a list of all losses: only what the last "
            f"iteration leaves is there. Add up in a tensor, or use a plain `for`{where}"
        )


def _place(partition: Partition, value: Value) -> tuple[Any, ...]:
    segment = partition.parts[partition.part_of[id(value.entry)]].segment
    return segment.number_of[id(value.entry)], value.index


def _strides(call: StepCall, scan: Any, parts: list[Part], lifted: tuple[int, ...]) -> tuple[int, ...]:
    """By how much each input advances per iteration."""
    strides = [1 if g.kind == "scan" else 0 for g in call.inputs if g.kind != "number"]
    alike = [u for u in parts if u.kind is parts[-1].kind]
    for i in lifted:
        column = [u.segment.numbers[i] for u in alike]
        labels = [_shift(u, scan) for u in alike]
        step, rest = divmod(column[-1] - column[-2], labels[-1] - labels[-2])
        even = rest == 0 and all(
            x == column[-1] + step * (t - labels[-1]) for x, t in zip(column, labels, strict=True)
        )
        if not even or (step and not all(isinstance(x, int) for x in column)):
            raise CaptureError(
                f"a Python number changes from iteration to iteration of a scan ({', '.join(map(str, column))}, ...); "
                f"scan a tensor of its values (the scan at {scan.location})"
            )
        strides.append(int(step))
    return tuple(strides)


def _shift(part: Part, scan: Any) -> int:
    """Which iteration a captured one was taken for."""
    assert part.scan is not None
    return scan.labels[part.scan[1]]


def _moved(call: StepCall, strides: tuple[int, ...], by: int, looped: bool) -> StepCall:
    """The call so many iterations later, alone or the first one of a loop."""
    inputs = [replace(g, stride=s).after(by) for g, s in zip(call.inputs, strides, strict=True)]
    return replace(call, inputs=inputs if looped else [replace(g, stride=0) for g in inputs])


# -- registers -------------------------------------------------------------------------------------------------------


class _Registers:
    """Places for values that are passed on, given back after their last use."""

    def __init__(self, partition: Partition, templates: set[int]) -> None:
        self.partition, self.templates = partition, templates
        self.count = 0
        self._of: dict[Any, int] = {}
        self._free: list[int] = []
        self._last_by_kind: dict[int, list[int]] = {}
        self._use: dict[Any, int] = {}
        for n, part in enumerate(partition.parts):
            for ref in part.segment.inputs:
                if isinstance(ref, Value):
                    self._use[identity(ref)] = n
        for ref in partition.finals():
            if isinstance(ref, Value):
                self._use[identity(ref)] = len(partition.parts)

    def where(self, ref: Any) -> int | Input:
        """Where a value is found in the end."""
        return self._of[identity(ref)] if isinstance(ref, Value) else ref

    def assign(self, n: int) -> tuple[dict[str, Any], list[int]]:
        """Registers that part ``n`` reads, by value, and those it writes, in the order of its outputs (-1: none)."""
        part = self.partition.parts[n]
        read = {identity(r): self._of[identity(r)] for r in part.segment.inputs if isinstance(r, Value)}
        looped = n in self.templates
        for ref in part.segment.inputs:
            if isinstance(ref, Value) and self._use[identity(ref)] == n:
                carried = self.partition.part_of[id(ref.entry)] == n - 1
                if not looped or carried:  # what all iterations read must outlast them
                    self._free.append(read[identity(ref)])
        free = self._free = list(dict.fromkeys(self._free))
        carry = set[tuple[Any, ...]]()
        if looped:
            before = [
                r
                for r in part.segment.inputs
                if isinstance(r, Value) and self.partition.part_of[id(r.entry)] == n - 1
            ]
            carry = {_place(self.partition, r) for r in before}
        preferred = self._last_by_kind.get(id(part.kind), [-1] * len(part.kind.outputs))
        places = list(part.kind.outputs)
        keys = [(id(part.segment.entries[number]), index) for number, index in places]
        wanted = [key in self._use or place in carry for key, place in zip(keys, places, strict=True)]
        written = [-1] * len(places)
        for k, register in enumerate(preferred):
            if wanted[k] and register in free:
                free.remove(register)
                written[k] = register
        for k in range(len(places)):
            if not wanted[k]:
                continue
            if written[k] < 0:
                if looped and places[k] in carry:
                    raise AssertionError("a carried value has lost its register")
                written[k] = free.pop() if free else self.count
                self.count = max(self.count, written[k] + 1)
            self._of[keys[k]] = written[k]
        self._last_by_kind[id(part.kind)] = written
        return read, written
