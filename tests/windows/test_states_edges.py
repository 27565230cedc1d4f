"""Moments that are gone back to: writes in between, several optimizers, other windows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim
from branches import LOOPS, Remembering, X, Y, by_hand, by_window, metas
from forms import leaf, mlp
from metaoptim.compiler.ir.programs.calls import Assign
from oracle import agree


@pytest.mark.parametrize("early", [True, False])
def test_a_reference_does_not_see_what_is_written_later(early: bool) -> None:
    def loop(it: Any, m: dict[str, Tensor], write: Any) -> Tensor:
        it.step(Y + m["shift"])
        there = it.extract()
        if early:
            write(it)
        it.step(Y)
        it.recover(there)
        write(it)
        it.step(Y * 2)
        total = it.loss(Y)
        it.recover(there)
        it.step(Y * 3)
        return total + 2 * it.loss(Y * 2)

    def in_window(it: Any) -> None:
        with torch.no_grad():
            it.net.head.weight.mul_(0.5)
        it.inner.state[it.inner.param_groups[0]["params"][0]]["momentum_buffer"].mul_(0.5)

    def by_functions(it: Any) -> None:
        it.theta["head.weight"] = (it.theta["head.weight"] * 0.5).detach().requires_grad_()
        it.state["inner.weight"] = {
            "momentum_buffer": it.state["inner.weight"]["momentum_buffer"].detach() * 0.5
        }

    expected = by_hand(lambda it, m: loop(it, m, by_functions), "MetaSGD", True)
    for options in ({}, {"slots": 2}):
        agree(by_window(lambda it, m: loop(it, m, in_window), "MetaSGD", True, **options), expected)


@pytest.mark.parametrize("name", ["branches-detached", "stop-net inner"])
def test_with_a_window_that_reaches_far_enough(name: str) -> None:
    expected = by_hand(LOOPS[name], "MetaAdam", False, carries=False)
    for window in (2 if "stop" in name else 4, 20):
        agree(by_window(LOOPS[name], "MetaAdam", False, carries=False, window=window), expected)


def test_two_optimizers_and_a_super_step_parted() -> None:
    def run(**options: Any) -> dict[str, Tensor | None]:
        a, b, m = mlp(0), mlp(1), metas()
        first, second = (
            metaoptim.MetaAdam([a], lr=m["lr"]),
            metaoptim.MetaSGD([b], lr=0.1, momentum=m["momentum"]),
        )
        total = torch.zeros(())
        with metaoptim.SlidingWindow(offline=True, **options):
            for k in range(3):
                one, two = F.mse_loss(a(X), b(X) + m["shift"]), (a(X) * b(X)).mean()
                first.step(one)
                there = metaoptim.extract_state(a, first)
                second.step(two)
                if k == 1:
                    first.step(F.mse_loss(a(X), b(X)))
                    total = total + F.mse_loss(a(X) * b(X), Y)
                    metaoptim.recover_state(there)
                if k == 0:
                    metaoptim.stop_gradient(b[0], second)
            total = total + F.mse_loss(a(X), b(X) + Y)
        total.backward()
        named = {f"{n}.{k}": p for n, net in (("a", a), ("b", b)) for k, p in net.named_parameters()}
        return {k: p.grad for k, p in {**named, **m}.items()}

    expected = run(strategy="full_tape")
    assert expected["a.0.weight"].abs().max() > 1e-3  # type: ignore[union-attr]
    for options in ({}, {"slots": 2}):
        agree(run(**options), expected)


def test_statistics_and_tied_parameters_come_back() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.5)
    with metaoptim.SlidingWindow(offline=True):
        inner.step(net(X).square().mean())
        there = metaoptim.extract_state(net, inner)
        before = [t.detach().clone() for t in (*net.parameters(), *net.buffers())]
        for _ in range(2):
            inner.step(net(X).square().mean())
            after = list(net.buffers())
            assert not torch.equal(after[0], before[-3]) and after[2] == before[-1] + 1
            metaoptim.recover_state(there)
            now = [t.detach() for t in (*net.parameters(), *net.buffers())]
            assert all(map(torch.equal, now, before)) and net[2].weight is net[0].weight
        net(X).square().sum().backward()
    assert net[0].weight.grad is not None


def test_many_branches_from_one_moment_hold_it_once() -> None:
    net, m = mlp(), metas()
    inner = metaoptim.MetaSGD([net], lr=m["lr"])
    with metaoptim.SlidingWindow(offline=True, slots=2) as window:
        inner.step(F.mse_loss(net(X), Y))
        there = metaoptim.extract_state(net, inner)
        for k in range(5):
            metaoptim.recover_state(there)
            inner.step(F.mse_loss(net(X), Y * k))
        values = [v for c in window.program.calls if isinstance(c, Assign) for v in c.values]
    assert len(values) == 6 * 4 and len({v.untyped_storage()._cdata for v in values}) == 2 * 4


def test_a_budget_counts_what_branches_hold_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    size, lr, x = sum(p.nbytes for p in net.parameters()), leaf(0.1), torch.randn(4, 64)
    inner = metaoptim.MetaSGD([net], lr=lr)
    with metaoptim.SlidingWindow(offline=True, memory_budget=14 * size) as window:
        inner.step(net(x).square().mean())
        there = metaoptim.extract_state(net, inner)
        for k in range(60):
            metaoptim.recover_state(there)
            inner.step((net(x) - k).square().mean())
        kept = window.explain().kept_states
        net(x).square().mean().backward()
    assert 1 <= kept < 14 and lr.grad is not None


def test_the_weights_of_every_step_have_their_graph() -> None:
    def loss(net: nn.Module, theta: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(functional_call(net, theta, (X,)), Y)

    def run(**options: Any) -> dict[str, Tensor | None]:
        net, m, thetas = mlp(), metas(), []
        inner = metaoptim.MetaSGD([net], lr=m["lr"], momentum=m["momentum"])
        with metaoptim.SlidingWindow(offline=True, **options):
            for _ in range(3):
                inner.step(F.mse_loss(net(X), Y + m["shift"]))
                thetas.append(dict(net.named_parameters()))
                with torch.no_grad():
                    assert not net(X).requires_grad
        stacked = {k: torch.stack([theta[k] for theta in thetas]) for k in thetas[0]}
        total = torch.func.vmap(lambda theta: loss(net, theta))(stacked).sum() + loss(net, thetas[1])
        total.backward()
        return {k: p.grad for k, p in (*net.named_parameters(), *m.items())}

    expected = run(strategy="full_tape")
    assert expected["lr"].abs() > 1e-3  # type: ignore[union-attr]
    for options in ({}, {"slots": 1}):
        agree(run(**options), expected)


def test_outside_a_window_and_from_one_to_another() -> None:
    net = Remembering(carries=False)
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.5)
    before = metaoptim.extract_state(net, inner, by="reference")
    values = [t.detach().clone() for t in (*net.parameters(), *net.buffers())]

    def now() -> list[Tensor]:
        return [t.detach() for t in (*net.parameters(), *net.buffers())]

    with metaoptim.SlidingWindow(offline=True):
        inner.step(F.mse_loss(net(X), Y))
        adapted, linked = metaoptim.extract_state(net, inner, by="detached"), metaoptim.extract_state(net)
        there = [t.clone() for t in now()]
        metaoptim.recover_state(before)
        assert all(map(torch.equal, now(), values)) and not any(inner.state[p] for p in inner.state)
        F.mse_loss(net(X), Y).backward()
    assert net.head.weight.grad is None  # values from before the window
    own, buffer = net.head.weight, net.trace
    metaoptim.recover_state(adapted)
    assert all(map(torch.equal, now(), there)) and net.head.weight is own and net.trace is buffer
    assert all(inner.state[p]["momentum_buffer"].any() for p in net.parameters())
    metaoptim.recover_state(before)
    with metaoptim.SlidingWindow(offline=True):
        metaoptim.recover_state(adapted)
        assert all(map(torch.equal, now(), there))
        with pytest.raises(metaoptim.WindowError, match="extracted by reference in a window"):
            metaoptim.recover_state(linked)
        assert all(map(torch.equal, now(), there))
    assert all(map(torch.equal, now(), values))
    with pytest.raises(metaoptim.WindowError, match="extracted by reference in a window"):
        metaoptim.recover_state(linked)


def test_what_no_step_trains_must_be_as_it_was() -> None:
    net, other = mlp(), mlp(1)
    inner = metaoptim.MetaSGD(list(net[0].parameters()), lr=0.1, networks=[net])
    state = metaoptim.extract_state(net)
    with metaoptim.SlidingWindow(offline=True):
        inner.step(F.mse_loss(net(X), Y))
        metaoptim.recover_state(state)
        with pytest.raises(metaoptim.WindowError, match="no inner optimizer of this window trains"):
            metaoptim.extract_state(other)
    noise = nn.Module()
    noise.register_buffer("scale", leaf())
    wide = nn.Sequential(mlp(), noise)
    trained, state_of_all = metaoptim.MetaSGD([wide[0]], lr=0.1), metaoptim.extract_state(wide)
    with metaoptim.SlidingWindow(offline=True):
        trained.step(F.mse_loss(wide[0](X), Y))
        metaoptim.recover_state(state_of_all)
        assert wide[1].scale.requires_grad  # a meta-parameter stays what it is
    with torch.no_grad():
        net[2].weight.mul_(2)
    with (
        pytest.raises(metaoptim.WindowError, match=r"shape \(2, 4\) has another value than in the state"),
        metaoptim.SlidingWindow(offline=True),
    ):
        metaoptim.recover_state(state)


def test_what_is_refused() -> None:
    net = mlp()
    inner = metaoptim.MetaSGD([net], lr=0.1)
    for given, error, match in (
        ((), TypeError, "got nothing, expected networks and inner optimizers"),
        ((net, list(net.parameters())), TypeError, "got list"),
        ((torch.optim.SGD(net.parameters()),), TypeError, "got SGD"),
    ):
        for function in (metaoptim.extract_state, metaoptim.stop_gradient):
            with pytest.raises(error, match=match):
                function(*given)
    with pytest.raises(ValueError, match="'deepcopy' is 'detached' here"):
        metaoptim.extract_state(net, by="deepcopy")
    with pytest.raises(TypeError, match="got OrderedDict"):
        metaoptim.recover_state(net.state_dict())  # type: ignore[arg-type]
    with pytest.raises(metaoptim.WindowError, match="outside a window"):
        metaoptim.stop_gradient(net)
    with metaoptim.SlidingWindow(offline=True, window=3):
        with pytest.raises(metaoptim.WindowError, match="by='detached'"):
            metaoptim.extract_state(net, inner)
        inner.step(F.mse_loss(net(X), Y))
    with metaoptim.SlidingWindow(offline=True):
        inner.step(F.mse_loss(net(X), Y))
        weight, there = net[0].weight, metaoptim.extract_state(net)
        inner.step(F.mse_loss(net(X), Y))
        metaoptim.recover_state(there)
        with pytest.raises(metaoptim.CaptureError, match="as it was before later inner steps"):
            torch.autograd.grad(F.mse_loss(net(X), Y), weight)


def test_a_state_of_no_parameter_comes_back() -> None:
    net = mlp()
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.5)
    key: Any = "of the whole optimizer"
    before = metaoptim.extract_state(inner)
    with metaoptim.SlidingWindow(offline=True):
        inner.step(F.mse_loss(net(X), Y))
        inner.state[key] = {"count": torch.tensor(1.0)}
        there = metaoptim.extract_state(net, inner)
        inner.state[key] = {"count": torch.tensor(2.0)}
        metaoptim.recover_state(there)
        assert inner.state[key]["count"] == 1 and there.counts[0][2] is not inner.state[key]
        metaoptim.recover_state(before)
        assert key not in inner.state


def test_schedules_and_wrapped_optimizers_go_back_too() -> None:
    def run(form: str, cls: Any) -> dict[str, Tensor | None]:
        net, m = mlp(), metas()

        def whole(net: nn.Module, m: dict[str, Tensor]) -> Tensor:
            rate = metaoptim.schedules.Schedule(lambda step: m["lr"] * 0.8**step)
            inner = cls([net], lr=rate)
            with metaoptim.SlidingWindow(offline=True, strategy="full_tape" if form == "tape" else "auto"):
                inner.step(F.mse_loss(net(X), Y))
                there, total = metaoptim.extract_state(net, inner), torch.zeros(())
                for k in (1, 2):
                    metaoptim.recover_state(there)
                    inner.step(F.mse_loss(net(X), Y * k + m["shift"]))
                    inner.step(F.mse_loss(net(X), Y * k))
                    total = total + k * F.mse_loss(net(X), Y - k)
                return total

        (metaoptim.compile(whole, backend="eager") if form == "C" else whole)(net, m).backward()
        return {k: p.grad for k, p in (*net.named_parameters(), *m.items())}

    for cls in (metaoptim.MetaSGD, metaoptim.MetaAdamW):
        expected = run("tape", cls)
        for form in "AC":
            agree(run(form, cls), expected)
