"""Optimizers of other libraries as inner ones: their own steps, or a refusal that names the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim

Params = Any


class Base(torch.optim.Optimizer):
    """A step for each parameter by itself."""

    def __init__(self, params: Params, lr: float = 1e-2, beta: float = 0.8, decay: float = 0.0) -> None:
        super().__init__(params, dict(lr=lr, beta=beta, decay=decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                self.one(p, p.grad, self.state[p], group)

    def begin(self, group: dict[str, Any]) -> None: ...

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(Base):
    """State made in the first step; a branch by a hyper-parameter; a sign."""

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["m"] = torch.zeros_like(p)
        if group["decay"] > 0:
            p.mul_(1 - group["lr"] * group["decay"])
        p.add_(torch.tanh(5 * (state["m"] * group["beta"] + g)), alpha=-group["lr"])
        state["m"].lerp_(g, 1 - group["beta"])


class CountsInState(Base):
    """An int in the state, and math.sqrt of what is computed from it."""

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"], state["v"] = 0, torch.zeros_like(p)
        state["step"] += 1
        state["v"].mul_(group["beta"]).addcmul_(g, g, value=1 - group["beta"])
        scale = math.sqrt(1 - group["beta"] ** state["step"]) / min(4, state["step"])
        p.addcdiv_(g, state["v"].sqrt().add_(1e-3), value=-group["lr"] * scale)


class CountsInGroup(Base):
    """A count in the group, as pytorch-optimizer has it, and one that no group begins with."""

    def begin(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] / group["step"] ** 0.5 * g)


class PlainAttribute(Base):
    """What it computes depends on an attribute."""

    def __init__(self, params: Params, power: float = 1.5, **options: Any) -> None:
        super().__init__(params, **options)
        self.power = power

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * g.sign() * g.abs().clamp_(min=1e-12).pow_(self.power))


def networks() -> tuple[nn.Module, nn.Module]:
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    return made[0], made[1]


generator = torch.Generator().manual_seed(2)
XS, YS = torch.randn(9, 6, 3, generator=generator), torch.randn(9, 6, 2, generator=generator)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, chosen: slice = slice(8)) -> None:
    for x, y in zip(XS[chosen], YS[chosen], strict=True):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()


def adapt(net: nn.Module, inner: metaoptim.MetaOptimizer, chosen: slice = slice(8)) -> Tensor:
    for x, y in zip(XS[chosen], YS[chosen], strict=True):
        inner.step(F.mse_loss(net(x), y))
    return F.mse_loss(net(XS[8]), YS[8])


@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
@pytest.mark.parametrize("cls", [Lion, CountsInState, CountsInGroup, PlainAttribute])
def test_the_steps_and_their_derivative_are_those_of_the_optimizer(cls: type[Base], strategy: str) -> None:
    options = dict(lr=0.03, decay=0.1)

    def own(lr: float) -> tuple[float, nn.Module]:
        net, _ = networks()
        train(net, cls(net.parameters(), **{**options, "lr": lr}))
        return F.mse_loss(net(XS[8]), YS[8]).item(), net

    net, _ = networks()
    inner = metaoptim.wrap(cls(net.parameters(), **options), [net])
    lr = inner.param_groups[0]["lr"] = torch.tensor(0.03, requires_grad=True)
    with metaoptim.SlidingWindow(offline=True, strategy=strategy):
        (loss := adapt(net, inner)).backward()
    torch.testing.assert_close(loss.item(), own(0.03)[0], rtol=1e-12, atol=0)
    assert lr.grad is not None
    difference = (own(0.03 + 1e-6)[0] - own(0.03 - 1e-6)[0]) / 2e-6
    torch.testing.assert_close(lr.grad.item(), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cls", [Lion, CountsInState, CountsInGroup, PlainAttribute])
def test_begins_where_the_optimizer_was_and_goes_back(cls: type[Base]) -> None:
    first, second = networks()
    train(first, cls(first.parameters()))
    optimizer = cls(second.parameters())
    train(second, optimizer, slice(3))
    inner = metaoptim.wrap(optimizer, [second])
    with metaoptim.SlidingWindow():
        adapt(second, inner, slice(3, 6))
    back = inner.to_torch()
    assert type(back) is cls
    train(second, back, slice(6, 8))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "cls, ours, options",
    [
        (torch.optim.SGD, metaoptim.MetaSGD, dict(momentum=0.8, nesterov=True, weight_decay=0.1)),
        (torch.optim.Adam, metaoptim.MetaAdam, dict(betas=(0.7, 0.8), amsgrad=True)),
        (torch.optim.Adam, metaoptim.MetaOptimizer, dict(decoupled_weight_decay=True, weight_decay=0.3)),
        (torch.optim.RMSprop, metaoptim.MetaRMSprop, dict(centered=True, momentum=0.5)),
    ],
)
def test_those_written_here_are_taken_where_they_have_the_options(
    cls: Any, ours: type, options: dict
) -> None:
    first, second = networks()
    train(first, cls(first.parameters(), lr=0.02, foreach=False, **options))
    optimizer = cls(second.parameters(), lr=0.02, foreach=False, **options)
    train(second, optimizer, slice(3))
    inner = metaoptim.wrap(optimizer, [second])
    assert isinstance(inner, ours) and ours.__name__ in ("MetaOptimizer", type(inner).__name__)
    with metaoptim.SlidingWindow():
        adapt(second, inner, slice(3, 6))
    train(second, inner.to_torch(), slice(6, 8))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_groups_and_what_differs_between_them() -> None:
    ours, theirs = networks()

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        weights = [p for p in net.parameters() if p.dim() == 2]
        biases = [p for p in net.parameters() if p.dim() == 1]
        return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0, "lr": 0.1}]

    with metaoptim.SlidingWindow():
        adapt(ours, metaoptim.wrap(torch.optim.AdamW(groups(ours), lr=0.02), [ours]))
    train(theirs, torch.optim.AdamW(groups(theirs), lr=0.02))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_made_inside_a_compiled_function() -> None:
    def meta_loss(net: nn.Module, lr: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        inner = metaoptim.wrap(torch.optim.NAdam(net.parameters(), lr=0.1), [net])
        inner.param_groups[0]["lr"] = lr
        with metaoptim.SlidingWindow(offline=True) as window:
            for x, y in window.scan(xs, ys):
                inner.step(F.mse_loss(net(x), y))
            return F.mse_loss(net(XS[8]), YS[8])

    one, other = networks()
    lr = torch.tensor(0.05, requires_grad=True)
    metaoptim.compile(meta_loss, backend="aot_eager")(one, lr, XS[:8], YS[:8]).backward()
    rate = torch.tensor(0.05, requires_grad=True)
    with metaoptim.SlidingWindow(offline=True, strategy="full_tape"):
        adapt(other, metaoptim.MetaNAdam([other], lr=rate)).backward()
    torch.testing.assert_close(lr.grad, rate.grad, rtol=1e-10, atol=0)


def test_torchs_schedulers_set_its_rate() -> None:
    ours, theirs = networks()
    inner, optimizer = metaoptim.MetaRAdam([ours], lr=0.1), torch.optim.RAdam(theirs.parameters(), lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (inner, optimizer)]
    for x, y in zip(XS, YS, strict=True):
        with metaoptim.SlidingWindow():
            inner.step(F.mse_loss(ours(x), y))
        optimizer.zero_grad()
        F.mse_loss(theirs(x), y).backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


# -- refused ----------------------------------------------------------------------------------------------------------


class Mixes(Base):
    """Clips by the norm of all parameters."""

    def begin(self, group: dict[str, Any]) -> None:
        self.norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * g / self.norm)


class MixesUnseen(Base):
    """The same without a trace of it."""

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * g / torch.stack([q.grad.norm() for q in group["params"]]).norm())


class Counts(Base):
    turns = 0

    def begin(self, group: dict[str, Any]) -> None:
        self.turns = self.turns + 1

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] / self.turns * g)


class Decides(Base):
    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if g.norm() > 1:
            p.sub_(group["lr"] * g)


class Estimates(Base):
    def begin(self, group: dict[str, Any]) -> None:
        group["estimate"] = group.get("estimate", 1e-3) * 1.1

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["estimate"] * g)


class Keeps(Base):
    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("past", []).append(g)
        p.sub_(group["lr"] * g)


class Shares(Base):
    def begin(self, group: dict[str, Any]) -> None:
        self.state["k"] = self.state.get("k", torch.zeros(())) + 1  # type: ignore[index]

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * g)


class Closes(Base):
    def begin(self, group: dict[str, Any]) -> None:
        raise RuntimeError("needs a closure")


@pytest.mark.parametrize(
    "cls, error, words",
    [
        (Mixes, metaoptim.CaptureError, "attribute 'norm'"),
        (MixesUnseen, metaoptim.CaptureError, "mixes parameters"),
        (Counts, metaoptim.CaptureError, "attribute 'turns'"),
        (Decides, metaoptim.CaptureError, "line .*value of a tensor.*torch.where"),
        (Estimates, metaoptim.CaptureError, "'estimate'"),
        (Keeps, metaoptim.CaptureError, "list as state 'past'"),
        (Shares, metaoptim.CaptureError, r"state\['k'\]"),
        (Closes, metaoptim.CaptureError, "needs a closure"),
        (torch.optim.SparseAdam, TypeError, "SparseAdam.*dense"),
    ],
)
def test_refused_by_name(cls: Any, error: type[Exception], words: str) -> None:
    net, same = networks()
    with pytest.raises(error, match=words):
        metaoptim.wrap(cls(net.parameters()), [net])
    for p, q in zip(net.parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q) and p.grad is None


def test_a_scheduler_of_the_optimizer_given_is_told_of() -> None:
    net, _ = networks()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with pytest.warns(UserWarning, match=r"StepLR\(inner"):
        metaoptim.wrap(optimizer, [net])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_learnt_number_in_the_optimizer_given_is_refused(cls: Any, compiled: bool) -> None:
    """Of those that it had when it was given, `wrap` has made its own."""
    net, _ = networks()
    optimizer = cls(net.parameters(), lr=0.1)
    decay = optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1, requires_grad=True)
    inner = metaoptim.wrap(optimizer, [net])

    def loss() -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            inner.step(net(XS[0]).square().mean())
            return net(XS[1]).square().mean()

    run = metaoptim.compile(loss, backend="eager") if compiled else loss
    run().backward()
    assert decay.grad is not None and decay.grad != 0
    inner.param_groups[0]["weight_decay"] = 0.2
    loss().backward()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(metaoptim.WindowError, match=r"inner.param_groups\[0\]\['lr'\]"):
        loss()


def test_an_option_that_is_misspelt_afterwards() -> None:
    net, _ = networks()
    inner = metaoptim.MetaAdamW([net])
    inner.param_groups[0]["weigth_decay"] = torch.tensor(0.1)
    with metaoptim.SlidingWindow(), pytest.raises(TypeError, match="did you mean 'weight_decay'"):
        inner.step(net(XS[0]).square().mean())


def test_refused_by_kind() -> None:
    net, _ = networks()
    with pytest.raises(TypeError, match="LBFGS"):
        metaoptim.wrap(torch.optim.LBFGS(net.parameters()), [net])
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        metaoptim.wrap(net, [net])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        metaoptim.wrap(metaoptim.MetaSGD([net]), [net])
    with pytest.raises(ValueError, match="none of the networks"):
        metaoptim.wrap(torch.optim.SGD(net.parameters()), [nn.Linear(2, 2)])


def test_transforms_and_schedules_stand_before_it() -> None:
    schedule = metaoptim.schedules.linear(torch.tensor(0.1, requires_grad=True), 0.02, 8)
    clip = metaoptim.transforms.clip_global_norm(torch.tensor(0.7, requires_grad=True))
    wanted = []
    for strategy in ("auto", "full_tape"):
        net, _ = networks()
        inner = metaoptim.MetaNAdam([net], lr=schedule, transforms=[clip])
        with metaoptim.SlidingWindow(offline=True, strategy=strategy):
            loss = adapt(net, inner)
            wanted.append(
                [loss, *torch.autograd.grad(loss, [*net.parameters(), *learnt(schedule), *learnt(clip)])]
            )
        assert inner.to_torch().param_groups[0]["lr"] == 0.1
    for ours, theirs in zip(*wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert bool((ours != 0).any())


def learnt(of: Any) -> list[Tensor]:
    return [t for t in of.hyper.values() if isinstance(t, Tensor) and t.requires_grad]
