"""The meta-gradient at a solution of the inner problem: a linear system in the place of a sweep over all steps."""

from __future__ import annotations

import random
from collections.abc import Container, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from metaoptim.compiler.ir.programs.calls import Assign, StepCall
from metaoptim.compiler.ir.step import Role
from metaoptim.errors import WindowError, warn

from ..sweep import Sweep, Tell

Vector = dict[int, Tensor]  # state index -> entry
_SOLVERS = ("neumann", "cg", "nystrom")


@dataclass
class Implicit:
    """Implicit differentiation: the meta-gradient of a loss at θ* = Υ(θ*, η), a fixed point of the inner step.

    dL/dη = (∂Υ/∂η)ᵀ u with (I - (∂Υ/∂θ)ᵀ) u = ∂L/∂θ*. Only the last step is kept, however long the loop, and θ₀ gets
    no gradient: a solution does not depend on it. Bias: that of the distance to the solution, and of the solver's
    residual; no variance, if every step sees all of the data (and besides that of the columns drawn for
    ``"nystrom"``). Cost: one pull-back through the last step for each iteration or column, and one more for ``"cg"``
    and ``"nystrom"``.

    Args:
        solver: ``"neumann"``: u = Σ_k ((∂Υ/∂θ)ᵀ)ᵏ ∂L/∂θ*, for any inner optimizer whose step contracts. ``"cg"``:
            conjugate gradients, in far fewer iterations, for plain gradient descent (`MetaSGD` without momentum and
            with one rate), of which the system is symmetric; it must be positive definite (a minimum). ``"nystrom"``,
            for the same: u = (A_K A_KK⁺ A_Kᵀ + ρI)⁻¹ ∂L/∂θ*, where A = I - (∂Υ/∂θ)ᵀ is the rate times the Hessian, and
            A_K are the columns of ``rank`` entries of θ drawn at random. No iteration follows another, so it can
            neither diverge nor stall; what lies outside of the columns' span is divided by ρ.
        iterations: most terms of the series, or iterations of the solver. Not for ``"nystrom"``.
        tolerance: the solve ends where its residual has become smaller, relative to ∂L/∂θ*; a warning says so where it
            has not. The residual of ``"nystrom"`` is that of the system without ρ, and seldom small.
        converged: a warning says so where the last step moved θ by more than this, relative to its norm.
        rank: of ``"nystrom"``: how many columns, at most as many as θ has entries. They are kept during the backward.
        rho: of ``"nystrom"``: ρ > 0, in units of A. The damping of the Hessian is ρ divided by the last step's rate.
        generator: of ``"nystrom"``: what the columns are drawn with, on the CPU; None is torch's own.

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
        Algorithms 2 and 3; Hataya & Yamada 2023, arXiv 2302.09726 (``"nystrom"``).
    """

    solver: Literal["neumann", "cg", "nystrom"] = "neumann"
    iterations: int = 100
    tolerance: float = 1e-5
    converged: float = 1e-3
    rank: int = 10
    rho: float = 0.01
    generator: torch.Generator | None = None
    residual: float | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.solver not in _SOLVERS:
            raise ValueError(f"solver: got {self.solver!r}, expected one of {', '.join(map(repr, _SOLVERS))}")
        for name in ("iterations", "tolerance", "converged", "rank", "rho"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a number above 0")

    def check_state(self, stateful: bool) -> None:
        """Raise for a step of an optimizer that has a state, where the system must be symmetric."""
        if stateful and self.solver != "neumann":
            raise WindowError(
                f"Implicit({self.solver!r}): the inner optimizer has a state, so the system is not symmetric; use "
                "Implicit('neumann'), or MetaSGD without momentum"
            )

    def check_real(self, parameters: Iterable[Tensor]) -> None:
        """Raise for complex parameters: the inner products here are those of real ones."""
        if any(p.is_complex() for p in parameters):
            raise WindowError("gradient=Implicit(...): a complex parameter; use gradient='exact'")

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
        self._outside: Vector = {}  # gradients of what no step moves: networks whose optimizers do not step
        self._untrained: Container[int] = ()

    def meta(self, key: Any, grad: Tensor) -> None:
        """Accumulate the gradient of a meta-parameter, where the cotangent is part of the solution."""
        if self._sums:
            super().meta(key, grad)

    def take(self, position: int, found: Iterable[tuple[Role, Any, Tensor]]) -> None:
        """Gradients have come out of the call at ``position``."""
        unknown: list[tuple[Role, Any, Tensor]] = []
        for role, index, grad in found:
            if role is Role.META or index not in self._untrained:
                unknown.append((role, index, grad))
            elif self._sums:
                self._outside[index] = self._outside[index] + grad if index in self._outside else grad
        super().take(position, unknown)

    def targets(
        self, program: Any, bottom: int, tell: Tell | None = None, untrained: Container[int] = ()
    ) -> Iterator[tuple[int, int]]:
        """The last step, once for each iteration."""
        self.arrive(self.position)
        self._untrained = untrained
        self._outside = {i: c for i, c in self.cotangents.items() if i in untrained}
        last = only_step(program, max(bottom, program.start), self.position)
        if last is not None:
            indices = set(program[last].writes)
            given = {i: c for i, c in self.cotangents.items() if i in indices}
            roles = {port.role for port in program[last].step.inputs}
            self.implicit.check_state(Role.OPT_STATE in roles)  # of a compiled step
            self.implicit.check_real(given.values())
            solve = {"neumann": self._series, "cg": self._conjugate, "nystrom": self._columns}
            yield from solve[self.implicit.solver](program[last], last, given)
        self.cotangents = self._outside  # no other gradient goes further back
        for position in range(self.position - 1, bottom - 1, -1):
            if isinstance(call := program[position], Assign):
                self._assigned(call, position, untrained)
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
            before, term = term, dict(self.cotangents)
            if norm and before is given and not _size({k: v - given.get(k, 0) for k, v in term.items()}):
                self._refuse_still()
            residual = _size(term) / norm if norm else 0.0
            if residual <= self.implicit.tolerance:
                break
        if not (residual < 1 or residual <= self.implicit.tolerance):
            raise WindowError(
                f"Implicit('neumann'): the series diverges, its last term is {residual:.1e} times its first: the last "
                "step does not contract here. Take a smaller rate in it, train further, or use gradient='exact'"
            )
        self._end(residual)

    def _image(self, call: StepCall, last: int, way: Vector) -> Generator[tuple[int, int], None, Vector]:
        """(I - (∂Υ/∂θ)ᵀ) ``way``."""
        yield from self._through(call, last, way, False)
        return self._minus_pulled(way)

    def _minus_pulled(self, way: Vector) -> Vector:
        return {k: v - self.cotangents[k] if k in self.cotangents else v for k, v in way.items()}

    def _conjugate(self, call: StepCall, last: int, given: Vector) -> Iterator[tuple[int, int]]:
        given = _whole(call, given)
        norm, solution = _size(given), {k: torch.zeros_like(v) for k, v in given.items()}
        rest, way = given, given
        squared = _dot(rest, rest)
        known: tuple[Vector, float] | None = None  # the last direction, to which the next image is orthogonal
        for _ in range(self.implicit.iterations):
            if squared**0.5 <= self.implicit.tolerance * norm:
                break
            image = yield from self._image(call, last, way)
            curvature = _dot(way, image)
            if known is not None and abs(_dot(known[0], image)) > 1e-2 * abs(known[1] * curvature) ** 0.5:
                self._refuse_asymmetry()
            if known is None and not curvature and not _size(image):
                self._refuse_still()
            known = way, curvature
            if not curvature > 0:
                self._refuse_curvature(curvature)
            length = squared / curvature
            solution = {k: v + length * way[k] for k, v in solution.items()}
            rest = {k: v - length * image[k] for k, v in rest.items()}
            before, squared = squared, _dot(rest, rest)
            way = {k: v + squared / before * way[k] for k, v in rest.items()}
        yield from self._through(call, last, solution, True)
        self._end(squared**0.5 / norm if norm else 0.0)

    def _columns(self, call: StepCall, last: int, given: Vector) -> Iterator[tuple[int, int]]:
        given = _whole(call, given)
        count = sum(v.numel() for v in given.values())
        seed = int(torch.randint(1 << 62, (), generator=self.implicit.generator))
        chosen = random.Random(seed).sample(range(count), min(self.implicit.rank, count))
        right = _flat(given)
        columns = right.new_empty(count, len(chosen))
        for k, entry in enumerate(chosen):
            unit = torch.zeros_like(right)
            unit[entry] = 1
            image = yield from self._image(call, last, _like(given, unit))
            columns[:, k] = _flat(image)
        if len(right) and not columns.any():
            self._refuse_still()
        solution = _like(given, self._damped(columns, columns[chosen], right))
        yield from self._through(call, last, solution, True)
        left, norm = self._minus_pulled(solution), _size(given)
        self._end(_size({k: v - left[k] for k, v in given.items()}) / norm if norm else 0.0)

    def _damped(self, columns: Tensor, inner: Tensor, right: Tensor) -> Tensor:
        """(C M⁺ Cᵀ + ρI)⁻¹ b of the ``columns`` C, the ``inner`` square M among them, and the right side b.

        With C = QR, and W Λ Wᵀ for R M⁺ Rᵀ: QW (Λ + ρ)⁻¹ (QW)ᵀ b + (b - QQᵀb) / ρ.
        """
        rho, rounding = self.implicit.rho, len(inner) * torch.finfo(right.dtype).eps
        if float((inner - inner.T).abs().max()) > 1e-2 * float(inner.abs().max()):
            self._refuse_asymmetry()
        basis, triangle = torch.linalg.qr(columns)
        # entries of I - (∂Υ/∂θ)ᵀ are as inexact as 1 is
        inverse = torch.linalg.pinv((inner + inner.T) / 2, atol=rounding, rtol=rounding, hermitian=True)
        values, vectors = torch.linalg.eigh(triangle @ inverse @ triangle.T)
        if not float(values.min()) > -rho:
            self._refuse_curvature(float(values.min()))
        basis = basis @ vectors
        outside = right - basis @ (basis.T @ right)
        outside = outside - basis @ (basis.T @ outside)  # what rounding has left would be divided by ρ
        return basis @ ((basis.T @ right) / (values + rho)) + outside / rho

    def _refuse_asymmetry(self) -> NoReturn:
        raise WindowError(
            f"Implicit({self.implicit.solver!r}): the system is not symmetric, as it is for MetaSGD with one rate, no "
            "momentum and no transforms alone; use Implicit('neumann')"
        )

    def _refuse_still(self) -> NoReturn:
        raise WindowError(
            f"Implicit({self.implicit.solver!r}): the last step leaves the parameters where they are, wherever that "
            "is, so it tells nothing of a solution: its rate was 0, or its loss does not depend on the parameters that "
            "the outer loss reads. Let the schedule end above 0, or use gradient='exact'"
        )

    def _refuse_curvature(self, curvature: float) -> NoReturn:
        raise WindowError(
            f"Implicit({self.implicit.solver!r}): the inner problem has the curvature {curvature:.1e} in some "
            "direction, so this is no minimum of it, or its step is none of plain MetaSGD (transforms, several "
            "rates); train further, add λ/2 |θ - θ₀|² to the inner loss, or use Implicit('neumann')"
        )

    def _end(self, residual: float) -> None:
        implicit = self.implicit
        implicit.residual = residual
        if not residual <= implicit.tolerance:
            work, advice = {
                "neumann": (
                    "iterations",
                    "iterations, or use 'cg' (plain MetaSGD) or a larger rate in the last step",
                ),
                "cg": ("iterations", "iterations"),
                "nystrom": (
                    "rank",
                    "rank, lower rho (it is compared with rate times curvature), raise the tolerance to what you "
                    "accept, or use 'cg'",
                ),
            }[implicit.solver]
            warn(
                f"the implicit gradient is not solved for: with {work}={getattr(implicit, work)} of "
                f"{implicit.solver!r} its residual is {residual:.1e} (tolerance={implicit.tolerance:g}); raise {advice}"
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


def _whole(call: StepCall, given: Vector) -> Vector:
    """``given`` with zeros for what else the step has made: the system couples all of it."""
    made = [(call.writes[k], call.step.outputs[k]) for k in call.step.cotangents]
    return {i: given[i] if i in given else port.spec.empty().zero_() for i, port in made if i >= 0}


def _flat(vector: Vector) -> Tensor:
    """All entries in one row."""
    first = next(iter(vector.values()))
    dtype = torch.promote_types(first.dtype, torch.float32)
    return torch.cat([v.reshape(-1).to(first.device, dtype) for v in vector.values()])


def _like(vector: Vector, row: Tensor) -> Vector:
    """A row's entries where those of ``vector`` lie."""
    parts = row.split([v.numel() for v in vector.values()])
    return {k: part.view(v.shape).to(v) for (k, v), part in zip(vector.items(), parts, strict=True)}


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((v.double() * b[k].double()).sum()) for k, v in a.items())


def _size(of: Vector) -> float:
    return _dot(of, of) ** 0.5


def _norm(of: Iterable[Tensor]) -> float:
    return sum(float(t.square().sum()) for t in of) ** 0.5
