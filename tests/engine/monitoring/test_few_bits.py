"""The warning of parameters and optimizer state in bfloat16 or float16, and what it measures."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from metaoptim.runtime.engine.monitoring import few_bits

XS = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_bits, "_told", set())


class LowState(metaoptim.MetaOptimizer):
    """SGD with momentum, whose buffer has few bits whatever the parameters are."""

    def __init__(self, networks: list[nn.Module], lr: float) -> None:
        super().__init__(networks, dict(lr=lr))

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        return {"buffer": torch.zeros_like(param, dtype=torch.bfloat16)}

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        buffer = state["buffer"] * 0.9 + grad.to(torch.bfloat16)
        return param - hyper["lr"] * buffer.to(param.dtype), {"buffer": buffer}


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def told(
    dtype: torch.dtype,
    optimizer: Any = metaoptim.MetaAdam,
    form: str = "A",
    *,
    lr: float = 1e-2,
    loss: Any = None,
    autocast: bool = False,
    **window: Any,
) -> tuple[list[str], list[Tensor | None]]:
    """The warnings of three steps and a backward, and the gradients by theta_0."""
    net, xs = network(dtype), XS.to(dtype)
    inner = optimizer([net], lr=lr)
    loss = loss or (lambda net, x: (net(x) - x[:, :1]).square().mean())

    def step(x: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(net, x)
        inner.step(value)

    take = metaoptim.compile(step, backend="eager") if form == "B" else step

    def whole(xs: Tensor) -> Tensor:
        with metaoptim.SlidingWindow(offline=True, **window):
            for x in xs[:3]:
                take(x)
            return (net(xs[4]) - 1).square().mean()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (metaoptim.compile(whole, backend="eager") if form == "C" else whole)(xs).backward()
    return [str(w.message) for w in caught], [p.grad for p in net.parameters()]


def figure(text: str) -> float:
    found = re.search(r"a cosine of (-?[\d.]+) with the same in float32", text)
    assert found is not None, text
    return float(found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", "ABC")
def test_parameters_and_state(form: str, dtype: torch.dtype) -> None:
    """Once; with the step, what has few bits, what that costs, and what to do."""
    texts, _ = told(dtype, metaoptim.MetaSGD, form)
    (text,) = texts
    short = str(dtype).removeprefix("torch.")
    assert "test_few_bits.py:" in text and f"has parameters in {short}: " in text
    assert f"torch.autocast(..., dtype=torch.{short})" in text
    assert figure(text) > 0.9
    assert told(dtype, metaoptim.MetaSGD, form)[0] == []
    (text,) = told(dtype, lambda nets, lr: metaoptim.MetaSGD(nets, lr=lr, momentum=0.9), form)[0]
    assert f"has optimizer state in {short}: " in text


def test_adam_loses_more_than_sgd() -> None:
    """Its second derivatives are next to those of a sign."""
    (text,) = told(torch.bfloat16, lr=1e-3)[0]
    assert "has optimizer state in bfloat16 and parameters in bfloat16: " in text
    assert abs(figure(text)) < 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", "AC")
def test_not_told(form: str, dtype: torch.dtype) -> None:
    """Of parameters with enough bits nothing is said; autocast is what the warning recommends."""
    assert told(dtype, form=form)[0] == []
    assert told(torch.float32, form=form, autocast=True)[0] == []


@pytest.mark.parametrize("form", "AC")
def test_state_alone(form: str) -> None:
    (text,) = told(torch.float32, LowState, form)[0]
    assert "has optimizer state in bfloat16: " in text and figure(text) > 0.99


def test_figure_is_that_of_eager() -> None:
    """The last step's derivative by eager autograd, in few bits and in float32: what it adds to the cotangent."""
    net, xs = network(torch.bfloat16), XS.bfloat16()

    def added(dtype: torch.dtype, theta: list[Tensor], cotangent: list[Tensor]) -> Tensor:
        theta = [t.detach().to(dtype).requires_grad_() for t in theta]
        names = [name for name, _ in net.named_parameters()]
        out = torch.func.functional_call(net, dict(zip(names, theta)), xs[2].to(dtype))
        grads = torch.autograd.grad((out - xs[2, :, :1].to(dtype)).square().mean(), theta, create_graph=True)
        new = [t - 2e-3 * g for t, g in zip(theta, grads, strict=True)]
        pulled = torch.autograd.grad(new, theta, [c.to(dtype) for c in cotangent])
        return torch.cat(
            [(p - c.to(dtype)).double().flatten() for p, c in zip(pulled, cotangent, strict=True)]
        )

    inner = metaoptim.MetaSGD([net], lr=2e-3)
    with metaoptim.SlidingWindow():
        for x in xs[:3]:
            theta = [p.detach().clone() for p in net.parameters()]
            inner.step((net(x) - x[:, :1]).square().mean())
    outer = (net(xs[4]) - 1).square().mean()
    cotangent = list(torch.autograd.grad(outer, list(net.parameters())))
    few, wide = (added(dtype, theta, cotangent) for dtype in (torch.bfloat16, torch.float32))
    expected = float(few @ wide / (few.norm() * wide.norm()))
    assert expected < 0.999
    (text,) = told(torch.bfloat16, metaoptim.MetaSGD, lr=2e-3)[0]
    assert figure(text) == pytest.approx(expected, abs=1e-3)


def test_nothing_is_changed() -> None:
    """The gradient is the same to the bit, and a hook of the user's is called for the backward alone."""
    calls: list[int] = []

    def hook(cotangent: Tensor) -> None:
        calls.append(1)

    texts, first = told(torch.bfloat16, backward_hook=hook)
    assert len(texts) == 1 and len(calls) == 3 * 4
    texts, second = told(torch.bfloat16, backward_hook=hook)
    assert texts == [] and all(map(torch.equal, first, second))


def test_without_a_figure() -> None:
    """Where there are no second derivatives, memory is limited, or a Function of the user's would be called for it."""

    class Bits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if x.dtype is not torch.bfloat16:
                raise RuntimeError("bfloat16 only")
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 2

    (text,) = told(torch.bfloat16, metaoptim.MetaSGD, loss=lambda net, x: Bits.apply(net(x)).square().mean())[
        0
    ]
    assert "cosine" not in text and "Keep parameters" in text
    few_bits._told.clear()
    (text,) = told(torch.bfloat16, metaoptim.MetaSGD, slots=2)[0]
    assert "cosine" not in text
    few_bits._told.clear()
    (text,) = told(
        torch.bfloat16, metaoptim.MetaSGD, loss=lambda net, x: net(x).mean(), gradient="first_order"
    )[0]
    assert "cosine" not in text and "Keep parameters" in text


def test_casts_in_the_loss_are_widened() -> None:
    """A norm in float32 inside a network of few bits gives what it has been given."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        out = net(x)
        return ((out.float() - out.float().mean()).to(torch.bfloat16) * out).sum()

    (text,) = told(torch.bfloat16, metaoptim.MetaSGD, loss=loss)[0]
    assert figure(text) > 0.9
