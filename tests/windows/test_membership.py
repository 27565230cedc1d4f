"""Which optimizers belong to a window: those that step in it, or are made in it; the others leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import leaf, mlp

torch.manual_seed(5)
X, Y = torch.randn(6, 3), torch.randn(6, 2)
MODES = pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
STRATEGIES = pytest.mark.parametrize("strategy", ["auto", "full_tape"])


def gradients(*tensors: Tensor) -> list[Tensor]:
    """Their gradients; zeros for none, so that lists compare."""
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]


def equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def in_form(form: str, whole: Callable, *steps: Callable) -> tuple[Callable, ...]:
    """A function with a window and the steps that it takes, as in form A, B or C."""
    if form == "B":
        steps = tuple(metaoptim.compile(s, backend="eager") for s in steps)
    return metaoptim.compile(whole, backend="eager") if form == "C" else whole, *steps


@MODES
@pytest.mark.filterwarnings("ignore:the loss lies more than window=2")
@pytest.mark.parametrize("form", ["A", "B", "C", "tape"])
def test_networks_of_optimizers_that_do_not_step_are_meta_networks(offline: bool, form: str) -> None:
    def run(alive: bool, **options: Any) -> list[Tensor]:
        critic, actor, lr = mlp(3), mlp(4), leaf(0.1)
        inner = metaoptim.MetaSGD([actor], lr=lr)
        old = metaoptim.MetaAdam([critic]) if alive else None

        def one_step() -> None:
            inner.step(F.mse_loss(actor(X), Y) * critic(X).square().mean())

        def whole(critic: nn.Module, actor: nn.Module, lr: Tensor) -> Tensor:
            with metaoptim.SlidingWindow(offline=offline, **options):
                for _ in range(4):
                    step()
                return F.mse_loss(actor(X), Y + critic(X))

        whole, step = in_form(form, whole, one_step)
        whole(critic, actor, lr).backward()
        assert (old is None or not old.state) and critic[0].weight.grad.abs().max() > 1e-3
        return gradients(*critic.parameters(), *actor.parameters(), lr)

    for options in ({"strategy": "full_tape"},) if form == "tape" else ({}, {"slots": 2}, {"window": 2}):
        equal(run(True, **options), run(False, **options))


@MODES
@pytest.mark.parametrize("form", ["A", "B", "C"])
def test_one_joins_in_the_middle(offline: bool, form: str) -> None:
    """Offline the gradient of its parameters is that of the tape, online there is none, also of losses before."""

    def run(form: str, **options: Any) -> list[Tensor]:
        critic, actor, lr = mlp(3), mlp(4), leaf(0.1)
        first = metaoptim.MetaSGD([actor], lr=lr)
        second = metaoptim.MetaAdam([critic], lr=lr)

        def of_actor() -> None:
            first.step(F.mse_loss(actor(X), Y) * critic(X).square().mean())

        def of_both() -> None:
            a, c = F.mse_loss(actor(X), Y) + critic(X).mean(), (critic(X) - actor(X)).square().mean()
            first.step(a)
            second.step(c)

        def whole(critic: nn.Module, actor: nn.Module, lr: Tensor) -> Tensor:
            with metaoptim.SlidingWindow(offline=offline, **options):
                total = F.mse_loss(actor(X), Y + 1) + critic(X).sum()
                for _ in range(2):
                    step_actor()
                total = total + F.mse_loss(actor(X), Y + 1) + critic(X).sum()
                for _ in range(3):
                    step_both()
                    step_actor()
                return total + (actor(X) * critic(X)).sum()

        whole, step_actor, step_both = in_form(form, whole, of_actor, of_both)
        whole(critic, actor, lr).backward()
        return gradients(*critic.parameters(), *actor.parameters(), lr)

    expected = run("A", strategy="full_tape")
    assert expected[-1].abs() > 1e-3
    assert bool(expected[0].abs().max() > 1e-3) is offline
    for options in ({}, {"slots": 2}) if form == "B" else ({}, {"slots": 2}, {"window": 20}):
        equal(run(form, **options), expected)


@STRATEGIES
def test_a_teacher_is_frozen_inside(strategy: str) -> None:
    teacher, student = mlp(1), mlp(2)
    old, inner = metaoptim.MetaSGD([teacher]), metaoptim.MetaSGD([student], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, strategy=strategy):
        (teacher(X).sum() * student(X).sum()).backward()
        assert teacher[0].weight.grad is not None
        teacher.requires_grad_(False)
        inner.step(F.mse_loss(student(X), teacher(X)))
        assert not teacher(X).requires_grad
        old.zero_grad()
        F.mse_loss(student(X), Y).backward()
        with pytest.raises(metaoptim.WindowError, match="frozen"):
            student.requires_grad_(False)
    assert teacher[0].weight.grad is None and student[0].weight.grad is not None
    assert not any(p.requires_grad for p in teacher.parameters())
    teacher.requires_grad_(True)
    with metaoptim.SlidingWindow(offline=True, strategy=strategy):  # and steps again
        old.step(F.mse_loss(teacher(X), Y))
        teacher[0].requires_grad_(True)


@MODES
@STRATEGIES
def test_what_does_not_step_is_as_without_the_window(offline: bool, strategy: str) -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

    torch.manual_seed(0)
    old, twin, net = Old(), Old(), mlp()
    twin.load_state_dict(old.state_dict())
    another, inner = metaoptim.MetaAdam([old]), metaoptim.MetaSGD([net], lr=0.1)
    tensors = [*old.parameters(), *old.buffers()]
    with metaoptim.SlidingWindow(offline=offline, strategy=strategy):
        inner.step(F.mse_loss(net(X), old(X)))
        with torch.no_grad():
            old.norm.bias.copy_(torch.ones(3))
        old.linear.weight = new = nn.Parameter(torch.ones(2, 3))
        F.mse_loss(net(X), old(X)).backward()
    twin(X), twin(X)
    assert old.linear.weight is new and all(a is b for a, b in zip(old.buffers(), tensors[4:], strict=True))
    torch.testing.assert_close(old.norm.running_mean, twin.norm.running_mean)
    assert old.norm.bias is tensors[1] and torch.equal(old.norm.bias, torch.ones(3))
    assert new.grad is not None and old.norm.weight.grad is not None and not another.state
    state = {k: v.clone() for k, v in old.state_dict().items()}
    with pytest.raises(ZeroDivisionError), metaoptim.SlidingWindow(offline=offline, strategy=strategy):
        old(X)
        with torch.no_grad():
            old.norm.bias.zero_()
        inner.step(F.mse_loss(net(X), old(X)))
        raise ZeroDivisionError
    assert all(torch.equal(v, state[k]) for k, v in old.state_dict().items())


def test_a_load_before_the_first_step_is_undone_and_cuts() -> None:
    """Whatever an optimizer's networks were at entry, before it joined: they are it again."""
    net, other = mlp(), mlp(1)
    own = [p.detach().clone() for p in net.parameters()]
    inner = metaoptim.MetaSGD([net], lr=leaf(0.1))
    for strategy in ("auto", "full_tape"):
        with metaoptim.SlidingWindow(offline=True, strategy=strategy):
            net.load_state_dict(other.state_dict())
            inner.step(F.mse_loss(net(X), Y))
            F.mse_loss(net(X), Y).backward()
        equal(list(net.parameters()), own)
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_scripted_modules_are_refused_when_the_optimizer_is_built() -> None:
    class Holder(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

    with pytest.warns((DeprecationWarning, FutureWarning)):  # the latter from torch 2.14 on
        scripted = Holder(torch.jit.trace(mlp(), X))
    with pytest.raises(TypeError, match="'inside' is scripted or traced"):
        metaoptim.MetaSGD([scripted])


def test_an_optimizer_that_fails_to_join_is_no_other_window_s_matter() -> None:
    torn = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    torn[1].weight = nn.Parameter(torn[0].weight.detach()[:, :])
    bad, net = metaoptim.MetaSGD([torn]), mlp()
    inner = metaoptim.MetaSGD([net], lr=0.1)
    for _ in range(2):
        with pytest.raises(metaoptim.WindowError, match="share memory"), metaoptim.SlidingWindow():
            bad.step(torn(X).square().mean())
        with metaoptim.SlidingWindow(offline=True):
            inner.step(F.mse_loss(net(X), Y))
            F.mse_loss(net(X), Y).backward()
    assert net[0].weight.grad is not None


def test_optimizers_that_do_not_step_are_not_on_the_tape() -> None:
    def run() -> tuple:
        net = mlp()
        inner = metaoptim.MetaSGD([net], lr=leaf(0.1))
        with metaoptim.SlidingWindow(offline=True) as window:
            for _ in range(3):
                inner.step(F.mse_loss(net(X), Y))
            report = window.explain()
        return report.program, report.state_bytes, report.gradient_targets

    alone = run()
    big = nn.Linear(2000, 2000)
    old = metaoptim.MetaAdam([big])
    assert run() == alone and old is not None


# -- networks that change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["A", "B", "C", "tape"])
def test_a_head_put_in_before_the_window_is_trained(form: str) -> None:
    """As in Proto-MAML; what has been taken out is forgotten, with its state."""

    def run(form: str, replaced: bool) -> list[Tensor]:
        net, lr = mlp(), leaf(0.1)
        heads = [nn.Linear(4, 2), nn.Linear(4, 3)]
        with torch.no_grad():
            for head in heads:
                head.weight.copy_(torch.arange(float(head.weight.numel())).view_as(head.weight).sin())
                head.bias.zero_()
        net[2] = heads[0] if replaced else heads[1]
        inner = metaoptim.MetaAdam([net], lr=lr)

        def one_step() -> None:
            inner.step(net(X).square().mean())

        def whole(net: nn.Module, lr: Tensor) -> Tensor:
            with metaoptim.SlidingWindow(offline=True, strategy="full_tape" if form == "tape" else "auto"):
                for _ in range(3):
                    step()
                return net(X).sin().sum()

        whole, step = in_form(form, whole, one_step)
        if replaced:
            whole(net, lr).backward()
            with metaoptim.SlidingWindow():  # leaves a state
                inner.step(net(X).square().mean())
            inner.state.clear()
            for p in (*net.parameters(), lr):
                p.grad = None
            with torch.no_grad():
                for p, q in zip(net[0].parameters(), mlp()[0].parameters(), strict=True):
                    p.copy_(q)
            net[2] = heads[1]
        whole(net, lr).backward()
        assert net[2].weight.grad.abs().max() > 1e-3
        assert [id(p) for p in inner.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
        inner.load_state_dict(inner.state_dict())
        return gradients(*net.parameters(), lr)

    equal(run(form, True), run("A", False))


@pytest.mark.parametrize("form", ["A", "B", "C", "tape"])
@pytest.mark.parametrize("where", ["replaced", "added", "before"])
def test_a_layer_put_in_inside_the_window_is_named(form: str, where: str) -> None:
    net = mlp()
    inner = metaoptim.MetaSGD([net], lr=0.1)

    def one_step() -> None:
        inner.step(net(X).square().mean(), allow_unused=True)

    def whole(net: nn.Module) -> None:
        with metaoptim.SlidingWindow(strategy="full_tape" if form == "tape" else "auto"):
            if where != "before":
                step()
            if where == "added":
                net.append(nn.Linear(2, 2))
            else:
                net[2] = nn.Linear(4, 2)
            step()

    whole, step = in_form(form, whole, one_step)
    name = "3.weight" if where == "added" else "2.weight"
    with pytest.raises(metaoptim.WindowError, match=f"{name!r} was put into the network of a MetaSGD inside"):
        whole(net)
    if form != "C":
        with metaoptim.SlidingWindow():  # the next one trains it
            inner.step(net(X).square().mean())


def test_what_has_been_frozen_tied_and_taken_out_between_windows() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 3))
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.9)
    with metaoptim.SlidingWindow():
        inner.step(net(X).square().mean())
    net[3].weight = net[0].weight
    net[2] = nn.Identity()
    net[0].bias.requires_grad_(False)
    before = net[0].bias.detach().clone()
    with metaoptim.SlidingWindow(offline=True):
        for _ in range(2):
            inner.step(net(X).square().mean())
        assert net[3].weight is net[0].weight
        net(X).square().mean().backward()
    assert torch.equal(net[0].bias, before) and len(inner.state) == 3 == len(inner.state_dict()["state"])
    assert [p.shape for p in inner.param_groups[0]["params"]] == [p.shape for p in net.parameters()]


@pytest.mark.parametrize("joins", [False, True])
def test_writing_into_a_network_before_its_optimizer_steps(joins: bool) -> None:
    """An ordinary network's gradient is by what was written; one that is stepped later has its history cut there."""

    def run(form: str, alive: bool = True, **options: Any) -> list[Tensor]:
        a, b, lr = mlp(3), mlp(4), leaf(0.1)
        first = metaoptim.MetaSGD([a], lr=lr) if alive else None
        second = metaoptim.MetaSGD([b], lr=lr)

        def whole(a: nn.Module, b: nn.Module, lr: Tensor) -> Tensor:
            with metaoptim.SlidingWindow(offline=True, **options):
                second.step(F.mse_loss(a(X) + b(X), Y))
                with torch.no_grad():
                    a[2].bias.mul_(0.9)
                for _ in range(2):
                    second.step(F.mse_loss(a(X) + b(X), Y))
                    if joins:
                        first.step(F.mse_loss(a(X) * b(X), Y))
                return F.mse_loss(a(X) + b(X), Y)

        if form == "C":
            whole = metaoptim.compile(whole, backend="eager")
        whole(a, b, lr).backward()
        return gradients(*a.parameters(), *b.parameters(), lr)

    expected = run("A", joins, strategy="full_tape")
    for options in ({}, {"slots": 2}, {"window": 9}):
        equal(run("A", **options), expected)
    equal(run("A", strategy="full_tape"), expected)
    if joins:
        equal(run("C"), expected)
    else:
        with pytest.raises(
            metaoptim.CaptureError, match=r"'2\.bias' was changed in place, and its optimizer"
        ):
            run("C")
