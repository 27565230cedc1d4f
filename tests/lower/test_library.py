"""The library of steps: what equal steps share, and how many structures it keeps."""

from __future__ import annotations

import torch
from torch import fx

from metaoptim.compiler.derive.flat import default_dtype
from metaoptim.compiler.ir.step import StepGraph
from metaoptim.compiler.lower.library import Library


def graph(lifted: tuple[int, ...] = ()) -> StepGraph:
    empty = fx.Graph()
    empty.output(())
    return StepGraph(empty, (), ())


def test_it_keeps_the_structures_used_last() -> None:
    kept = Library(capacity=2)
    a, b = kept.step("a", graph), kept.step("b", graph)
    assert kept.step("a", graph) is a
    c = kept.step("c", graph)
    assert [id(s) for s in kept.steps()] == [id(a), id(c)]
    assert kept.step("b", graph) is not b


def test_one_without_room_shares_nothing() -> None:
    none = Library(0)
    assert none.step("a", graph) is not none.step("a", graph) and none.steps() == []


def test_numbers_that_differ_are_lifted() -> None:
    kept = Library()
    _, lifted, new = kept.get("a", (1.0, 0.0), graph)
    assert lifted == () and new
    second, lifted, new = kept.get("a", (2.0, 0.0), graph)
    assert lifted == (0,) and new
    assert kept.get("a", (3.0, 0.0), graph) == (second, (0,), False)
    _, lifted, new = kept.get("a", (3.0, -0.0), graph)  # not the same to the bit
    assert lifted == (0, 1) and new


def test_another_default_dtype_makes_another_step() -> None:
    kept = Library()
    usual = kept.step("a", graph)
    with default_dtype(torch.float32):
        assert kept.step("a", graph) is not usual
        kept.discard("a")
    assert kept.steps() == [usual]
