"""What a compiled function reads, and writes itself: nothing of it is frozen in silence.

Each case is taken through calls between which something changes, and compared with the tape, step by step.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaoptim
import stale_functions
import stale_objects
from stale import Case, Settings, X, gradients, loss_after_a_step, nothing_is_frozen

CASES = {**stale_objects.CASES, **stale_functions.CASES}
assert len(CASES) == len(stale_objects.CASES) + len(stale_functions.CASES)


@pytest.mark.parametrize("form", ["B", "C"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_frozen(name: str, form: str) -> None:
    nothing_is_frozen(CASES[name], form)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Attribute", "self.k: was 1, is 20"),
        ("LearningRate", "self.inner.param_groups[0]['lr']: was 0.1, is 0.1500"),
        ("GlobalOfAHelper", "SCALE: was 1.0, is 2.0"),
        ("AnotherModule", "changing.SCALE: was 1.0, is 2.0"),
    ],
)
def test_the_change_is_named(name: str, text: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "metaoptim.recompiles")
    made = CASES[name]()
    f = metaoptim.compile(loss_after_a_step if name == "LearningRate" else CASES[name].loss, backend="eager")
    f(made, X)
    made.change()
    f(made, X)
    assert text in caplog.records[-1].getMessage()


# -- refused ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "counter": (itertools.count, next, r"made\.held.*iterator \(count\)"),
    "iterator": (lambda: iter([1.0, 2.0]), next, r"made\.held.*iterator \(list_iterator\)"),
    "generator": (lambda: (float(k) for k in range(9)), next, r"made\.held.*iterator \(generator\)"),
    "Random": (lambda: random.Random(0), lambda r: r.random(), r"made\.held.*random generator \(Random\)"),
    "numpy": (
        lambda: np.random.default_rng(0),
        lambda r: r.random(),
        r"made\.held.*random generator \(Generator\)",
    ),
}


@pytest.mark.parametrize("form", ["B", "C"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, form: str) -> None:
    make, use, message = REFUSED[name]

    class Held(Case):
        def set_up(self) -> None:
            self.held = make()

        def factor(self) -> Any:
            return 1 + use(self.held)

    with pytest.raises(metaoptim.CaptureError, match=message):
        gradients(Held(), form, torch.tensor(0.5, requires_grad=True), 1)


# -- what is neither stale nor compiled anew --------------------------------------------------------------------------


def test_what_is_not_read_makes_nothing_compile_anew() -> None:
    class Agent(Case):
        unread, calls = 0, 0

        def step(self, x: Tensor) -> None:
            self.calls += 1
            self.seen = x.shape
            self.inner.step(self.loss(x))

    agent = Agent()
    step = metaoptim.compile(Agent.step, backend="eager")
    with metaoptim.SlidingWindow():
        for _ in range(3):
            step(agent, X)
            agent.unread += 1
            agent.other = object()  # type: ignore[attr-defined]
    assert sum(map(len, step._specializations.known.values())) == 2  # with state, and without


def test_classes_are_as_before_after_a_capture() -> None:
    made = CASES["Dataclass"]()
    before = [vars(cls).get("__getattribute__") for cls in (nn.Module, Settings, type(made))]
    gradients(made, "C", torch.tensor(0.5, requires_grad=True), 2)
    assert [vars(cls).get("__getattribute__") for cls in (nn.Module, Settings, type(made))] == before
    with pytest.raises(metaoptim.CaptureError, match="value is needed while the function is captured"):
        metaoptim.compile(lambda: made.net(X).sum().item() * made.settings.k, backend="eager")()
    assert [vars(cls).get("__getattribute__") for cls in (nn.Module, Settings, type(made))] == before
