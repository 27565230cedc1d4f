"""A trace cut into segments, the parts of a compiled program: one per super-step, and what comes before and after."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .slices import Keyed, hook_key
from .step import RANK, Role, gradient, show
from .tensors import TensorSpec
from .trace import Input, Noise, ScanItem, Trace
from .update import UpdatePlan
from .values import Entry, Number, Value, changed, identity, owner

aten = torch.ops.aten
Place = tuple[int, Any]  # of a call, and which of its outputs; None for the only one


def leaves(a: Any) -> Iterator[Any]:
    """The values, inputs and numbers in an argument."""
    if isinstance(a, tuple):
        for b in a:
            yield from leaves(b)
    elif isinstance(a, dict):
        for b in a.values():
            yield from leaves(b)
    elif isinstance(a, (Value, Input, Noise, ScanItem, Number)):
        yield a


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


class Hooks:
    """The tensor hooks of a trace.

    Attributes:
        of: id of a call -> its hooked outputs, each with its hooks.
        inputs: id of an `Input` -> its hooks.
        thetas: ids of the calls that show parameters by which an inner gradient is taken.
        indexed: see `Trace`.
    """

    def __init__(self, trace: Trace, inputs: dict[int, list[Any]] | None = None) -> None:
        self.of, self.inputs, self.indexed = trace.hooks, inputs or {}, trace.indexed
        self.thetas = _shown(trace.entries)


class Segment(Keyed):
    """Consecutive calls of a trace.

    A hook acts where its tensor is made, on the whole of its gradient. One on a parameter acts in the step that takes
    the gradient by it.

    Attributes:
        inputs: what they read from outside, in the order they are met.
        key: their structure.
    """

    def __init__(self, entries: list[Entry], hooks: Hooks) -> None:
        super().__init__(entries)
        self.indexed = hooks.indexed
        self.inputs: list[Any] = []
        self._input_at: dict[Any, int] = {}
        calls = tuple(self._entry_key(e) for e in entries)
        inner = _shown(entries)
        for number, entry in enumerate(entries):
            if id(entry) in inner or id(entry) not in hooks.thetas:
                for index, spies in hooks.of.get(id(entry), {}).items():
                    self.hooks["v", number, index] = spies
        for at in sorted(thetas_of(self)):
            if isinstance(self.inputs[at], Value):
                for spies in hooks.of.get(id(self.inputs[at].entry), {}).values():
                    self.hooks["x", at] = spies
        for at, x in enumerate(self.inputs):
            if id(x) in hooks.inputs:
                self.hooks["x", at] = hooks.inputs[id(x)]
        acting = tuple((at, tuple(hook_key(s.hook) for s in spies)) for at, spies in self.hooks.items())
        self.opaque = self.opaque or bool(acting)
        self.key = (calls, tuple(map(_kind, self.inputs)), acting)

    def token(self, a: Any) -> Any:
        """A hashable stand-in: ("v", entry, output), ("x", k), ("n", k) or a constant."""
        inside = isinstance(a, Value) and id(a.entry) in self.number_of
        if isinstance(a, (Input, Noise, ScanItem, Value)) and not inside:
            at = self._input_at.setdefault(identity(a), len(self.inputs))
            if at == len(self.inputs):
                self.inputs.append(a)
            return ("x", at)
        return super().token(a)

    def place_of(self, ref: Any) -> int | None:
        """The place of ``ref`` among the inputs."""
        return self._input_at.get(identity(ref))

    def memory_of(self, ref: Any) -> Any:
        """The call or input that made the memory of ``ref``, as far back as these calls go."""
        return identity(owner(ref, lambda entry: id(entry) in self.number_of))


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


def _kind(ref: Any) -> tuple[Any, ...]:
    if isinstance(ref, Value):
        return ("value", ref.ref, is_inner_state(ref))
    if isinstance(ref, Noise):
        return ("noise", ref.spec, ref.key)
    return ("scan" if isinstance(ref, ScanItem) else "input", ref.spec, ref.grad)


@dataclass
class PartKind:
    """What equal segments have in common.

    Attributes:
        outputs: (entry, output) places that anything later reads, with their specs.
        active, active_outputs: places of the inputs and outputs that depend on something that requires grad.
    """

    parts: list[Part] = field(default_factory=list)
    outputs: dict[Place, TensorSpec] = field(default_factory=dict)
    active: set[int] = field(default_factory=set)
    active_outputs: set[Place] = field(default_factory=set)


@dataclass
class Part:
    """One segment in its place in the program.

    Attributes:
        steps: how many inner steps it holds.
        scan: (which scan, which captured iteration) it is, or None.
    """

    segment: Segment
    steps: int
    location: str
    scan: tuple[int, int] | None
    kind: PartKind = field(default_factory=PartKind)


@dataclass
class Partition:
    """A program in the making: what the passes rewrite."""

    trace: Trace
    hooks: Hooks
    parts: list[Part] = field(default_factory=list)
    kinds: list[PartKind] = field(default_factory=list)
    part_of: dict[int, int] = field(default_factory=dict)  # id of an entry -> its part

    def finals(self) -> list[Any]:
        """Values that are wanted at the end."""
        return [*self.trace.outputs, *(v for _, v in self.trace.writes)]


def _shown(entries: list[Entry]) -> set[int]:
    """Ids of the calls that show the parameters by which ``entries`` take inner gradients."""
    thetas = (theta for e in entries if e.op is gradient for theta in e.args[1])
    return {id(theta.entry) for theta in thetas if isinstance(theta, Value)}


def thetas_of(segment: Segment) -> set[int]:
    """Places of the inputs by which inner gradients are taken."""
    found = {segment.place_of(theta) for e in segment.entries if e.op is gradient for theta in e.args[1]}
    return {at for at in found if at is not None}


@dataclass
class Roles:
    """What the inputs and outputs of a segment are to the inner loop.

    Attributes:
        inputs: by place.
        order: the places in the order of a step graph's inputs.
        outputs: by (entry, output), in order.
    """

    inputs: list[Role]
    order: list[int]
    outputs: dict[Place, Role]


def ordered(inputs: list[Role]) -> list[int]:
    """Places of the inputs in the order of a step graph's: theta, other values passed on, the rest."""
    return sorted(range(len(inputs)), key=lambda at: (RANK.get(inputs[at], 3), at))


def roles_of(segment: Segment, kind: PartKind) -> Roles:
    """Roles in a part of a compiled function."""
    thetas = thetas_of(segment)
    inputs = []
    for at, ref in enumerate(segment.inputs):
        if isinstance(ref, Value):
            inner = Role.OPT_STATE if is_inner_state(ref) else Role.CARRY
            inputs.append(Role.THETA if at in thetas else inner)
        else:
            given = Role.NOISE if isinstance(ref, Noise) else Role.SCAN
            inputs.append(Role.META if at in kind.active else given)
    outputs = {}
    for number, index in kind.outputs:
        inner = is_inner_state(Value(segment.entries[number], index))
        outputs[number, index] = Role.OPT_STATE if inner else Role.CARRY
    return Roles(inputs, ordered(inputs), outputs)
