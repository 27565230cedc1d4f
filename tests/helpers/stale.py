"""Losses that read what changes between the calls of a compiled function, and what their windows give."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import full_tape
from oracle import agree

X, Y = torch.linspace(-1, 1, 15).view(5, 3), torch.linspace(0, 1, 10).view(5, 2)


class Case:
    """A loss, and what changes of what it reads: subclasses say."""

    settings: Any = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.inner: Any = metaoptim.MetaSGD([self.net], lr=0.1, momentum=0.5)
        self.set_up()

    def set_up(self) -> None:
        """Make the rest."""

    def loss(self, x: Tensor) -> Tensor:
        """The inner loss."""
        return F.mse_loss(self.net(x), Y) * self.factor()

    def factor(self) -> Any:
        """What it is multiplied by."""
        return 1.0

    def change(self) -> None:
        """What happens between two calls."""


@dataclasses.dataclass
class Settings:
    k: float = 1.0
    square: bool = False
    name: str = "mean"
    rates: list = dataclasses.field(default_factory=lambda: [1.0, 2.0])
    inner: Any = None

    @property
    def doubled(self) -> float:
        return 2 * self.k


def gradients(made: Case, form: str, eta: Tensor, calls: int) -> list[dict[str, Any]]:
    """What each window gives: two steps, a change, two steps (form B), or a whole function and a change (C)."""

    def step() -> None:
        made.inner.step(made.loss(X) * eta)

    def whole(window: Any) -> Tensor:
        with window(offline=True):
            step()
            step()
            return F.mse_loss(made.net(X), Y)

    def steps(window: Any, step: Callable[[], None]) -> Tensor:
        with window(offline=True):
            for k in range(4):
                step()
                if k == 1 and not hasattr(made, "between"):
                    made.change()
            return F.mse_loss(made.net(X), Y)

    compiled = metaoptim.compile(step if form[0] == "B" else whole, backend="eager")
    found = []
    for _ in range(calls):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*has been recompiled 8 times")
            if form == "C":
                outer = compiled(metaoptim.SlidingWindow)
            elif form == "C tape":
                outer = whole(full_tape)
            else:
                window, take = (full_tape, step) if "tape" in form else (metaoptim.SlidingWindow, compiled)
                outer = steps(window, take)
        leaves = {"eta": eta, **dict(made.net.named_parameters())}
        found.append(dict(zip(leaves, torch.autograd.grad(outer, list(leaves.values())), strict=True)))
        found[-1]["outer"] = outer.detach()
        made.change()
    return found


def nothing_is_frozen(case: type[Case], form: str) -> None:
    """Every call of a compiled function, or step, gives what the tape does."""
    eta = torch.tensor(0.5, requires_grad=True)
    calls = 2 if form == "B" else 4
    expected = gradients(case(), f"{form} tape", eta, calls)
    for got, want in zip(gradients(case(), form, eta, calls), expected, strict=True):
        agree(got, want, rtol=1e-9)
    assert not torch.allclose(expected[0]["outer"], expected[-1]["outer"], rtol=1e-6)


def loss_after_a_step(self: Case, x: Tensor) -> Tensor:
    """An outer loss."""
    with metaoptim.SlidingWindow(offline=True):
        self.inner.step(self.loss(x))
        return self.loss(x)
