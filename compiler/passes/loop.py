"""loop: a run of calls that differ by what advances from one to the next becomes a Loop, and so do rounds of calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ..ir import Loop, StepCall
from ..program import Given, RolledProgram

_LONGEST = 32  # calls in a round


def loop(rolled: RolledProgram) -> str:
    """Fold rounds of calls that leave their results where the next round looks for them.

    A plain ``for`` leaves many: of one call each, or of several where optimizers step by turns. What calls are given
    besides is the same in every round, or a row or a whole number that moves on by as much every time, or listed.
    """
    before = len(rolled.calls)
    rolled.calls = _folded(rolled.calls)
    return f"{before} calls and loops are now {len(rolled.calls)}"


def _folded(calls: list[StepCall | Loop]) -> list[StepCall | Loop]:
    alike = _repeats(list(map(_key, calls)))
    folded: list[StepCall | Loop] = []
    at = 0
    while at < len(calls):
        # the round that covers most: the shortest, of those that cover as much
        length = max(alike, key=lambda p: (alike[p][at] >= p) * (alike[p][at] // p + 1) * p, default=0)
        count = 1 + alike[length][at] // length if length else 1
        if count == 1:
            folded.append(calls[at])
            at += 1
            continue
        rounds = [calls[at + k * length : at + (k + 1) * length] for k in range(count)]
        folded.append(_loop(rounds))
        at += length * count
    return folded


def _key(item: StepCall | Loop) -> tuple:
    """Equal for calls that may be one and the same of a loop."""
    if isinstance(item, Loop):
        return (id(item),)
    return (id(item.step), item.opt_state_in, item.opt_state_out, item.location)


def _repeats(keys: list[tuple]) -> dict[int, list[int]]:
    """Length of a round -> for each place, how many places from there on are like the one a round later."""
    found = {}
    for length in range(1, min(_LONGEST, len(keys) // 2) + 1):
        counts = [0] * len(keys)
        for at in range(len(keys) - length - 1, -1, -1):
            counts[at] = counts[at + 1] + 1 if keys[at] == keys[at + length] else 0
        found[length] = counts
    return found


def _loop(rounds: list[list[Any]]) -> Loop:
    calls, strides = [], []
    for call, *others in zip(*rounds, strict=True):
        given = zip(call.inputs, *(other.inputs for other in others), strict=True)
        columns = [_column(column) for column in given]
        calls.append(replace(call, inputs=[first for first, _ in columns]))
        strides.append(tuple(stride for _, stride in columns))
    return Loop(tuple(calls), len(rounds), tuple(strides))


def _column(given: Sequence[Given]) -> tuple[Given, int]:
    """What stands for one input of a call in all rounds, and its stride."""
    first, second, *_ = given
    if first.kind == "noise" or all(
        g.kind == first.kind and g.at == first.at and _same(g.of, first.of) for g in given
    ):
        return first, 0
    if first.kind == "scan" and all(g.kind == "scan" and g.of is first.of for g in given):
        stride = second.at - first.at
        if all(b.at - a.at == stride for a, b in pairwise(given)):
            return first, stride
    if all(g.kind == "number" and type(g.of) is int for g in given):
        stride = second.of - first.of
        if all(b.of - a.of == stride for a, b in pairwise(given)):
            return first, stride
    return Given("each", tuple(given)), 1


def _same(a: object, b: object) -> bool:
    """One tensor, or numbers alike to the last bit: -0.0 is not 0.0."""
    return a is b or (isinstance(a, (int, float)) and type(a) is type(b) and repr(a) == repr(b))
