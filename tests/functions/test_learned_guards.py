"""What a rule is, besides its weights: it may change between calls, and before the backward."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from edges import STEPS, loss_of, network
from metaoptim.compiler.lower.library import library
from oracle import agree


class Rule(nn.Module):
    """With settings of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.w = nn.Linear(1, 1), nn.Parameter(torch.tensor(0.4))
        self.number, self.settings, self.listed = 1.5, argparse.Namespace(k=1.2), [0.9]
        self.register_buffer("held", torch.tensor(0.7))

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(param)}

    def forward(self, param: Tensor, grad: Tensor, state: dict) -> tuple[Tensor, dict]:
        m = 0.9 * state["m"] + grad * self.number * self.settings.k * self.listed[0] * self.held
        return self.w * self.lin(m.unsqueeze(-1)).squeeze(-1) + grad * (0.1 if self.training else 0.2), {
            "m": m
        }


class World:
    """One rule, in every form."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.net, self.rule = network(), Rule()
        self.inner = metaoptim.MetaLearned([self.net], self.rule, lr=0.1)
        self.compiled = metaoptim.compile(self.loop, backend="eager")
        self.compiled_outside = metaoptim.compile(self.loop_outside, backend="eager")

        @metaoptim.compile(backend="eager")
        def step(x: int) -> None:
            self.inner.step(loss_of(self.net, x))

        self.step = step

    def loop(self, rule: nn.Module) -> Tensor:
        return self.run(metaoptim.MetaLearned([self.net], rule, lr=0.1))

    def loop_outside(self) -> Tensor:
        return self.run(self.inner)

    def run(self, inner: metaoptim.MetaLearned, **options: Any) -> Tensor:
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(STEPS):
                inner.step(loss_of(self.net, t))
            return loss_of(self.net, STEPS)

    def by_steps(self) -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            for t in range(STEPS):
                self.step(t)
            return loss_of(self.net, STEPS)

    def forms(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "window": lambda: self.run(self.inner),
            "argument": lambda: self.compiled(self.rule),
            "outside": lambda: self.compiled_outside(),
            "steps": self.by_steps,
            "tape": lambda: self.run(self.inner, strategy="full_tape"),
        }

    def gradients(self, form: str) -> dict[str, Tensor | None]:
        self.rule.zero_grad()
        self.forms()[form]().backward()
        return {n: p.grad for n, p in self.rule.named_parameters()}


def _layers(w: World) -> None:
    w.rule.lin = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))  # pyright: ignore[reportAttributeAccessIssue]


def _values(w: World) -> None:
    with torch.no_grad():
        for t in (*w.rule.parameters(), w.rule.held):
            t.mul_(1.3)  # pyright: ignore[reportCallIssue]


def _another(w: World) -> None:
    w.rule = Rule()
    w.inner.param_groups[0]["rule"] = w.rule


def _hook(w: World) -> None:
    w.rule.lin.register_forward_hook(lambda module, args, out: 2 * out)


CHANGES: dict[str, Callable[[World], Any]] = {
    "weights and buffers": _values,
    "number": lambda w: setattr(w.rule, "number", 0.5),
    "settings": lambda w: setattr(w.rule.settings, "k", 0.5),
    "list": lambda w: w.rule.listed.__setitem__(0, 2.0),
    "mode": lambda w: w.rule.eval(),
    "layers": _layers,
    "parameter": lambda w: setattr(w.rule, "w", nn.Parameter(torch.tensor(0.2))),
    "buffer": lambda w: w.rule.register_buffer("held", torch.tensor(0.9)),
    "frozen": lambda w: w.rule.w.requires_grad_(False),
    "hook": _hook,
    "another rule": _another,
}


@pytest.mark.filterwarnings("ignore:.* has been recompiled")
@pytest.mark.parametrize("form", ["window", "argument", "outside", "steps"])
def test_a_changed_rule_is_seen(form: str) -> None:
    w = World()
    before = w.gradients(form)
    agree(before, w.gradients("tape"))
    for name, change in CHANGES.items():
        change(w)
        after = w.gradients("tape")
        assert name == "frozen" or any(
            a is None or b is None or a.shape != b.shape or not torch.allclose(a, b)
            for a, b in zip(before.values(), after.values(), strict=False)
        )
        agree(w.gradients(form), after)
        before = after


def test_values_alone_do_not_compile_again() -> None:
    w = World()
    for _ in range(3):
        w.gradients("argument")
        _values(w)
    assert len(w.compiled._specializations.known) == 1


@pytest.mark.parametrize("form", ["window", "argument"])
def test_a_change_between_the_steps_and_the_backward_is_not(form: str) -> None:
    w = World()
    expected = w.gradients("tape")
    w.rule.zero_grad()
    library.clear()  # the backward derives the step's graph only now
    loss = w.forms()[form]()
    w.rule.number, w.rule.settings.k, w.rule.listed[0] = 7.0, 8.0, 9.0
    w.rule.eval()
    loss.backward()
    agree({n: p.grad for n, p in w.rule.named_parameters()}, expected)


def test_equal_rules_share_their_steps() -> None:
    library.clear()
    first, second = World(), World()
    first.gradients("window")
    before = len(library.steps())
    _values(second)
    second.gradients("window")
    assert len(library.steps()) == before
    second.rule.number = 3.0
    second.gradients("window")
    assert len(library.steps()) == 2 * before
