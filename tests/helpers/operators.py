"""PyTorch's own operator database, operator by operator, inside an inner loop, in every form, against a tape by hand.

``python tests/helpers/operators.py`` goes through all of them and writes docs/operators.md; with names, it
prints what it finds of these.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.testing._internal import common_methods_invocations as database
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import metaoptim
from metaoptim.errors import MetaOptimError, ProgramError

# It seeds random operators at each call, which compiled functions refuse; here they draw one after the other.
database.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
OPS: dict[str, list[Any]] = {}  # name -> its entries in the database
for _op in database.op_db:
    if _op.supports_autograd and _op.supports_gradgrad and torch.float64 in _op.supported_dtypes("cpu"):
        OPS.setdefault(_op.name, []).append(_op)

FORMS = {
    "A": "a window",
    "B": "a compiled step inside a window",
    "C": "a compiled function with a plain `for`",
    "scan": "a compiled function with `window.scan`",
}
TABLE = Path(__file__).parents[2] / "docs" / "operators.md"
SAMPLES = 3  # of every entry, which make up one loss
SHARE = 24  # tests take every so manieth operator by default,
_SCANNED = 4  # and every so manieth is also tried in a scan
_TRIED = 40  # samples among which these are looked for
_LARGEST = 20_000  # numbers fed to an operator
_FACTORS = [1.0, 1.3, 0.8, 1.15, 0.9, 1.25, 0.7]  # by which steps differ; the last is the outer loss's
_STEPS = {"A": 2, "B": 2, "C": 2, "scan": 6}


class Net(nn.Module):
    """The parameters that operators are fed from."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.3, -0.5, 0.8]))


class Sample:
    """A call of an operator, all of whose differentiable inputs depend on parameters."""

    def __init__(self, op: Callable, sample: Any, reach: float = 1.0) -> None:
        self.op = op
        leaves, self.spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        self.fed = [i for i, a in enumerate(leaves) if isinstance(a, Tensor) and a.requires_grad]
        self.given = [a.detach() if isinstance(a, Tensor) else a for a in leaves]
        self.leaves = self.given
        fed = [self.given[i] for i in self.fed]
        size = sum(a.numel() for a in fed)
        self.suitable = 0 < size <= _LARGEST and all(
            a.dtype == torch.float64 and a.layout == torch.strided for a in fed
        )
        self.maps: list[Tensor] = []
        if self.suitable:
            sines = torch.sin(torch.arange(3.0 * size).view(-1, 3) * 1.7 + 0.4) * reach
            for a, part in zip(fed, sines.split([a.numel() for a in fed]), strict=True):
                self.maps.append(part * (0.05 * a.flatten() + 0.01).unsqueeze(1))

    def __call__(self, z: Tensor) -> list[Tensor]:
        """What the operator gives."""
        leaves = list(self.leaves)
        for i, m in zip(self.fed, self.maps, strict=True):
            leaves[i] = torch.addmv(leaves[i].flatten(), m, z).view(leaves[i].shape)
        given, args, kwargs = tree_unflatten(leaves, self.spec)
        outputs = tree_leaves(self.op(given, *args, **kwargs))
        return [out for out in outputs if isinstance(out, Tensor) and out.requires_grad and out.numel()]


class Case:
    """An inner loss of some samples, which depend on parameters and on a meta-parameter."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples
        self.weights: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Begin anew: with the samples as they were, and the random numbers."""
        for sample in self.samples:
            sample.leaves = [a.clone() if isinstance(a, Tensor) else a for a in sample.given]
        torch.manual_seed(5)

    def loss(self, net: Any, scale: Tensor, factor: Tensor) -> Tensor:
        """A scalar of what the operator gives."""
        z = net.p * scale
        total = torch.dot(z, z)
        for out in [out for sample in self.samples for out in sample(z)]:
            out = torch.view_as_real(out.resolve_conj()) if out.is_complex() else out
            total = total + torch.dot(out.double().asinh().flatten(), self._weight(out.numel()))
        return total * factor

    def _weight(self, size: int) -> Tensor:
        if size not in self.weights:
            self.weights[size] = torch.linspace(0.5, 1.5, size + 1)[1:]
        return self.weights[size]


class Leaves:
    """What is differentiated by, made anew."""

    def __init__(self) -> None:
        self.net = Net()
        self.scale, self.lr = (torch.tensor(v, requires_grad=True) for v in (1.2, 0.02))
        self.factors = [torch.tensor(f) for f in _FACTORS]

    def all(self) -> list[Tensor]:
        return [self.net.p, self.scale, self.lr]


def tape(case: Case, steps: int) -> list[Tensor] | None:
    """The gradients by a plain tape, or None where it has none that are worth a comparison."""
    given = Leaves()
    shown = Net()
    del shown.p
    shown.p = given.net.p * 1  # type: ignore[assignment]
    try:
        case.begin()
        for factor in given.factors[:steps]:
            loss = case.loss(shown, given.scale, factor)
            (g,) = torch.autograd.grad(loss, shown.p, create_graph=True)
            shown.p = shown.p - given.lr * g  # type: ignore[assignment]
        outer = case.loss(shown, given.scale, given.factors[-1])
        found = torch.autograd.grad(outer, given.all())
    except Exception:  # whatever it is, eager PyTorch cannot do this
        return None
    return list(found) if case.weights and all(g.isfinite().all() for g in found) else None


def _form_a(case: Case, given: Leaves) -> None:
    inner = metaoptim.MetaSGD([given.net], lr=given.lr)
    with metaoptim.SlidingWindow(offline=True, slots=1):
        for factor in given.factors[:2]:
            inner.step(case.loss(given.net, given.scale, factor))
        case.loss(given.net, given.scale, given.factors[-1]).backward()


def _form_b(case: Case, given: Leaves) -> None:
    inner = metaoptim.MetaSGD([given.net], lr=given.lr)

    @metaoptim.compile(backend="eager")
    def step(factor: Tensor, scale: Tensor) -> None:
        inner.step(case.loss(given.net, scale, factor))

    with metaoptim.SlidingWindow(offline=True, slots=1):
        for factor in given.factors[:2]:
            step(factor, given.scale)
        case.loss(given.net, given.scale, given.factors[-1]).backward()


def _form_c(case: Case, given: Leaves) -> None:
    @metaoptim.compile(backend="eager", slots=1)
    def outer(net: Net, scale: Tensor, lr: Tensor, factors: list[Tensor]) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True):
            for factor in factors[:2]:
                inner.step(case.loss(net, scale, factor))
            return case.loss(net, scale, factors[-1])

    outer(given.net, given.scale, given.lr, given.factors).backward()


def _scan(case: Case, given: Leaves) -> None:
    @metaoptim.compile(backend="eager", slots=1)
    def outer(net: Net, scale: Tensor, lr: Tensor, factors: Tensor, last: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True) as window:
            for factor in window.scan(factors):
                inner.step(case.loss(net, scale, factor))
            return case.loss(net, scale, last)

    *steps, last = given.factors
    outer(given.net, given.scale, given.lr, torch.stack(steps), last).backward()


_RUN = {"A": _form_a, "B": _form_b, "C": _form_c, "scan": _scan}


class Found(NamedTuple):
    """What a form does with an operator: "equal", "refused", "wrong" or "crashed", and why or by how much."""

    name: str
    form: str
    outcome: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name:44} {self.form:5} {self.outcome:8} {' '.join(self.why.split())}".rstrip()


def in_form(name: str, form: str, case: Case, expected: list[Tensor]) -> Found:
    """What ``form`` does with ``case``."""
    given = Leaves()
    case.begin()
    try:
        _RUN[form](case, given)
    except ProgramError as error:
        return Found(name, form, "crashed", f"{type(error).__name__}: {error}")
    except MetaOptimError as error:
        return Found(name, form, "refused", error.reason)
    except Exception as error:  # any other is not what a user should see
        return Found(name, form, "crashed", f"{type(error).__name__}: {error}")
    scale = max(float(e.abs().max()) for e in expected)
    for t, e in zip(given.all(), expected, strict=True):
        off = float((t.grad - e).abs().max()) if t.grad is not None else math.inf
        if not off <= 1e-8 * float(e.abs().max()) + 1e-12 * scale:
            return Found(name, form, "wrong", f"off by {off:.2g} of {float(e.abs().max()):.2g}")
    return Found(name, form, "equal")


def _as_called(op: Any) -> Callable:
    """An entry's function, found by its name at every call, as users find it."""
    for home in (torch, torch.nn.functional, torch.linalg, torch.special, torch.fft):
        attribute = getattr(op.op, "__name__", "")
        if getattr(home, attribute, None) is op.op:
            return lambda *args, **kwargs: getattr(home, attribute)(*args, **kwargs)
    return op


def variants(name: str) -> Iterator[tuple[str, Any, Callable]]:
    """The entries of an operator, as they are and in place: what to call each, the entry, the function."""
    for op in OPS[name]:
        full = f"{name}.{op.variant_test_name}" if op.variant_test_name else name
        yield full, op, _as_called(op)
        if op.inplace_variant is not None:
            in_place = op.inplace_variant
            yield f"{full} in place", op, lambda x, *args, f=in_place, **kw: f(x.clone(), *args, **kw)


def _is_fed(sample: Any) -> bool:
    leaves = tree_leaves((sample.input, sample.args, sample.kwargs))
    return any(isinstance(a, Tensor) and a.requires_grad and a.numel() for a in leaves)


def case_of(
    op: Any, call: Callable, in_place: bool, forms: Iterable[str]
) -> tuple[Case, dict[int, list[Tensor]]] | None:
    """Samples of an entry that a plain tape can differentiate twice, and its gradients by the number of steps."""
    torch.manual_seed(0)
    try:
        samples = op.sample_inputs("cpu", torch.float64, requires_grad=True)
        given = list(itertools.islice(filter(_is_fed, samples), _TRIED))
        given = [s for s in given if not in_place or not s.broadcasts_input]
    except ImportError:  # a few need what is not installed
        return None
    taken: list[Sample] = []
    for at in dict.fromkeys([0, len(given) - 1, len(given) // 2, *range(len(given))] if given else []):
        for sample in (
            Sample(call, given[at], reach) for reach in (1.0, 1e-3)
        ):  # some end at their domain's bounds
            if sample.suitable and tape(Case([sample]), 2) is not None:
                taken.append(sample)
                break
        if len(taken) == SAMPLES:
            break
    while taken:
        case = Case(taken)
        expected = {n: tape(case, n) for n in {_STEPS[form] for form in forms}}
        if all(e is not None for e in expected.values()):
            return case, expected  # type: ignore[return-value]
        taken = taken[:-1]
    return None


def forms_of(name: str) -> list[str]:
    """The forms that an operator is tried in: a scan takes longer than the others, and does the same to most."""
    return [form for form in FORMS if form != "scan" or [*OPS].index(name) % _SCANNED == 0]


def sweep(name: str, forms: Iterable[str] | None = None) -> Iterator[Found]:
    """What forms do with the entries of an operator; if that is not to be equal, the worst they do with a sample."""
    forms = forms_of(name) if forms is None else forms
    order = ["equal", "refused", "crashed", "wrong"]
    for full, op, call in variants(name):
        made = case_of(op, call, full.endswith(" in place"), forms)
        for form in forms if made else ():
            case, expected = made  # type: ignore[misc]
            found = [in_form(full, form, case, expected[_STEPS[form]])]
            if found[0].outcome != "equal" and len(case.samples) > 1:
                for alone in (Case([sample]) for sample in case.samples):
                    gradients = tape(alone, _STEPS[form])
                    found += [] if gradients is None else [in_form(full, form, alone, gradients)]
            yield max(found, key=lambda f: order.index(f.outcome))


def summary(why: str) -> str:
    """An error's first clause, on one line."""
    return re.split(r"[;:.] |[;.]$", " ".join(why.split()))[0].replace("|", "\\|")


def rows(found: Iterable[Found]) -> list[str]:
    """Rows of the table: what is refused, by name, with the forms that do and what they say."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for f in found:
        if f.outcome == "refused":
            reasons.setdefault((f.name, summary(f.why)), []).append(f.form)
    return [f"| `{name}` | {', '.join(forms)} | {why} |" for (name, why), forms in reasons.items()]


def table_of(found: list[Found]) -> str:
    """docs/operators.md."""
    entries = len({f.name for f in found})
    counts = " | ".join(str(sum(f.form == form and f.outcome == "equal" for f in found)) for form in FORMS)
    refused = " | ".join(str(sum(f.form == form and f.outcome == "refused" for f in found)) for form in FORMS)
    explained = "; ".join(f"**{form}**: {what}" for form, what in FORMS.items())
    return f"""# Operators

PyTorch's database of operators (`op_db`), each entry with a second derivative that can be fed float64, as it is and in
place: {entries} entries, inside an inner loss that feeds every differentiable input from the network and from a
meta-parameter, two inner steps (six in a scan) with a learnt rate. `python tests/helpers/operators.py` compares the
meta-gradients with a plain tape and writes this page; `tests/exact/test_operators.py` holds it to that, for a share of
the operators, or for all of them with `--whole-sweep`.

{explained}.

| | {" | ".join(FORMS)} |
|---|{"---|" * len(FORMS)}
| equal | {counts} |
| refused | {refused} |

Refused, by name:

| operator | forms | says |
|---|---|---|
""" + "".join(row + "\n" for row in rows(found))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="operators; all of them if there are none")
    parser.add_argument("--forms", help="such as A,B")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    found: list[Found] = []
    for name in options.names or OPS:
        began = time.perf_counter()
        for f in sweep(name, options.forms and options.forms.split(",")):
            found.append(f)
            print(f, flush=True)
        if (took := time.perf_counter() - began) > 5:
            print(f"{name} took {took:.0f} s", file=sys.stderr)
    print({o: sum(f.outcome == o for f in found) for o in ("equal", "refused", "wrong", "crashed")})
    if not options.names:
        TABLE.write_text(table_of(found))


if __name__ == "__main__":
    main()
