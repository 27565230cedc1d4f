"""The meta-gradient at a solution of the inner problem: a linear system in the place of a sweep over all steps."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from metaoptim.compiler.ir.calls import StepCall
from metaoptim.compiler.ir.step import Role
from metaoptim.errors import WindowError, warn

from .sweep import Sweep, Tell

Vector = dict[int, Tensor]  # state index -> entry
_SOLVERS = ("neumann", "cg")


@dataclass
class Implicit:
    """Implicit differentiation: the meta-gradient of a loss at θ* = Υ(θ*, η), a fixed point of the inner step.

    dL/dη = (∂Υ/∂η)ᵀ u with (I - (∂Υ/∂θ)ᵀ) u = ∂L/∂θ*. Only the last step is kept, however long the loop, and θ₀ gets
    no gradient: a solution does not depend on it. Bias: that of the distance to the solution, and of the solver's
    residual; no variance, if every step sees all of the data. Cost: one pull-back through the last step for each
    iteration, and one more for ``"cg"``.

    Args:
        solver: ``"neumann"``: u = Σ_k ((∂Υ/∂θ)ᵀ)ᵏ ∂L/∂θ*, for any inner optimizer whose step contracts. ``"cg"``:
            conjugate gradients, in far fewer iterations, for plain gradient descent (`MetaSGD` without momentum and
            with one rate), of which the system is symmetric; it must be positive definite (a minimum).
        iterations: most terms of the series, or iterations of the solver.
        tolerance: the solve ends where its residual has become smaller, relative to ∂L/∂θ*; a warning says so where it
            has not.
        converged: a warning says so where the last step moved θ by more than this, relative to its norm.

    Attributes:
        residual: the relative residual of the last solve; None before the first.

    Raises:
        ValueError: for an unknown solver, or numbers that are not positive.

    Example:
        >>> net, decay = torch.nn.Linear(3, 1), torch.tensor(0.5, requires_grad=True)
        >>> x, y = torch.eye(3), torch.ones(3, 1)
        >>> inner = metaoptim.MetaSGD([net], lr=0.5)
        >>> with metaoptim.SlidingWindow(gradient=metaoptim.Implicit("cg")):
        ...     for t in range(200):
        ...         l2 = sum(p.square().sum() for p in net.parameters())
        ...         inner.step((net(x) - y).square().mean() + decay * l2)
        ...     (net(x) - y).square().sum().backward()
        >>> decay.grad.shape
        torch.Size([])

    References:
        Rajeswaran et al. 2019 (iMAML), arXiv 1909.04630, eq. 6; Lorraine, Vicol & Duvenaud 2020, arXiv 1911.02590,
        Algorithms 2 and 3.
    """

    solver: Literal["neumann", "cg"] = "neumann"
    iterations: int = 100
    tolerance: float = 1e-5
    converged: float = 1e-3
    residual: float | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.solver not in _SOLVERS:
            raise ValueError(f"solver: got {self.solver!r}, expected one of {', '.join(map(repr, _SOLVERS))}")
        for name in ("iterations", "tolerance", "converged"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a number above 0")

    def check(self, before: Iterable[Tensor], after: Iterable[Tensor]) -> None:
        """Warn if a step from ``before`` to ``after`` is not that of a solution."""
        pairs = [(a.double(), b.double()) for a, b in zip(before, after, strict=True)]
        moved = _norm(b - a for a, b in pairs) / max(_norm(b for _, b in pairs), 1e-300)
        if not moved <= self.converged:
            warn(
                f"the inner problem has not converged: its last step moved the parameters by {moved:.1e} of their norm "
                f"(converged={self.converged:g}), so the implicit gradient is not that of a solution; take more steps, "
                "or gradient='exact'"
            )


class SolutionSweep(Sweep):
    """Pulls cotangents back through the last step again and again, until the linear system is solved."""

    def __init__(self, implicit: Implicit) -> None:
        super().__init__()
        self.implicit = implicit
        self._sums = True  # whether gradients of meta-parameters count

    def meta(self, key: Any, grad: Tensor) -> None:
        """Accumulate the gradient of a meta-parameter, where the cotangent is part of the solution."""
        if self._sums:
            super().meta(key, grad)

    def take(self, position: int, found: Iterable[tuple[Role, Any, Tensor]]) -> None:
        """Gradients have come out of the call at ``position``."""
        found = list(found)
        if self.implicit.solver == "cg" and any(role is Role.OPT_STATE for role, _, _ in found):
            raise WindowError(
                "Implicit('cg'): the inner optimizer has a state, so the system is not symmetric; use "
                "Implicit('neumann'), or MetaSGD without momentum"
            )
        super().take(position, found)

    def targets(
        self, program: Any, bottom: int, tell: Tell | None = None, untrained: Container[int] = ()
    ) -> Iterator[tuple[int, int]]:
        """The last step, once for each iteration."""
        self.arrive(self.position)
        last = only_step(program, max(bottom, program.start), self.position)
        if last is not None:
            indices = set(program[last].writes)
            given = {i: c for i, c in self.cotangents.items() if i in indices}
            solve = self._series if self.implicit.solver == "neumann" else self._conjugate
            yield from solve(program[last], last, given)
        self.cotangents.clear()  # no gradient goes further back
        self.position = bottom

    def _through(
        self, call: StepCall, last: int, cotangents: Vector, sums: bool
    ) -> Iterator[tuple[int, int]]:
        """Pull back through the last step: `cotangents` has what comes out then."""
        self._sums, self.cotangents = sums, dict(cotangents)
        if self._receives(call, self.cotangents):
            yield last, last

    def _series(self, call: StepCall, last: int, given: Vector) -> Iterator[tuple[int, int]]:
        norm, residual, term = _size(given), 1.0, given
        for _ in range(self.implicit.iterations):
            yield from self._through(call, last, term, True)
            term = dict(self.cotangents)
            residual = _size(term) / norm if norm else 0.0
            if residual <= self.implicit.tolerance:
                break
        self._end(residual)

    def _conjugate(self, call: StepCall, last: int, given: Vector) -> Iterator[tuple[int, int]]:
        norm, solution = _size(given), {k: torch.zeros_like(v) for k, v in given.items()}
        rest, way = given, given
        squared = _dot(rest, rest)
        known: tuple[Vector, float] | None = None  # the last direction, to which the next image is orthogonal
        for _ in range(self.implicit.iterations):
            if squared**0.5 <= self.implicit.tolerance * norm:
                break
            yield from self._through(call, last, way, False)
            image = {k: v - self.cotangents[k] if k in self.cotangents else v for k, v in way.items()}
            curvature = _dot(way, image)
            if known is not None and abs(_dot(known[0], image)) > 1e-2 * abs(known[1] * curvature) ** 0.5:
                raise WindowError(
                    "Implicit('cg'): the system is not symmetric, as it is for MetaSGD with one rate, no momentum and "
                    "no transforms alone; use Implicit('neumann')"
                )
            known = way, curvature
            if not curvature > 0:
                raise WindowError(
                    f"Implicit('cg'): the inner problem has the curvature {curvature:.1e} in some direction, so this "
                    "is no minimum of it, its step is none of plain MetaSGD (transforms, several rates), or its last "
                    "rate was 0; use Implicit('neumann'), or train further"
                )
            length = squared / curvature
            solution = {k: v + length * way[k] for k, v in solution.items()}
            rest = {k: v - length * image[k] for k, v in rest.items()}
            before, squared = squared, _dot(rest, rest)
            way = {k: v + squared / before * way[k] for k, v in rest.items()}
        yield from self._through(call, last, solution, True)
        self._end(squared**0.5 / norm if norm else 0.0)

    def _end(self, residual: float) -> None:
        implicit = self.implicit
        implicit.residual = residual
        if not residual <= implicit.tolerance:
            warn(
                f"the implicit gradient is not solved for: after {implicit.iterations} iterations of "
                f"{implicit.solver!r} its residual is {residual:.1e} (tolerance={implicit.tolerance:g}); raise "
                "iterations"
                + (
                    ", or use 'cg' (plain MetaSGD) or a larger rate in the last step"
                    if implicit.solver == "neumann"
                    else ""
                )
            )


def only_step(program: Any, bottom: int, end: int) -> int | None:
    """The position of the step between two positions; None where there is none."""
    steps = [p for p in range(bottom, end) if isinstance(program[p], StepCall)]
    if len(steps) > 1 or (steps and program[steps[0]].back):
        raise WindowError(
            "an implicit gradient is that of one inner problem, but several optimizers step in this window; use one "
            "optimizer with several networks, or gradient='exact'"
        )
    return steps[0] if steps else None


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((v.double() * b[k].double()).sum()) for k, v in a.items())


def _size(of: Vector) -> float:
    return _dot(of, of) ** 0.5


def _norm(of: Iterable[Tensor]) -> float:
    return sum(float(t.square().sum()) for t in of) ** 0.5
