"""Forward mode, against autograd's own tape."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim import SlidingWindow
from metaoptim.runtime.engine.estimators.tangents import MOST

generator = torch.Generator().manual_seed(5)
X, Y = torch.randn(12, 4, generator=generator), torch.randn(12, 2, generator=generator)
XQ, YQ = torch.randn(7, 4, generator=generator), torch.randn(7, 2, generator=generator)

Way = dict[str, Any]
FORWARD, TAPE = {"gradient": "forward"}, {"strategy": "full_tape"}


def both(run: Callable[[Way], list[Tensor | None]]) -> list[Tensor]:
    """What ``run`` gives in forward mode, after a comparison with the tape."""
    ours, theirs = run(FORWARD), run(TAPE)
    found = [t for t in ours if t is not None]
    assert len(found) == len(ours) and all(bool(t.any()) for t in found), (
        "a gradient that is none proves nothing"
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
    return found


def rates() -> tuple[Tensor, Tensor]:
    return torch.tensor(-2.0, requires_grad=True), torch.linspace(0.5, 1.5, 12).requires_grad_()


def mlp(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))


MAKES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "sgd": lambda net, raw: metaoptim.MetaSGD([net], lr=raw.exp()),
    "momentum": lambda net, raw: metaoptim.MetaSGD([net], lr=0.1, momentum=raw.exp(), nesterov=True),
    "adam": lambda net, raw: metaoptim.MetaAdam([net], lr=raw.exp(), weight_decay=raw.exp()),
    "schedule": lambda net, raw: metaoptim.MetaRMSprop(
        [net], lr=metaoptim.schedules.linear(raw.exp(), 0.01, 5)
    ),
    "transforms": lambda net, raw: metaoptim.MetaSGD(
        [net], lr=raw.exp(), transforms=[metaoptim.transforms.clip_value(raw.exp())]
    ),
}


@pytest.mark.parametrize("name", MAKES)
def test_equals_the_tape(name: str) -> None:
    def run(way: Way) -> list[Tensor | None]:
        net, (raw, weights) = mlp(), rates()
        inner = MAKES[name](net, raw)
        with SlidingWindow(**way):
            for _ in range(6):
                inner.step((weights * (net(X) - Y).square().sum(1)).mean())
            F.mse_loss(net(XQ), YQ).backward()
        assert all(p.grad is None for p in net.parameters())
        return [raw.grad, weights.grad]

    both(run)


def test_losses_on_the_way_and_a_meta_parameter_that_comes_late() -> None:
    def run(way: Way) -> list[Tensor | None]:
        net, (raw, weights), late = mlp(), rates(), torch.tensor(0.4, requires_grad=True)
        inner = metaoptim.MetaAdam([net], lr=raw.exp())
        total, kept = torch.zeros(()), []
        with SlidingWindow(**way):
            for t in range(6):
                loss = (weights * (net(X) - Y).square().sum(1)).mean()
                if t > 2:
                    loss = loss + late * net[0].get_parameter("weight").square().sum()
                inner.step(loss)
                kept.append(loss)
                total = total + (t + 1) * weights.sum() * F.mse_loss(net(XQ), YQ)
            total.backward(retain_graph=True)
            total.backward(retain_graph=True)  # nodes survive
            (kept[1] + kept[-1]).backward(retain_graph=True)
        return [raw.grad, weights.grad, late.grad]

    both(run)


def test_offline_the_initial_parameters_are_differentiated_by() -> None:
    def run(way: Way) -> list[Tensor | None]:
        net, (raw, _) = mlp(), rates()
        inner = metaoptim.MetaSGD([net], lr=raw.exp(), momentum=0.9)
        with SlidingWindow(offline=True, **way):
            first = F.mse_loss(net(XQ), YQ)
            for _ in range(4):
                inner.step(F.mse_loss(net(X), Y))
            (first + F.mse_loss(net(XQ), YQ)).backward()
        return [raw.grad, *(p.grad for p in net.parameters())]

    both(run)


def test_several_optimizers_with_a_trunk_and_a_network_that_none_steps() -> None:
    def run(way: Way) -> list[Tensor | None]:
        torch.manual_seed(2)
        trunk, actor, critic, meta = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 1)
        raw = torch.tensor(-2.0, requires_grad=True)
        first = metaoptim.MetaSGD([trunk, actor], lr=raw.exp())
        second = metaoptim.MetaAdam([critic], lr=raw.exp())
        other = metaoptim.MetaSGD([meta], lr=0.1)  # which does not step
        with SlidingWindow(**way):
            for _ in range(4):
                with torch.no_grad():
                    meta.bias.mul_(1.5)  # no history cut: no step moves it
                hidden = torch.tanh(trunk(X))
                loss, fit = meta(actor(hidden)).square().mean(), F.mse_loss(critic(hidden.detach()), Y)
                first.step(loss)
                second.step(fit)
            (meta(actor(trunk(XQ))).mean() + critic(trunk(XQ)).square().mean()).backward()
        assert other.param_groups
        return [raw.grad, meta.weight.grad, meta.bias.grad]

    both(run)


@pytest.mark.parametrize("kind", ["convolution", "recurrent", "attention", "mask", "spectrum"])
def test_operators(kind: str) -> None:
    def run(way: Way) -> list[Tensor | None]:
        torch.manual_seed(3)
        data = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(3))
        net: nn.Module = {
            "convolution": lambda: nn.Sequential(
                nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), nn.SiLU(), nn.Mish(), nn.Dropout(0.2), nn.MaxPool1d(2)
            ),
            "recurrent": lambda: nn.GRU(8, 3, batch_first=True),
            "mask": lambda: nn.Linear(8, 3),
            "spectrum": lambda: nn.Linear(8, 6),
            "attention": lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True),
        }[kind]()
        net.requires_grad_(True)
        raw = torch.tensor(-3.0, requires_grad=True)

        def output(x: Tensor) -> Tensor:
            out = net(x)
            if kind == "spectrum":
                return torch.fft.rfft(out).abs()
            return out[0] if kind == "recurrent" else out[out > 0] if kind == "mask" else out

        inner = metaoptim.MetaAdam([net], lr=raw.exp(), betas=(0.9, 0.99))
        with SlidingWindow(**way):
            for _ in range(3):
                inner.step((output(data) - 1).square().mean())
            output(data + 1).square().mean().backward()
        return [raw.grad]

    both(run)


def test_going_back_detached_starting_and_cutting() -> None:
    def run(way: Way) -> list[Tensor | None]:
        net, (raw, _) = nn.Linear(4, 2), rates()
        torch.manual_seed(1)
        net.reset_parameters()
        first = torch.full((2,), 0.3, requires_grad=True)
        inner = metaoptim.MetaSGD([net], lr=raw.exp(), momentum=0.5)
        with SlidingWindow(**way):
            inner.step(F.mse_loss(net(X), Y))
            inner.start({"bias": first * 2})
            for k in range(4):
                if k == 2:
                    metaoptim.stop_gradient(net)
                inner.step(F.mse_loss(net(X), Y))
                with torch.no_grad():
                    if k == 1:
                        net.bias.mul_(0.5)  # a history cut
            with (
                pytest.raises(metaoptim.WindowError, match="by='detached'")
                if way is FORWARD
                else nullcontext()
            ):
                metaoptim.extract_state(net)
            F.mse_loss(net(XQ), YQ).backward()
        return [raw.grad, first.grad]

    both(run)


def test_memory_does_not_depend_on_the_number_of_steps() -> None:
    net, (raw, _) = mlp(), rates()
    inner = metaoptim.MetaSGD([net], lr=raw.exp())
    with SlidingWindow(gradient="forward") as window:
        for _ in range(20):
            inner.step(F.mse_loss(net(X), Y))
        engine = window._session.engine  # type: ignore[union-attr]
        assert window.program.end - window.program.start <= 2 and len(engine.store) <= 2
        assert engine.tangents is not None and len(engine.tangents._at) <= 2
        before = engine.replays
        F.mse_loss(net(XQ), YQ).backward()
        assert engine.replays == before == 0 and raw.grad is not None


def test_compiled_steps() -> None:
    def run(way: Way) -> list[Tensor | None]:
        net, (raw, weights) = mlp(), rates()
        inner = metaoptim.MetaAdam([net], lr=0.05)

        def step(x: Tensor, raw: Tensor) -> None:
            inner.step(raw.exp() * (weights * (net(x) - Y).square().sum(1)).mean())

        taken = step if way is TAPE else metaoptim.compile(step, backend="eager")
        with SlidingWindow(**way):
            for t in range(4):
                taken(X + t, raw)
            F.mse_loss(net(XQ), YQ).backward()
        return [raw.grad, weights.grad]

    both(run)


def test_what_is_refused() -> None:
    net, (raw, _) = mlp(), rates()
    many = torch.ones(MOST + 1, requires_grad=True)
    before = [p.detach().clone() for p in net.parameters()]
    inner = metaoptim.MetaSGD([net], lr=raw.exp(), momentum=0.9)
    with SlidingWindow(gradient="forward"):
        for _ in range(2):  # again, when it is asked again
            with pytest.raises(metaoptim.WindowError, match=rf"{MOST + 2} entries in all.*gradient='exact'"):
                inner.step(F.mse_loss(net(X), Y) * many.mean())
        assert not any(inner.state.values()), "a step that is refused leaves nothing"
        inner.step(F.mse_loss(net(X), Y))
    assert not torch.equal(before[0], next(net.parameters()))
    large = nn.Linear(4, 40)
    other = metaoptim.MetaSGD([large], lr=0.1)
    with (
        SlidingWindow(gradient="forward", offline=True),
        pytest.raises(metaoptim.WindowError, match="offline=True"),
    ):
        other.step(large(X).square().mean())

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # pyright: ignore
            return 2 * grad

    with (
        SlidingWindow(gradient="forward"),
        pytest.raises(metaoptim.CaptureError, match=r"custom autograd\.Function"),
    ):
        inner.step(Double.apply(net(X)).square().mean())  # type: ignore[union-attr]
    options: list[Way] = [
        {"slots": 3},
        {"memory_budget": "1MiB"},
        {"window": 2},
        {"backward_hook": metaoptim.zero_nan_hook},
        {"backend": "inductor"},
        {"strategy": "full_tape"},
        {"slots": 2, "offload": "disk"},
    ]
    for option in options:
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.*a forward gradient.*leave it out"):
            SlidingWindow(gradient="forward", **option)

    def compiled(net: nn.Module) -> Tensor:
        with SlidingWindow(gradient="forward"):
            metaoptim.MetaSGD([net], lr=0.1).step(net(X).square().mean())
            return net(X).square().mean()

    with pytest.raises(metaoptim.WindowError, match=r"gradient='forward'.*take the decorator off"):
        metaoptim.compile(compiled, backend="eager")(nn.Linear(4, 2))


def test_a_gradient_by_what_later_steps_have_moved_is_refused() -> None:
    net, (raw, _) = mlp(), rates()
    inner = metaoptim.MetaSGD([net], lr=raw.exp())
    with SlidingWindow(gradient="forward"):
        inner.step(F.mse_loss(net(X), Y))
        there: Any = net[0].weight
        for _ in range(4):
            inner.step(F.mse_loss(net(X), Y))
        with pytest.raises(metaoptim.CaptureError, match="as it was before later inner steps"):
            torch.autograd.grad(F.mse_loss(net(XQ), YQ), there)


def test_nothing_lives_on_by_a_cycle() -> None:
    net, (raw, _) = mlp(), rates()
    inner = metaoptim.MetaSGD([net], lr=raw.exp())
    gc.disable()
    try:
        with SlidingWindow(gradient="forward") as window:
            inner.step(F.mse_loss(net(X), Y))
            engine = weakref.ref(window._session.engine)  # type: ignore[union-attr]
            F.mse_loss(net(XQ), YQ).backward()
        del window
        assert engine() is None
    finally:
        gc.enable()
