"""What a scan cannot be: iterations that differ are refused, and what tells them apart is named."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import leaf, mlp
from metaoptim.errors import CaptureError
from oracle import agree
from scans import batches, compiled, query


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


@pytest.mark.parametrize("back", [1, 2])
@pytest.mark.parametrize("steps", [5, 6, 9, 10])
def test_a_row_of_an_earlier_iteration(back: int, steps: int) -> None:
    def body(win: Any, inner: Any, net: Any, w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        before = [xs[0] * 1.0, xs[1] * 1.0]
        for x, y in win.scan(xs, ys):
            inner.step(F.mse_loss(net(x) + net(before[-back]), y) * w)
            before = [before[1], x]
        return query(net)

    _refused(body, r"a row that an earlier one was given.*window.scan\(xs\[1:\], xs\[:-1\]\)", steps)


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
