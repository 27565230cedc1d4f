"""Evolution strategies: a meta-gradient from inner loops that are run again with perturbed meta-parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.compiler.compat import disable_current_modes
from metaoptim.compiler.ir.programs.calls import Assign, StepCall
from metaoptim.compiler.ir.retention import check_count
from metaoptim.compiler.ir.tensors import TensorSpec, tensor_spec
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.compiler.lower.derivatives import loss_of
from metaoptim.errors import WindowError, warn

from ...states.slots import State
from ..engine import Engine
from ..interpreter import changed
from ..sweep import LOSS, Sweep

Key: TypeAlias = (
    Any  # the number of a meta-parameter, or the position and state index of a parameter that has entered
)
Shift: TypeAlias = dict[Key, Tensor]
Named: TypeAlias = dict[Any, Tensor]  # entries of a state by what they are to the user, whatever the window
_SIGNS = (1.0, -1.0)


@dataclass
class Evolution:
    """Evolution strategies: the meta-gradient of inner loops whose derivative is of no use (chaos, rounding, signs).

    The recorded steps are run again from the first state, 2N times, with the meta-parameters η ± σε_i in the place of
    η, ε_i ~ N(0, I), on the same data and random numbers. The gradient is 1/(2σN) Σ_i ε_i (f(η+σε_i) - f(η-σε_i)).

    What f is: for a loss that a step was taken by, the loss itself, at the perturbed parameters. The estimate is then
    unbiased for the derivative of E f(η+σε), the loss smoothed over distances of about σ. For any other outer loss L,
    whose graph is not the window's, f = ⟨v, θ_T⟩ with v = ∂L/∂θ_T at the unperturbed θ_T: the derivative of L there,
    times that of E θ_T(η+σε). The trajectory is smoothed, the outer loss is not. The bias, to the smoothed loss, is L's
    curvature times the spread of the perturbed θ_T, to first order; none where L is linear. Where the spread is large,
    as in chaos, let L be a loss that is stepped by.

    The variance falls as 1/N, grows with the number of entries of η, and in chaotic loops with 1/σ². One state is kept,
    whatever T. A backward costs 2NT steps, forward only, so losses without a second derivative do. What is perturbed is
    what steps read that requires grad: of ``lr=raw.exp()`` the rate, by σ, and of ``raw.exp() * loss`` in an inner loss
    ``raw``. Offline, the initial parameters are perturbed as well, and receive a gradient; for hyper-parameters alone
    an online window has less variance. The runs know values alone: what a step reads through ``detach`` or under
    ``no_grad`` counts as well.

    Args:
        sigma: σ > 0, the size of perturbations, in units of the meta-parameters.
        pairs: N, antithetic pairs of perturbed runs.
        generator: what the ε are drawn with, on the CPU; None is torch's own.
        persistent: online windows in sequence are unrolls of one long inner loop (PES): the perturbed runs go on from
            where their own last window has ended, as often as the window's networks begin as the last one left them (to
            the bit; otherwise anew), and their perturbations add up, so that short windows do not truncate. Every
            window runs its steps 2·pairs times, whether a backward asks for it or not.

    Raises:
        ValueError: for numbers that are not positive.

    Example:
        >>> net, log_lr = torch.nn.Linear(3, 1), torch.tensor(-2.0, requires_grad=True)
        >>> generator = torch.Generator().manual_seed(0)
        >>> with metaoptim.SlidingWindow(gradient=metaoptim.Evolution(sigma=0.1, pairs=8, generator=generator)):
        ...     inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
        ...     for t in range(10):
        ...         inner.step((net(torch.ones(1, 3)) - 1).square().sum())
        ...     (net(torch.ones(1, 3)) - 1).square().sum().backward()
        >>> log_lr.grad.shape
        torch.Size([])

    References:
        Salimans et al. 2017, arXiv 1703.03864, eq. 1; Metz et al. 2019, arXiv 1810.10180 (for unrolled optimization);
        Vicol, Metz & Sohl-Dickstein 2021, arXiv 2112.13835 (persistent).
    """

    sigma: float = 0.1
    pairs: int = 16
    generator: torch.Generator | None = None
    persistent: bool = False
    _left: _Left | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count("pairs", self.pairs)
        if not self.sigma > 0:
            raise ValueError(f"sigma: got {self.sigma!r}, expected a number above 0")
        if not isinstance(self.generator, (torch.Generator, type(None))):
            raise TypeError(
                f"generator: got {type(self.generator).__name__}, expected a torch.Generator or None, as in "
                "torch.Generator().manual_seed(0)"
            )


@dataclass
class _Pair:
    """Two runs of an inner loop, with opposite perturbations."""

    begun: tuple[Named, Named]  # what they go on from, of what the last window has left
    before: WeakIdKeyDictionary  # meta-parameter -> the sum of its perturbations in earlier windows
    noise: Shift = field(default_factory=dict[Key, Tensor])  # ε


@dataclass
class _Left:
    """What a persistent window has left: the unperturbed state, and the pairs."""

    state: Named
    pairs: list[_Pair]


class Particles:
    """The perturbed runs of one window.

    Args:
        evolution: the user's.
        name_of: what entries of the state are to the user, by state index.
    """

    def __init__(self, evolution: Evolution, name_of: Callable[[], dict[int, Any]]) -> None:
        self.evolution, self._name_of = evolution, name_of
        self.asked = False
        # layout, the id of the user's own parameter (0 for a meta-parameter), and the tensor if it is a leaf
        self._entered: dict[Key, tuple[TensorSpec, int, Tensor | None]] = {}
        self._pairs: list[_Pair] | None = None  # of a persistent window
        self._left: Named = {}  # the unperturbed state that the window before has left, if the pairs go on from theirs
        # number of a pair -> a position, and the states of its runs there
        self._ends: dict[int, tuple[int, tuple[State, State]]] = {}

    def enter(self, keys: Iterable[Key], tensors: Iterable[Tensor]) -> None:
        """Tensors enter the tape under keys."""
        for key, t in zip(keys, tensors, strict=True):
            if t.requires_grad:
                own = id(t) if isinstance(key, tuple) else 0
                self._entered[key] = tensor_spec(t), own, t if t.is_leaf else None

    def check(self, metas: list[Tensor]) -> None:
        """Raise for meta-parameters that cannot be perturbed, or not from window to window."""
        for t in metas:
            if t.is_complex():
                raise WindowError("gradient=Evolution(...): a complex tensor that requires grad")
            if self.evolution.persistent and not t.is_leaf:
                raise WindowError(
                    f"Evolution(persistent=True): a step reads a tensor of shape {tuple(t.shape)} that was computed "
                    "from others, and is another one in the next window; make it a leaf, or compute it in the loss"
                )

    def sweep(self) -> EvolutionSweep:
        """What cotangents of one backward come together in."""
        return EvolutionSweep(self)

    # -- runs ------------------------------------------------------------------------------------------------------

    def estimate(
        self, engine: Engine, pairs: list[_Pair], deposits: Mapping[int, list[tuple[int, Tensor]]]
    ) -> dict[Key, Tensor]:
        """The gradients of all that has entered, of the sum of ``deposits``: cotangents by position."""
        self.asked = True
        entered = {k: x for k, x in self._entered.items() if x[1] not in engine.closed}
        sums: dict[Key, Tensor] = {}
        for number, pair in enumerate(pairs):
            weight = self._difference(engine, number, pair, deposits) / (
                2 * self.evolution.sigma * len(pairs)
            )
            for key, (spec, _, leaf) in entered.items():
                noise = self._noise(pair, key, spec)
                if leaf is not None and leaf in pair.before:
                    noise = noise + pair.before[leaf]
                sums[key] = sums[key] + weight * noise if key in sums else weight * noise
        return sums

    def begin(self, engine: Engine) -> list[_Pair]:
        """The pairs for a backward: in a persistent window the same each time."""
        if self._pairs is not None:
            return self._pairs
        count, left = self.evolution.pairs, self.evolution._left
        pairs = [_Pair(({}, {}), WeakIdKeyDictionary()) for _ in range(count)]
        if self.evolution.persistent:
            self._pairs = pairs
            state = self._named(engine, engine.store[engine.store.base])
            if left is not None and len(left.pairs) == count and _same(state, left.state):
                self._pairs = pairs = [_Pair(p.begun, p.before) for p in left.pairs]
                self._left = left.state
        return pairs

    def _noise(self, pair: _Pair, key: Key, spec: TensorSpec) -> Tensor:
        if key not in pair.noise:
            drawn = torch.randn(
                spec.shape, dtype=spec.dtype, device="cpu", generator=self.evolution.generator
            )
            pair.noise[key] = drawn.to(spec.device)
        return pair.noise[key]

    def _difference(
        self, engine: Engine, number: int, pair: _Pair, deposits: Mapping[int, list[tuple[int, Tensor]]]
    ) -> float:
        """What f is in one run more than in the other."""
        top = engine.program.end if self.evolution.persistent else max(deposits)
        losses = {p: g for p, found in deposits.items() for index, g in found if index == LOSS}
        total = 0.0
        states: tuple[State, State] = ([], [])
        with disable_current_modes(), unaffected():
            runs = [self._run(engine, pair, k, top, losses) for k in range(2)]
            for (position, plus, loss_plus), (_, minus, loss_minus) in zip(*runs, strict=True):
                for index, cotangent in deposits.get(position, ()):
                    a, b = (loss_plus, loss_minus) if index == LOSS else (plus[index], minus[index])
                    assert isinstance(a, Tensor) and isinstance(b, Tensor)
                    total += float((cotangent.conj() * (a - b)).sum().real)
                states = plus, minus
        if self.evolution.persistent:
            self._ends[number] = top, states
        return total

    def _run(
        self, engine: Engine, pair: _Pair, which: int, top: int, losses: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, State, Tensor | None]]:
        """One run up to ``top``: each position, the state there, and the loss of the step before if it is wanted."""
        program, base, size = engine.program, engine.store.base, self.evolution.sigma * _SIGNS[which]
        shift = {
            k: size * self._noise(pair, k, x[0])
            for k, x in self._entered.items()
            if x[1] not in engine.closed
        }
        names, begun = self._name_of(), dict(pair.begun[which])

        first: dict[int, int] = {}  # state index of a parameter that is perturbed -> where it has entered
        for key in shift:
            if isinstance(key, tuple):
                first.setdefault(key[1], key[0])

        def value(position: int, index: int, given: Tensor) -> Tensor:
            """What is in the place of an entry that is set to ``given``."""
            if index in engine.untrained:  # written into, it is the leaf it was
                position = first.get(index, position)
            if (position, index) in shift:
                return given + shift[position, index]
            own = begun.pop(names.get(index), None)
            return given if own is None or not torch.equal(given, self._left[names[index]]) else own

        state = [value(first.get(i, base), i, t) for i, t in enumerate(engine.store[base])]
        yield base, state, None
        passed: dict[int, State] = {}
        for position in range(base, top):
            call, loss = program[position], None
            passed[position] = state
            if isinstance(call, Assign):
                found = [value(position, i, t) for i, t in zip(call.indices, call.values, strict=True)]
                state = changed(state, zip(call.indices, found, strict=True))
            else:
                assert isinstance(call, StepCall)
                operands = engine.operands(call, state, passed[position - call.back], position)
                for at_input, number in zip(call.step.metas, call.metas, strict=True):
                    if number in shift:
                        operands[at_input] = operands[at_input] + shift[number]
                if position + 1 in losses:
                    (loss,) = loss_of(call.step, operands, tensor_spec(losses[position + 1]))(*operands)
                results = engine._lowered(call, "replay", operands, position)(*operands)
                state = changed(state, zip(call.writes, results, strict=False))
            passed = {p: s for p, s in passed.items() if p > position - program.reach}
            yield position + 1, state, loss

    # -- from window to window -------------------------------------------------------------------------------------

    def _named(self, engine: Engine, state: State) -> Named:
        """A state's entries by name, but for those that are perturbed: these begin anew in every window."""
        learnt = {
            k[1] for k, x in self._entered.items() if isinstance(k, tuple) and x[1] not in engine.closed
        }
        names = self._name_of()
        return {names[i]: t for i, t in enumerate(state) if i in names and i not in learnt}

    def close(self, engine: Engine) -> None:
        """The window has ended: a persistent one leaves its runs to the next."""
        if not (self.evolution.persistent and engine.program.begun):
            return
        end, left = engine.program.end, list[_Pair]()
        for number, pair in enumerate(self.begin(engine)):
            if self._ends.get(number, (-1,))[0] != end:
                self._difference(engine, number, pair, {})
            before = WeakIdKeyDictionary(dict(pair.before.items()))
            for key, (spec, own, leaf) in self._entered.items():
                if leaf is not None and own not in engine.closed:
                    noise = self._noise(pair, key, spec)
                    before[leaf] = noise + before[leaf] if leaf in before else noise
            plus, minus = self._ends[number][1]
            left.append(_Pair((self._named(engine, plus), self._named(engine, minus)), before))
        state = {name: t.clone() for name, t in self._named(engine, engine.state).items()}
        self.evolution._left = _Left(state, left)


def _same(state: Named, left: Named) -> bool:
    """Whether an inner loop begins where the last one has ended, in all that it begins with."""
    known = [name for name in state if name in left]
    return bool(known) and all(torch.equal(state[name], left[name]) for name in known)


class EvolutionSweep(Sweep):
    """Keeps cotangents where they were deposited, and lets `Particles` estimate what they lead to."""

    def __init__(self, particles: Particles) -> None:
        super().__init__()
        self._particles, self._seen = particles, 0
        self._pairs: list[_Pair] = []

    def estimate(self, engine: Engine) -> None:
        """Find the gradients of all that has entered, unless they are known."""
        count = sum(map(len, self.deposits.values()))
        if count == self._seen:
            return
        self._seen, self._pairs = count, self._pairs or self._particles.begin(engine)
        for key, grad in self._particles.estimate(engine, self._pairs, self.deposits).items():
            if isinstance(key, tuple):
                self.adopted[key] = grad
            else:
                self.metas[key] = grad
            if not bool(grad.isfinite().all()):
                warn(
                    f"the evolution gradient is not finite: with sigma={self._particles.evolution.sigma:g} some of the "
                    "perturbed runs diverge. Take a smaller sigma (it is in units of what steps read: of lr=raw.exp() "
                    "the rate), or a smaller rate"
                )
