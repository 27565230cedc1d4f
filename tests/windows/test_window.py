"""What a window means: entry and exit, backward in all its forms, hooks, threads."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import metaoptim
from forms import leaf
from metaoptim.runtime.windows.session import current_session
from window_cases import STRATEGIES, batch, grads, loss_of, network, params


class PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {}))


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
        assert current_session() is None
        metaoptim.MetaSGD([net])  # may be built: nothing of the window is left behind


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
