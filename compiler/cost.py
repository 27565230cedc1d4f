"""What a meta-gradient costs, as formulas in the number of inner steps T and of slots c."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import sympy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .differentiate import cotangent_outputs
from .ir import Lowering, StepGraph
from .lower import derived, replayed

T, c, r = sympy.symbols("T c r", integer=True, positive=True)


@dataclass(frozen=True)
class CostModel:
    """Bytes and operations of one meta-gradient through T inner steps with c slots.

    peak = K + c·S + T·B; extra forwards = r·(T + 1) − C(c + r, c + 1) − T with the least r for which
    T + 1 ≤ C(c + r, c) (Griewank & Walther 2000, "Algorithm 799: Revolve"); operations = (T + extra)·F + T·V.

    Attributes:
        fixed_bytes: K, with one step's derivative (A) and the states it works on in it.
        state_bytes: S, of a kept state.
        step_bytes: B, what every further step adds: gradients of the data, where it has some.
        forward_flops, vjp_flops: F and V, floating point operations of matrix products and convolutions in a step and
            in its derivative.
    """

    fixed_bytes: int
    state_bytes: int
    step_bytes: int
    forward_flops: int
    vjp_flops: int

    @property
    def peak(self) -> sympy.Expr:
        """Peak bytes, in T and c; c = T keeps every state."""
        return self.fixed_bytes + self.state_bytes * sympy.Min(c, T) + self.step_bytes * T

    @property
    def extra_forwards(self) -> sympy.Expr:
        """Steps run a second time, in T, c and r."""
        return r * (T + 1) - sympy.binomial(c + r, c + 1) - T

    @property
    def flops(self) -> sympy.Expr:
        """Operations in all, in T, c and r."""
        return (T + self.extra_forwards) * self.forward_flops + T * self.vjp_flops

    def at(self, horizon: int, slots: int) -> dict[str, int]:
        """The formulas' values.

        Args:
            horizon: T.
            slots: c, at most T.

        Returns:
            ``peak_bytes``, ``extra_forwards`` and ``flops``.
        """
        values: dict[Any, int] = {T: horizon, c: slots, r: _repeats(horizon + 1, slots)}
        names = {"peak_bytes": self.peak, "extra_forwards": self.extra_forwards, "flops": self.flops}
        exact = {"binomial": comb, "Min": min}  # sympy's own are slow for large numbers
        return {
            name: sympy.lambdify([*values], formula, exact)(*values.values())
            for name, formula in names.items()
        }

    def slots(self, horizon: int, budget: int) -> int:
        """The most slots with which T steps stay within ``budget`` bytes; 0 if there are none."""
        room = budget - self.fixed_bytes - self.step_bytes * horizon
        return max(0, min(room // self.state_bytes, horizon)) if self.state_bytes else horizon * (room >= 0)

    def minimum(self, horizon: int) -> int:
        """The smallest budget for T steps, in bytes."""
        return self.at(horizon, 1)["peak_bytes"]


def _repeats(states: int, slots: int) -> int:
    found, reach = 0, 1
    while reach < states:
        found += 1
        reach = reach * (slots + found) // found
    return found


def step_flops(step: StepGraph, how: Lowering) -> tuple[int, int]:
    """Operations of a step and of its derivative, as torch counts them: matrix products, convolutions, attention."""
    counts = []
    for graph, extra in ((replayed(step), []), (derived(step, how.hvp), cotangent_outputs(step))):
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            graph(*[p.empty() for p in step.inputs], *[step.outputs[i].empty() for i in extra])
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]
