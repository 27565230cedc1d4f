"""Losses that are kept after their steps: no activations hang on them; what can be asked of them, and what not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from forms import full_tape, leaf
from kept_losses import OPTIONS, XS, World, weighted
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine.nodes import stepped
from oracle import agree

# -- memory ----------------------------------------------------------------------------------------------------------

WIDTH, ROWS = 8, 2048
ACTIVATIONS = 3 * ROWS * WIDTH * 8  # bytes of a step's, at least


class Wide:
    """A small network on many rows; ``keep``: "all" losses, their "sum", or "none"."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.rate, self.x = leaf(0.1), torch.ones(ROWS, WIDTH)

    def loss(self) -> Tensor:
        return self.net(self.x).square().mean()


def _loop(w: Wide, steps: int, keep: str, step: Callable[[], Tensor]) -> Tensor:
    losses, total = [], torch.zeros(())
    for _ in range(steps):
        loss = step()
        if keep == "all":
            losses.append(loss)
        elif keep == "sum":
            total = total + loss
    return w.loss() + total + sum(losses)


def form_a(w: Wide, steps: int, keep: str) -> Tensor:
    inner = metaoptim.MetaSGD([w.net], lr=w.rate)
    with metaoptim.SlidingWindow(offline=True, slots=3):
        return _loop(w, steps, keep, lambda: inner.step(w.loss()))


def form_b(w: Wide, steps: int, keep: str) -> Tensor:
    inner = metaoptim.MetaSGD([w.net], lr=w.rate)
    step = metaoptim.compile(lambda: inner.step(w.loss()), backend="eager")
    with metaoptim.SlidingWindow(offline=True, slots=3):
        return _loop(w, steps, keep, step)


@metaoptim.compile(backend="eager", slots=3)
def form_c(w: Wide, steps: int, keep: str) -> Tensor:
    inner = metaoptim.MetaSGD([w.net], lr=w.rate)
    with metaoptim.SlidingWindow(offline=True):
        return _loop(w, steps, keep, lambda: inner.step(w.loss()))


def _held_and_peak(form: Callable, steps: int, keep: str) -> tuple[int, int]:
    form(Wide(), steps, keep).backward()  # programs are traced
    w = Wide()
    with AllocatorMeter() as forward:
        outer = form(w, steps, keep)
    with AllocatorMeter() as backward:
        outer.backward()
    return forward.held, max(forward.peak, forward.held + backward.peak)


@pytest.mark.parametrize(
    ("form", "keep"), [(form_a, "all"), (form_a, "sum"), (form_b, "all"), (form_c, "all")]
)
def test_losses_that_are_kept_hold_no_activations(form: Callable, keep: str) -> None:
    held, peak = _held_and_peak(form, 10, keep)
    held_without, peak_without = _held_and_peak(form, 10, "none")
    assert held - held_without < ACTIVATIONS / 4
    assert peak - peak_without < ACTIVATIONS


def test_a_budget_holds_where_losses_are_differentiated() -> None:
    """To first order, a step's own derivative takes nothing beside that of its loss."""

    def held_and_peak(steps: int, budget: int) -> tuple[int, int]:
        torch.manual_seed(0)
        x = torch.ones(512, 64)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        inner = metaoptim.MetaSGD([net], lr=torch.tensor(0.1, requires_grad=True), first_order=True)
        with AllocatorMeter() as forward, metaoptim.SlidingWindow(offline=True, memory_budget=budget):
            outer = weighted([inner.step(net(x).square().mean()) for _ in range(steps)])
        with AllocatorMeter() as backward:
            outer.backward()
        return forward.held, forward.held + backward.peak

    held_and_peak(3, 4_000_000)
    held, peak = held_and_peak(60, 4_000_000)
    assert held > 1_000_000 and peak < 4_000_000


# -- what is asked of a loss after its step --------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_asked_for_one_by_one(options: dict[str, Any]) -> None:
    """In the block right after the step, again at its end, and after it."""

    def each(window: Any) -> list[dict[str, Tensor | None]]:
        w, found = World(), []
        inner = w.sgd()

        def of(loss: Tensor) -> None:
            grads = torch.autograd.grad(loss, list(w.leaves().values()), retain_graph=True, allow_unused=True)
            found.append(dict(zip(w.leaves(), grads, strict=True)))

        losses = []
        with window:
            for x in XS[:4]:
                losses.append(inner.step(w.loss(x)))
                of(losses[-1])
            of(losses[2])
        for loss in reversed(losses):
            of(loss)
        return found

    options = {"offline": True, **options}
    expected = each(full_tape(offline=options["offline"]))
    for one, other in zip(each(metaoptim.SlidingWindow(**options)), expected, strict=True):
        agree(one, other)


@pytest.mark.parametrize("offline", [True, False])
def test_a_sliding_window_sees_as_far_from_a_kept_loss_as_from_its_graph(offline: bool) -> None:
    def found(kept: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        w, losses = World(), []
        inner = w.sgd()
        with metaoptim.SlidingWindow(offline=offline, window=2):
            for x in XS:
                loss = w.loss(x)
                keep = kept(loss)
                inner.step(loss)
                losses.append(keep)
        with pytest.warns(metaoptim.UnreachableWarning) if offline else nullcontext():
            grads = torch.autograd.grad(weighted(losses), list(w.leaves().values()), allow_unused=True)
        return losses, dict(zip(w.leaves(), grads, strict=True))

    graphs, expected = found(lambda loss: loss.clone())
    losses, got = found(lambda loss: loss)
    assert all(map(stepped, losses)) and not any(map(stepped, graphs))
    agree(got, expected)


@pytest.mark.parametrize("window", [None, 50])
def test_what_a_replay_cannot_give_is_refused(window: int | None) -> None:
    w = World()
    inner = w.sgd()
    with metaoptim.SlidingWindow(offline=True, window=window):
        inner.step(w.loss(XS[0]))
        weight, h = w.net[0].weight, w.net(XS[1])  # type: ignore[union-attr]
        loss = (h - w.shift).square().mean()
        before, double = loss.clone(), loss * 2
        inner.step(loss)
        after = loss * 3
        with pytest.raises(metaoptim.CaptureError, match="after its inner step"):
            torch.autograd.grad(loss, h)
        if window is None:
            with pytest.raises(metaoptim.CaptureError, match="after its inner step"):
                torch.autograd.grad(loss + 1, weight)
        else:
            (direct,) = torch.autograd.grad(loss, weight)
            torch.testing.assert_close(direct, torch.autograd.grad(before, weight, retain_graph=True)[0])
        with pytest.raises(metaoptim.MetaOptimError, match="create_graph"):
            torch.autograd.grad(loss, w.weight, create_graph=True)
        (part,) = torch.autograd.grad(after, loss)
        assert part == 3
    (direct,) = torch.autograd.grad(before, h, retain_graph=True)  # who holds the graph can go on using it
    torch.testing.assert_close(torch.autograd.grad(double, h)[0], 2 * direct)


def test_losses_with_hooks_keep_their_graph() -> None:
    w = World()
    inner, seen = w.sgd(), []
    with metaoptim.SlidingWindow(offline=True):
        first, second = w.loss(XS[0]), w.loss(XS[1])
        first.retain_grad()
        second.register_hook(seen.append)
        inner.step(first)
        inner.step(w.loss(XS[1]))
        third = w.loss(XS[2])
        third.register_hook(seen.append)
        inner.step(third)
        third.backward()
    assert not stepped(first) and not stepped(third) and len(seen) == 2 and second.requires_grad


def test_a_loss_that_is_detached_or_changed_in_place_after_its_step() -> None:
    w = World()
    one, two = w.sgd(), w.sgd(w.head)
    with metaoptim.SlidingWindow(offline=True):
        logged, changed = [], []
        for x in XS[:3]:
            loss, other = w.loss(x), w.outer() + w.loss(x)
            one.step(loss)
            loss += w.weight
            two.step(other)
            changed.append(loss)
            logged.append(other.detach_())
        values = [float(t) for t in logged]
        grads = torch.autograd.grad(weighted(changed), [w.weight, w.shift])
    assert not any(t.requires_grad for t in logged) and len(set(values)) == 3
    v = World()
    one, two = v.sgd(), v.sgd(v.head)
    with full_tape(offline=True):
        total: Any = 0.0
        for k, x in enumerate(XS[:3]):
            loss, other = v.loss(x), v.outer() + v.loss(x)
            one.step(loss)
            total = total + (1 + 0.5 * k) * (loss + v.weight)
            two.step(other)
    expected = torch.autograd.grad(total, [v.weight, v.shift])
    agree(dict(zip("ws", grads, strict=True)), dict(zip("ws", expected, strict=True)))


def test_a_step_by_what_depends_on_its_parameters_through_an_earlier_loss_is_refused() -> None:
    w = World()
    one, two = w.sgd(), w.sgd(w.head)
    with metaoptim.SlidingWindow(offline=True):
        first = one.step(w.head(w.net(XS[0])).square().mean())
        average = 0.5 * first
        one.step(w.loss(XS[1]))
        assert stepped(first)
        two.step(w.head(w.shift).square().mean() + average.detach())
        first = one.step(w.head(w.net(XS[0])).square().mean())
        one.step(w.loss(XS[1]))
        average = 0.5 * first
        one.step(w.loss(XS[2]))
        with pytest.raises(metaoptim.CaptureError, match="computed from the loss of an earlier step"):
            two.step(w.head(w.shift).square().mean() + average)
