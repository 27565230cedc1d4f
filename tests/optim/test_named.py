"""The optimizers of torch.optim by name: their steps are torch's, and their meta-gradients those of torch's steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", dict(lr=0.02, betas=(0.8, 0.9), eps=0.05, weight_decay=0.1)),
    "AdamW amsgrad": ("AdamW", dict(lr=0.02, amsgrad=True, maximize=True)),
    "AdamW without decay": ("AdamW", dict(lr=0.02, weight_decay=0.0)),
    "NAdam": ("NAdam", dict(lr=0.02, eps=0.05, weight_decay=0.1, momentum_decay=0.02)),
    "NAdam decoupled": ("NAdam", dict(lr=0.02, weight_decay=0.1, decoupled_weight_decay=True)),
    "RAdam": ("RAdam", dict(lr=0.02, betas=(0.7, 0.8), eps=0.05)),
    "RAdam decoupled": (
        "RAdam",
        dict(lr=0.02, betas=(0.7, 0.8), weight_decay=0.1, decoupled_weight_decay=True),
    ),
    "Adamax": ("Adamax", dict(lr=0.02, eps=0.05, weight_decay=0.1)),
    "Adagrad": (
        "Adagrad",
        dict(lr=0.05, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.2, eps=0.05),
    ),
    "Adadelta": ("Adadelta", dict(lr=0.5, rho=0.8, eps=0.05, weight_decay=0.1)),
    "ASGD": ("ASGD", dict(lr=0.05, lambd=0.1, alpha=0.6, t0=2.0, weight_decay=0.1)),
    "Rprop": ("Rprop", dict(lr=0.02, etas=(0.6, 1.3), step_sizes=(0.015, 0.04))),
    "Adafactor": ("Adafactor", dict(lr=0.05, weight_decay=0.1, d=1.1, eps=(0.01, 0.5))),
    "Adafactor maximize": ("Adafactor", dict(lr=0.05, maximize=True)),
    "Muon": ("Muon", dict(lr=0.05, weight_decay=0.2, momentum=0.8, eps=0.05)),
    "Muon adjusted": ("Muon", dict(lr=0.05, nesterov=False, adjust_lr_fn="match_rms_adamw")),
}
ALL = pytest.mark.parametrize("case", CASES)
ONE_EACH = pytest.mark.parametrize("case", [c for c in CASES if " " not in c])
# Of what acts on the average of the parameters alone, which is no part of the outer loss.
FLAT = {"ASGD": ("t0",)}


class Matrices(nn.Module):
    """Two layers without biases, one of them wide and one tall, for Muon too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def network(case: str) -> nn.Module:
    torch.manual_seed(1)
    return (
        Matrices() if case.startswith("Muon") else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    )


def batches(steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(steps, 6, 3, generator=generator), torch.randn(steps, 6, 2, generator=generator)


@pytest.fixture(autouse=True)
def _newton_schulz_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon's iteration in bfloat16 has two digits; ours can run it in another type, torch's is made to here."""
    cast = Tensor.to
    monkeypatch.setattr(Tensor, "bfloat16", lambda x: x)
    # from torch 2.15 on
    monkeypatch.setattr(
        Tensor, "to", lambda x, *args, **to: x.clone() if to.get("copy") else cast(x, *args, **to)
    )


def exact(name: str) -> dict[str, Any]:
    return {"ns_dtype": torch.float64} if name == "Muon" else {}


@ALL
def test_fifty_steps_are_those_of_torch(case: str) -> None:
    name, options = CASES[case]
    ours, theirs = network(case), network(case)
    inner = getattr(metaoptim, f"Meta{name}")([ours], **options, **exact(name))
    optimizer = getattr(torch.optim, name)(theirs.parameters(), **options)
    with metaoptim.SlidingWindow():
        for x, y in zip(*batches(50), strict=True):
            inner.step(F.mse_loss(ours(x), y))
            optimizer.zero_grad()
            F.mse_loss(theirs(x), y).backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key, value in optimizer.state[q].items():
            if value is not None:
                torch.testing.assert_close(
                    inner.state[p][key], value, rtol=1e-10, atol=1e-12, check_dtype=False
                )


def numbers_of(options: dict[str, Any], defaults: dict[str, Any], flat: tuple[str, ...]) -> dict[str, Any]:
    """The options that are floats other than 0, or pairs of them, as leaves."""

    def leaf(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(leaf, value))
        return torch.tensor(value, requires_grad=True) if type(value) is float and value else value

    all_of = {**defaults, **options}
    return {k: leaf(v) for k, v in all_of.items() if type(v) in (float, tuple) and k not in flat}


def leaves(tree: dict[str, Any]) -> list[Tensor]:
    flat = [v for value in tree.values() for v in (value if isinstance(value, tuple) else (value,))]
    return [v for v in flat if isinstance(v, Tensor)]


def moved(tree: dict[str, Any], which: int, by: float) -> dict[str, Any]:
    """The numbers as floats, one of them moved."""
    count = iter(range(100))

    def number(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(number, value))
        return float(value.detach()) + by * (next(count) == which) if isinstance(value, Tensor) else value

    return {k: number(v) for k, v in tree.items()}


def by_torch(case: str, options: dict[str, Any], shift: list[Tensor] | None = None) -> float:
    """The outer loss after torch's own steps."""
    name = CASES[case][0]
    net = network(case)
    if shift is not None:
        with torch.no_grad():
            for p, d in zip(net.parameters(), shift, strict=True):
                p.add_(d)
    optimizer = getattr(torch.optim, name)(net.parameters(), **options)
    xs, ys = batches(8)
    for x, y in zip(xs[:-1], ys[:-1], strict=True):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    return F.mse_loss(net(xs[-1]), ys[-1]).item()


def ours(case: str, options: dict[str, Any], form: str) -> nn.Module:
    """The network with the meta-gradient by its parameters, after a window or a compiled function."""
    name = CASES[case][0]
    net, cls = network(case), getattr(metaoptim, f"Meta{name}")
    xs, ys = batches(8)

    def loss(net: nn.Module, options: dict[str, Any], xs: Tensor, ys: Tensor) -> Tensor:
        inner = cls([net], **options, **exact(name))
        with metaoptim.SlidingWindow(offline=True, slots=3) as window:
            for x, y in window.scan(xs[:-1], ys[:-1]):
                inner.step(F.mse_loss(net(x), y))
            return F.mse_loss(net(xs[-1]), ys[-1])

    if form != "window":
        metaoptim.compile(loss, backend=form)(net, options, xs, ys).backward()
        return net
    inner = cls([net], **options, **exact(name))
    with metaoptim.SlidingWindow(offline=True, slots=3):
        for x, y in zip(xs[:-1], ys[:-1], strict=True):
            inner.step(F.mse_loss(net(x), y))
        F.mse_loss(net(xs[-1]), ys[-1]).backward()
    return net


@ONE_EACH
@pytest.mark.parametrize("form", ["window", "eager"])
def test_meta_gradients_are_finite_differences_of_torchs_own_steps(case: str, form: str) -> None:
    name, options = CASES[case]
    usual = {k: p.default for k, p in inspect.signature(getattr(torch.optim, name)).parameters.items()}
    learnt = numbers_of(options, usual, FLAT.get(name, ()))
    rest = {k: v for k, v in options.items() if k not in learnt}
    net = ours(case, {**rest, **learnt}, form)
    assert leaves(learnt)
    for n, leaf in enumerate(leaves(learnt)):
        assert leaf.grad is not None
        step = 1e-6 * max(1e-2, abs(leaf.item()))
        up, down = (by_torch(case, {**rest, **moved(learnt, n, s)}) for s in (step, -step))
        torch.testing.assert_close(leaf.grad.item(), (up - down) / (2 * step), rtol=2e-5, atol=2e-7)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator) for p in net.parameters()]
    along = sum(
        float((p.grad * d).sum())
        for p, d in zip(net.parameters(), direction, strict=True)
        if p.grad is not None
    )
    numbers = {**rest, **moved(learnt, -1, 0.0)}
    up, down = (by_torch(case, numbers, [1e-6 * s * d for d in direction]) for s in (1, -1))
    torch.testing.assert_close(along, (up - down) / 2e-6, rtol=2e-5, atol=2e-7)


@ONE_EACH
def test_finite_where_gradients_are_exactly_zero(case: str) -> None:
    name, options = CASES[case]
    net = network(case)
    dead = list(net.parameters())[-1]
    lr = torch.tensor(options["lr"], requires_grad=True)
    inner = getattr(metaoptim, f"Meta{name}")([net], **{**options, "lr": lr})
    with metaoptim.SlidingWindow(offline=True):
        for x, y in zip(*batches(4), strict=True):
            inner.step(F.mse_loss(net(x), y) * (0.0 if case == "Muon" else 1.0) + 0.0 * dead.sum())
        F.mse_loss(net(batches(1)[0][0]), batches(1)[1][0]).backward()
    for p in (lr, *net.parameters()):
        assert p.grad is not None and bool(p.grad.isfinite().all())


@ONE_EACH
def test_states_go_to_torch_and_come_back(case: str) -> None:
    name, options = CASES[case]
    first, second = network(case), network(case)
    xs, ys = batches(9)
    cls = getattr(metaoptim, f"Meta{name}")

    def run(net: nn.Module, optimizer: torch.optim.Optimizer, chosen: slice) -> None:
        for x, y in zip(xs[chosen], ys[chosen], strict=True):
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            optimizer.step()

    def run_inner(net: nn.Module, inner: metaoptim.MetaOptimizer, chosen: slice) -> None:
        with metaoptim.SlidingWindow():
            for x, y in zip(xs[chosen], ys[chosen], strict=True):
                inner.step(F.mse_loss(net(x), y))

    run(first, optimizer := getattr(torch.optim, name)(first.parameters(), **options), slice(9))
    inner = cls([second], **options, **exact(name))
    run_inner(second, inner, slice(3))
    theirs = getattr(torch.optim, name)(second.parameters())
    theirs.load_state_dict(inner.state_dict())  # by its dictionary
    run(second, theirs, slice(3, 5))
    inner = metaoptim.wrap(theirs, [second])
    if exact(name):
        inner.param_groups[0]["ns_dtype"] = torch.float64
    run_inner(second, inner, slice(5, 7))
    back = inner.to_torch()
    assert type(back) is type(optimizer)
    run(second, back, slice(7, 9))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_arguments_are_torchs_by_place_and_by_name() -> None:
    net = nn.Linear(2, 1)
    inner = metaoptim.MetaAdamW([net], 0.1, (0.8, 0.9), weight_decay=0.3)
    assert inner.param_groups[0]["betas"] == (0.8, 0.9) and inner.defaults["eps"] == 1e-8
    parameters = list(inspect.signature(metaoptim.MetaAdamW).parameters)
    theirs = list(inspect.signature(torch.optim.AdamW).parameters)
    assert parameters == [*theirs, "networks", "first_order", "transforms"]
    bad: list[tuple[type[Exception], Callable[[], object]]] = [
        (ValueError, lambda: metaoptim.MetaAdamW([net], lr=-1.0)),
        (ValueError, lambda: metaoptim.MetaAdamW([net], betas=(torch.tensor(1.5), 0.9))),
        (TypeError, lambda: metaoptim.MetaAdamW([net], learning_rate=0.1)),
        (TypeError, lambda: metaoptim.MetaAdamW([{"params": net, "wd": 0.1}])),
    ]
    for error, act in bad:
        with pytest.raises(error):
            act()


def test_a_rate_of_its_own_for_each_entry() -> None:
    net = nn.Linear(3, 2)
    rates = [torch.full_like(p, 0.1, requires_grad=True) for p in net.parameters()]
    groups = [{"params": [p], "lr": r} for p, r in zip(net.parameters(), rates, strict=True)]
    inner = metaoptim.MetaAdamW(groups, networks=[net])
    xs, ys = batches(3)
    with metaoptim.SlidingWindow(offline=True):
        for x, y in zip(xs, ys, strict=True):
            inner.step(F.mse_loss(net(x), y))
        F.mse_loss(net(xs[0]), ys[0]).backward()
    for p, rate in zip(net.parameters(), rates, strict=True):
        assert rate.grad is not None and rate.grad.shape == p.shape and bool((rate.grad != 0).all())
