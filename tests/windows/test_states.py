"""Moments of an inner loop that are gone back to, against the same loops by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from branches import LOOPS, Y, by_hand, by_window
from oracle import agree


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
@pytest.mark.parametrize("name", LOOPS)
def test_each_loss_has_the_gradient_of_its_own_history(name: str, offline: bool) -> None:
    optimizer = "MetaAdam" if offline else "MetaSGD"
    expected = by_hand(LOOPS[name], optimizer, offline)
    assert all(g is not None and g.abs().max() > 1e-6 for k, g in expected.items() if "." not in k)
    for options in ({}, {"slots": 2}, {"strategy": "full_tape"}):
        agree(by_window(LOOPS[name], optimizer, offline, **options), expected)


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
def test_under_a_budget_and_on_disk(offline: bool, tmp_path: Path) -> None:
    for name, optimizer in (("nested", "MetaSGD"), ("branches-reference", "MetaAdam")):
        expected = by_hand(LOOPS[name], optimizer, offline)
        for options in ({"memory_budget": "4MiB"}, {"slots": 2, "offload": tmp_path}):
            agree(by_window(LOOPS[name], optimizer, offline, **options), expected)


@pytest.mark.parametrize("name", LOOPS)
def test_between_compiled_steps(name: str) -> None:
    optimizer, offline, slots = ("MetaAdam", True, None) if len(name) % 2 else ("MetaSGD", False, 2)
    found = by_window(LOOPS[name], optimizer, offline, slots=slots, carries=False, compiles=True)
    agree(found, by_hand(LOOPS[name], optimizer, offline, carries=False))


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
@pytest.mark.parametrize("at_once", [True, False])
def test_many_branches_and_a_backward_in_each(at_once: bool, offline: bool) -> None:
    def loop(it: Any, m: dict[str, Tensor], at_once: bool) -> Tensor:
        it.step(Y)
        there, total = it.extract(), 0 * m["shift"].sum()
        for k in range(1, 10):
            it.recover(there)
            for _ in range(1 + k % 3):
                it.step(Y * k + m["shift"])
            if at_once:
                (k * it.loss(Y - k)).backward()
            else:
                total = total + k * it.loss(Y - k)
            if k == 5:
                there = it.extract()
        return total

    expected = by_hand(lambda it, m: loop(it, m, False), "MetaSGD", offline, carries=False)
    for options in ({}, {"slots": 2}):
        found = by_window(lambda it, m: loop(it, m, at_once), "MetaSGD", offline, carries=False, **options)
        agree(found, expected)
