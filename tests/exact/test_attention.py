"""Attention and recurrent layers, in every form and precision, against the full tape; and what the first use checks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import metaoptim
from metaoptim.compiler.lower.library import library
from metaoptim.compiler.passes.substitutes import SUBSTITUTES

STEPS = 2
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}


def gradients(
    form: str,
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module, int], Tensor],
    around: Callable[[], AbstractContextManager] = nullcontext,
    optimizer: Any = metaoptim.MetaSGD,
    offline: bool = True,
) -> dict[str, Tensor]:
    """The outer loss and its gradients by a learning rate and theta_0, where ``form`` is A, B, C or the tape."""
    torch.manual_seed(0)
    net, log_lr = build(), torch.tensor(-2.0, requires_grad=True)
    inner = optimizer([net], lr=log_lr.exp())

    def step(t: int) -> None:
        with around():
            value = loss(net, t)
        inner.step(value)

    take = metaoptim.compile(step, backend="eager") if form == "B" else step

    def whole() -> Tensor:
        with metaoptim.SlidingWindow(offline=offline, strategy="full_tape" if form == "tape" else "auto"):
            for t in range(STEPS):
                take(t)
            with around():
                return loss(net, STEPS)

    torch.manual_seed(1)
    outer = (metaoptim.compile(whole, backend="eager") if form == "C" else whole)()
    by = {"log_lr": log_lr, **(dict(net.named_parameters()) if offline else {})}
    grads = torch.autograd.grad(outer, list(by.values()))
    return {"loss": outer.detach(), **dict(zip(by, grads, strict=True))}


def agree(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Equal but for rounding: gradients by the bias of a key are nothing else."""
    scale = max(float(e.abs().max()) for e in expected.values())
    for name, e in expected.items():
        worst, size = float((got[name] - e).abs().max()), float(e.abs().max())
        assert worst <= rtol * (size + 0.02 * scale), f"{name}: off by {worst:.3g}, largest entry {size:.3g}"


class Attention(nn.Module):
    """``attend`` on five tokens of width 8, projected to queries of ``heads`` heads and keys of ``shared``."""

    def __init__(
        self, attend: Callable, dtype: torch.dtype, heads: int = 2, shared: int = 2, keys: int = 5
    ) -> None:
        super().__init__()
        self.attend, self.keys = attend, keys
        self.q, self.k, self.v = (nn.Linear(8, 4 * h, dtype=dtype) for h in (heads, shared, shared))
        self.x = torch.randn(2, 5, 8).to(dtype)

    def forward(self, t: int) -> Tensor:
        x = self.x * (1 + t)
        q, k, v = (
            f(x[:, :n]).unflatten(-1, (-1, 4)).transpose(1, 2)
            for f, n in ((self.q, 5), (self.k, self.keys), (self.v, self.keys))
        )
        return self.attend(q, k, v)


def attend(**options: Any) -> Callable:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = {
            a: b.to(q.dtype) if a == "attn_mask" and b.dtype != torch.bool else b for a, b in options.items()
        }
        return F.scaled_dot_product_attention(q, k, v, **given)

    return call


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


KEPT = random(5, 5) > -0.7
KEPT[2] = False  # this query sees nothing
#: attention, heads of the query, of the key, length of the keys
VARIANTS: dict[str, tuple[Callable, int, int, int]] = {
    "grouped": (attend(enable_gqa=True), 4, 2, 5),
    "grouped, causal": (attend(enable_gqa=True, is_causal=True), 4, 1, 5),
    "a bias for a mask": (attend(attn_mask=random(2, 1, 5, 3)), 2, 2, 3),
    "a boolean mask": (attend(attn_mask=KEPT), 2, 2, 5),
    "causal, of fewer keys, scaled": (attend(is_causal=True, scale=0.9), 2, 2, 3),
    "dropout": (attend(dropout_p=0.4), 2, 2, 5),
    "three dimensions": (lambda *qkv: attend()(*(a[:, 0] for a in qkv)), 2, 2, 5),
    "five dimensions": (lambda *qkv: attend(is_causal=True)(*(a.unsqueeze(1) for a in qkv)), 2, 2, 5),
}


@pytest.mark.filterwarnings("ignore:.*Keep parameters and optimizer state in float32")
@pytest.mark.parametrize("form", "ABC")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float64) for name in VARIANTS),
        *(
            (name, d)
            for d in (torch.float32, torch.bfloat16)
            for name in ("grouped, causal", "a boolean mask")
        ),
    ],
    ids=str,
)
def test_attention(name: str, dtype: torch.dtype, form: str) -> None:
    call, heads, shared, keys = VARIANTS[name]
    build = lambda: Attention(call, dtype, heads, shared, keys)
    loss = lambda net, t: net(t).double().sin().square().mean()
    agree(gradients(form, build, loss), gradients("tape", build, loss), TOLERANCE[dtype])


class Layer(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module], call: Callable, tokens: int = 5) -> None:
        super().__init__()
        self.layer, self.call = layer(), call
        self.register_buffer("x", torch.randn(2, tokens, 8))
        for p in self.parameters():
            nn.init.normal_(p, std=0.4)  # biases are zero at first

    def forward(self, t: int) -> Tensor:
        return self.call(self.layer, self.x * (1 + t)).double().sin().square().mean()


LAYERS: dict[str, Callable[[], Layer]] = {
    "multi-head": lambda: Layer(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)[0]
    ),
    "transformer": lambda: Layer(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), lambda m, x: m(x)
    ),
    "lstm": lambda: Layer(lambda: nn.LSTM(8, 6, bidirectional=True, batch_first=True), lambda m, x: m(x)[0]),
}


@pytest.mark.parametrize("form", "ABC")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in LAYERS),
        ("multi-head", torch.float16),
    ],  # torch has no LSTM of float16
    ids=str,
)
def test_autocast(name: str, dtype: torch.dtype, form: str) -> None:
    build, loss = lambda: LAYERS[name]().float(), lambda net, t: net(t)
    around = lambda: torch.autocast("cpu", dtype)
    agree(gradients(form, build, loss, around), gradients("tape", build, loss, around), TOLERANCE[dtype])


@pytest.mark.parametrize("optimizer", [metaoptim.MetaSGD, metaoptim.MetaAdam])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gradients_that_are_zero_but_for_rounding(dtype: torch.dtype, tokens: int, optimizer: Any) -> None:
    """Those by the bias of a key; and by all that leads to the weights of a single token."""
    attention = lambda: nn.MultiheadAttention(8, 2, batch_first=True)
    build = lambda: Layer(attention, lambda m, x: m(x, x, x, need_weights=False)[0], tokens).to(dtype)
    loss = lambda net, t: net(t)
    expected = gradients("tape", build, loss, optimizer=optimizer)
    library.clear()
    agree(gradients("A", build, loss, optimizer=optimizer), expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "small"),
    [(torch.float64, 1e-6), (torch.float32, 1e-3), (torch.bfloat16, 1e-2)],
    ids=lambda v: str(v),
)
def test_a_wrong_gradient_of_a_small_parameter_is_found(dtype: torch.dtype, small: float) -> None:
    """Its gradient is much smaller than the others', and twice what the recorder makes of it."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"large": nn.Linear(8, 4), "small": nn.Linear(8, 4)}).float()
    net.to(torch.float64 if dtype is torch.float64 else torch.float32)
    x = torch.randn(6, 8).to(net["large"].weight.dtype)
    library.clear()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            h = net["small"](x)
            h.grad_fn.register_hook(lambda gi, go: tuple(None if g is None else 2 * g for g in gi))
            return net["large"](x).sin().sum() + small * h.sin().sum()

    inner = metaoptim.MetaSGD([net], lr=0.1)
    with (
        metaoptim.SlidingWindow(offline=True),
        pytest.raises(metaoptim.CaptureError, match=r"'small\.(weight|bias)'"),
    ):
        inner.step(loss())


def test_a_full_tape_puts_torchs_switches_back() -> None:
    """Attention is taken apart while one is open, also where windows of several threads overlap."""
    enabled = torch.backends.cuda.flash_sdp_enabled
    assert enabled()
    with pytest.raises(ZeroDivisionError), metaoptim.SlidingWindow(strategy="full_tape"):
        assert not enabled()
        raise ZeroDivisionError
    assert enabled()
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with metaoptim.SlidingWindow(strategy="full_tape"):
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with pytest.warns(UserWarning, match="no inner optimizer"):
        with metaoptim.SlidingWindow(strategy="full_tape"):
            thread.start()
            entered.wait()
        assert not enabled()
        left.set()
        thread.join()
    assert enabled()


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_what_stands_for_the_fused_kernels_of_a_gpu(kernel: str) -> None:
    """Laid out in memory as torch says of theirs, and the numbers of plain attention."""
    fused = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention").default
    parts, more = SUBSTITUTES[fused], () if kernel == "flash" else (None, True)
    for axes in ((0, 1, 2, 3), (0, 2, 1, 3)):
        shape = [(2, 4, 5, 8)[a] for a in axes]
        with FakeTensorMode():
            q = torch.empty(shape, device="cuda", dtype=torch.float16).permute(axes)
            expected = fused(q, q, q, *more)[0].stride()
        q = torch.empty(shape, device="meta").permute(axes)
        assert parts(q, q, q, *more)[0].stride() == expected
    q, k, v = random(3, 2, 4, 5, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(parts(q, k, v, *more, 0.0, True, scale=0.3)[0], expected)
    with pytest.raises(metaoptim.CaptureError, match="dropout inside a fused kernel"):
        parts(q, k, v, *more, 0.1)
