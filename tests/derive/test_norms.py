"""Operators whose derivatives torch differentiates wrongly: norms, weight norm, forward mode inside a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import metaoptim
from metaoptim.compiler.derive.norms import FORMULAS

aten = torch.ops.aten
# torch's own forward mode uses torch.jit.script
FORWARD_MODE = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning"
)
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
    with pytest.raises(metaoptim.CaptureError, match="write the norm in plain operators"):
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
        with pytest.raises(metaoptim.CaptureError, match="the loss reads the statistics"):
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


# -- weight norm, whose second derivative is wrong already ------------------------------------------------------------


class PlainWeightNorm(nn.Module):
    """What `torch.nn.utils.parametrizations.weight_norm` does, in plain operators."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def norms(self, v: Tensor) -> Tensor:
        return v.square().sum([d for d in range(v.dim()) if d != self.dim], keepdim=True).sqrt()

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / self.norms(v))

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.norms(w), w


def weight_normed(native: bool, dim: int, convolution: bool, **window: Any) -> list[Tensor]:
    torch.manual_seed(0)
    layer: nn.Module = nn.Conv1d(2, 3, 2) if convolution else nn.Linear(4, 3)
    x, y = torch.randn(6, 2, 4) if convolution else torch.randn(6, 4), torch.randn(6, 3)
    if native:
        layer = parametrizations.weight_norm(layer, dim=dim)
    else:
        parametrize.register_parametrization(layer, "weight", PlainWeightNorm(dim))
    lr = torch.tensor(0.3, requires_grad=True)
    inner = metaoptim.MetaSGD([layer], lr=lr)
    form = window.pop("form", "A")

    def outputs() -> Tensor:
        return layer(x).mean(-1) if convolution else layer(x)

    def step() -> None:
        inner.step((outputs() - y).square().mean())

    stepped = metaoptim.compile(step, backend="eager") if form == "B" else step

    def loss() -> Tensor:
        with metaoptim.SlidingWindow(offline=True, **window):
            for _ in range(3):
                stepped()
            return (outputs().tanh() - y).square().mean()

    (metaoptim.compile(loss, backend="aot_eager") if form == "C" else loss)().backward()
    assert lr.grad is not None and lr.grad != 0
    return [lr.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("form", ["A", "B", "C"])
@pytest.mark.parametrize(("dim", "convolution"), [(0, False), (1, False), (0, True), (2, True)])
def test_weight_norm(dim: int, convolution: bool, form: str) -> None:
    expected = weight_normed(False, dim, convolution, strategy="full_tape")
    assert len(expected) == 4  # the rate, bias, g and v
    agree(weight_normed(True, dim, convolution, form=form, slots=None if form == "B" else 1), expected)


def test_weight_norm_in_forward_mode() -> None:
    expected = weight_normed(False, 0, False, strategy="full_tape")
    agree(weight_normed(True, 0, False, gradient="forward"), expected)


def test_weight_norm_is_refused_where_torchs_formula_would_be_taken() -> None:
    with pytest.raises(metaoptim.CaptureError, match="second derivative of weight norm"):
        weight_normed(True, 0, False, strategy="full_tape")
    net = parametrizations.weight_norm(nn.Linear(3, 2))
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True):
        x = torch.randn(4, 3).requires_grad_()
        (slope,) = torch.autograd.grad(net(x).pow(3).sum(), list(net.parameters())[1], create_graph=True)
        with pytest.raises(metaoptim.CaptureError, match="the loss reads the statistics"):
            inner.step(slope.square().mean())


# -- forward mode inside a loss ---------------------------------------------------------------------------------------

WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda t: F.layer_norm(t, (4,)),
    "batch norm": lambda t: F.batch_norm(t, None, None, training=True),
    "instance norm": lambda t: F.instance_norm(t[None]),
    "solve": lambda t: torch.linalg.solve(t.T @ t + 1, t.T),
    "det": lambda t: torch.linalg.det(t.T @ t + 1),
    "slogdet": lambda t: torch.linalg.slogdet(t.T @ t + 1)[1],
    "logdet": lambda t: torch.logdet(t.T @ t + torch.eye(4)),
}
RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "group norm": lambda t: F.group_norm(t, 2),
    "rms norm": lambda t: F.rms_norm(t, (4,)),
    "batch norm, evaluating": lambda t: F.batch_norm(t.tanh(), torch.full((4,), 0.1), torch.full((4,), 0.8)),
    "inv": lambda t: torch.linalg.inv(t.T @ t + torch.eye(4)),
}


def by_directions(
    fn: Callable[[Tensor], Tensor], eta: float, form: str, **window: Any
) -> tuple[float, float]:
    """The outer loss, and its derivative by ``eta``."""
    torch.manual_seed(0)
    net, x, v = nn.Linear(3, 4), torch.randn(6, 3), torch.randn(6, 3)
    weight = torch.tensor(eta, requires_grad=True)
    inner = metaoptim.MetaSGD([net], lr=0.02)

    def loss() -> Tensor:
        with metaoptim.SlidingWindow(offline=True, **window):
            for _ in range(2):
                along = torch.func.jvp(lambda x: fn(net(x)), (x,), (v,))[1]
                inner.step(weight * along.sin().square().sum())
            return net(x).sin().sum()

    out = (metaoptim.compile(loss, backend="eager") if form == "C" else loss)()
    out.backward()
    assert weight.grad is not None
    return out.item(), weight.grad.item()


@FORWARD_MODE
@pytest.mark.parametrize("form", ["A", "full tape", "C"])
@pytest.mark.parametrize("case", WRONG)
def test_forward_mode_that_torch_differentiates_wrongly_is_refused(case: str, form: str) -> None:
    window = {"strategy": "full_tape"} if form == "full tape" else {}
    with pytest.raises(metaoptim.CaptureError, match="within forward-mode differentiation"):
        by_directions(WRONG[case], 0.7, form, **window)


@FORWARD_MODE
@pytest.mark.parametrize("case", RIGHT)
def test_other_forward_mode_is_exact(case: str) -> None:
    step = 1e-5
    up, down = (by_directions(RIGHT[case], 0.7 + s, "A")[0] for s in (step, -step))
    slope = (up - down) / (2 * step)
    assert abs(slope) > 1e-4
    assert by_directions(RIGHT[case], 0.7, "A", slots=1)[1] == pytest.approx(slope, rel=1e-6)
