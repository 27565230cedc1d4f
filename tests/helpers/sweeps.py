"""Inner loops around one thing after the other - operators, modules - in every form, against a tape by hand.

A case is an inner loss of some samples. What forms do with it is counted by sample, and written into a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import metaoptim
from metaoptim.errors import MetaOptimError, ProgramError

FORMS = {
    "A": "a window",
    "B": "a compiled step inside a window",
    "C": "a compiled function with a plain `for`",
    "scan": "a compiled function with `window.scan`",
    "inductor": "C, compiled by inductor",
}
OUTCOMES = ("equal", "refused", "wrong", "crashed")
_BATCH = 12  # samples that share a loss
_LARGEST = 100_000  # numbers fed to a sample
_FACTORS = [1.0, 1.3, 0.8, 1.15, 0.9, 1.25, 0.7]  # by which steps differ; the last is the outer loss's
_STEPS = {"scan": 6}  # two in the others
# Of these torch says that they cannot be differentiated twice, and does it nevertheless.
_WRONG = [
    f"torch.nn.modules.linear_cross_entropy._linear_cross_entropy_batch_chunked{which}"
    for which in ("", "_no_reduction")
]


class Net(nn.Module):
    """The parameters that samples are fed from, and what has parameters of its own."""

    def __init__(self, inside: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.3, -0.5, 0.8]))
        self.inside = nn.ModuleList(inside)

    def forward(self, of: Callable[..., Tensor], *args: Any) -> Tensor:
        """``of`` this network: so `functional_call` can show it with other parameters."""
        return of(self, *args)


class Fed:
    """Arguments, all of whose differentiable tensors depend on parameters."""

    def __init__(self, args: tuple, kwargs: dict, reach: float = 1.0) -> None:
        leaves, self._spec = tree_flatten((args, kwargs))
        self._fed = [i for i, a in enumerate(leaves) if isinstance(a, Tensor) and a.requires_grad]
        self._given = [a.detach() if isinstance(a, Tensor) else a for a in leaves]
        fed = [self._given[i] for i in self._fed]
        size = sum(a.numel() for a in fed)
        self.any = size > 0
        self.suitable = size <= _LARGEST and all(
            a.dtype in (torch.float64, torch.complex128) and a.layout == torch.strided for a in fed
        )
        self._maps: list[Tensor] = []
        if self.suitable:
            sines = torch.sin(torch.arange(3.0 * size).view(-1, 3) * 1.7 + 0.4) * reach
            for a, part in zip(fed, sines.split([a.numel() for a in fed]), strict=True):
                self._maps.append(part * (0.05 * a.flatten() + 0.01).unsqueeze(1))
        self.begin()

    def begin(self) -> None:
        """Begin anew, with the arguments as they were."""
        self._leaves = [a.clone() if isinstance(a, Tensor) else a for a in self._given]

    def __call__(self, z: Tensor) -> tuple[tuple, dict]:
        """The arguments, by way of three numbers."""
        leaves = list(self._leaves)
        for i, m in zip(self._fed, self._maps, strict=True):
            leaves[i] = torch.addmv(leaves[i].flatten(), m, z.to(m.dtype)).view(leaves[i].shape)
        return tree_unflatten(leaves, self._spec)


class Sample(Protocol):
    """A call of what is tried."""

    arguments: Fed

    def inside(self) -> list[nn.Module]:
        """Modules whose parameters are inner parameters too, made anew."""
        ...

    def __call__(self, inside: Iterator[nn.Module], z: Tensor) -> Any:
        """What the call gives, by the next of the modules if it has one."""
        ...


S = TypeVar("S", bound=Sample)


class Case(Generic[S]):
    """An inner loss of some samples, which depend on parameters and on a meta-parameter."""

    def __init__(self, samples: list[S]) -> None:
        self.samples = samples
        self.weights: dict[int, Tensor] = {}

    def begin(self) -> Net:
        """Begin anew: with a network, the samples as they were, and the random numbers."""
        torch.manual_seed(5)
        for sample in self.samples:
            sample.arguments.begin()
        return Net(module for sample in self.samples for module in sample.inside())

    def loss(self, net: Any, scale: Tensor, factor: Tensor) -> Tensor:
        """A scalar of what the samples give."""
        z = net.p * scale
        total = torch.dot(z, z)
        modules = iter(net.inside)
        for sample in self.samples:
            for out in tree_leaves(sample(modules, z)):
                if isinstance(out, Tensor) and out.requires_grad and out.numel():
                    out = torch.view_as_real(out.resolve_conj()) if out.is_complex() else out
                    total = total + torch.dot(out.double().asinh().flatten(), self._weight(out.numel()))
        return total * factor

    def _weight(self, size: int) -> Tensor:
        if size not in self.weights:
            self.weights[size] = torch.linspace(0.5, 1.5, size + 1)[1:]
        return self.weights[size]


class Leaves:
    """What is differentiated by, made anew."""

    def __init__(self, case: Case) -> None:
        self.net = case.begin()
        self.scale, self.lr = (torch.tensor(v, requires_grad=True) for v in (1.2, 0.02))
        self.factors = [torch.tensor(f) for f in _FACTORS]

    def all(self) -> list[Tensor]:
        return [*self.net.parameters(), self.scale, self.lr]


def tape(case: Case, form: str) -> list[Tensor] | None:
    """The gradients by a plain tape, or None where it has none that are worth a comparison.

    Attention is taken apart for it: the fused kernels have no second derivative. A loss in chunks gives a wrong one.
    """
    given = Leaves(case)
    theta = {name: p * 1 for name, p in given.net.named_parameters()}
    try:
        with sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
            for name in _WRONG:
                stack.enter_context(patch(name, side_effect=NotImplementedError, create=True))
            for factor in given.factors[: _STEPS.get(form, 2)]:
                loss = functional_call(given.net, theta, (case.loss, given.scale, factor))
                gs = torch.autograd.grad(loss, [*theta.values()], create_graph=True, allow_unused=True)
                theta = {
                    n: v if g is None else v - given.lr * g
                    for (n, v), g in zip(theta.items(), gs, strict=True)
                }
            outer = functional_call(given.net, theta, (case.loss, given.scale, given.factors[-1]))
            found = torch.autograd.grad(outer, given.all(), allow_unused=True, materialize_grads=True)
    except Exception:  # whatever it is, eager PyTorch cannot do this
        return None
    return list(found) if case.weights and all(g.isfinite().all() for g in found) else None


# -- the forms --------------------------------------------------------------------------------------------------------


def _form_a(case: Case, given: Leaves) -> None:
    inner = metaoptim.MetaSGD([given.net], lr=given.lr)
    with metaoptim.SlidingWindow(offline=True, slots=1):
        for factor in given.factors[:2]:
            inner.step(case.loss(given.net, given.scale, factor), allow_unused=True)
        case.loss(given.net, given.scale, given.factors[-1]).backward()


def _form_b(case: Case, given: Leaves) -> None:
    inner = metaoptim.MetaSGD([given.net], lr=given.lr)

    @metaoptim.compile(backend="eager")
    def step(factor: Tensor, scale: Tensor) -> None:
        inner.step(case.loss(given.net, scale, factor), allow_unused=True)

    with metaoptim.SlidingWindow(offline=True, slots=1):
        for factor in given.factors[:2]:
            step(factor, given.scale)
        case.loss(given.net, given.scale, given.factors[-1]).backward()


def _form_c(case: Case, given: Leaves, backend: str = "eager") -> None:
    @metaoptim.compile(backend=backend, slots=1)
    def outer(net: Net, scale: Tensor, lr: Tensor, factors: list[Tensor]) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True):
            for factor in factors[:2]:
                inner.step(case.loss(net, scale, factor), allow_unused=True)
            return case.loss(net, scale, factors[-1])

    outer(given.net, given.scale, given.lr, given.factors).backward()


def _by_inductor(case: Case, given: Leaves) -> None:
    _form_c(case, given, "inductor")


def _scan(case: Case, given: Leaves) -> None:
    @metaoptim.compile(backend="eager", slots=1)
    def outer(net: Net, scale: Tensor, lr: Tensor, factors: Tensor, last: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True) as window:
            for factor in window.scan(factors):
                inner.step(case.loss(net, scale, factor), allow_unused=True)
            return case.loss(net, scale, last)

    *steps, last = given.factors
    outer(given.net, given.scale, given.lr, torch.stack(steps), last).backward()


_RUN = {"A": _form_a, "B": _form_b, "C": _form_c, "scan": _scan, "inductor": _by_inductor}


def in_form(form: str, case: Case, expected: list[Tensor]) -> tuple[str, str]:
    """What ``form`` does with ``case``: one of `OUTCOMES`, and why or by how much."""
    given = Leaves(case)
    try:
        _RUN[form](case, given)
    except ProgramError as error:
        return "crashed", f"{type(error).__name__}: {error}"
    except MetaOptimError as error:
        return "refused", error.reason
    except Exception as error:  # any other is not what a user should see
        return "crashed", f"{type(error).__name__}: {error}"
    scale = max(float(e.abs().max()) for e in expected if e.numel())
    for t, e in zip(given.all(), expected, strict=True):
        off = t.grad - e if t.grad is not None else e
        worst, size = (float(v.abs().max()) if v.numel() else 0.0 for v in (off, e))
        if not worst <= 1e-8 * size + 1e-12 * scale:
            return "wrong", f"off by {worst:.2g} of {size:.2g}"
    return "equal", ""


# -- what is found ----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a form does with the samples of an entry: how many by outcome; why, and in how many."""

    name: str
    form: str
    counts: Counter[str]
    reasons: Counter[tuple[str, str]]

    def bad(self) -> list[str]:
        """What is wrong or crashes."""
        return [
            f"{self.name} {self.form}: {n} {what}: {why}"
            for (what, why), n in self.reasons.items()
            if what in ("wrong", "crashed")
        ]

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in self.counts.items())
        reasons = "".join(
            f"\n    {n} {what}: {' '.join(why.split())}" for (what, why), n in self.reasons.items()
        )
        return f"{self.name:44} {self.form:8} {counts}{reasons}"


def compared(tries: Iterable[Iterable[S]], most: int | None = None) -> tuple[list[S], int]:
    """The samples that a plain tape can differentiate twice, the first of its tries each; and how many it cannot."""
    taken: list[S] = []
    eager_cannot = 0
    for samples in tries:
        if len(taken) == most:
            break
        fits = (s for s in samples if s.arguments.suitable and tape(Case([s]), "A") is not None)
        sample = next(fits, None)
        if sample is None:
            eager_cannot += 1
        else:
            taken.append(sample)
    return taken, eager_cannot


def found_of(name: str, samples: list[S], forms: Iterable[str]) -> Iterator[Found]:
    """What forms do with samples, some of which share a loss; each alone, where together they are not equal."""
    batches = [samples[at : at + _BATCH] for at in range(0, len(samples), _BATCH)]
    for form in forms:
        found = Found(name, form, Counter(), Counter())
        for batch in batches:
            case = Case(batch)
            expected = tape(case, form)
            what, why = ("", "") if expected is None else in_form(form, case, expected)
            said = [(what, why)] * (len(batch) if what else 0)
            if what != "equal" and (len(batch) > 1 or not what):
                alone = [(c, e) for c in (Case([s]) for s in batch) if (e := tape(c, form)) is not None]
                each = [in_form(form, c, e) for c, e in alone]
                if not what or any(other != "equal" for other, _ in each):
                    said = each
            found.counts.update(what for what, _ in said)
            found.reasons.update((what, why) for what, why in said if what != "equal")
        yield found
