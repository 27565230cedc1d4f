"""Tensors overwritten in the middle of an inner step: exact, or refused in the same words in every form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import leaf, mlp
from oracle import agree

WINDOWS: list[dict[str, Any]] = [{}, {"slots": 1}, {"slots": 2}]
X, Y = torch.linspace(-1, 1, 15).view(5, 3), torch.linspace(0.5, -0.7, 10).view(5, 2)


def _whole(scale: Tensor) -> Tensor:
    return (scale * 3).detach()


def _in_place(scale: Tensor) -> Tensor:
    return (scale * 3).detach_()


def _of_a_value(scale: Tensor) -> Tensor:
    kept = scale * 3
    return kept.detach()


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("cut", [_whole, _in_place, _of_a_value])
def test_a_detached_tensor_is_written_through_a_view(cut: Any, offline: bool) -> None:
    """It requires grad then, by what was written; nothing flows on to what it was detached from."""

    def gradients(**window: Any) -> dict[str, Tensor | None]:
        net, written, scale = mlp(), leaf(0.7), torch.tensor([0.3, 1.2], requires_grad=True)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=offline, **window):
            for _ in range(3):
                factor = cut(scale)
                factor[0] = written
                inner.step(F.mse_loss(net(X) * factor, Y))
            F.mse_loss(net(X), Y).backward()
        return {"written": written.grad, "scale": scale.grad}

    expected = gradients(strategy="full_tape")
    assert expected["scale"] is None and expected["written"] is not None
    assert float(expected["written"].abs()) > 1e-3
    for window in WINDOWS:
        agree(gradients(**window), expected)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("window", [*WINDOWS, {"window": 2}], ids=str)
def test_the_parameter_of_another_network_between_loss_and_step(window: dict, known: bool) -> None:
    """The step goes back to the value that its loss has read; also where its step graph was met before."""
    size = 3 + known + 2 * len(window)  # a structure of its own

    def gradients(**options: Any) -> dict[str, Tensor | None]:
        torch.manual_seed(0)
        a, b = nn.Linear(size, 2), nn.Linear(size, 2)
        x = torch.randn(5, size, generator=torch.Generator().manual_seed(1))
        first, second = metaoptim.MetaSGD([a], lr=0.1), metaoptim.MetaSGD([b], lr=0.1)
        for write in [False, True] if known else [True]:
            a.zero_grad()
            b.zero_grad()
            with metaoptim.SlidingWindow(offline=True, **options):
                for _ in range(2):
                    loss = F.mse_loss(a(x) + b(x), Y)
                    if write:
                        with torch.no_grad():
                            a.bias.mul_(0.9)
                    second.step(loss)
                F.mse_loss(a(x) + b(x), Y).backward()
        assert first is not None
        return {f"{i}{n}": p.grad for i, net in enumerate((a, b)) for n, p in net.named_parameters()}

    agree(gradients(**window), gradients(strategy="full_tape"))


def _twice(net: nn.Module, m: Tensor) -> Tensor:
    loss = F.mse_loss(net(X) * m, Y)
    with torch.no_grad():
        net.get_parameter("0.bias").mul_(0.9)
    return loss + net(X).square().mean()


def _after(net: nn.Module, m: Tensor) -> Tensor:
    loss = F.mse_loss(net(X) * m, Y)
    with torch.no_grad():
        net.get_parameter("0.bias").mul_(0.9)
    return loss


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("loss", [_twice, _after])
@pytest.mark.parametrize("form", ["A", "full_tape", "B", "C"])
def test_its_own_parameter_between_loss_and_step(form: str, loss: Any, offline: bool) -> None:
    """A training loop would step by the sum of both gradients, and nothing here could tell which theta that is of."""
    net, m = mlp(), leaf(0.7)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    inner = metaoptim.MetaSGD([net], lr=0.1)
    options: Any = {"strategy": "full_tape"} if form == "full_tape" else {}

    def step() -> None:
        inner.step(loss(net, m), allow_unused=True)

    def loop(take: Any) -> Tensor:
        with metaoptim.SlidingWindow(offline=offline, **options):
            for _ in range(3):
                take()
            return F.mse_loss(net(X), Y)

    with pytest.raises(
        metaoptim.CaptureError,
        match=r"parameter '(net\.)?0\.bias' was overwritten between its use in the loss and the step",
    ):
        if form == "C":
            metaoptim.compile(backend="eager")(lambda: loop(step))()
        else:
            loop(metaoptim.compile(backend="eager")(step) if form == "B" else step)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert m.grad is None and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("form", ["A", "full_tape", "C"])
def test_after_the_step_it_is_a_history_cut(form: str) -> None:
    """As clipping weights is; the next loss reads what was written."""

    def gradients(form: str) -> dict[str, Tensor | None]:
        net, m = mlp(), leaf(0.7)
        inner = metaoptim.MetaSGD([net], lr=0.1 * m)
        options: Any = {"strategy": "full_tape"} if form == "full_tape" else {}

        def of(net: nn.Module, m: Tensor) -> Tensor:
            with metaoptim.SlidingWindow(offline=True, **options):
                for _ in range(3):
                    inner.step(F.mse_loss(net(X) * m, Y))
                    with torch.no_grad():
                        net.get_parameter("0.weight").clamp_(-0.4, 0.4)
                return F.mse_loss(net(X), Y)

        (metaoptim.compile(backend="eager")(of) if form == "C" else of)(net, m).backward()
        return {"m": m.grad, **{n: p.grad for n, p in net.named_parameters()}}

    agree(gradients(form), gradients("full_tape"))
