"""compile(recapture=True): a function that has changed behind its guards is found out."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from forms import leaf, mlp


class Settings:
    """What a function reads and no guard covers, since it comes from a function of Python's own."""

    def __init__(self) -> None:
        self.scale, self.steps, self.shift, self.square = 0.5, 3, torch.tensor(0.2), True
        self.row, self.name = 0, "loss"


def loss_of(net: nn.Module, x: Tensor, settings: Settings) -> Tensor:
    out = net(x[settings.row]) * settings.scale + settings.shift + torch.tensor(0.1)
    return out.square().mean() if settings.square else out.abs().mean()


_HIDDEN: ContextVar[Settings] = ContextVar("hidden")
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"scale": 0.7}, r"(?s)was\n.*0\.5.*and is\n.*0\.7"),
    "an operator": ({"square": False}, r"(?s)was\n.*pow.*and is\n.*abs"),
    "a tensor": ({"shift": torch.tensor(0.3)}, "a constant tensor of shape .* has other values"),
    "what is learnt": ({"shift": torch.tensor(0.2, requires_grad=True)}, "it does something else|was"),
    "a row": ({"row": 1}, "another row"),
    "what it returns": ({"name": "penalty"}, "'penalty'"),
}
IN_WHOLE = CHANGES | {"a length": ({"steps": 4}, "took 3 inner steps, and takes 4")}


@pytest.mark.parametrize("change", IN_WHOLE)
def test_a_function(change: str) -> None:
    _HIDDEN.set(settings := Settings())
    net, log_lr, x = mlp(), leaf(-1.0), torch.randn(2, 5, 3)

    @metaoptim.compile(backend="eager", recapture=True)
    def meta_loss(net: nn.Module, log_lr: Tensor, x: Tensor) -> Any:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(offline=True):
            for _ in range(_HIDDEN.get().steps):
                inner.step(loss_of(net, x, _HIDDEN.get()))
            return loss_of(net, x, _HIDDEN.get()), _HIDDEN.get().name

    first, name = meta_loss(net, log_lr, x)
    again, _ = meta_loss(net, log_lr, x)
    assert torch.equal(first, again) and name == "loss"
    before = [p.clone() for p in net.parameters()]
    for key, value in IN_WHOLE[change][0].items():
        setattr(settings, key, value)
    with pytest.raises(metaoptim.CaptureError, match=IN_WHOLE[change][1]) as caught:
        meta_loss(net, log_lr, x)
    assert "frozen at capture" in str(caught.value) and "meta_loss" in str(caught.value)
    assert all(map(torch.equal, before, net.parameters()))
    assert log_lr.grad is None


@pytest.mark.parametrize("change", ["a number", "a tensor", "what it returns"])
def test_a_step(change: str) -> None:
    _HIDDEN.set(settings := Settings())
    net, log_lr, x = mlp(), leaf(-1.0), torch.randn(2, 5, 3)
    inner = metaoptim.MetaSGD([net], lr=log_lr.exp())

    @metaoptim.compile(backend="eager", recapture=True)
    def step(x: Tensor) -> str:
        inner.step(loss_of(net, x, _HIDDEN.get()))
        return _HIDDEN.get().name

    with pytest.raises(metaoptim.CaptureError, match="frozen at capture") as caught:
        with metaoptim.SlidingWindow(offline=True):
            for _ in range(3):
                assert step(x) == "loss"
            for key, value in CHANGES[change][0].items():
                setattr(settings, key, value)
            step(x)
    assert "step" in str(caught.value)


def test_what_is_made_anew_in_every_call_is_no_change() -> None:
    net, log_lr = nn.Sequential(mlp(), nn.Dropout(0.3)), leaf(-1.0)

    @metaoptim.compile(backend="eager", recapture=True)
    def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                h = net(x)
                h.register_hook(lambda g: 0.5 * g)
                inner.step((h * torch.tensor([1.0, 2.0]) + torch.randn(2)).square().mean())
            return net(xs[0]).square().mean()

    for seed in range(3):
        torch.manual_seed(seed)
        meta_loss(net, log_lr, torch.randn(4, 5, 3)).backward()
    assert len(meta_loss._specializations.known) == 1


@pytest.mark.parametrize("places", [(0, 0, 0, 1, 2, 3, 0), (0, 0, 3, 1, 4, 0)])
def test_other_rows_of_a_loop(places: tuple[int, ...]) -> None:
    """The first and last steps read the same rows as before; those that a loop moves on to, or lists, are others."""
    _HIDDEN.set(settings := Settings())
    settings.steps = 1
    net, log_lr, xs = mlp(), leaf(-1.0), torch.randn(12, 5, 3)

    @metaoptim.compile(backend="eager", recapture=True)
    def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp(), momentum=0.5)
        with metaoptim.SlidingWindow(offline=True):
            for at in places:
                inner.step(net(xs[at * _HIDDEN.get().steps]).square().mean())
            return net(xs[0]).square().mean()

    meta_loss(net, log_lr, xs)
    meta_loss(net, log_lr, xs)
    settings.steps = 2
    with pytest.raises(metaoptim.CaptureError, match="another row or number"):
        meta_loss(net, log_lr, xs)
