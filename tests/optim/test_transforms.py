"""Transforms of inner gradients: as by hand in every form, checked where they are given, and noticed by guards."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from by_hand import FORMS, STEPS, Grads, Metas, by_hand, data, descent, equal, network
from metaoptim import MetaSGD, transforms
from metaoptim.compiler.lower.library import library
from metaoptim.optim.transforms import Transform

T = transforms


def squash(grads: list[Tensor], params: list[Tensor], hyper: dict[str, Any]) -> list[Tensor]:
    return [torch.tanh(hyper["k"] * g) + hyper["pull"] * p for g, p in zip(grads, params, strict=True)]


def clipped(g: Tensor, norm: Tensor, largest: Any) -> Tensor:
    return g * torch.clamp(largest / (norm + 1e-6), max=1.0)


def norm_of(grads: Grads, order: float = 2.0) -> Tensor:
    return torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads.values()]), order)


#: name -> values of the learnt numbers, the transforms, and what they do, by hand
CASES: dict[str, tuple[dict[str, Any], Callable[[Metas], list], Callable[[Grads, Grads, Metas], Grads]]] = {
    "scale": (
        {"c": 0.7},
        lambda m: [T.scale(m["c"], mask="*.bias")],
        lambda g, p, m: {n: m["c"] * v if n.endswith("bias") else v for n, v in g.items()},
    ),
    "weight_decay": (
        {"wd": 0.3},
        lambda m: [T.weight_decay(m["wd"], mask=lambda name: "weight" in name)],
        lambda g, p, m: {n: v + m["wd"] * p[n] if "weight" in n else v for n, v in g.items()},
    ),
    "centralize": (
        {},
        lambda m: [T.centralize()],
        lambda g, p, m: {n: v - v.mean(1, keepdim=True) if v.dim() > 1 else v for n, v in g.items()},
    ),
    "zero": (
        {},
        lambda m: [T.zero(["0.*", "2.bias"])],
        lambda g, p, m: {n: v * (n == "2.weight") for n, v in g.items()},
    ),
    "only": (
        {},
        lambda m: [T.only("2.*")],
        lambda g, p, m: {n: v * n.startswith("2.") for n, v in g.items()},
    ),
    "clip_value": (
        {"c": 0.3},
        lambda m: [T.clip_value(m["c"])],
        lambda g, p, m: {n: torch.minimum(torch.maximum(v, -m["c"]), m["c"]) for n, v in g.items()},
    ),
    "clip_norm": (
        {"c": 0.4},
        lambda m: [T.clip_norm(m["c"], 3.0)],
        lambda g, p, m: {n: clipped(v, norm_of({n: v}, 3.0), m["c"]) for n, v in g.items()},
    ),
    "clip_global_norm": (
        {"c": 0.5},
        lambda m: [T.clip_global_norm(m["c"])],
        lambda g, p, m: {n: clipped(v, norm_of(g), m["c"]) for n, v in g.items()},
    ),
    "own": (
        {"k": 1.7, "pull": 0.1},
        lambda m: [Transform(squash, k=m["k"], pull=m["pull"], mask="*weight")],
        lambda g, p, m: {
            n: torch.tanh(m["k"] * v) + m["pull"] * p[n] if "weight" in n else v for n, v in g.items()
        },
    ),
    "in order": (
        {"c": 0.4, "wd": 0.3},
        lambda m: [
            lambda grads, params, hyper: [-2 * g for g in grads],
            T.clip_norm(m["c"]),
            T.weight_decay(m["wd"]),
        ],
        lambda g, p, m: {
            n: clipped(-2 * v, norm_of({n: -2 * v}), m["c"]) + m["wd"] * p[n] for n, v in g.items()
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_as_by_hand(name: str, form: str) -> None:
    values, made, change = CASES[name]
    expected = by_hand(values, lambda t, m: 0.3, lambda t, g, p, m: change(g, p, m), momentum=0.5)
    equal(FORMS[form](descent(lr=0.3, momentum=0.5, transforms=made), values), expected)


@pytest.mark.parametrize("optimizer", ["MetaSGD", "MetaAdam", "MetaRMSprop"])
def test_every_optimizer_takes_them(optimizer: str) -> None:
    """Weight decay in front is the optimizer's own."""
    found = []
    for options in ({"weight_decay": 0.2}, {"transforms": [T.weight_decay(0.2)]}):
        net, (xs, ys) = network(), data()
        inner = getattr(metaoptim, optimizer)([net], lr=0.05, **options)
        with metaoptim.SlidingWindow(offline=True):
            for t in range(4):
                inner.step((net(xs[t]) - ys[t]).square().mean())
            (net(xs[5]) - ys[5]).square().mean().backward()
        found.append([p.grad for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_of_zero_has_a_finite_derivative() -> None:
    net = nn.Linear(2, 2, bias=False).double()
    inner = MetaSGD([net], lr=0.1, transforms=[T.clip_norm(0.1), T.clip_global_norm(0.1), T.centralize()])
    with metaoptim.SlidingWindow(offline=True):
        inner.step((0 * net(torch.ones(3, 2, dtype=torch.float64))).sum())
        net(torch.ones(3, 2, dtype=torch.float64)).square().sum().backward()
    assert net.weight.grad is not None and net.weight.grad.isfinite().all() and net.weight.grad.any()


def test_numbers_that_change_make_no_new_program() -> None:
    net, (xs, ys) = network(), data()
    inner, sizes = (
        MetaSGD([net], lr=0.1, transforms=[T.scale(0.5, mask="*weight"), T.clip_global_norm(0.2)]),
        [],
    )
    with metaoptim.SlidingWindow(offline=True):
        for t in range(STEPS):
            inner.transforms[0].hyper["factor"] = 0.5 + 0.01 * t
            inner.transforms = [inner.transforms[0], T.clip_global_norm(0.2 + 0.01 * t)]
            inner.step((net(xs[t]) - ys[t]).square().mean())
            sizes.append(len(library.steps()))
    # one where no number is an input yet, one where they are
    assert sizes[1:] == sizes[1:2] * (STEPS - 1), sizes


@pytest.mark.parametrize("compiled", [False, True])
def test_changes_hold_from_the_next_step_on(compiled: bool) -> None:
    """Compiled functions notice every way to change them."""
    net, (xs, ys) = network(), data()
    inner = MetaSGD([net], lr=0.1)

    def once() -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            inner.step((net(xs[0]) - ys[0]).square().mean())
            return (net(xs[1]) - ys[1]).square().mean()

    run, other = metaoptim.compile(backend="eager")(once) if compiled else once, once
    factor = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    changes: list[Callable[[], object]] = [
        lambda: inner.transforms.append(T.scale(2.0)),
        lambda: inner.transforms[0].hyper.update(factor=-1.0),
        lambda: inner.transforms[0].hyper.update(factor=factor),
        lambda: setattr(inner.transforms[0], "mask", "0.weight"),
        lambda: setattr(inner, "transforms", [T.only("0.*"), T.clip_value(0.01)]),
        lambda: inner.reset_grad_normalizer(1e-3),
        lambda: inner.reset_grad_normalizer(2e-3, norm_type=1.0),
        lambda: inner.reset_grad_normalizer(None),
        lambda: inner.transforms.clear(),
    ]
    seen = [float(run().detach())]
    for change in changes:
        change()
        seen.append(float(run().detach()))
        assert seen[-1] == pytest.approx(float(other().detach()), rel=1e-12)
    assert all(a != b for a, b in itertools.pairwise(seen)) and seen[0] == seen[-1]


def test_a_function_is_what_it_closes_over() -> None:
    net, (xs, ys) = network(), data()
    size = 1.0

    def scaled(grads: list[Tensor], params: list[Tensor], hyper: dict[str, Any]) -> list[Tensor]:
        return [size * g for g in grads]

    def gradient(inner: MetaSGD) -> Tensor:
        with metaoptim.SlidingWindow(offline=True, slots=1):
            for t in range(3):
                inner.step((net(xs[t]) - ys[t]).square().mean())
            return torch.autograd.grad((net(xs[5]) - ys[5]).square().mean(), list(net.parameters()))[0]

    inner = MetaSGD([net], lr=0.1, transforms=[scaled])
    torch.testing.assert_close(gradient(inner), gradient(MetaSGD([net], lr=0.1)))
    size = 0.5
    torch.testing.assert_close(gradient(inner), gradient(MetaSGD([net], lr=0.05)))


def test_the_normalizer_is_one_of_them() -> None:
    inner = MetaSGD([network()], transforms=[T.centralize()])
    inner.reset_grad_normalizer(1.0)
    inner.transforms.append(T.scale(2.0))
    inner.reset_grad_normalizer(0.5)
    assert repr(inner.transforms) == "[centralize(), clip_global_norm(max_norm=0.5), scale(factor=2.0)]"
    inner.reset_grad_normalizer(None)
    inner.reset_grad_normalizer(None)
    assert repr(inner.transforms) == "[centralize(), scale(factor=2.0)]"


def test_one_that_must_be_finite_looks_at_what_it_is_given() -> None:
    net, (xs, ys) = network(), data()
    finite = T.clip_global_norm(1.0, error_if_nonfinite=True, mask="2.*")
    for before, fails in ((T.zero("2.*"), False), (T.scale(float("inf")), True)):
        inner = MetaSGD([net], transforms=[before, finite])
        kept = net[2].weight.detach().clone()
        with metaoptim.SlidingWindow():
            loss = (net(xs[0]) - ys[0]).square().mean()
            if fails:
                with pytest.raises(
                    metaoptim.LossError, match=r"MetaSGD.step: the norm of the inner gradient is (inf|nan)"
                ):
                    inner.step(loss)
            else:
                inner.step(loss)
        assert torch.equal(net[2].weight, kept)


@pytest.mark.parametrize(
    ("transform", "match"),
    [
        (
            T.scale(2.0, mask="*.wieght"),
            r"MetaSGD.transforms\[0\]: the mask '\*.wieght' matches none .* '0.weight'",
        ),
        (T.only("head"), r"the mask 'head' matches none"),
        (
            lambda grads, params, hyper: grads[0],
            r"the transform <lambda>: got .*expected a list of one tensor",
        ),
        (
            lambda grads, params, hyper: [g.sum() for g in grads],
            r"of its shape: \(a tensor of shape \(4, 3\)",
        ),
        (T.scale(torch.ones(2, 1, 1)), r"the transform scale: got .*must broadcast"),
    ],
    ids=["misspelt", "only", "tensor", "shapes", "grown"],
)
@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_what_does_not_fit_is_told_and_changes_nothing(transform: Any, match: str, strategy: str) -> None:
    net, (xs, ys) = network(), data()
    inner, before = MetaSGD([net], transforms=[transform]), [p.detach().clone() for p in net.parameters()]
    with metaoptim.SlidingWindow(strategy=strategy):
        with pytest.raises(metaoptim.WindowError, match=match):
            inner.step((net(xs[0]) - ys[0]).square().mean())
        inner.transforms = []
        inner.step(0 * (net(xs[0]) - ys[0]).square().mean())
    assert all(map(torch.equal, net.parameters(), before))


def test_what_cannot_be_a_transform() -> None:
    net, weight = network(), torch.ones(())
    with pytest.raises(TypeError, match=r"MetaSGD.transforms: got scale\(factor=2.0\), expected a list"):
        MetaSGD([net], transforms=T.scale(2.0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got int, expected a function"):
        MetaSGD([net], transforms=[3])  # type: ignore[list-item]
    with pytest.raises(
        TypeError, match=r"centralize does not take three arguments.*is called first: centralize\("
    ):
        MetaSGD([net], transforms=[T.centralize])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="closes over a tensor"):
        MetaSGD([net], transforms=[lambda grads, params, hyper: [weight * g for g in grads]])
    with pytest.raises(ValueError, match=r"max_norm: got a tensor of shape \(2,\)"):
        T.clip_norm(torch.ones(2))
    for make in (T.clip_value, T.clip_norm, T.clip_global_norm, T.weight_decay):
        with pytest.raises(ValueError, match=r"got -1\.0, expected a number that is not negative"):
            make(-1.0)
    inner = MetaSGD([net])
    inner.transforms.append(squash)  # type: ignore[arg-type]
    with metaoptim.SlidingWindow(), pytest.raises(TypeError, match=r"transforms\[0\] is <function squash"):
        inner.step((net(data()[0][0])).square().mean())


def test_impure_ones_are_refused() -> None:
    net, (xs, ys) = network(), data()
    for impure, match in (
        (lambda grads, params, hyper: [g.mul_(2) for g in grads], "in place"),
        (lambda grads, params, hyper: [g + torch.randn_like(g) for g in grads], "random numbers"),
    ):
        inner = MetaSGD([net], transforms=[impure])
        with pytest.raises(metaoptim.CaptureError, match=match), metaoptim.SlidingWindow():
            inner.step((net(xs[0]) - ys[0]).square().mean())


# -- torch's clipping of .grad ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_torch_clips_what_an_outer_backward_has_left(strategy: str) -> None:
    net, (xs, ys) = network(), data()
    inner = MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, strategy=strategy):
        inner.step((net(xs[0]) - ys[0]).square().mean())
        with pytest.raises(metaoptim.WindowError, match=r"clip_grad_norm_ on parameters .*clip_global_norm"):
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        with pytest.raises(metaoptim.WindowError, match=r"clip_grad_value_ on parameters .*clip_value"):
            torch.nn.utils.clip_grad_value_(net.parameters(), 0.1)
        (net(xs[1]) - ys[1]).square().mean().backward()
        torch.nn.utils.clip_grad_value_(net.parameters(), 0.05)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(grads) == 4 and float(torch.nn.utils.get_total_norm(grads)) <= 0.1 + 1e-6
    net.zero_grad()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # nothing is said outside


def test_torch_clips_others_and_is_refused_in_compiled_functions() -> None:
    net, (xs, ys) = network(), data()
    inner, other = MetaSGD([net], lr=0.1), nn.Linear(2, 2)
    with metaoptim.SlidingWindow(offline=True):
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        other(torch.ones(1, 2)).sum().backward()
        torch.nn.utils.clip_grad_norm_([*net.parameters(), *other.parameters()], 0.1)

    @metaoptim.compile(backend="eager")
    def step(x: Tensor, y: Tensor) -> None:
        loss = (net(x) - y).square().mean()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        inner.step(loss)

    with (
        metaoptim.SlidingWindow(offline=True),
        pytest.raises(metaoptim.WindowError, match="clip_global_norm"),
    ):
        step(xs[0], ys[0])
