"""Norms in losses that hold a derivative themselves, against norms in plain operators: torch's own third is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.derive.norms import FORMULAS

aten = torch.ops.aten
MODES = ("layer", "batch", "instance", "batch in evaluation mode")


class Norm(nn.Module):
    """A norm of the features, by torch's operator or in plain ones."""

    def __init__(self, mode: str, native: bool) -> None:
        super().__init__()
        self.mode, self.native = mode, native
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.bias = nn.Parameter(torch.linspace(-0.3, 0.4, 4))
        self.register_buffer("mean", torch.linspace(-0.1, 0.2, 4))
        self.register_buffer("var", torch.linspace(0.7, 1.1, 4))

    def forward(self, x: Tensor) -> Tensor:
        given, batch = (self.weight, self.bias), x[None] if self.mode == "instance" else x
        if not self.native:
            if self.mode == "batch in evaluation mode":
                normed = (x - self.mean) / (self.var + 1e-5).sqrt()
            else:
                dim = -1 if self.mode == "layer" else 0
                mean = x.mean(dim, keepdim=True)
                normed = (x - mean) / ((x - mean).square().mean(dim, keepdim=True) + 1e-5).sqrt()
            return normed * self.weight + self.bias
        if self.mode == "layer":
            return F.layer_norm(x, (4,), *given)
        if self.mode == "instance":
            return F.instance_norm(batch.transpose(1, 2), None, None, *given)[0].T
        training = self.mode == "batch"
        stats: Any = (None, None) if training else (self.mean, self.var)
        return F.batch_norm(x, *stats, *given, training)


class Setting:
    def __init__(self, mode: str, native: bool) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), Norm(mode, native), nn.Tanh(), nn.Linear(4, 2))
        self.x, self.y = torch.randn(2, 8, 3).unbind()
        self.lr, self.weight = (torch.tensor(v, requires_grad=True) for v in (0.1, 0.3))
        self.inner = metaoptim.MetaSGD([self.net], lr=self.lr)

    def penalized(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = self.net(x)
        (slope,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return out.square().mean() + self.weight * slope.square().mean()

    def outer(self) -> Tensor:
        return self.net(self.y).pow(3).mean()

    def gradients(self) -> list[Tensor]:
        leaves = (self.lr, self.weight, *self.net.parameters())
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def by_penalty(setting: Setting, form: str, **window: Any) -> list[Tensor]:
    def loss() -> Tensor:
        with metaoptim.SlidingWindow(offline=True, **window):
            for _ in range(2):
                setting.inner.step(setting.penalized(setting.x))
            return setting.outer()

    (metaoptim.compile(loss, backend="aot_eager") if form == "C" else loss)().backward()
    return setting.gradients()


def by_windows(setting: Setting, **window: Any) -> list[Tensor]:
    meta = metaoptim.MetaSGD([setting.net], lr=0.2)
    with metaoptim.SlidingWindow(offline=True, **window):
        for _ in range(2):
            with metaoptim.SlidingWindow(offline=True):
                setting.inner.step(setting.net(setting.x).pow(3).mean())
                loss = setting.outer()
            meta.step(loss)
        setting.outer().backward()
    return setting.gradients()


def agree(got: list[Tensor], expected: list[Tensor]) -> None:
    largest = max(float(t.abs().max()) for t in expected)
    assert largest > 1e-3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * largest)


@pytest.mark.parametrize("form", ["A", "C"])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_penalties(mode: str, form: str) -> None:
    expected = by_penalty(Setting(mode, native=False), "A", strategy="full_tape")
    agree(by_penalty(Setting(mode, native=True), form, slots=1), expected)


@pytest.mark.parametrize("mode", MODES)
def test_windows_inside_windows(mode: str) -> None:
    expected = by_windows(Setting(mode, native=False), strategy="full_tape")
    agree(by_windows(Setting(mode, native=True), slots=1), expected)


def test_autograds_tape_is_refused() -> None:
    """Where torch's own formulas would be differentiated, it gets them wrong, or raises."""
    setting = Setting("layer", native=True)
    with pytest.raises(metaoptim.CaptureError, match="NativeLayerNormBackwardBackward0"):
        by_penalty(setting, "A", strategy="full_tape")
    assert all(t.grad is None for t in setting.net.parameters())
    with pytest.raises(metaoptim.CaptureError, match="derivative of a norm"):
        by_windows(setting, strategy="full_tape")
    first = metaoptim.MetaSGD([setting.net], lr=0.1, first_order=True)
    with metaoptim.SlidingWindow(offline=True, strategy="full_tape"):  # which takes the second alone
        first.step(setting.penalized(setting.x))


def test_second_derivatives_in_a_loss_are_refused() -> None:
    setting = Setting("layer", native=True)
    with metaoptim.SlidingWindow(offline=True):
        x = setting.x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(setting.net(x).pow(3).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
        with pytest.raises(metaoptim.CaptureError, match="a second derivative of"):
            setting.inner.step(bend.square().mean())


CASES: dict[str, tuple[tuple[int, ...], Any]] = {
    # shape, and what is normed over; or whether in training mode
    "layer": ((5, 3, 4), [3, 4]),
    "layer, over all": ((3, 4), [3, 4]),
    "batch": ((6, 4, 3), True),
    "batch, evaluating": ((6, 4), False),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_formulas_give_what_the_operators_give(case: str, dtype: torch.dtype, affine: bool) -> None:
    shape, of = CASES[case]
    torch.manual_seed(0)
    x, grad = torch.randn(2, *shape).to(dtype).unbind()
    masks = [(True, affine, affine), (False, affine, affine), (True, False, False)]
    if case.startswith("layer"):
        weight, bias = torch.randn(2, *of).to(dtype).unbind() if affine else (None, None)
        _, mean, rstd = aten.native_layer_norm(x, of, weight, bias, 1e-3)
        op, args = aten.native_layer_norm_backward.default, (grad, x, of, mean, rstd, weight, bias)
    else:
        weight, bias = torch.randn(2, 4).to(dtype).unbind() if affine else (None, None)
        running = torch.linspace(-0.2, 0.3, 4, dtype=dtype), torch.linspace(0.5, 1.5, 4, dtype=dtype)
        _, mean, rstd = aten.native_batch_norm(x, weight, bias, *running, of, 0.0, 1e-3)
        op = aten.native_batch_norm_backward.default
        args = (grad, x, weight, *running, mean, rstd, of, 1e-3)
    near = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-9, "atol": 1e-12}
    for mask in masks:
        found, expected = FORMULAS[op](*args, mask), op(*args, mask)
        for got, want, asked in zip(found, expected, mask, strict=True):
            if asked:
                torch.testing.assert_close(got, want, **near)
            else:
                assert got is None


def test_formulas_of_other_libraries() -> None:
    """cuDNN's and MIOpen's operators, which need their devices, have their arguments in another order."""
    torch.manual_seed(0)
    x, grad, weight = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4)
    _, mean, invstd = aten.native_batch_norm(x, weight, weight, None, None, True, 0.0, 1e-3)
    args = (x, grad, weight, None, None, mean, invstd, 1e-3)
    mask = (True, True, True)
    expected = aten.native_batch_norm_backward(grad, x, weight, None, None, mean, invstd, True, 1e-3, mask)
    reserve = torch.empty(0)
    for op, given in (("cudnn", (*args, reserve)), ("miopen", args)):
        found = FORMULAS[getattr(aten, f"{op}_batch_norm_backward").default](*given)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want)
