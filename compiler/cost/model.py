"""What a meta-gradient costs, as formulas in the number of inner steps T and of slots c."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from fractions import Fraction
from math import comb, floor
from typing import Any

import sympy
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from metaoptim.compiler.compat import FakeTensorMode

from ..ir.step import FlatGraph, Lowering, StepGraph
from ..lower.derivatives import derived, replayed, residuals

T, c, r, W = sympy.symbols("T c r W", integer=True, positive=True)
n = sympy.Symbol("n", integer=True, nonnegative=True)
K, A, S, B, R, E, D = sympy.symbols("K A S B R E D", nonnegative=True)
F, V, H = sympy.symbols("F V H", nonnegative=True)
_EXACT = {"binomial": comb, "Min": min, "floor": floor}  # sympy's own are slow for large numbers

SIZES = {  # what they are
    K: "whatever the plan",
    A: "a step's derivative",
    S: "a state",
    B: "gradients, and copies, of what is learnt that each step adds",
    R: "a call's residuals",
    E: "residuals of what comes before and after",
    D: "with a tier",
    F: "operations of a step",
    V: "operations of its derivative",
    H: "operations that residuals save",
}


@dataclass(frozen=True)
class CostModel:
    """Bytes and operations of one meta-gradient through T inner steps with c slots.

    With N = T, or min(T, W) where gradients are truncated:

    * peak = K + A + c·S + T·B, where c = N keeps every state; and E + n·R where residuals are saved over the last n
      steps, or D where states go to a lower tier;
    * extra forwards = r·(N + 1) − C(c + r, c + 1) − N with the least r for which N + 1 ≤ C(c + r, c) (Griewank &
      Walther 2000, "Algorithm 799: Revolve"); with a tier (c − 1)·⌊(N − 1)/(c + 1)⌋ + ⌊N/(c + 1)⌋;
    * offloaded = S·⌊(N − 1)/(c + 1)⌋;
    * operations = (T + extra forwards)·F + N·V − n·H; a state that goes down and comes up counts as a step.

    T, W and n count calls of step graphs: inner steps, and what comes before and after them.
    """

    fixed_bytes: int  # K, what there is besides: the states that a derivative works on, gradients, copies
    transient_bytes: int  # A, most that one step's derivative allocates
    state_bytes: int  # S, of a kept state
    step_bytes: int  # B, what every further step adds: gradients of the data, where it has some
    forward_flops: int | Fraction  # F, floating point operations of products and convolutions in a step
    vjp_flops: int | Fraction  # V, those in its derivative
    residual_bytes: int = 0  # R, of one step's residuals
    residual_fixed_bytes: int = 0  # E, what those of the calls after the steps take more, and saving any
    saved_flops: int | Fraction = 0  # H, what residuals save of a step and its derivative
    tier_bytes: int = 0  # D, of states on their way to the tier and back
    window: int | None = None  # W; None for no truncation

    @property
    def sizes(self) -> dict[Any, Any]:
        """What the symbols that are no counts stand for: ``peak.subs(sizes)`` is in T and c."""
        return dict(zip((K, A, S, B, F, V, R, E, H, D), astuple(self)))

    @property
    def swept(self) -> sympy.Expr:
        """N, how many steps a backward goes back over."""
        return T if self.window is None else sympy.Min(T, W)

    @property
    def peak(self) -> sympy.Expr:
        """Peak bytes; c = N keeps every state."""
        return K + A + S * sympy.Min(c, self.swept) + B * T

    @property
    def peak_with_residuals(self) -> sympy.Expr:
        """Peak bytes with every state kept, and residuals of n ≥ 1 steps."""
        return K + A + S * self.swept + B * T + E + R * n

    @property
    def peak_with_tier(self) -> sympy.Expr:
        """Peak bytes of the device where other states go to a lower tier."""
        return self.peak + D

    @property
    def extra_forwards(self) -> sympy.Expr:
        """Steps run a second time, in T, c and r."""
        return r * (self.swept + 1) - sympy.binomial(c + r, c + 1) - self.swept

    @property
    def extra_forwards_with_tier(self) -> sympy.Expr:
        """Steps run a second time where other states go to a lower tier."""
        whole = sympy.floor((self.swept - 1) / (c + 1))
        return (c - 1) * whole + sympy.floor(self.swept / (c + 1))

    @property
    def offloaded(self) -> sympy.Expr:
        """Bytes that go to the tier then, and come back."""
        return S * sympy.floor((self.swept - 1) / (c + 1))

    @property
    def flops(self) -> sympy.Expr:
        """Operations in all, in T, c, r and n."""
        return (T + self.extra_forwards) * F + self.swept * V - n * H

    @property
    def flops_with_tier(self) -> sympy.Expr:
        """Operations with a tier; a state that goes down and comes up counts as a step."""
        return (T + self.extra_forwards_with_tier + self.offloaded / S) * F + self.swept * V

    def at(self, horizon: int, slots: int, saved: int = 0, tiered: bool = False) -> dict[str, int]:
        """The values of the formulas.

        Args:
            horizon: T.
            slots: c, at most N.
            saved: n, with c = N.
            tiered: whether other states go to a lower tier.

        Returns:
            ``peak_bytes``, ``extra_forwards``, ``offloaded_bytes`` and ``flops``.
        """
        window = horizon if self.window is None else self.window
        counts = {T: horizon, W: window, c: slots, n: saved, r: _repeats(min(horizon, window) + 1, slots)}
        peak = self.peak_with_residuals if saved else self.peak
        formulas = {
            "peak_bytes": self.peak_with_tier if tiered else peak,
            "extra_forwards": self.extra_forwards_with_tier if tiered else self.extra_forwards,
            "offloaded_bytes": self.offloaded if tiered else sympy.Integer(0),
            "flops": self.flops_with_tier if tiered else self.flops,
        }
        values: dict[Any, Any] = {**counts, **self.sizes}
        return {
            name: int(sympy.lambdify([*values], formula, _EXACT)(*values.values()))
            for name, formula in formulas.items()
        }


def _repeats(states: int, slots: int) -> int:
    """The least r for which ``states`` ≤ C(slots + r, slots)."""
    found, reach = 0, 1
    while reach < states:
        found += 1
        reach = reach * (slots + found) // found
    return found


def step_flops(step: StepGraph, lowering: Lowering) -> tuple[int, int, int]:
    """Operations of a step, of its derivative, and how many of both residuals save.

    As torch counts them: matrix products, convolutions, attention.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [p.spec.empty() for p in step.inputs]
        cotangents = [step.outputs[i].spec.empty() for i in step.cotangents]
        _, replay = _counted(replayed(step), given)
        _, vjp = _counted(derived(step, lowering.hvp), [*given, *cotangents])
        divided = residuals(step, lowering.hvp)
        if divided is None:
            return replay, vjp, 0
        made, forward = _counted(divided.forward, given)
        kept = [made[i] for i in divided.residuals]
        _, backward = _counted(divided.backward, [*given, *kept, *cotangents])
    return replay, vjp, max(0, replay + vjp - forward - backward)


def _counted(graph: FlatGraph, inputs: Sequence[Tensor]) -> tuple[Sequence[Any], int]:
    with FlopCounterMode(display=False) as counter:
        results = graph(*inputs)
    return results, counter.get_total_flops()
