"""What a captured function does: a trace, and the segments it is cut into, the parts of a compiled program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..operators import aten
from ..retention import UNSAID, Retention
from ..step import RANK, Role, gradient, show
from ..tensors import TensorSpec
from ..update import UpdatePlan
from ..values import Entry, Input, Noise, Number, ScanItem, Spy, Value, changed, identity, owner
from .slices import Keyed

OutputAt = tuple[int, Any]  # of a call, and which of its outputs; None for the only one


@dataclass(slots=True, eq=False, repr=False)
class Scan:
    """A loop captured by a few of its iterations."""

    count: int  # how many iterations it stands for
    labels: list[int]  # which of them have been captured
    location: str
    begins: list[int] = field(default_factory=lambda: [])  # first entry of each captured iteration
    end: int = -1  # index after the last entry, once the loop has run out


@dataclass
class WindowMark:
    """A window of the trace."""

    offline: bool
    window: int | None = None  # W
    retention: Retention = UNSAID
    backward_hook: Callable[..., Any] | None = None
    adopted: list[Entry] = field(default_factory=list[Entry])  # the call that takes each parameter in
    # Tensors that would keep a value after an online window, with what stands for it.
    last: list[tuple[Any, Value]] = field(default_factory=list[tuple[Any, Value]])


@dataclass
class Trace:
    """What a captured function does."""

    entries: list[Entry] = field(default_factory=list[Entry])  # calls, in order
    inputs: list[Input] = field(default_factory=list[Input])  # real tensors read
    # Index after each inner step's last entry, with the user's line.
    steps: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    scans: list[Scan] = field(default_factory=list[Scan])  # only their first iterations are among the entries
    windows: list[WindowMark] = field(default_factory=list[WindowMark])
    outputs: list[Any] = field(default_factory=list[Any])  # what stands for each tensor the function returns
    # Tensors that the function was given and that have another value after it, with what stands for it.
    left: list[tuple[Tensor, Value]] = field(default_factory=list[tuple[Tensor, Value]])
    # Tensors that keep a new value, and what stands for it, and W: as the pass mode has decided.
    writes: list[tuple[Any, Value]] = field(default_factory=list[tuple[Any, Value]])
    window: int | None = None
    # Id of a call, or of an input -> its hooked outputs, each with the hooks that were there when a gradient passed.
    hooks: dict[int, dict[Any, list[Spy]]] = field(default_factory=dict[int, dict[Any, list[Spy]]])
    indexed: bool = False  # whether indices that may differ from step to step are `Number`s already
    draws_on: torch.device | None = None  # where random numbers are drawn
    milliseconds: float = 0.0  # how long the capture took

    @cached_property
    def thetas(self) -> set[int]:
        """Ids of the calls that show parameters by which an inner gradient is taken."""
        return _shown(self.entries)


def leaves(a: Any) -> Iterator[Any]:
    """The values, inputs and numbers in an argument."""
    if isinstance(a, (Value, Input, Noise, ScanItem, Number)):
        yield a
    elif isinstance(a, (tuple, dict)):
        for b in a.values() if isinstance(a, dict) else a:  # pyright: ignore[reportUnknownVariableType]
            yield from leaves(b)


def arguments(entry: Entry) -> Iterator[Any]:
    """What a call reads."""
    yield from leaves(entry.args)
    if entry.kwargs:
        yield from leaves(entry.kwargs)


def sources(entry: Entry) -> Iterator[Any]:
    """Where a gradient that reaches the outputs of a call goes on to."""
    if entry.op is aten.detach.default:
        return
    if entry.grad:
        yield from arguments(entry)
        yield from (Value(write, None) for write in entry.deps)
    else:  # under no_grad a tensor that is changed in place keeps its history
        yield from changed(entry)


class Segment(Keyed):
    """Consecutive calls of a trace.

    A hook acts where its tensor is made, on the whole of its gradient. One on a parameter acts in the step that takes
    the gradient by it.
    """

    def __init__(self, entries: list[Entry], trace: Trace) -> None:
        super().__init__(entries)
        self.indexed = trace.indexed
        self.inputs: list[Any] = []  # what they read from outside, in the order they are met
        self._input_at: dict[Any, int] = {}
        calls = self.entry_keys()
        inner = _shown(entries)
        for number, entry in enumerate(entries):
            if id(entry) in inner or id(entry) not in trace.thetas:
                for index, spies in trace.hooks.get(id(entry), {}).items():
                    self.hooks["v", number, index] = spies
        for at, x in enumerate(self.inputs):
            made = x.entry if isinstance(x, Value) and at in self.thetas else x
            for spies in trace.hooks.get(id(made), {}).values():
                self.hooks["x", at] = spies
        self.key = (calls, tuple(map(_kind, self.inputs)), self.hook_keys())

    @cached_property
    def thetas(self) -> set[int]:
        """Places of the inputs by which inner gradients are taken."""
        taken = (theta for e in self.entries if e.op is gradient for theta in e.args[1])
        return {self._input_at[key] for key in map(identity, taken) if key in self._input_at}

    def token(self, a: Any) -> Any:
        """A hashable stand-in: ("v", entry, output), ("x", k), ("n", k) or a constant."""
        inside = isinstance(a, Value) and id(a.entry) in self.number_of
        if isinstance(a, (Input, Noise, ScanItem, Value)) and not inside:
            at = self._input_at.setdefault(identity(a), len(self.inputs))
            if at == len(self.inputs):
                self.inputs.append(a)
            return ("x", at)
        return super().token(a)

    def memory_of(self, ref: Any) -> Any:
        """The call or input that made the memory of ``ref``, as far back as these calls go."""
        return identity(owner(ref, lambda entry: id(entry) in self.number_of))


def _shown(entries: list[Entry]) -> set[int]:
    """Ids of the calls that show the parameters by which ``entries`` take inner gradients."""
    thetas = (theta for e in entries if e.op is gradient for theta in e.args[1])
    return {id(theta.entry) for theta in thetas if isinstance(theta, Value)}


def _kind(ref: Any) -> tuple[Any, ...]:
    if isinstance(ref, Value):
        return ("value", ref.ref, is_inner_state(ref))
    if isinstance(ref, Noise):
        return ("noise", ref.spec, ref.key)
    return ("scan" if isinstance(ref, ScanItem) else "input", ref.spec, ref.grad)


def spec_of(ref: Any) -> TensorSpec:
    """Shape, dtype, strides and device of what ``ref`` stands for."""
    return ref.ref if isinstance(ref, Value) else ref.spec


def is_inner_state(ref: Value) -> bool:
    """Whether a value is theta or optimizer state, which a truncated gradient does not flow through for long."""
    entry = ref.entry
    if entry.op is show:
        return True
    while entry.op is operator.getitem:
        entry = entry.args[0].entry
    return isinstance(entry.op, UpdatePlan)


@dataclass
class PartKind:
    """What equal segments have in common."""

    parts: list[Part] = field(default_factory=lambda: [])
    outputs: dict[OutputAt, TensorSpec] = field(default_factory=lambda: {})  # that anything later reads
    active: set[int] = field(default_factory=set[int])  # inputs that depend on something that requires grad
    active_outputs: set[OutputAt] = field(default_factory=set[OutputAt])  # outputs that do


@dataclass
class Part:
    """One segment in its place in the program."""

    segment: Segment
    steps: int  # how many inner steps it holds
    location: str
    scan: tuple[int, int] | None  # which scan, and which captured iteration, it is
    kind: PartKind = field(default_factory=PartKind)


@dataclass
class Partition:
    """A program in the making: what the passes rewrite."""

    trace: Trace
    parts: list[Part] = field(default_factory=list[Part])
    kinds: list[PartKind] = field(default_factory=list[PartKind])
    part_of: dict[int, int] = field(default_factory=dict[int, int])  # id of an entry -> its part

    def made(self, value: Value) -> tuple[Part, OutputAt]:
        """The part that gives a value, and the value's place in it."""
        part = self.parts[self.part_of[id(value.entry)]]
        return part, (part.segment.number_of[id(value.entry)], value.index)

    def finals(self) -> list[Any]:
        """Values that are wanted at the end."""
        return [*self.trace.outputs, *(v for _, v in self.trace.writes)]


@dataclass
class Roles:
    """What the inputs, by place, and the outputs of a segment, in order, are to the inner loop."""

    inputs: list[Role]
    outputs: dict[OutputAt, Role]

    @property
    def order(self) -> list[int]:
        """Places of the inputs in the order of a step graph's: theta, other values passed on, the rest."""
        return sorted(range(len(self.inputs)), key=lambda at: (RANK.get(self.inputs[at], 3), at))


def roles_of(segment: Segment, kind: PartKind) -> Roles:
    """Roles in a part of a compiled function."""
    inputs: list[Role] = []
    for at, ref in enumerate(segment.inputs):
        if isinstance(ref, Value):
            inner = Role.OPT_STATE if is_inner_state(ref) else Role.CARRY
            inputs.append(Role.THETA if at in segment.thetas else inner)
        else:
            given = Role.NOISE if isinstance(ref, Noise) else Role.SCAN
            inputs.append(Role.META if at in kind.active else given)
    outputs: dict[OutputAt, Role] = {}
    for number, index in kind.outputs:
        inner = is_inner_state(Value(segment.entries[number], index))
        outputs[number, index] = Role.OPT_STATE if inner else Role.CARRY
    return Roles(inputs, outputs)
