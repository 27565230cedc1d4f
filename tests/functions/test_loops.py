"""`window.scan` and `window.range` in form C: a few captured iterations stand for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import full_tape, leaf, mlp
from oracle import agree
from scans import batches, compiled, query

LENGTHS = (1, 2, 3, 4, 5, 9)


LOOPS: dict[str, Callable] = {}


def loop(body: Callable) -> Callable:
    """``body(window, xs, ys, shift, w)`` gives a loss, what is changed, and the networks."""
    LOOPS[body.__name__] = body
    return body


@loop
def carried_and_summed(nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """A sum, a hidden state, momentum created by the first iteration, and what the last one leaves."""
    (net,) = nets
    inner = metaoptim.MetaSGD([net], lr=0.1 * w.exp(), momentum=0.9)
    with window(offline=True) as win:
        total, h = torch.zeros(()), torch.zeros(5, 2)
        last = total
        for x, y, s in win.scan(xs, ys, shift):
            out = net(x) + 0.3 * h
            last = F.mse_loss(out, y + s)
            total = total + query(net)
            h = h * w + out.tanh()
            inner.step(last * w.sigmoid())
        return query(net) + 0.2 * total + h.square().mean() + last


@loop
def hidden_state_none_at_first(
    nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor
) -> Tensor:
    (net,) = nets
    inner = metaoptim.MetaAdam([net], lr=0.05 * w.exp())
    with window(offline=True) as win:
        h = None
        for x, y, s in win.scan(xs, ys, shift):
            out = net(x) if h is None else net(x) + h * w
            h = out.tanh()
            inner.step(F.mse_loss(out, y + s))
        return query(net) + h.sum()


@loop
def indexed_by_range(nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """Forwards, backwards, with strides, of slices, and of a tensor computed inside."""
    (net,) = nets
    count = len(shift)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    doubled, scaled = torch.cat([xs, xs * 2]), shift * w
    with window(offline=True) as win:
        for t in win.range(count):
            out = net(xs[t]) + doubled[2 * t, :, :2] + doubled[t : t + 2, :, :2].mean(0)
            inner.step(F.mse_loss(out, ys[count - 1 - t] + shift[t] * scaled[-1 - t]))
        return query(net)


@loop
def scan_of_computed(nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """A source made inside, and steps before, between and after two scans."""
    (net,) = nets
    inner = metaoptim.MetaAdam([net], lr=0.05)
    with window(offline=True) as win:
        inner.step(query(net) * w)
        for x in win.scan(xs * w):
            inner.step(net(x).square().mean())
        inner.step(query(net) * w * 0.5)
        for y, s in win.scan(ys.cos(), shift):
            inner.step((net(y[:, :1].expand(5, 3)) - s).square().mean())
        inner.step(query(net) * w)
        return query(net)


@loop
def noise_inside(nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    (net,) = nets
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with window(offline=True) as win:
        fixed = torch.randn(5, 3)
        for x, y, s in win.scan(xs, ys, shift):
            out = F.dropout(net(x + fixed * torch.rand(5, 3)), 0.3)
            inner.step(F.mse_loss(out, y + s) * w)
        return query(net) + torch.randn(()) * w


@loop
def two_optimizers(nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    actor, critic = nets
    first, second = metaoptim.MetaAdam([actor], lr=0.05), metaoptim.MetaSGD([critic], lr=0.1, momentum=0.5)
    with window(offline=True) as win:
        for x, y, s in win.scan(xs, ys, shift):
            values = critic(x)
            judged = (values - w * (y + s)).square().mean()
            played = -(actor(x).log_softmax(-1) * (y - values).detach()).mean()
            second.step(judged)
            first.step(played)
        return query(actor) + query(critic)


@loop
def accumulated_in_place(nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    (net,) = nets
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with window(offline=True) as win:
        total, trace = torch.zeros(()), torch.zeros(5, 2)
        for x, y, s in win.scan(xs, ys, shift):
            trace.mul_(0.5).add_(net(x).detach() * 0.1)
            total += query(net) * w
            inner.step(F.mse_loss(net(x) + trace, y + s) * w)
        return total + query(net)


@loop
def constants_inside(nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """Made anew in every iteration, of equal values; one is changed in place, one is empty, one requires grad."""
    (net,) = nets
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with window(offline=True) as win:
        for x, y, s in win.scan(xs, ys, shift):
            counter, direction = torch.tensor(0.5), torch.tensor([0.3, -0.2], requires_grad=True)
            out = torch.cat([net(x).flatten(), torch.tensor([])]).view(5, 2) * x.new_tensor([1.0, 2.0])
            (slope,) = torch.autograd.grad((out.detach() @ direction).sin().sum(), direction)
            weights = torch.tensor([1.0, 2.0]) * counter.add_(1)
            inner.step(
                F.cross_entropy(out + slope, y.softmax(1), weight=weights)
                + (s * w).square().mean() * out.mean()
            )
        return query(net)


@loop
def narrowed(nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """From where tensors say."""
    (net,) = nets
    inner = metaoptim.MetaSGD([net], lr=0.1)
    numbers = torch.arange(len(xs))
    at = numbers % 4 - 5 * (numbers % 2)
    with window(offline=True) as win:
        for x, s, start in win.scan(xs, shift, at):
            out = torch.narrow(net(x), dim=0, start=start, length=2) + x.narrow(1, torch.tensor(1), 2)[:2]
            inner.step((out - s * w).square().mean())
        return query(net)


@loop
def batch_norm(nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """Online: running statistics and the step count are carried too, and left in place."""
    (net,) = nets
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.5)
    with window() as win:
        for x, y, s in win.scan(xs, ys, shift):
            inner.step(F.mse_loss(net(x), y + s) * w)
        net.eval()
        loss = query(net)
        net.train()
        return loss


@loop
def teacher(nets: list, window: Any, xs: Tensor, ys: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """A dict of tensors carried on."""
    (net,) = nets
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with window(offline=True) as win:
        mean = {n: p.detach().clone() for n, p in net.named_parameters()}
        for x, y, s in win.scan(xs, ys, shift):
            with torch.no_grad():
                wanted = torch.func.functional_call(net, mean, (x,))
            inner.step(F.mse_loss(net(x), y + s) * w + F.mse_loss(net(x), wanted))
            mean = {n: 0.9 * mean[n] + 0.1 * p.detach() for n, p in net.named_parameters()}
        return query(net)


def _networks(name: str) -> list[nn.Module]:
    if name == "two_optimizers":
        return [mlp(1), mlp(2)]
    if name == "batch_norm":
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))]
    return [mlp()]


def outcome(name: str, steps: int, wrap: Callable[[Callable], Callable], window: Any) -> dict[str, Any]:
    """The loss, gradients by everything, buffers and the random stream afterwards."""
    nets = _networks(name)
    xs, ys = batches(steps)
    shift = (0.1 * ys[:, 0] + 0.2).requires_grad_()
    w = leaf()
    torch.manual_seed(7)
    loss = wrap(LOOPS[name])(nets, window, xs, ys, shift, w)
    params = [p for net in nets for p in net.parameters()]
    grads = torch.autograd.grad(loss, [w, shift, *params], allow_unused=True)
    left = [t.detach() for net in nets for t in (*net.parameters(), *net.buffers())]
    values = [loss.detach(), *grads, *left, torch.get_rng_state().double()]
    return {str(i): v for i, v in enumerate(values)}


@pytest.mark.parametrize("name", LOOPS)
def test_equals_the_tape(name: str) -> None:
    for steps in LENGTHS:
        expected = outcome(name, steps, lambda f: f, full_tape)
        assert expected["1"] is not None and float(expected["1"].abs()) > 1e-5
        got = outcome(
            name, steps, functools.partial(compiled, slots=2 if steps % 2 else None), metaoptim.SlidingWindow
        )
        try:
            agree(got, expected, rtol=1e-9)
        except AssertionError as error:
            raise AssertionError(f"{steps} steps: {error}") from error


def test_nothing_to_scan() -> None:
    for name in ("carried_and_summed", "two_optimizers", "indexed_by_range"):
        expected = outcome(name, 0, lambda f: f, full_tape)
        agree(outcome(name, 0, compiled, metaoptim.SlidingWindow), expected)


def test_equals_the_plain_loop() -> None:
    """The same function with `zip` in the place of the scan: the same numbers."""

    def of(loop: Any, net: nn.Module, w: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.9)
        h = torch.zeros(5, 2)
        for x, y in loop:
            h = (net(x) + h * w).tanh()
            inner.step(F.mse_loss(h, y) * w.exp())
        return query(net)

    def scanned(net: nn.Module, w: Tensor) -> Tensor:
        with metaoptim.SlidingWindow(offline=True) as win:
            return of(win.scan(xs, ys), net, w)

    def zipped(net: nn.Module, w: Tensor) -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            return of(zip(xs, ys, strict=True), net, w)

    xs, ys = batches(9)
    net, found = mlp(), []
    for fn in (scanned, zipped):
        w = leaf()
        grads = torch.autograd.grad(compiled(fn)(net, w), [w, *net.parameters()])
        found.append(dict(enumerate(grads)))
    agree(found[0], found[1], rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["carried_and_summed", "two_optimizers", "noise_inside", "indexed_by_range"])
def test_programs_do_not_depend_on_the_length(name: str) -> None:
    counts = set()
    for steps in (6, 7, 40):
        made: list[Any] = []
        outcome(
            name, steps, lambda f, made=made: made.append(compiled(f)) or made[0], metaoptim.SlidingWindow
        )
        ((program,),) = made[0]._specializations.known.values()
        steps_of = {id(g) for g in program.program.step_graphs}
        counts.add((len(steps_of), len(program.program.calls), program.program.registers))
    assert len(counts) == 1
