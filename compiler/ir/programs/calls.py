"""Calls of step graphs, and the Loops that a run of calls, or rounds of several, become where they repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

from torch import Tensor

from ..step import EAGER, Lowering, Role, StepGraph
from ..text import kind_of, registers_text
from ..values import Input, Noise, Spy

LONGEST = 32  # calls in a round


@dataclass(slots=True)
class StepCall:
    """A step graph and what it is called with."""

    step: StepGraph
    reads: tuple[int, ...]  # state indices behind the inputs that are state, in order
    writes: tuple[
        int, ...
    ]  # state indices the outputs go to, in order; -1 for none. Gradients, the last, have none.
    inputs: list[Any]  # what fills the other inputs, in order
    location: str  # the user's line
    back: int = 0  # how many positions before its own lies the state whose theta its loss has read
    metas: tuple[Any, ...] = ()  # for each META input, the number under which its gradient is collected
    rng: int = -1  # state index of the random generator's state, if the step draws
    lowering: Lowering = EAGER
    spies: tuple[Spy, ...] = ()  # the tensor hooks that are part of the step
    saved: bool = False  # whether it ran with residuals, which replays do too: the same to the bit

    @property
    def theta(self) -> tuple[int, ...]:
        """State indices of the parameters that its loss has read."""
        return self.reads[: self.step.thetas]

    def text(self, names: Mapping[int, str], inputs: Mapping[Input, str]) -> str:
        """The call in a function's program: the registers and inputs that a step graph reads, those that it writes."""
        given = ", ".join(given.text(inputs) for given in self.inputs)
        read = "; ".join(filter(None, [registers_text(self.reads), given]))
        location = self.location.replace("\\", "/").rpartition("/")[2]
        where = f"  # {location}" if location else ""
        return f"{registers_text(self.writes) or 'nothing'} = {names[id(self.step)]}({read}){where}"

    @property
    def updated(self) -> tuple[int, ...]:
        """State indices of theta'."""
        return tuple(i for i, port in zip(self.writes, self.step.outputs) if port.role is Role.THETA)


@dataclass(slots=True)
class Assign:
    """State entries set to values from outside.

    Of an ``adoption`` the values are a network's own parameters, and cotangents that arrive here are theirs; otherwise
    it is a history cut (an in-place load), where cotangents end.
    """

    indices: tuple[int, ...]
    values: list[Tensor]
    adoption: bool = False


@dataclass
class Loop:
    """Iterations that only differ in the slices and numbers their calls are given.

    ``calls`` are those of the first iteration. In each later one they read what the iteration before has written.
    """

    calls: tuple[StepCall, ...]
    count: int


@dataclass(frozen=True)
class Operand:
    """An input of a call that is no register."""

    kind: str  # "input", "scan" (a slice of one), "noise", "number", or "each" (of several, the one at `at`)
    of: Any  # the `Input`, the `Noise`, the number, or what there is to choose from
    at: int = 0  # of a slice, its position
    stride: int = 0  # in a loop, by how much position or number advance from one iteration to the next

    def after(self, iterations: int) -> Operand:
        """The one so many iterations later."""
        by = self.stride * iterations
        if self.kind == "number":
            return Operand("number", self.of + by, 0, self.stride)
        return Operand(self.kind, self.of, self.at + by, self.stride)

    @property
    def chosen(self) -> Operand:
        """Itself, or the one of several that it stands for now."""
        return self.of[self.at] if self.kind == "each" else self

    @property
    def sources(self) -> list[Input | Noise | float]:
        """What it may read, one or several."""
        return [g.of for g in self.of] if self.kind == "each" else [self.of]

    def text(self, names: Mapping[Input, str]) -> str:
        """What it is, in iteration t."""
        if self.kind == "noise":
            return kind_of(self.of.op) + "()"
        if self.kind == "input":
            return names[self.of]
        start = self.of if self.kind == "number" else self.at
        moving = f"{start} + " if start else ""
        place = moving + (f"{self.stride}·t" if self.stride != 1 else "t") if self.stride else f"{start}"
        if self.kind == "each":
            first, *_, last = (g.text(names) for g in self.of)
            return f"({first}, ..., {last})[{place}]"
        return place if self.kind == "number" else f"{names[self.of]}[{place}]"


Call: TypeAlias = StepCall | Assign
Item: TypeAlias = StepCall | Assign | Loop


def calls_of(item: StepCall | Loop) -> tuple[StepCall, ...]:
    """A call, or those of one iteration of a loop."""
    return item.calls if isinstance(item, Loop) else (item,)


# -- rounds that repeat ----------------------------------------------------------------------------------------------


def folded(calls: Sequence[Any]) -> list[Any]:
    """``calls`` with Loops in the place of rounds that repeat."""
    alike = _repeats(list(map(_key, calls)))
    found: list[Item] = []
    at = 0
    while at < len(calls):
        # the round that covers most: the shortest, of those that cover as much
        length = max(alike, key=lambda p: (alike[p][at] >= p) * (alike[p][at] // p + 1) * p, default=0)
        count = 1 + alike[length][at] // length if length else 1
        if count == 1:
            found.append(calls[at])
            length = 1
        else:
            found.append(_loop([calls[at + k * length : at + (k + 1) * length] for k in range(count)]))
        at += length * count
    return found


def nth(loop: Loop, n: int) -> StepCall:
    """The ``n``-th call of a Loop of recorded calls."""
    k, which = divmod(n, len(loop.calls))
    call = loop.calls[which]
    inputs, metas = ([x.of[k] if type(x) is Operand else x for x in of] for of in (call.inputs, call.metas))
    step, reads, writes, where = call.step, call.reads, call.writes, call.location
    return StepCall(
        step, reads, writes, inputs, where, call.back, tuple(metas), lowering=call.lowering, saved=call.saved
    )


def extended(known: Loop, calls: Sequence[Item]) -> int:
    """Let a Loop of recorded calls go on with those of ``calls`` that do as its own; how many they are."""
    length = len(known.calls)
    count = 0
    while (count + 1) * length <= len(calls) and all(
        _key(own) == _key(call)
        for own, call in zip(known.calls, calls[count * length : (count + 1) * length], strict=True)
    ):
        count += 1
    for k, own in enumerate(known.calls):
        more: list[Any] = list(calls[k : count * length : length])
        own.inputs = [_longer(x, known.count, [c.inputs[i] for c in more]) for i, x in enumerate(own.inputs)]
        metas = enumerate(own.metas)
        own.metas = tuple([_longer(m, known.count, [c.metas[i] for c in more]) for i, m in metas])
    known.count += count
    return count * length


def _longer(column: Any, count: int, more: list[Any]) -> Any:
    if isinstance(column, Operand):
        column.of.extend(more)
    elif not all(_same(x, column) for x in more):
        return Operand("each", [column] * count + more, 0, 1)
    return column


def _key(item: Item) -> tuple[Any, ...]:
    """Equal for calls that may be one and the same of a loop."""
    if not isinstance(item, StepCall) or item.spies:
        return (id(item),)
    return id(item.step), item.reads, item.writes, item.back, item.lowering, item.location, item.saved


def _repeats(keys: list[tuple[Any, ...]]) -> dict[int, list[int]]:
    """Length of a round -> for each place, how many places from there on are like the one a round later."""
    found: dict[int, list[int]] = {}
    for length in range(1, min(LONGEST, len(keys) // 2) + 1):
        counts = found[length] = [0] * len(keys)
        for at in range(len(keys) - length - 1, -1, -1):
            counts[at] = counts[at + 1] + 1 if keys[at] == keys[at + length] else 0
    return found


def _loop(rounds: list[Sequence[StepCall]]) -> Loop:
    calls: list[StepCall] = []
    for column in zip(*rounds, strict=True):
        inputs = [_column(given) for given in zip(*(call.inputs for call in column), strict=True)]
        metas = [_column(given) for given in zip(*(call.metas for call in column), strict=True)]
        calls.append(replace(column[0], inputs=inputs, metas=tuple(metas)))
    return Loop(tuple(calls), len(rounds))


def _column(given: Sequence[Any]) -> Any:
    """What stands for one input of a call in all rounds."""
    first = given[0]
    if not isinstance(first, Operand):  # of a recorded call
        return first if all(_same(g, first) for g in given) else Operand("each", list(given), 0, 1)
    kind = first.kind
    if kind == "noise" or all(g.kind == kind and g.at == first.at and _same(g.of, first.of) for g in given):
        return first
    strides: set[int] = set()
    if kind == "scan" and all(g.kind == "scan" and g.of is first.of for g in given):
        strides = {b.at - a.at for a, b in pairwise(given)}
    elif all(g.kind == "number" and type(g.of) is int for g in given):
        strides = {b.of - a.of for a, b in pairwise(given)}
    if len(strides) == 1:
        return replace(first, stride=strides.pop())
    return Operand("each", tuple(given), 0, 1)


def _same(a: object, b: object) -> bool:
    """One tensor, or numbers alike to the last bit: -0.0 is not 0.0."""
    return a is b or (isinstance(a, (int, float)) and type(a) is type(b) and repr(a) == repr(b))
