"""The optimizers in examples/optimizers are what their papers say, and so are the gradients by their numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim
from edges import XS, YS, loss_of, network
from oracle import agree

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "optimizers"
T = 3


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"optimizers_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, f"Meta{name.capitalize()}")


# Written in place of the optimizer's steps, from the papers: (theta, g, what it keeps, numbers) -> theta.


def lion(p: Tensor, g: Tensor, kept: dict[str, Any], h: dict[str, Tensor]) -> Tensor:
    m = kept.get("m", 0.0)
    c = h["beta1"] * m + (1 - h["beta1"]) * g
    kept["m"] = h["beta2"] * m + (1 - h["beta2"]) * g
    return p - h["lr"] * (c.sign() + h["weight_decay"] * p)


def lamb(p: Tensor, g: Tensor, kept: dict[str, Any], h: dict[str, Tensor]) -> Tensor:
    t = kept["t"] = kept.get("t", 0) + 1
    m = kept["m"] = h["beta1"] * kept.get("m", 0.0) + (1 - h["beta1"]) * g
    v = kept["v"] = h["beta2"] * kept.get("v", 0.0) + (1 - h["beta2"]) * g**2
    r = (m / (1 - h["beta1"] ** t)) / ((v / (1 - h["beta2"] ** t)).sqrt() + h["eps"])
    r = r + h["weight_decay"] * p
    return p - h["lr"] * p.norm() / r.norm() * r


def adan(p: Tensor, g: Tensor, kept: dict[str, Any], h: dict[str, Tensor]) -> Tensor:
    d = g - kept["g"] if "g" in kept else torch.zeros_like(g)
    kept["g"] = g
    m = kept["m"] = (1 - h["beta1"]) * kept.get("m", 0.0) + h["beta1"] * g
    v = kept["v"] = (1 - h["beta2"]) * kept.get("v", 0.0) + h["beta2"] * d
    n = kept["n"] = (1 - h["beta3"]) * kept.get("n", 0.0) + h["beta3"] * (g + (1 - h["beta2"]) * d) ** 2
    p = p - h["lr"] / (n.sqrt() + h["eps"]) * (m + (1 - h["beta2"]) * v)
    return p / (1 + h["weight_decay"] * h["lr"])


#: name -> (steps by hand, numbers, those whose gradient is 0)
CASES: dict[str, tuple[Callable[..., Tensor], dict[str, float], set[str]]] = {
    "lion": (lion, {"lr": 0.03, "beta1": 0.7, "beta2": 0.9, "weight_decay": 0.3}, {"beta1", "beta2"}),
    "lamb": (lamb, {"lr": 0.1, "beta1": 0.7, "beta2": 0.9, "weight_decay": 0.3, "eps": 1e-3}, set()),
    "adan": (
        adan,
        {"lr": 0.1, "beta1": 0.3, "beta2": 0.2, "beta3": 0.15, "weight_decay": 0.3, "eps": 1e-3},
        set(),
    ),
}


def leaves(numbers: dict[str, float]) -> dict[str, Tensor]:
    return {k: torch.tensor(v, requires_grad=True) for k, v in numbers.items()}


def options(h: dict[str, Any]) -> dict[str, Any]:
    betas = tuple(v for k, v in h.items() if k[:4] == "beta")
    return {**{k: v for k, v in h.items() if k[:4] != "beta"}, "betas": betas}


def by_hand(name: str) -> dict[str, Tensor | None]:
    step, numbers, _ = CASES[name]
    net, h = network(), leaves(numbers)
    theta, kept = dict(net.named_parameters()), {n: {} for n, _ in net.named_parameters()}
    for t in range(T):
        loss = F.mse_loss(functional_call(net, theta, (XS[t],)), YS[t])
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {n: step(p, g, kept[n], h) for (n, p), g in zip(theta.items(), grads, strict=True)}
    F.mse_loss(functional_call(net, theta, (XS[T],)), YS[T]).backward()
    return {**{k: v.grad for k, v in h.items()}, **{n: p.grad for n, p in net.named_parameters()}}


def loop(optimizer: Any, net: nn.Module, h: dict[str, Tensor], **window: Any) -> Tensor:
    inner = optimizer([net], **options(h))
    with metaoptim.SlidingWindow(offline=True, **window):
        for t in range(T):
            inner.step(loss_of(net, t))
        return loss_of(net, T)


@pytest.mark.parametrize("form", ["window", "slots", "tape", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_it_equals_its_paper_with_every_gradient(name: str, form: str) -> None:
    optimizer, net, h = loaded(name), network(), leaves(CASES[name][1])
    if form == "compiled":
        loss = metaoptim.compile(loop, backend="eager")(optimizer, net, h)
    else:
        given: Any = {"slots": {"slots": 1}, "tape": {"strategy": "full_tape"}}
        loss = loop(optimizer, net, h, **given.get(form, {}))
    loss.backward()
    expected = by_hand(name)
    assert {k for k in h if float(expected[k].abs()) < 1e-9} == CASES[name][2]  # pyright: ignore[reportOptionalMemberAccess]
    agree({**{k: v.grad for k, v in h.items()}, **{n: p.grad for n, p in net.named_parameters()}}, expected)


@pytest.mark.parametrize("name", CASES)
def test_gradients_that_have_always_been_zero_leave_the_others_finite(name: str) -> None:
    net, h = network(), leaves(CASES[name][1])
    with torch.no_grad():
        net[2].bias.zero_()  # of which LAMB takes the norm
    inner = loaded(name)([net], **options(h))
    with metaoptim.SlidingWindow(offline=True):
        for t in range(T):
            inner.step(0 * loss_of(net, t))
        loss_of(net, T).backward()
    found = [*(v.grad for v in h.values()), *(p.grad for p in net.parameters())]
    assert all(g is None or bool(g.isfinite().all()) for g in found)


@pytest.mark.parametrize("name", CASES)
def test_plain_numbers_and_defaults(name: str) -> None:
    net = network()
    inner = loaded(name)([net])
    before = [p.detach().clone() for p in net.parameters()]
    with metaoptim.SlidingWindow():
        inner.step(loss_of(net, 0))
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
