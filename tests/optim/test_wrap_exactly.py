"""What a wrapped step could get wrong unseen: what it reads, what surrounds it, options and states that come later."""

from __future__ import annotations

import builtins
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.optim.wrapped.shims import shims

generator = torch.Generator().manual_seed(2)
XS, YS = torch.randn(9, 6, 3, generator=generator), torch.randn(9, 6, 2, generator=generator)
FACTOR = 1.0
LEARNT = torch.tensor(1.0, requires_grad=True)
Change = Callable[[torch.optim.Optimizer, int], None]


class Base(torch.optim.Optimizer):
    """A step for each parameter by itself."""

    def __init__(self, params: Any, lr: float = 0.05, beta: float = 0.8, **options: Any) -> None:
        super().__init__(params, dict(lr=lr, beta=beta, **options))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                self.one(p, p.grad, self.state[p], group)

    def begin(self, group: dict[str, Any]) -> None: ...

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * g)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def own(cls: Any, change: Change | None = None, **options: Any) -> float:
    """The outer loss after steps of the optimizer itself."""
    net = network()
    train(net, cls(net.parameters(), **options), change=change)
    return F.mse_loss(net(XS[8]), YS[8]).item()


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: slice = slice(8), change: Change | None = None
) -> None:
    for i in range(*steps.indices(8)):
        if change is not None:
            change(optimizer, i)
        optimizer.zero_grad()
        F.mse_loss(net(XS[i]), YS[i]).backward()
        optimizer.step()


def adapt(net: nn.Module, inner: Any, steps: slice = slice(8), change: Change | None = None) -> Tensor:
    for i in range(*steps.indices(8)):
        if change is not None:
            change(inner, i)
        inner.step(F.mse_loss(net(XS[i]), YS[i]))
    return F.mse_loss(net(XS[8]), YS[8])


def wrapped(cls: Any, change: Change | None = None, **options: Any) -> float:
    net = network()
    inner = metaoptim.wrap(cls(net.parameters(), **options), [net])
    with metaoptim.SlidingWindow(offline=True):
        return adapt(net, inner, change=change).item()


# -- what a step reads ------------------------------------------------------------------------------------------------


def factor() -> float:
    return FACTOR


class ReadsGlobal(Base):
    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * factor() * g)


class ReadsClass(Base):
    factor = 1.0

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * self.factor * g)


def test_a_global_and_an_attribute_of_the_class_are_as_they_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls, owner, name in ((ReadsGlobal, globals(), "FACTOR"), (ReadsClass, ReadsClass, "factor")):
        first = wrapped(cls)
        if isinstance(owner, dict):
            monkeypatch.setitem(owner, name, 3.0)
        else:
            monkeypatch.setattr(owner, name, 3.0)
        assert wrapped(cls) == pytest.approx(own(cls), rel=1e-12)
        assert wrapped(cls) != pytest.approx(first, rel=1e-3)


def test_what_changes_after_it_was_wrapped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(optimizer: torch.optim.Optimizer, i: int) -> None:
        if i == 3:
            monkeypatch.setitem(globals(), "FACTOR", 3.0)

    with pytest.raises(metaoptim.CaptureError, match="has changed since it was wrapped"):
        wrapped(ReadsGlobal, change)


def test_a_compiled_function_notices_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    inner = metaoptim.wrap(ReadsGlobal(net.parameters()), [net])

    @metaoptim.compile(backend="eager")
    def meta_loss() -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            return adapt(net, inner)

    assert meta_loss().item() == pytest.approx(own(ReadsGlobal), rel=1e-12)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    with pytest.raises(metaoptim.CaptureError, match="has changed since it was wrapped"):
        meta_loss()
    inner = metaoptim.wrap(ReadsGlobal(net.parameters()), [net])
    assert meta_loss().item() == pytest.approx(own(ReadsGlobal), rel=1e-12)


class ReadsLearnt(Base):
    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * LEARNT * g)


def test_a_learnt_tensor_that_is_no_option_is_refused() -> None:
    with pytest.raises(metaoptim.CaptureError, match="make it an option"):
        wrapped(ReadsLearnt)


# -- what surrounds it ------------------------------------------------------------------------------------------------


def halved(step: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(step)
    def call(self: Base, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)
        step(self, closure)

    return call


class Decorated(Base):
    step = halved(Base.step)  # type: ignore[assignment]


def test_a_decorator_of_the_step_is_part_of_it() -> None:
    assert wrapped(Decorated) == pytest.approx(own(Decorated), rel=1e-12)
    assert own(Decorated) != pytest.approx(own(Base), rel=1e-3)


def test_hooks_and_steps_of_an_instance_are_refused_and_those_of_schedulers_are_not() -> None:
    net = network()
    hooked = torch.optim.SGD(net.parameters(), lr=0.1)
    hooked.register_step_pre_hook(lambda *_: None)
    with pytest.raises(TypeError, match="hooks"):
        metaoptim.wrap(hooked, [net])
    for cls in (torch.optim.Adam, Base):
        replaced = cls(net.parameters())
        torch.optim.lr_scheduler.StepLR(replaced, 2)
        with pytest.warns(UserWarning, match="a scheduler sets the rates of this"):
            metaoptim.wrap(replaced, [net])
        replaced.step = lambda closure=None: None  # type: ignore[method-assign]
        with pytest.raises(TypeError, match="set on the instance"):
            metaoptim.wrap(replaced, [net])


# -- options that come later ------------------------------------------------------------------------------------------


class ClipsAll(Base):
    """Clips by the norm of all parameters, where it clips."""

    def begin(self, group: dict[str, Any]) -> None:
        if group["clip"] > 0:
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                p.grad.mul_(group["clip"] / norm)


class Loops(Base):
    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        for _ in range(group["times"]):
            p.sub_(group["lr"] * g)


def test_options_that_are_set_later_are_examined_as_well() -> None:
    def clip(optimizer: torch.optim.Optimizer, i: int) -> None:
        optimizer.param_groups[0]["clip"] = 0.5 if i > 1 else 0.0

    assert wrapped(ClipsAll, clip=0.0) == pytest.approx(own(ClipsAll, clip=0.0), rel=1e-12)
    with pytest.raises(metaoptim.CaptureError, match="mixes parameters"):
        wrapped(ClipsAll, clip, clip=0.0)

    def times(optimizer: torch.optim.Optimizer, i: int) -> None:
        optimizer.param_groups[0]["times"] = 1 + i % 3

    assert wrapped(Loops, times, times=2) == pytest.approx(own(Loops, times, times=2), rel=1e-12)


class Truth(Base):
    """Asks whether a number is one, and takes the largest of others."""

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if group["decay"]:
            p.mul_(1 - group["lr"] * group["decay"])
        if not state:
            state["count"] = torch.zeros((), dtype=torch.long)
        state["count"] += 1
        p.sub_(group["lr"] / max(state["count"], 2.5) * min(n for n in (3.0, 2.0)) * g)


def test_the_truth_of_a_number_and_pythons_extremes() -> None:
    assert wrapped(Truth, decay=0.1) == pytest.approx(own(Truth, decay=0.1), rel=1e-12)


def test_python_is_as_it_was_for_numbers() -> None:
    before = builtins.min, math.sqrt, torch.add, vars(torch.Tensor).get("add")
    with pytest.raises(KeyError), shims():
        assert min(n for n in (3, 4)) == 3 and max([], default=5) == 5 and max(1, 2) == 2
        assert min([-3, 2], key=abs) == 2 and math.sqrt(4) == 2
        raise KeyError
    assert (builtins.min, math.sqrt, torch.add, vars(torch.Tensor).get("add")) == before


def test_low_precision_products_are_rounded_once() -> None:
    ours, theirs = network(), network()
    mine, other = ([p for p in net.parameters() if p.dim() == 2] for net in (ours, theirs))
    before = [p.detach().clone() for p in mine]
    inner = metaoptim.wrap(torch.optim.Muon(mine, lr=0.05), [ours])
    with metaoptim.SlidingWindow():
        adapt(ours, inner, slice(1))
    train(theirs, torch.optim.Muon(other, lr=0.05), slice(1))
    for p, q, start in zip(mine, other, before, strict=True):
        torch.testing.assert_close(p - start, q - start, rtol=0, atol=0.05 * 0.01)


# -- state ------------------------------------------------------------------------------------------------------------


class StepVector(Base):
    """A state of the name of a count."""

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = group["beta"] * state.get("step", torch.zeros_like(p)) + g
        p.sub_(group["lr"] * state["step"])


class StepScalar(Base):
    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = group["beta"] * state.get("step", torch.zeros(())) + g.norm()
        p.sub_(group["lr"] * state["step"] * g)


@pytest.mark.parametrize("cls", [StepVector, StepScalar])
def test_a_state_of_the_name_of_a_count_is_learnt_through(cls: type[Base]) -> None:
    net, beta = network(), torch.tensor(0.7, requires_grad=True)
    inner = metaoptim.wrap(cls(net.parameters()), [net])
    inner.param_groups[0]["beta"] = beta
    with metaoptim.SlidingWindow(offline=True):
        adapt(net, inner).backward()
    assert beta.grad is not None
    difference = (own(cls, beta=0.7 + 1e-6) - own(cls, beta=0.7 - 1e-6)) / 2e-6
    assert beta.grad.item() == pytest.approx(difference, rel=1e-6)
    if cls is StepVector:
        assert all(s["step"].dtype is torch.float64 for s in inner.state_dict()["state"].values())


class CountsInState(Base):
    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["k"] = state.get("k", 0) + 1
        p.sub_(group["lr"] / (1 - group["beta"] ** state["k"]) * g)


class CountsInGroup(Base):
    def begin(self, group: dict[str, Any]) -> None:
        group["k"] = group.get("k", 0) + 1

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] / (1 - group["beta"] ** group["k"]) * g)


@pytest.mark.parametrize("cls", [CountsInState, CountsInGroup])
def test_a_state_dict_interchanges_with_the_optimizer(cls: type[Base]) -> None:
    net = network()
    theirs = cls(net.parameters())
    train(net, theirs, slice(2))
    inner = metaoptim.wrap(cls(net.parameters()), [net])
    inner.load_state_dict(theirs.state_dict())
    with metaoptim.SlidingWindow():
        adapt(net, inner, slice(2, 4))
    again = metaoptim.wrap(cls(net.parameters()), [net])
    again.load_state_dict(inner.state_dict())
    with metaoptim.SlidingWindow():
        adapt(net, again, slice(4, 6))
    theirs.load_state_dict(again.state_dict())
    train(net, theirs, slice(6, 8))
    assert F.mse_loss(net(XS[8]), YS[8]).item() == pytest.approx(own(cls), rel=1e-12)


class CountsFromZero(Base):
    def begin(self, group: dict[str, Any]) -> None:
        group["k"] += 1


def test_a_count_that_groups_begin_with_is_there_before_the_first_step() -> None:
    net = network()
    inner = metaoptim.wrap(CountsFromZero(net.parameters(), k=0), [net])
    assert inner.to_torch().param_groups[0]["k"] == inner.state_dict()["param_groups"][0]["k"] == 0


def test_a_count_of_all_parameters_together_is_that_of_each() -> None:
    net = network()
    inner = metaoptim.wrap(CountsInGroup(net.parameters()), [net])
    net[0].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    with metaoptim.SlidingWindow():
        adapt(net, inner, slice(2))
        with pytest.raises(ValueError, match="counts steps in its groups"):
            inner.step(net[0](XS[0]).square().mean(), allow_unused=True)  # type: ignore[index]
    for chosen in (net[0].bias, net[2].weight):  # type: ignore[index, union-attr]
        chosen.requires_grad_(not chosen.requires_grad)
        with metaoptim.SlidingWindow(), pytest.raises(ValueError, match="freeze and unfreeze none"):
            adapt(net, inner, slice(1))
        chosen.requires_grad_(not chosen.requires_grad)
    with metaoptim.SlidingWindow():
        adapt(net, inner, slice(2))


def test_begins_at_the_count_also_where_a_parameter_has_no_state_yet() -> None:
    def fresh(net: nn.Module) -> Base:
        optimizer = CountsInGroup(net.parameters())
        train(net, optimizer, slice(3))
        return optimizer

    ours, theirs = network(), network()
    inner, optimizer = metaoptim.wrap(fresh(ours), [ours]), fresh(theirs)
    with metaoptim.SlidingWindow():
        adapt(ours, inner, slice(3, 8))
    train(theirs, optimizer, slice(3, 8))
    assert inner.to_torch().param_groups[0]["k"] == 8
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
