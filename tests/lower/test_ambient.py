"""Graphs run with PyTorch's ambient modes as they were captured with, whatever is switched on when they run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import full_tape

X = torch.linspace(-1, 1, 60, dtype=torch.float32).view(20, 3)


def bf16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def off() -> Any:
    return torch.autocast("cpu", enabled=False)


def nested() -> Any:
    @contextmanager
    def both() -> Iterator[None]:
        with bf16(), off(), bf16():
            yield

    return both()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def meta_gradient(
    form: str,
    inside: Callable[[], Any] = nullcontext,
    call: Callable[[], Any] = nullcontext,
    back: Callable[[], Any] = nullcontext,
    module: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)),
    x: Tensor = X,
    slots: int | None = None,
) -> dict[str, Tensor]:
    """Three steps; the outer loss has no operator that autocast concerns: what pulls it back is torch's own."""
    torch.manual_seed(0)
    net, eta = module().to(x.dtype), torch.tensor(0.5, dtype=x.dtype, requires_grad=True)
    inner = metaoptim.MetaSGD([net], lr=0.3, momentum=0.5)

    def step() -> Tensor:
        with inside():
            loss = net(x).square().mean() * eta
        inner.step(loss)
        return loss.detach()

    def whole(window: Any, step: Callable = step) -> Any:
        with window(offline=True):
            losses = [step() for _ in range(3)]
            return sum(p.square().sum() for p in net.parameters()), losses[-1]

    windows = functools.partial(metaoptim.SlidingWindow, slots=slots)
    with call():
        if form == "tape":
            outer, loss = whole(full_tape)
        elif form == "C":
            outer, loss = metaoptim.compile(whole, backend="eager", slots=slots)(metaoptim.SlidingWindow)
        else:
            taken = metaoptim.compile(step, backend="eager") if form == "B" else step
            outer, loss = whole(windows, taken)
    with back():
        outer.backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {"loss": loss, "outer": outer.detach(), "eta": eta.grad, **grads}  # type: ignore[dict-item]


def same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == expected.keys() and float(expected["eta"].abs()) > 1e-4
    for key, value in expected.items():
        torch.testing.assert_close(
            got[key], value, rtol=rtol, atol=0.1 * rtol, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("form", ["A", "B", "C"])
@pytest.mark.parametrize(
    ("inside", "call"), [(off, bf16), (bf16, nullcontext), (nullcontext, bf16), (nested, off), (bf16, bf16)]
)
@pytest.mark.parametrize(("back", "slots"), [(nullcontext, None), (bf16, 1)])
def test_autocast(form: str, inside: Callable, call: Callable, back: Callable, slots: int | None) -> None:
    expected = meta_gradient("tape", inside, call)
    # of an autocast to 8 bits, other orders of the same sums are seen
    rtol = 1e-5 if inside is off else 2e-2
    same(meta_gradient(form, inside, call, back, slots=slots), expected, rtol)
    if inside is not off:
        once_more = meta_gradient(form, inside, call, slots=slots)
        same(meta_gradient(form, inside, call, back, slots=slots), once_more)


class _Attention(nn.Module):
    """One causal head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(4, 5, 3, 8).unbind(2)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("form", ["B", "C"])
@pytest.mark.parametrize("back", [nullcontext, bf16])
def test_attention_under_the_callers_autocast(form: str, back: Callable) -> None:
    x = X.view(4, 5, 3)
    expected = meta_gradient("tape", off, bf16, module=_Attention, x=x)
    same(meta_gradient(form, off, bf16, back, _Attention, x, slots=2), expected, 1e-4)


OTHERS = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "default dtype": lambda: default_dtype(torch.float32),
    "default device": lambda: torch.device("meta"),
}


class _Makes(nn.Module):
    """Computes with what it makes of integers, which is of the default dtype, and with what it makes from nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rows = nn.Linear(3, 2), torch.arange(20).view(20, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (self.rows / 7) + torch.full((2,), 0.1)


@pytest.mark.parametrize("form", ["A", "B", "C"])
@pytest.mark.parametrize("mode", OTHERS)
def test_other_modes_at_the_backward(form: str, mode: str) -> None:
    if mode == "inference mode" and form == "A":
        pytest.skip("the outer loss's own backward is torch's")
    expected = meta_gradient("tape", module=_Makes, x=X.double())
    same(meta_gradient(form, back=OTHERS[mode], module=_Makes, x=X.double(), slots=2), expected, 1e-12)


@pytest.mark.parametrize("form", ["B", "C"])
def test_a_default_device_at_the_call(form: str) -> None:
    """What the function makes itself goes there; nothing that the engine makes does."""
    same(meta_gradient(form, call=lambda: torch.device("meta"), slots=2), meta_gradient("tape"))


CHANGES: dict[str, Callable[[bool], Any]] = {
    "autocast": lambda on: bf16() if on else off(),
    "default dtype": lambda on: default_dtype(torch.float32 if on else torch.float64),
    "default device": lambda on: torch.device("cpu") if on else nullcontext(),
    "deterministic": lambda on: _set(torch.use_deterministic_algorithms, on, False),
    "precision": lambda on: _set(torch.set_float32_matmul_precision, "high" if on else "highest", "highest"),
}


@contextmanager
def _set(function: Callable, value: Any, before: Any) -> Iterator[None]:
    function(value)
    try:
        yield
    finally:
        function(before)


@pytest.mark.parametrize("change", CHANGES)
def test_other_modes_are_captured_anew(change: str) -> None:
    @metaoptim.compile(backend="eager")
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return (net(x) * torch.full((2,), 0.1)).square().mean()

    net = nn.Linear(3, 2).float()
    for on, programs in ((False, 1), (True, 2), (True, 2), (False, 2)):
        with CHANGES[change](on):
            expected = (net(X) * torch.full((2,), 0.1)).square().mean()
            torch.testing.assert_close(loss(net, X), expected, rtol=1e-6, atol=0)
            assert sum(map(len, loss._specializations.known.values())) == programs


def test_a_call_in_inference_mode_serves_later_ones() -> None:
    net, eta = nn.Linear(3, 2).float(), torch.tensor(0.5, requires_grad=True)

    @metaoptim.compile(backend="eager")
    def outer() -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=eta)
        with metaoptim.SlidingWindow(offline=True):
            for _ in range(2):
                inner.step((net(X) - torch.tensor([0.5, -0.5])).square().mean())
            return net(X).square().mean()

    with torch.inference_mode():
        first = outer()
    loss = outer()
    loss.backward()
    assert float(first) == float(loss.detach()) and float(eta.grad.abs()) > 1e-4  # type: ignore[union-attr]
    assert not eta.grad.is_inference()  # type: ignore[union-attr]
