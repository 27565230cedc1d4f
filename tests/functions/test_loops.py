"""`window.scan` and `window.range` in form C: a few captured iterations stand for all of them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.errors import CaptureError
from oracle import agree

full_tape = functools.partial(metaoptim.SlidingWindow, strategy="full_tape")
LENGTHS = (1, 2, 3, 4, 5, 9)


def batches(steps: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(steps)
    return torch.randn(steps, 5, 3, generator=g), torch.randn(steps, 5, 2, generator=g)


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def leaf(value: float = 0.5) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def query(net: Any) -> Tensor:
    return F.mse_loss(net(torch.linspace(-1, 1, 15).view(5, 3)), torch.ones(5, 2))


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


def compiled(fn: Callable, **options: Any) -> Callable:
    return metaoptim.compile(fn, **{"backend": "eager", **options})


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


# -- what a scan cannot be -------------------------------------------------------------------------------------------


def _refused(body: Callable, match: str, steps: int = 9) -> None:
    net, w = mlp(), leaf()
    xs, ys = batches(steps)
    before = [p.detach().clone() for p in net.parameters()]

    def of(net: nn.Module, w: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True) as win:
            return body(win, inner, net, w, xs, ys)

    with pytest.raises(CaptureError, match=match) as caught:
        compiled(of)(net, w)
    assert __file__ in str(caught.value)
    assert metaoptim.runtime.windows.session.current_session() is None
    assert all(map(torch.equal, before, net.parameters()))


def test_a_list_of_losses() -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        losses = []
        for x, y in win.scan(xs, ys):
            losses.append(F.mse_loss(net(x), y))
            inner.step(losses[-1] * w)
        return torch.stack(losses).mean()

    _refused(body, "middle of a scan")


def test_values_of_two_iterations_back() -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        older = old = torch.zeros(5, 2)
        for x, y in win.scan(xs, ys):
            out = net(x)
            inner.step(F.mse_loss(out + older, y) * w)
            older, old = old, out
        return query(net)

    # what is handed on unchanged is a value of two iterations back
    _refused(body, "more than one iteration back")


def test_a_schedule_of_floats() -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        rate = 0.1
        for x, y in win.scan(xs, ys):
            inner.param_groups[0]["lr"] = rate
            rate *= 0.9
            inner.step(F.mse_loss(net(x), y) * w)
        return query(net)

    _refused(body, "Python number changes")


def test_a_counter() -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        for t, (x, y) in enumerate(win.scan(xs, ys)):
            inner.step(F.mse_loss(net(x), y) * w * (1 + t))
        return query(net)

    _refused(body, "something else than a `for`")


def test_data_by_a_counter() -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        for t, x in enumerate(win.scan(xs)):
            inner.step(F.mse_loss(net(x), ys[t]) * w)
        return query(net)

    _refused(body, "something else than a `for`")


class Count:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0

    def next(self) -> int:
        """A number more."""
        self.n += 1
        return self.n


COUNTED = 0


def counted() -> int:
    """A number more."""
    global COUNTED
    COUNTED += 1
    return COUNTED


LATE = {
    "number": "Python number changes: n is",
    "break": "Python number changes: n is",
    "object": r"changes: count\.n is",
    "global": "changes: (counted's )?COUNTED is",
    "closure": "changes: (more's )?n is",
    "iterator": "changes: factors",
    "zip": "something else than a `for`",
    "list": "kept holds 1, then 2 values",
    "scheduler": r"changes: scheduler\.last_epoch",
    "dict": r"changes: state\['n'\]",
    "module": r"changes: net\.calls is",
}


@pytest.mark.parametrize("how", LATE)
@pytest.mark.parametrize("by_range", [False, True], ids=["scan", "range"])
def test_what_would_show_after_the_captured_iterations_only(how: str, by_range: bool) -> None:
    """It all begins with the seventh of nine iterations, of which four are captured."""
    global COUNTED
    COUNTED = 0

    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        n, count, kept, state = 0, Count(), list[Tensor](), {"n": 0}
        factors = iter([1.0] * 6 + [2.0] * 3)
        net.calls = 0
        scheduler = torch.optim.lr_scheduler.MultiStepLR(inner, [6], 0.1) if how == "scheduler" else None

        def more() -> int:
            nonlocal n
            n += 1
            return n

        loop: Any = win.range(len(xs)) if by_range else win.scan(xs, ys)
        for item in zip(loop, [1.0] * 6 + [2.0] * 3) if how == "zip" else loop:
            x, y = (xs[item], ys[item]) if by_range else item
            loss = F.mse_loss(net(x), y) * w
            if how in ("number", "break"):
                n += 1
            if n == 7 and how == "break":
                break
            if how == "object":
                count.next()
            if how == "closure":
                more()
            if how == "dict":
                state["n"] += 1
            if how == "module":
                net.calls += 1
            if how == "list":
                kept.append(loss)
                loss = loss + kept[max(0, len(kept) - 6)].detach()
            late = max(n, count.n, state["n"], net.calls, counted() if how == "global" else 0) > 6
            inner.step(loss * (2 if late else 1) * (next(factors) if how == "iterator" else 1))
            if scheduler is not None:
                scheduler.step()
        return query(net)

    _refused(body, LATE[how])


def test_all_iterations_captured_may_count() -> None:
    def run(window: Any, compiled: bool) -> Any:
        net, w = mlp(), leaf()
        xs, ys = batches(4)

        def of(net: nn.Module, w: Tensor) -> Tensor:
            inner, n = metaoptim.MetaSGD([net], lr=0.1), 0
            with window(offline=True) as win:
                for x, y in win.scan(xs, ys) if compiled else zip(xs, ys):
                    n += 1
                    inner.step(F.mse_loss(net(x), y) * w * (2 if n == 1 else 1))
                return query(net)

        return torch.autograd.grad((metaoptim.compile(of, backend="eager") if compiled else of)(net, w), [w])

    agree({"w": run(metaoptim.SlidingWindow, True)[0]}, {"w": run(metaoptim.SlidingWindow, False)[0]})


def test_break() -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        for x, y in win.scan(xs, ys):
            inner.step(F.mse_loss(net(x), y) * w)
            if x is not None:
                break
        return query(net)

    _refused(body, "left by `break`")


@pytest.mark.parametrize("by", ["==", "<", "%", "bool", "in", "float"])
def test_the_number_of_an_iteration_has_no_value(by: str) -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        for t in win.range(len(xs)):
            scale = 1.0
            if by == "==" and t == 3:
                scale = 2.0
            if by == "<" and t < 4:
                scale = 2.0
            if by == "%":
                scale = 1.0 + t % 2
            if by == "bool" and t:
                scale = 2.0
            if by == "in" and t in {0, 4}:
                scale = 2.0
            if by == "float":
                scale = 0.9**t
            inner.step(F.mse_loss(net(xs[t]), ys[t]) * w * scale)
        return query(net)

    _refused(body, "number changes" if by == "float" else "asked for its value")


@pytest.mark.parametrize("what", ["list", "length", "branch", "other"])
def test_iterations_that_differ(what: str) -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        rows, hidden = list(ys), ctypes.c_int(-1)  # a number that the check of Python values does not see
        for x in win.scan(xs):
            hidden.value += 1
            out = net(x)
            y = rows[hidden.value] if what == "list" else ys[0]
            if what == "length":
                out, y = out[: hidden.value + 1], y[: hidden.value + 1]
            if what == "branch" and hidden.value > 2:
                out = out.tanh()
            if what == "other":
                out = out + torch.full((2,), float(hidden.value))
            inner.step(F.mse_loss(out, y) * w)
        return query(net)

    _refused(body, "differ in what they do|other tensors than the iteration before|number changes")


def test_a_loss_through_parameters_read_before_the_scan() -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        early = net(xs[0])
        for x, y in win.scan(xs, ys):
            inner.step(F.mse_loss(early + net(x), y) * w)
        return query(net)

    _refused(body, "from outside the iteration")


def test_scans_inside_each_other() -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        for x in win.scan(xs):
            for y in win.scan(ys):
                inner.step(F.mse_loss(net(x), y) * w)
        return query(net)

    _refused(body, "inside window.scan")
