"""Inner optimizers against torch.optim: numbers, options, groups, state."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

import metaoptim

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.7, "nesterov": True}),
    ("SGD", {"lr": 0.01, "maximize": True, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.02, "amsgrad": True}),
    ("Adam", {"lr": 0.02, "maximize": True, "amsgrad": True, "weight_decay": 0.05}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.003, "alpha": 0.8, "eps": 1e-5, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.003, "momentum": 0.6}),
    ("RMSprop", {"lr": 0.003, "centered": True, "momentum": 0.6}),
    ("RMSprop", {"lr": 0.003, "maximize": True, "centered": True}),
]
IDS = [f"{name}-{'-'.join(options) or 'defaults'}" for name, options in OPTIONS]


def two_networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), nn.Linear(2, 2).double()


def loss_of(a: nn.Module, b: nn.Module, t: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(t)
    x, y = (
        torch.randn(5, 3, generator=g, dtype=torch.float64),
        torch.randn(5, 2, generator=g, dtype=torch.float64),
    )
    return F.mse_loss(b(a(x)), y)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_trajectory_equals_torch(name: str, options: dict, strategy: str) -> None:
    a, b = two_networks()
    c, d = two_networks()
    reference = getattr(torch.optim, name)(
        [{"params": a.parameters()}, {"params": b.parameters(), "lr": 0.004}], **options
    )
    inner = getattr(metaoptim, f"Meta{name}")([c, {"params": d, "lr": 0.004}], **options)
    for t in range(50):
        reference.zero_grad()
        loss_of(a, b, t).backward()
        reference.step()
    with metaoptim.SlidingWindow(strategy=strategy):
        for t in range(50):
            inner.step(loss_of(c, d, t))
    for p, q in zip([*a.parameters(), *b.parameters()], [*c.parameters(), *d.parameters()], strict=True):
        torch.testing.assert_close(q, p, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_state_dict_interchanges(name: str, options: dict) -> None:
    """Train on one side, load on the other, go on: all four trajectories are one."""
    results = []
    for first, second in [("torch", "meta"), ("meta", "torch"), ("meta", "meta"), ("torch", "torch")]:
        a, b = two_networks()
        state = None
        for kind, steps in ((first, range(5)), (second, range(5, 10))):
            if kind == "torch":
                optimizer = getattr(torch.optim, name)(
                    [{"params": a.parameters()}, {"params": b.parameters()}], **options
                )
                if state is not None:
                    optimizer.load_state_dict(state)
                for t in steps:
                    optimizer.zero_grad()
                    loss_of(a, b, t).backward()
                    optimizer.step()
            else:
                optimizer = getattr(metaoptim, f"Meta{name}")([a, b], **options)
                if state is not None:
                    optimizer.load_state_dict(state)
                with metaoptim.SlidingWindow():
                    for t in steps:
                        optimizer.step(loss_of(a, b, t))
            state = copy.deepcopy(optimizer.state_dict())
        results.append([p.detach() for m in (a, b) for p in m.parameters()])
    for other in results[:3]:
        for p, q in zip(other, results[3], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


HYPER: list[tuple[str, str, float, dict[str, Any]]] = [
    ("SGD", "lr", 0.1, {}),
    ("SGD", "momentum", 0.6, {"lr": 0.05}),
    ("SGD", "dampening", 0.2, {"lr": 0.05, "momentum": 0.5}),
    ("SGD", "weight_decay", 0.1, {"lr": 0.05}),
    ("Adam", "lr", 0.03, {}),
    ("Adam", "eps", 1e-2, {"lr": 0.03}),
    ("Adam", "weight_decay", 0.1, {"lr": 0.03}),
    ("Adam", "eps_root", 1e-3, {"lr": 0.03}),
    ("Adam", "betas", 0.8, {"lr": 0.03}),
    ("RMSprop", "lr", 0.01, {}),
    ("RMSprop", "alpha", 0.9, {"lr": 0.01}),
    ("RMSprop", "eps", 1e-2, {"lr": 0.01}),
    ("RMSprop", "momentum", 0.4, {"lr": 0.01}),
    ("RMSprop", "weight_decay", 0.2, {"lr": 0.01}),
]


@pytest.mark.parametrize(
    ("name", "hyper", "value", "options"), HYPER, ids=[f"{n}-{h}" for n, h, _, _ in HYPER]
)
def test_every_hyper_parameter_gets_its_gradient(name: str, hyper: str, value: float, options: dict) -> None:
    """By finite differences through the whole inner loop."""

    def outer(number: Any, slots: int | None = 2) -> torch.Tensor:
        a, b = two_networks()
        given = {**options, hyper: (number, 0.9) if hyper == "betas" else number}
        inner = getattr(metaoptim, f"Meta{name}")([a, b], **given)
        with metaoptim.SlidingWindow(slots=slots):
            for t in range(4):
                inner.step(loss_of(a, b, t))
            return loss_of(a, b, 9)

    leaf = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    outer(leaf).backward()
    h = 1e-5 * value
    slope = (outer(value + h) - outer(value - h)).item() / (2 * h)
    assert leaf.grad is not None and abs(slope) > 1e-9
    torch.testing.assert_close(leaf.grad.item(), slope, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["MetaAdam", "MetaRMSprop"])
@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_dead_inputs_have_finite_meta_gradients(name: str, strategy: str) -> None:
    """A pixel that is always 0 gives a second moment of exactly 0, where sqrt has no derivative."""
    net = nn.Linear(3, 2).double()
    x = torch.tensor([[1.0, 0.0, -2.0], [0.5, 0.0, 1.0]], dtype=torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    inner = getattr(metaoptim, name)([net], lr=lr)
    with metaoptim.SlidingWindow(offline=True, strategy=strategy):
        for _ in range(3):
            inner.step((net(x) - 1).square().sum())
        (net(x) - 2).square().sum().backward()
    assert net.weight.grad is not None and lr.grad is not None
    assert net.weight.grad.isfinite().all() and lr.grad.isfinite() and lr.grad != 0
    assert (net.weight.grad[:, 1] == 0).all() and (net.weight.grad[:, 0] != 0).all()


def test_first_order_is_fomaml() -> None:
    """θ_T = θ_0 - η Σ g with g constant: dL/dθ_0 is dL/dθ_T."""
    a, b = two_networks()
    inner = metaoptim.MetaSGD([a, b], lr=0.2, first_order=True)
    with metaoptim.SlidingWindow(offline=True):
        for t in range(3):
            inner.step(loss_of(a, b, t))
        outer = loss_of(a, b, 7)
        shown = [*a.parameters(), *b.parameters()]
        expected = torch.autograd.grad(outer, shown, retain_graph=True)
        outer.backward()
    for p, g in zip([*a.parameters(), *b.parameters()], expected, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_grad_normalizer_clips_like_torch(strategy: str) -> None:
    a, b = two_networks()
    c, d = two_networks()
    reference = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.5)
    inner = metaoptim.MetaSGD([c, d], lr=0.5)
    max_norm = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    inner.reset_grad_normalizer(max_norm)
    for t in range(5):
        reference.zero_grad()
        loss_of(a, b, t).backward()
        torch.nn.utils.clip_grad_norm_([*a.parameters(), *b.parameters()], 0.3)
        reference.step()
    with metaoptim.SlidingWindow(strategy=strategy):
        for t in range(5):
            inner.step(loss_of(c, d, t))
        loss_of(c, d, 9).backward()
    for p, q in zip([*a.parameters(), *b.parameters()], [*c.parameters(), *d.parameters()], strict=True):
        torch.testing.assert_close(q, p)
    assert max_norm.grad is not None and max_norm.grad.abs() > 1e-4


@pytest.mark.parametrize("scheduler", ["StepLR", "CosineAnnealingLR"])
def test_torch_schedulers_drive_them(scheduler: str) -> None:
    arguments = {"StepLR": {"step_size": 2, "gamma": 0.5}, "CosineAnnealingLR": {"T_max": 8}}[scheduler]
    a, b = two_networks()
    c, d = two_networks()
    reference = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.5)
    inner = metaoptim.MetaSGD([c, d], lr=0.5)
    ours = getattr(torch.optim.lr_scheduler, scheduler)(inner, **arguments)
    theirs = getattr(torch.optim.lr_scheduler, scheduler)(reference, **arguments)
    with metaoptim.SlidingWindow(slots=2):
        for t in range(6):
            reference.zero_grad()
            loss_of(a, b, t).backward()
            reference.step()
            theirs.step()
            inner.step(loss_of(c, d, t))
            ours.step()
    assert inner.param_groups[0]["lr"] != 0.5
    for p, q in zip([*a.parameters(), *b.parameters()], [*c.parameters(), *d.parameters()], strict=True):
        torch.testing.assert_close(q, p)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, eta_min=0.05),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.2, total_iters=2), lr_scheduler.ExponentialLR(o, 0.7)], [2]
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_on_a_learnt_rate(name: str, leaf: bool) -> None:
    """Every rate is computed from the learnt one, and the gradient goes back to it."""

    def trained(optimizer: Any, networks: Any, take: Callable) -> Tensor:
        scheduler = SCHEDULES[name](optimizer)
        for t in range(5):
            take(loss_of(*networks, t))
            scheduler.step()
        return loss_of(*networks, 9)

    def at(lr: float) -> float:
        networks = two_networks()
        reference = torch.optim.SGD([p for m in networks for p in m.parameters()], lr=lr)

        def take(loss: Tensor) -> None:
            reference.zero_grad()
            loss.backward()
            reference.step()

        return float(trained(reference, networks, take).detach())

    raw = torch.tensor(0.2 if leaf else math.log(0.2), dtype=torch.float64, requires_grad=True)
    for window in ({"slots": 1}, {"strategy": "full_tape"}):
        networks = two_networks()
        inner = metaoptim.MetaSGD(networks, lr=raw if leaf else raw.exp())
        with metaoptim.SlidingWindow(offline=True, **window):
            outer = trained(inner, networks, inner.step)
            (found,) = torch.autograd.grad(outer, raw)
        assert float(outer.detach()) == pytest.approx(at(0.2), rel=1e-9)
        expected = (at(0.2 + 1e-5) - at(0.2 - 1e-5)) / 2e-5
        assert float(found) == pytest.approx(expected * (1 if leaf else 0.2), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_schedulers_that_put_numbers_in_place_of_a_learnt_rate() -> None:
    networks = two_networks()
    inner = metaoptim.MetaSGD(networks, lr=torch.tensor(0.2, dtype=torch.float64, requires_grad=True))
    with pytest.raises(metaoptim.WindowError, match=r"learnt 'lr'.*OneCycleLR.*compute the schedule"):
        lr_scheduler.OneCycleLR(inner, 0.3, total_steps=10)
    plateau = lr_scheduler.ReduceLROnPlateau(inner, patience=0)
    plateau.step(1.0)
    with pytest.raises(metaoptim.WindowError, match="compute the schedule"):
        plateau.step(2.0)


@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_frozen_unused_tied_and_shared(strategy: str) -> None:
    torch.manual_seed(0)
    trunk, head, other = nn.Linear(3, 3).double(), nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
    head_two = nn.Linear(3, 1).double()
    head_two.weight = head.weight  # tied across modules of one network
    trunk.bias.requires_grad_(False)
    net = nn.ModuleDict({"trunk": trunk, "head": head, "two": head_two})
    x = torch.randn(4, 3, dtype=torch.float64)
    first, second = metaoptim.MetaSGD([net], lr=0.1), metaoptim.MetaAdam([trunk, other], lr=0.05)
    frozen, unused = trunk.bias, other.bias.detach().clone()
    before = head.weight.detach().clone()
    with metaoptim.SlidingWindow(strategy=strategy):
        for _ in range(3):
            first.step((head(trunk(x).tanh()) + head_two(trunk(x))).square().mean())
            second.step((other.weight * trunk(x)).square().mean(), allow_unused=True)
            assert head.weight is head_two.weight
    assert trunk.bias is frozen and torch.equal(other.bias, unused) and head.weight is head_two.weight
    assert (
        not torch.equal(head.weight, before) and isinstance(head.weight, nn.Parameter) and head.weight.is_leaf
    )


def test_closure_allow_unused_and_add_param_group() -> None:
    a, b = two_networks()
    inner = metaoptim.MetaSGD([a], lr=0.1)
    weight = b.weight.detach().clone()
    with metaoptim.SlidingWindow():
        loss = inner.step(closure=lambda: loss_of(a, b, 0))
        assert loss.requires_grad and torch.equal(b.weight, weight)
        inner.add_param_group({"params": b, "lr": 0.3})
        inner.step(loss_of(a, b, 1))
        with pytest.raises(ValueError, match="more than one"):
            inner.add_param_group(a)
    assert not torch.equal(b.weight, weight) and inner.param_groups[1]["lr"] == 0.3


def test_repr_and_zero_grad_feel_like_torch() -> None:
    a, b = two_networks()
    inner = metaoptim.MetaAdam([a, b])
    assert repr(inner).startswith("MetaAdam (") and isinstance(inner, torch.optim.Optimizer)
    loss_of(a, b, 0).backward()
    inner.zero_grad()
    assert all(p.grad is None for p in a.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.Adam([{"params": a.parameters()}, {"params": b.parameters()}]).load_state_dict(
            inner.state_dict()
        )
