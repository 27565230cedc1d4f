"""What a window means: entry and exit, backward in all its forms, several optimizers, cuts, threads."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import metaoptim

STRATEGIES = pytest.mark.parametrize(
    "options", [{}, {"slots": 2}, {"strategy": "full_tape"}], ids=["all", "slots", "tape"]
)


class PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {}))


def network(seed: int = 0, bn: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(4)] if bn else []
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 2)).double()


def batch(t: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + t)
    return torch.randn(6, 3, generator=g, dtype=torch.float64), torch.randn(
        6, 2, generator=g, dtype=torch.float64
    )


def loss_of(net: Any, t: int) -> Tensor:
    x, y = batch(t)
    return F.mse_loss(net(x), y)


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def params(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def grads(net: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


@STRATEGIES
def test_offline_restores_everything(options: dict) -> None:
    net = network(bn=True)
    inner = metaoptim.MetaAdam([net], lr=0.1)
    own, buffers, state = list(net.parameters()), list(net.buffers()), copy.deepcopy(net.state_dict())
    with metaoptim.SlidingWindow(offline=True, **options):
        for t in range(3):
            inner.step(loss_of(net, t))
        assert not torch.equal(net[0].weight, own[0]) and len(inner.state_dict()["state"]) == 6
        loss_of(net, 9).backward()
    assert all(p is q for p, q in zip(net.parameters(), own, strict=True))
    assert all(b is c for b, c in zip(net.buffers(), buffers, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not inner.state and all(p.grad is not None and p.grad.abs().max() > 0 for p in own)


@STRATEGIES
def test_online_keeps_everything(options: dict) -> None:
    net, twin = network(bn=True), network(bn=True)
    own, lr = list(net.parameters()), leaf(0.1)
    inner, reference = metaoptim.MetaAdam([net], lr=lr), torch.optim.Adam(twin.parameters(), lr=0.1)
    for part in range(2):  # two windows in a row are one training run
        with metaoptim.SlidingWindow(**options):
            for t in range(3 * part, 3 * part + 3):
                inner.step(loss_of(net, t))
        for t in range(3 * part, 3 * part + 3):
            reference.zero_grad()
            loss_of(twin, t).backward()
            reference.step()
    assert all(p is q and p.is_leaf and p.grad is None for p, q in zip(net.parameters(), own, strict=True))
    for (k, v), w in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(v, w, msg=k)
    assert all(not v.requires_grad for s in inner.state.values() for v in s.values())


@STRATEGIES
def test_online_cuts_off_what_its_optimizers_step(options: dict) -> None:
    """From the entry of the window on, once one has stepped; without a step, from its construction inside."""
    net = network()
    inner = metaoptim.MetaSGD([net], lr=leaf(0.1))
    with metaoptim.SlidingWindow(**options):
        first = loss_of(net, 0)
        inner.step(loss_of(net, 1))
        (first + loss_of(net, 2)).backward()
    assert all(p.grad is None for p in net.parameters())
    with metaoptim.SlidingWindow(**options):
        inside = metaoptim.MetaSGD([net])
        loss_of(net, 0).backward()
    assert inside is not None and all(p.grad is None for p in net.parameters())
    for offline in (False, True):  # no step: an ordinary network
        net.zero_grad()
        with metaoptim.SlidingWindow(offline=offline, **options):
            loss_of(net, 0).backward()
        assert all(p.grad is not None for p in net.parameters())


@STRATEGIES
def test_backward_inside_after_repeated_and_by_autograd_grad(options: dict) -> None:
    results = []
    for how in ("inside", "after", "grad", "twice", "split"):
        net, lr = network(), leaf(0.1)
        inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.9)
        own = [*net.parameters(), lr]
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(4):
                inner.step(loss_of(net, t))
            outer = loss_of(net, 8) + loss_of(net, 9)
            halves = loss_of(net, 8), loss_of(net, 9)
            if how == "inside":
                outer.backward()
        if how == "after":
            outer.backward()
        if how == "grad":
            for p, g in zip(own, torch.autograd.grad(outer, own), strict=True):
                p.grad = g
        if how == "twice":
            (outer / 2).backward(retain_graph=True)
            (outer / 2).backward(retain_graph=True)
        if how == "split":
            halves[0].backward(retain_graph=True)
            halves[1].backward()
        results.append([p.grad for p in own])
    for other in results[1:]:
        for g, h in zip(other, results[0], strict=True):
            torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-13)


def test_two_backwards_without_retain_graph() -> None:
    """The original's `critic_loss.backward(); actor_loss.backward()`: our nodes survive."""
    net, gamma = network(), leaf(0.5)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow():
        for t in range(3):
            inner.step(loss_of(net, t) * gamma)
        first, second = loss_of(net, 8), loss_of(net, 9)
        together = torch.autograd.grad(first + second, gamma, retain_graph=True)[0]
        first.backward()
        second.backward()
    torch.testing.assert_close(gamma.grad, together)


@STRATEGIES
def test_exception_restores_as_at_entry(options: dict) -> None:
    net, gamma = network(bn=True), leaf(0.5)
    inner = metaoptim.MetaAdam([net], lr=0.1)
    with metaoptim.SlidingWindow(**options):
        inner.step(loss_of(net, 0))
    loss_of(net, 5).backward()
    before, own, old = copy.deepcopy(net.state_dict()), list(net.parameters()), grads(net)
    state = copy.deepcopy(inner.state_dict())
    for offline in (True, False):
        with pytest.raises(KeyError), metaoptim.SlidingWindow(offline=offline, **options):
            inner.step(loss_of(net, 1) * gamma)
            loss_of(net, 2).backward()
            net.zero_grad()
            raise KeyError
        assert all(p is q for p, q in zip(net.parameters(), own, strict=True))
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        for g, h in zip(grads(net), old, strict=True):
            assert g is not None and h is not None and torch.equal(g, h)
        now = inner.state_dict()
        assert all(
            torch.equal(v, now["state"][k][n]) for k, s in state["state"].items() for n, v in s.items()
        )
        assert metaoptim.MetaSGD([net]) is not None  # nothing of the window is left behind


@STRATEGIES
def test_actor_and_critic_losses_before_both_steps(options: dict) -> None:
    """Losses of one version of theta, then two steps: shared trunk, each loss at the parameters it read."""

    def run(window: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        trunk, actor, critic = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), nn.Linear(3, 1).double()
        gamma = leaf(0.7)
        modules = [trunk, actor, critic]

        def losses(t: int, f: Any) -> tuple[Tensor, Tensor]:
            x, y = batch(t)
            h = f[0](x).tanh()
            value = f[2](h)
            return (value - gamma * y[:, :1]).square().mean(), (f[1](h) * (y - value)).mean()

        if window:
            a, c = metaoptim.MetaSGD([trunk, actor], lr=0.1), metaoptim.MetaSGD([critic, trunk], lr=0.2)
            with metaoptim.SlidingWindow(offline=True, **options):
                for t in range(3):
                    critic_loss, actor_loss = losses(t, modules)
                    c.step(critic_loss)
                    a.step(actor_loss)
                sum(losses(9, modules)).backward()
            return [p.grad for m in modules for p in m.parameters()], gamma.grad
        theta = [[p.clone() for p in m.parameters()] for m in modules]
        for t in range(3):
            f = [lambda x, w=w: F.linear(x, *w) for w in theta]
            critic_loss, actor_loss = losses(t, f)
            gc_ = torch.autograd.grad(critic_loss, [*theta[2], *theta[0]], create_graph=True)
            ga = torch.autograd.grad(actor_loss, [*theta[0], *theta[1]], create_graph=True)
            theta = [
                [w - 0.2 * g - 0.1 * h for w, g, h in zip(theta[0], gc_[2:], ga[:2], strict=True)],
                [w - 0.1 * h for w, h in zip(theta[1], ga[2:], strict=True)],
                [w - 0.2 * g for w, g in zip(theta[2], gc_[:2], strict=True)],
            ]
        f = [lambda x, w=w: F.linear(x, *w) for w in theta]
        own = [p for m in modules for p in m.parameters()]
        found = torch.autograd.grad(sum(losses(9, f)), [*own, gamma])
        return list(found[:-1]), found[-1]

    (got, got_gamma), (expected, expected_gamma) = run(True), run(False)
    torch.testing.assert_close(got_gamma, expected_gamma, rtol=1e-10, atol=1e-13)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-13)


@STRATEGIES
def test_loss_finished_after_the_other_step(options: dict) -> None:
    """`actor.step(-(logp * adv).mean())` after `critic.step`, with logp computed before."""
    actor, critic, gamma = network(1), network(2), leaf(0.7)
    a, c = metaoptim.MetaSGD([actor], lr=0.3), metaoptim.MetaSGD([critic], lr=0.2)
    with metaoptim.SlidingWindow(**options):
        for t in range(3):
            x, y = batch(t)
            logp, value = actor(x), critic(x)
            c.step((value - gamma * y).square().mean())
            a.step((logp * (y - value.detach()) * gamma).mean() + logp.square().mean())
        (actor(batch(9)[0]) * critic(batch(9)[0])).sum().backward()
    first = gamma.grad.clone()
    actor, critic, gamma = network(1), network(2), leaf(0.7)
    theta = [dict(actor.named_parameters()), dict(critic.named_parameters())]
    theta = [{k: v.detach().requires_grad_() for k, v in th.items()} for th in theta]
    call = torch.func.functional_call
    for t in range(3):
        x, y = batch(t)
        logp, value = call(actor, theta[0], (x,)), call(critic, theta[1], (x,))
        g = torch.autograd.grad(
            (value - gamma * y).square().mean(), list(theta[1].values()), create_graph=True
        )
        h = torch.autograd.grad(
            (logp * (y - value.detach()) * gamma).mean() + logp.square().mean(),
            list(theta[0].values()),
            create_graph=True,
        )
        theta = [
            {k: v - 0.3 * d for (k, v), d in zip(theta[0].items(), h, strict=True)},
            {k: v - 0.2 * d for (k, v), d in zip(theta[1].items(), g, strict=True)},
        ]
    x = batch(9)[0]
    (expected,) = torch.autograd.grad(
        (call(actor, theta[0], (x,)) * call(critic, theta[1], (x,))).sum(), gamma
    )
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-13)


@STRATEGIES
def test_inside_the_block_the_network_is_an_ordinary_module(options: dict) -> None:
    net = network(bn=True)
    inner = metaoptim.MetaSGD([net], lr=0.2)
    plain = None
    for interfere in (False, True):
        net.zero_grad()
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(3):
                inner.step(loss_of(net, t))
                if interfere:
                    twin = copy.deepcopy(net)
                    assert torch.equal(twin[0].weight, net[0].weight) and twin[0].weight.is_leaf
                    net.eval()
                    with torch.no_grad():
                        loss_of(net, 5)
                    net.train()
                    net.zero_grad()
                    torch.save(net.state_dict(), io.BytesIO())
                    assert "Parameter" in repr(net[0].weight) and "BatchNorm" in repr(net)
                    assert [n for n, _ in net.named_parameters()] == [n for n, _ in twin.named_parameters()]
            loss_of(net, 9).backward()
        if plain is None:
            plain = grads(net)
        else:
            for g, h in zip(grads(net), plain, strict=True):
                torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-14)


@STRATEGIES
@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "data"])
def test_in_place_load_is_a_history_cut(options: dict, how: str) -> None:
    """After the load the past is constant: θ_0 and the steps before receive nothing, the steps after do."""
    net, donor = network(), network(7)
    early, late = leaf(0.1), leaf(0.2)
    first = metaoptim.MetaSGD([net], lr=0.1, momentum=0.5)
    with metaoptim.SlidingWindow(offline=True, **options):
        first.step(loss_of(net, 0) * early)
        read_before = loss_of(net, 3)
        if how == "load_state_dict":
            net.load_state_dict(donor.state_dict())
        for p, q in zip(net.parameters(), donor.parameters(), strict=True):
            if how == "copy_":
                with torch.no_grad():
                    p.mul_(0.0)
                    p.copy_(q)
            elif how == "data":
                p.data.copy_(q.data)
        first.step(loss_of(net, 1) * late)
        outer = loss_of(net, 2)
    outer.backward(retain_graph=True)
    after = [p.grad for p in net.parameters()]
    # the momentum buffer still remembers the first step: that path is not overwritten
    assert late.grad is not None and late.grad.abs() > 1e-6
    momentum_path = early.grad.clone()
    early.grad = None
    if how != "data":  # values saved for backward were overwritten; autograd says so itself
        pass
    theta = {n: p.detach().clone().requires_grad_() for n, p in donor.named_parameters()}
    start = dict(network().named_parameters())
    e, late_leaf = leaf(0.1), leaf(0.2)
    call = torch.func.functional_call
    g0 = torch.autograd.grad(
        loss_of(lambda x: call(net, start, (x,)), 0) * e, list(start.values()), create_graph=True
    )
    g1 = torch.autograd.grad(
        loss_of(lambda x: call(net, theta, (x,)), 1) * late_leaf, list(theta.values()), create_graph=True
    )
    final = {n: v - 0.1 * (0.5 * b + g) for (n, v), b, g in zip(theta.items(), g0, g1, strict=True)}
    wanted = torch.autograd.grad(
        loss_of(lambda x: call(net, final, (x,)), 2), [e, late_leaf, *start.values()]
    )
    torch.testing.assert_close(momentum_path, wanted[0])
    torch.testing.assert_close(late.grad, wanted[1])
    for g, h in zip(after, wanted[2:], strict=True):
        torch.testing.assert_close(g, h)
    assert read_before.requires_grad


@STRATEGIES
def test_captured_initial_parameters_are_a_constant_meta_parameter(options: dict) -> None:
    """A proximal term towards theta_0, captured before the window, offline: both paths reach theta_0."""
    net = network()
    anchors = list(net.parameters())
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, **options):
        for t in range(3):
            prox = sum((p * a.tanh()).sum() for p, a in zip(net.parameters(), anchors, strict=True))
            inner.step(loss_of(net, t) + 0.3 * prox)
        loss_of(net, 9).backward()
    got = grads(net)
    start = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    theta = {n: p * 1 for n, p in start.items()}
    for t in range(3):
        value = loss_of(lambda x, th=theta: torch.func.functional_call(net, th, (x,)), t)
        value = value + 0.3 * sum(
            (p * a.tanh()).sum() for p, a in zip(theta.values(), start.values(), strict=True)
        )
        g = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {n: p - 0.1 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    outer = loss_of(lambda x: torch.func.functional_call(net, theta, (x,)), 9)
    for g, h in zip(got, torch.autograd.grad(outer, list(start.values())), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-13)


@STRATEGIES
def test_optimizer_made_inside_and_networks_joining_late(options: dict) -> None:
    net, other, lr = network(), network(4), leaf(0.1)
    x = batch(5)[0]
    with metaoptim.SlidingWindow(offline=True, **options):
        inner = metaoptim.MetaSGD([net], lr=lr)
        inner.step(loss_of(net, 0))
        second = metaoptim.MetaSGD([other], lr=lr)
        for t in range(1, 3):
            inner.step(loss_of(net, t) + (net(x) * other(x)).mean())
            second.step(loss_of(other, t) + (net(x) * other(x)).mean())
        (net(x) * other(x)).sum().backward()
    got = [*grads(net), *grads(other), lr.grad]
    a = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    b = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    rate, call = leaf(0.1), torch.func.functional_call

    def f(th: dict) -> Any:
        return lambda x: call(net, th, (x,))

    def descend(th: dict, value: Any) -> dict:
        th = {
            n: p * 1 for n, p in th.items()
        }  # the gradient at this state, not through how the others came about
        g = torch.autograd.grad(value(f(th)), list(th.values()), create_graph=True)
        return {n: p - rate * d for (n, p), d in zip(th.items(), g, strict=True)}

    p, q = descend(a, lambda h: loss_of(h, 0)), b
    for t in range(1, 3):
        p = descend(p, lambda h, t=t, q=q: loss_of(h, t) + (h(x) * f(q)(x)).mean())
        q = descend(q, lambda h, t=t, p=p: loss_of(h, t) + (f(p)(x) * h(x)).mean())
    expected = torch.autograd.grad((f(p)(x) * f(q)(x)).sum(), [*a.values(), *b.values(), rate])
    for g, h in zip(got, expected, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-13)


@STRATEGIES
def test_pickup_step_and_grad_tape(options: dict) -> None:
    net, twin = network(), network()
    inner, reference = metaoptim.MetaAdam([net], lr=0.1), metaoptim.MetaAdam([twin], lr=0.1)
    with metaoptim.SlidingWindow(pickup_step=1, record_grad_tape=True, **options):
        for t in range(4):
            inner.step(loss_of(net, t))
    with metaoptim.SlidingWindow(**options):
        values = []
        for t in range(2):
            values.append(params(twin))
            reference.step(loss_of(twin, t))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert float(inner.state_dict()["state"][0]["step"]) == 2
    tape = dict(inner.named_parameters())
    assert len(tape) == 4 + 4 * 4 and torch.equal(tape["step_1:0.weight"], values[1][0])


@STRATEGIES
def test_backward_hook_sees_each_cotangent(options: dict) -> None:
    seen: list[int] = []

    def hook(grad: Tensor) -> Tensor:
        seen.append(grad.dim())
        return 2 * grad

    net, lr = network(), leaf(0.1)
    inner = metaoptim.MetaSGD([net], lr=lr)
    with metaoptim.SlidingWindow(offline=True, backward_hook=hook, **options):
        inner.step(loss_of(net, 0))
        outer = loss_of(net, 1)
        direct = torch.autograd.grad(outer, list(net.parameters()), retain_graph=True)
        outer.backward()
    assert sorted(seen) == [1, 1, 2, 2]
    start = list(net.parameters())
    g = torch.autograd.grad(loss_of(net, 0), start, create_graph=True)
    hessian = torch.autograd.grad(g, start, [-0.1 * 2 * d for d in direct])
    for p, d, h in zip(start, direct, hessian, strict=True):
        torch.testing.assert_close(p.grad, d + h)


def test_zero_nan_hook() -> None:
    assert torch.equal(metaoptim.zero_nan_hook(torch.tensor([1.0, float("nan")])), torch.tensor([1.0, 0.0]))


def test_third_order_is_refused_but_for_full_tape() -> None:
    for options in ({}, {"window": 2}, {"strategy": "full_tape"}):
        net, lr = network(), leaf(0.1)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(**options):
            inner.step(loss_of(net, 0))
            outer = loss_of(net, 1)
            if options.get("strategy"):
                (g,) = torch.autograd.grad(outer, lr, create_graph=True)
                assert g.requires_grad
            else:
                with pytest.raises(metaoptim.MetaOptimError, match="create_graph"):
                    torch.autograd.grad(outer, lr, create_graph=True)


def test_threads_are_apart() -> None:
    results: dict[int, list[Tensor]] = {}
    nets = [network(i) for i in range(4)]
    optimizers = [metaoptim.MetaSGD([n], lr=0.1, momentum=0.5) for n in nets[:2]]  # made here, used there
    barrier = threading.Barrier(4)

    def work(i: int) -> None:
        inner = optimizers[i] if i < 2 else metaoptim.MetaSGD([nets[i]], lr=0.1, momentum=0.5)
        barrier.wait(60)
        with metaoptim.SlidingWindow(offline=True, slots=2):
            for t in range(4):
                inner.step(loss_of(nets[i], t))
            loss_of(nets[i], 9).backward()
        results[i] = grads(nets[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        net = network(i)
        inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.5)
        with metaoptim.SlidingWindow(offline=True):
            for t in range(4):
                inner.step(loss_of(net, t))
            loss_of(net, 9).backward()
        for g, h in zip(results[i], grads(net), strict=True):
            torch.testing.assert_close(g, h)


def test_a_suspended_generator_leaves_the_modes_paired() -> None:
    net = network()
    inner = metaoptim.MetaSGD([net], lr=0.1)

    def steps() -> Any:
        with metaoptim.SlidingWindow(offline=True):
            for t in range(5):
                inner.step(loss_of(net, t))
                yield t

    generator = steps()
    next(generator)
    with PassThrough():
        generator.close()
        assert len(_get_current_dispatch_mode_stack()) == 1
    assert not _get_current_dispatch_mode_stack()
    with metaoptim.SlidingWindow(offline=True):
        inner.step(loss_of(net, 0))
        loss_of(net, 1).backward()
    assert net[0].weight.grad is not None


def test_checkpointed_outer_loss_after_the_block_sees_theta_T() -> None:
    got = []
    for use in (False, True):
        net = network()
        inner = metaoptim.MetaSGD([net], lr=0.3)
        with metaoptim.SlidingWindow(offline=True):
            inner.step(loss_of(net, 0))
            x, y = batch(1)
            out = checkpoint(net, x, use_reentrant=False) if use else net(x)
            outer = F.mse_loss(out, y)
        outer.backward()
        got.append(grads(net))
    for g, h in zip(*got, strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("window", [None, 2])
def test_nothing_leaks(window: int | None) -> None:
    """Network, window and states die with their last reference: no cycle runs through autograd nodes."""
    net, lr = network(), leaf(0.1)
    inner = metaoptim.MetaAdam([net], lr=lr)
    with metaoptim.SlidingWindow(window=window) as w:
        carried = None
        for t in range(4):
            extra = 0 if carried is None else carried.sum()
            inner.step(loss_of(net, t) + extra)
            carried = net(batch(t)[0]).tanh().neg().mul_(0.5)  # in place, as in dropout
        outer = loss_of(net, 9)
        engine = weakref.ref(w._session.engine)
    outer.backward()
    shown, optimizer = weakref.ref(engine().state[0]), weakref.ref(inner)
    gc.disable()
    try:
        del w, outer, carried, extra, inner
        assert engine() is None and shown() is None and optimizer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"slots": 1}])
def test_an_online_window_that_gives_nothing_a_gradient_says_so(options: dict[str, Any]) -> None:
    """Whoever forgets offline=True in MAML: every .grad stays None."""
    net = torch.nn.Linear(3, 1)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    x = torch.linspace(-1, 1, 6).view(2, 3)

    def backward(lr: Any, **window: Any) -> None:
        inner.param_groups[0]["lr"] = lr
        with metaoptim.SlidingWindow(**window):
            for _ in range(3):
                inner.step(net(x).square().mean())
            net(x).square().mean().backward()

    with pytest.warns(metaoptim.UnreachableWarning, match="offline=True") as caught:
        backward(0.1, **options)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(p.grad is None for p in net.parameters())
    backward(torch.tensor(0.1, requires_grad=True), **options)  # something is learnt: nothing to say
    if "window" not in options:
        backward(0.1, offline=True, **options)
        assert all(p.grad is not None for p in net.parameters())
