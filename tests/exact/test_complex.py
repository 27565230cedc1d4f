"""Networks with complex parameters, such as those of layers in the frequency domain, against the full tape."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from models import STEPS, Model, check, draw, gradients, made, numbers
from oracle import agree


class _Spectral(nn.Module):
    """A Fourier layer: complex weights that multiply the lowest frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(1, 3), nn.Linear(3, 1)
        self.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.complex128))
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        low = torch.fft.rfft(self.lift(x[..., None]), dim=1)[:, :4]
        back = torch.fft.irfft(low * self.weight + self.shift, n=8, dim=1)
        return self.head(torch.tanh(back)).squeeze(-1)


MODEL = Model(
    _Spectral, lambda net, x, y: (net(x) - x.roll(1, -1)).square().mean(), draw(2, 8), numbers(0, 3, 2)
)


def _rule() -> nn.Module:
    """A learnt rule that is no longer Adam."""
    torch.manual_seed(2)
    rule = metaoptim.PerParameterRule(hidden=4)
    for p in rule.parameters():
        nn.init.normal_(p, std=0.3)
    return rule


OPTIMIZERS: dict[str, Any] = {
    "SGD": functools.partial(metaoptim.MetaSGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": functools.partial(metaoptim.MetaAdam, weight_decay=0.1, amsgrad=True),
    "RMSprop": functools.partial(metaoptim.MetaRMSprop, momentum=0.5, centered=True),
    "AdamW": metaoptim.MetaAdamW,
    "Adagrad": metaoptim.MetaAdagrad,
    "learnt": lambda nets, lr: metaoptim.MetaLearned(nets, _rule(), lr=lr),
    "clipped": functools.partial(metaoptim.MetaSGD, transforms=[metaoptim.transforms.clip_global_norm(0.05)]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_complex_parameters(name: str) -> None:
    everything = name == "Adam"
    check(
        MODEL,
        "ABC" if everything else "AC",
        optimizer=OPTIMIZERS[name],
        modes=[True, False][: 1 + everything],
    )


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "AdamW"])
def test_steps_are_those_of_torch(name: str) -> None:
    """An update takes real and imaginary parts by themselves."""
    all_options = {"SGD": {"momentum": 0.9}, "RMSprop": {"centered": True}, "Adam": {"amsgrad": True}}
    options: dict[str, Any] = all_options.get(name, {})
    ours, theirs = made(MODEL), made(MODEL)
    inner = getattr(metaoptim, f"Meta{name}")([ours], lr=0.01, **options)
    outer = getattr(torch.optim, name)(theirs.parameters(), lr=0.01, **options)
    with metaoptim.SlidingWindow():
        for x in MODEL.xs:
            inner.step(MODEL.loss(ours, x, x))
    for x in MODEL.xs:
        outer.zero_grad()
        MODEL.loss(theirs, x, x).backward()
        outer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    a, b = inner.state_dict()["state"], outer.state_dict()["state"]
    assert all(v.dtype == b[i][k].dtype for i, state in a.items() for k, v in state.items() if k != "step")


def _outer(net: nn.Module, rates: Any, **window: Any) -> Tensor:
    inner = metaoptim.MetaAdam([net], lr=rates)
    with metaoptim.SlidingWindow(offline=True, **window):
        for x in MODEL.xs[:STEPS]:
            inner.step(MODEL.loss(net, x, x))
        return MODEL.loss(net, MODEL.xs[STEPS], MODEL.xs[STEPS])


def test_gradient_is_that_of_differences() -> None:
    """The gradient by a complex number is ∂/∂Re + i ∂/∂Im, as everywhere in torch."""
    net = made(MODEL)
    (grad,) = torch.autograd.grad(_outer(net, 0.01), [net.weight])
    for direction in (1, 1j):
        values = []
        for sign in (1, -1):
            moved = made(MODEL)
            with torch.no_grad():
                moved.weight[2, 1] += sign * 1e-5 * direction
            values.append(_outer(moved, 0.01).detach())
        slope = (values[0] - values[1]) / 2e-5
        got = grad[2, 1].real if direction == 1 else grad[2, 1].imag
        assert float((got - slope).abs()) < 1e-6 * float(grad.abs().max()) + 1e-9


def test_options() -> None:
    """Mixed mode, few slots, a rate for every entry, and compiled graphs."""
    net = made(MODEL)
    rates = torch.full((4, 3), 0.01, requires_grad=True)

    def by(f: Any) -> dict[str, Tensor | None]:
        wanted = {"rates": rates, **dict(net.named_parameters())}
        return dict(zip(wanted, torch.autograd.grad(f(), list(wanted.values())), strict=True))

    groups = lambda **window: _grouped(net, rates, **window)
    expected = by(lambda: groups(strategy="full_tape"))
    agree(by(lambda: groups(slots=2)), expected, rtol=1e-9)
    agree(by(lambda: groups(memory_budget="1MiB")), expected, rtol=1e-9)
    for options in ({"hvp": "mixed"}, {"backend": "aot_eager", "hvp": "reverse"}):
        compiled = metaoptim.compile(groups, **{"backend": "eager", **options})
        agree(by(compiled), expected, rtol=1e-9)


def _grouped(net: nn.Module, rates: Tensor, **window: Any) -> Tensor:
    """The weight has a rate for each of its entries, the others one."""
    others = [p for p in net.parameters() if p is not net.weight]
    groups = [{"params": [net.weight], "lr": rates}, {"params": others, "lr": 0.02}]
    inner = metaoptim.MetaAdam(groups, networks=[net])
    with metaoptim.SlidingWindow(offline=True, **window):
        for x in MODEL.xs[:STEPS]:
            inner.step(MODEL.loss(net, x, x))
        return MODEL.loss(net, MODEL.xs[STEPS], MODEL.xs[STEPS])


def test_forward_mode() -> None:
    """Online, where the complex parameters are carried along, and learnt is a rate."""
    found = []
    for gradient in ("exact", "forward"):
        net, log_lr = made(MODEL), torch.tensor(-4.0, requires_grad=True)
        inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(gradient=gradient):
            for x in MODEL.xs[:STEPS]:
                inner.step(MODEL.loss(net, x, x))
            found.append(torch.autograd.grad(MODEL.loss(net, MODEL.xs[STEPS], MODEL.xs[STEPS]), log_lr)[0])
    torch.testing.assert_close(*found)
    assert abs(float(found[0])) > 1e-3


def test_refused() -> None:
    """What torch refuses, and what is written for real vectors."""
    with pytest.raises(metaoptim.CaptureError, match="Adafactor does not support complex"):
        gradients(MODEL, "A", optimizer=metaoptim.MetaAdafactor)
    with pytest.raises(
        metaoptim.WindowError, match=r"'lr' is a tensor of shape \(1,\), and a parameter is complex"
    ):
        gradients(MODEL, "A", optimizer=lambda nets, lr: metaoptim.MetaAdamW(nets, lr=lr.reshape(1)))
    net = made(MODEL)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with pytest.raises(metaoptim.WindowError, match="complex parameter; use gradient='exact'"):
        with metaoptim.SlidingWindow(gradient=metaoptim.Implicit()):
            inner.step(MODEL.loss(net, MODEL.xs[0], MODEL.xs[0]))
    with pytest.raises(metaoptim.WindowError, match="complex tensors that require grad"):
        with metaoptim.SlidingWindow(gradient="forward", offline=True):
            inner.step(MODEL.loss(net, MODEL.xs[0], MODEL.xs[0]))


class _Slow(nn.Module):
    """A rule with a state that begins as the parameter's size: of each part its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        assert not param.is_complex()
        return {"size": param.abs()}

    def forward(
        self, param: Tensor, grad: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.scale * grad * (1 + state["size"]), {"size": 0.9 * state["size"]}


def test_a_rule_is_given_parts_from_its_state_on() -> None:
    check(MODEL, "AC", optimizer=lambda nets, lr: metaoptim.MetaLearned(nets, _Slow(), lr=lr), modes=[True])
