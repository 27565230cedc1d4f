"""loop: a run of calls that differ by what advances from one to the next becomes a Loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

from ..capture.tracer import Input
from ..ir import Loop, StepCall
from ..program import Given, RolledProgram


def loop(rolled: RolledProgram) -> str:
    """Fold calls of one step graph that leave their results where the next of them looks for them.

    A plain ``for`` leaves many. What a run is given besides is the same in every call, or a row or a whole number that
    moves on by as much every time, or listed.
    """
    before = len(rolled.calls)
    rolled.calls = [made for _, run in groupby(rolled.calls, _alike) for made in _folded(list(run))]
    return f"{before} calls and loops are now {len(rolled.calls)}"


def _alike(item: StepCall | Loop) -> tuple:
    """Equal for consecutive calls that may be one loop."""
    if isinstance(item, Loop):
        return (id(item),)
    return (id(item.step), item.opt_state_in, item.opt_state_out, item.location)


def _folded(run: list[Any]) -> list[Any]:
    """A run of calls, folded if it can be."""
    if len(run) == 1:
        return run
    columns = [_column(column) for column in zip(*(call.inputs for call in run), strict=True)]
    if None in columns:
        return run
    inputs, strides = zip(*columns, strict=True) if columns else ((), ())
    return [Loop(replace(run[0], inputs=list(inputs)), len(run), strides)]


def _column(given: Sequence[Given]) -> tuple[Given, int] | None:
    """What stands for one input of all calls of a run, and its stride."""
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
    if any(isinstance(g.of, Input) and g.of.grad and g.kind == "input" for g in given):
        return None  # each gets a gradient of its own, and what a loop takes shall not depend on its length
    return Given("each", tuple(given)), 1


def _same(a: object, b: object) -> bool:
    """One tensor, or numbers alike to the last bit: -0.0 is not 0.0."""
    return a is b or (isinstance(a, (int, float)) and type(a) is type(b) and repr(a) == repr(b))
