"""roll: equal parts become calls of one step graph, a scan becomes a Loop, values passed on get registers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from metaoptim.errors import CaptureError

from ..ir.programs.calls import Loop, Operand, StepCall
from ..ir.programs.program import Program
from ..ir.text import plural
from ..ir.traces.trace import Part, Partition, PartKind, Scan, roles_of
from ..ir.values import Input, Noise, ScanItem, Value, exact, identity
from ..lower.library import Library
from .build import build_step_graph
from .options import Options


def roll(partition: Partition, options: Options) -> tuple[Program, str]:
    """Turn parts into calls. Equal parts, also of other functions, have the same step graph from the library."""
    library = Library(0) if "roll" in options.skip else options.library
    trace = partition.trace
    program = Program(window=trace.window, offline=any(w.offline for w in trace.windows))
    for window in trace.windows:
        program.retention = program.retention if program.retention.given else window.retention
        program.backward_hook = window.backward_hook or program.backward_hook
    hooked = program.backward_hook is not None
    templates: set[int] = set()  # parts that stand for all further iterations of a scan
    moved: dict[
        int, tuple[Scan, list[Part]]
    ] = {}  # parts captured for a later iteration than they are run in
    for s, scan in enumerate(trace.scans):
        places = [n for n, u in enumerate(partition.parts) if u.scan is not None and u.scan[0] == s]
        if scan.count > len(scan.labels) and places:
            _check_scan(partition, scan, places)
            templates.add(places[-1])
            moved.update((n, (scan, [partition.parts[m] for m in places])) for n in places[-2:])
    lifted_by = {id(kind): _lifted(kind) for kind in partition.kinds}
    registers = _Registers(partition, templates)
    for n, part in enumerate(partition.parts):
        segment, kind, lifted = part.segment, part.kind, lifted_by[id(part.kind)]
        key = (
            segment.key,
            tuple(kind.outputs.items()),
            frozenset(kind.active),
            frozenset(kind.active_outputs),
            lifted,
            tuple(None if i in lifted else x for i, x in enumerate(exact(segment.numbers))),
            hooked,
        )
        step = library.step(key, lambda u=part, lifted=lifted: build_step_graph(u, lifted, hooked))
        refs = [segment.inputs[at] for at in roles_of(segment, kind).order]
        given = [_operand(ref) for ref in refs if not isinstance(ref, Value)]
        given += [Operand("number", segment.numbers[i]) for i in lifted]
        written = tuple(registers.assign(n))
        state = tuple(registers.where(ref) for ref in refs if isinstance(ref, Value))
        call = StepCall(step, state, written, given, part.location)
        if n in moved and part.scan is not None:
            scan, parts = moved[n]
            looped = n in templates
            k = len(scan.labels) - 1 if looped else part.scan[1]
            call = _moved(call, _strides(call, scan, parts, lifted), k - _shift(part, scan), looped)
            program.calls.append(Loop((call,), scan.count - k) if looped else call)
        else:
            program.calls.append(call)
    program.registers = registers.count
    program.outputs = [registers.place(v) for v in trace.outputs]
    program.dead = tuple(i for i, v in enumerate(trace.outputs) if not _carries_gradient(partition, v))
    program.writes = [(target, registers.place(v)) for target, v in trace.writes]
    loops = sum(isinstance(c, Loop) for c in program.calls)
    return program, (
        f"{plural(len(partition.parts), 'part')}, {plural(len(program.step_graphs), 'step graph')}, "
        f"{plural(loops, 'scan')}, {plural(program.registers, 'register')}"
    )


def _lifted(kind: PartKind) -> tuple[int, ...]:
    """Numbers that differ between the segments of a kind."""
    columns = zip(*(exact(u.segment.numbers) for u in kind.parts), strict=True)
    return tuple(i for i, column in enumerate(columns) if len(set(column)) > 1)


def _operand(ref: Any) -> Operand:
    if isinstance(ref, ScanItem):
        return Operand("scan", ref.source, ref.position)
    return Operand("noise" if isinstance(ref, Noise) else "input", ref)


def _carries_gradient(partition: Partition, ref: Any) -> bool:
    if not isinstance(ref, Value):
        return False
    part, place = partition.made(ref)
    return place in part.kind.active_outputs


# -- loops -----------------------------------------------------------------------------------------------------------


def _check_scan(partition: Partition, scan: Scan, places: list[int]) -> None:
    where = f" (the scan at {scan.location})"
    of_middle = (
        "a value from the middle of a scan is used after it, such as a list of all losses: only what the last "
        f"iteration leaves is there. Add up in a tensor, or use a plain `for`{where}"
    )
    if len(places) < len(scan.labels):  # nothing reads what the last iterations leave, as those before them
        raise CaptureError(of_middle)
    before, last = partition.parts[places[-2]], partition.parts[places[-1]]
    if before.kind is not last.kind:
        raise CaptureError(
            "the iterations of a scan differ in what they do, so that one cannot stand for all; use a plain `for` over "
            f"the tensors, or make what differs a tensor that is scanned too{where}"
        )

    def number(ref: Any) -> int | None:
        return partition.part_of[id(ref.entry)] if isinstance(ref, Value) else None

    apart = _shift(last, scan) - _shift(before, scan)
    for a, b in zip(before.segment.inputs, last.segment.inputs, strict=True):
        if number(b) == places[-2]:
            same = number(a) == places[-3] and partition.made(a)[1] == partition.made(b)[1]
        elif isinstance(b, ScanItem):
            same = isinstance(a, ScanItem) and a.source is b.source
            if same and b.position - a.position != apart:
                raise CaptureError(
                    "an iteration of a scan reads a row that an earlier one was given; scan the tensor twice, as in "
                    f"window.scan(xs[1:], xs[:-1]), or use a plain `for`{where}"
                )
        else:
            same = isinstance(b, Noise) or identity(a) == identity(b)
        if not same:
            raise CaptureError(
                "an iteration of a scan reads values of more than one iteration back, or other tensors than the "
                f"iteration before it; use a plain `for`, or carry what is needed in one tensor{where}"
            )
    later = [v for u in partition.parts[places[-1] + 1 :] for v in u.segment.inputs] + partition.finals()
    if not set(map(number, later)).isdisjoint(places[:-1]):
        raise CaptureError(of_middle)


def _strides(call: StepCall, scan: Scan, parts: list[Part], lifted: tuple[int, ...]) -> tuple[int, ...]:
    """By how much each input advances per iteration."""
    strides = [1 if g.kind == "scan" else 0 for g in call.inputs if g.kind != "number"]
    alike = [u for u in parts if u.kind is parts[-1].kind]
    labels = [_shift(u, scan) for u in alike]
    for i in lifted:
        column = [u.segment.numbers[i] for u in alike]
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


def _shift(part: Part, scan: Scan) -> int:
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
        self._use: dict[Any, int] = {}  # the last part that reads a value
        for n, refs in enumerate([*(part.segment.inputs for part in partition.parts), partition.finals()]):
            self._use.update((identity(ref), n) for ref in refs if isinstance(ref, Value))

    def where(self, ref: Value) -> int:
        """The register of a value."""
        return self._of[identity(ref)]

    def place(self, ref: Any) -> int | Input:
        """Where a value is found in the end: in a register, or in an input."""
        return self.where(ref) if isinstance(ref, Value) else ref

    def assign(self, n: int) -> list[int]:
        """The registers that part ``n`` writes, in the order of its outputs (-1: none)."""
        part, looped = self.partition.parts[n], n in self.templates
        values = [r for r in part.segment.inputs if isinstance(r, Value)]
        before = [r for r in values if self.partition.part_of[id(r.entry)] == n - 1]
        carry = {self.partition.made(r)[1] for r in before} if looped else set[Any]()
        # what all iterations of a loop read must outlast them
        done = [self.where(r) for r in (before if looped else values) if self._use[identity(r)] == n]
        free = self._free = list(dict.fromkeys([*self._free, *done]))
        places = list(part.kind.outputs)
        keys = [(id(part.segment.entries[number]), index) for number, index in places]
        wanted = [k for k, key in enumerate(keys) if key in self._use or places[k] in carry]
        written = [-1] * len(places)
        preferred = self._last_by_kind.get(id(part.kind), written)
        for k in wanted:
            if preferred[k] in free:
                free.remove(preferred[k])
                written[k] = preferred[k]
        for k in wanted:
            if written[k] < 0:
                if places[k] in carry:
                    raise AssertionError("a carried value has lost its register")
                written[k] = free.pop() if free else self.count
                self.count = max(self.count, written[k] + 1)
            self._of[keys[k]] = written[k]
        self._last_by_kind[id(part.kind)] = written
        return written
