"""Inner loops of real models: tiny, randomly initialised, trained by Adam with a learnt rate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import metaoptim
from oracle import agree

STEPS = 4

if importlib.util.find_spec("torchvision") is not None and not torch.backends.cuda.is_built():
    # Beside a torch without CUDA its wheel has none of its operators, and cannot be imported without these names.
    # Nothing here calls them.
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou) -> Tensor")


class Model(NamedTuple):
    """How to build a model, its loss of one batch and its labels, and these of every step and of the outer loss."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    xs: Tensor
    ys: Tensor


def draw(*shape: int, seed: int = 4) -> Tensor:
    """The same numbers every time; one row for each step, and one for the outer loss."""
    return torch.randn(STEPS + 1, *shape, generator=torch.Generator().manual_seed(seed))


def numbers(low: int, high: int, *shape: int, seed: int = 3) -> Tensor:
    """Integers, as of `draw`."""
    return torch.randint(low, high, (STEPS + 1, *shape), generator=torch.Generator().manual_seed(seed))


def made(model: Model, low: bool = False) -> nn.Module:
    """The network in float64, or float32 if ``low``, no parameter of which is zero or alike another."""
    torch.manual_seed(0)
    net = model.build()
    net = net.float() if low else net.double()
    for p in net.parameters():
        values = torch.view_as_real(p.detach()) if p.is_complex() else p
        nn.init.normal_(values, mean=values.mean().item(), std=0.1)
    return net


def gradients(
    model: Model,
    form: str,
    offline: bool = True,
    *,
    optimizer: Any = metaoptim.MetaAdam,
    autocast: Any = nullcontext,
    wrapped: Callable[[nn.Module], nn.Module] = lambda net: net,
    backend: str = "eager",
) -> dict[str, Tensor | None]:
    """The outer loss, and its gradients by a learnt learning rate and theta_0, in a form or by the tape.

    Form "A" is a window, "B" one with a compiled step, "C" a compiled function, "tape" autograd's own tape.
    """
    net = wrapped(made(model, low=autocast is not nullcontext))
    log_lr = torch.tensor(-5.0, requires_grad=True)
    inner = optimizer([net], lr=log_lr.exp())

    def step(x: Tensor, y: Tensor) -> None:
        with autocast():
            loss = model.loss(net, x, y)
        inner.step(loss, allow_unused=True)

    take = metaoptim.compile(step, backend=backend) if form == "B" else step

    def whole(xs: Tensor, ys: Tensor) -> Tensor:
        with metaoptim.SlidingWindow(offline=offline, strategy="full_tape" if form == "tape" else "auto"):
            for x, y in zip(xs[:STEPS], ys[:STEPS]):
                take(x, y)
            with autocast():
                return model.loss(net, xs[STEPS], ys[STEPS])

    outer = (metaoptim.compile(whole, backend=backend) if form == "C" else whole)(model.xs, model.ys)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    by = {"log_lr": log_lr, **(trained if offline else {})}
    grads = torch.autograd.grad(outer, list(by.values()), allow_unused=True)
    return {"loss": outer.detach(), **dict(zip(by, grads, strict=True))}


def check(
    model: Model,
    forms: str = "AC",
    *,
    tape: Model | None = None,
    modes: Sequence[bool] = (True, False),
    rtol: float = 1e-9,
    **options: Any,
) -> None:
    """The forms give what the tape gives, offline and online; ``tape``: a model that is the same to the tape."""
    for offline in modes:
        expected = gradients(tape or model, "tape", offline, **options)
        assert abs(float(expected["log_lr"])) > 1e-3  # type: ignore[arg-type]
        for form in forms:
            agree(gradients(model, form, offline, **options), expected, rtol=rtol)
