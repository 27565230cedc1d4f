"""Losses that are kept after their steps: their gradients are those of the tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import metaoptim
from forms import full_tape
from kept_losses import OPTIONS, XS, World, weighted
from metaoptim.runtime.engine.nodes import stepped
from oracle import agree


def a_list(w: World, window: Callable) -> Tensor:
    inner, losses = w.sgd(), []
    with window():
        for x in XS:
            loss = w.loss(x)
            inner.step(loss)
            losses.append(loss)
        w.kept = losses
        outer = w.outer()
    return weighted(losses) + outer


def without_an_outer_loss(w: World, window: Callable) -> Tensor:
    inner = w.sgd()
    with window():
        w.kept = [inner.step(w.loss(x)) for x in XS]
    return weighted(w.kept)


def a_running_sum(w: World, window: Callable) -> Tensor:
    inner, total = metaoptim.MetaAdam([w.net], lr=0.1 * w.rate.exp()), torch.zeros(())
    with window():
        for x in XS:
            loss = w.loss(x)
            inner.step(loss)
            total = total + loss * w.weight
        return total + w.outer()


def a_view(w: World, window: Callable) -> Tensor:
    inner = w.sgd()
    with window():
        for x in XS:
            losses = (w.net(x) - w.shift).square().mean(0)
            loss = losses[1]
            w.kept.append(inner.step(loss))
        return weighted(w.kept)


def of_one_element(w: World, window: Callable) -> Tensor:
    inner = w.sgd()
    with window():
        for x in XS:
            w.kept.append(inner.step(w.loss(x).reshape(1, 1)))
        return weighted(w.kept)


def used_before_its_step(w: World, window: Callable) -> Tensor:
    inner, others = w.sgd(), []
    with window():
        for x in XS:
            loss = w.loss(x)
            others.append(loss * w.weight + loss.exp())
            w.kept.append(inner.step(loss))
        return weighted(others) + weighted(w.kept) + w.outer()


def used_in_the_next_loss(w: World, window: Callable) -> Tensor:
    inner, last = w.sgd(), torch.zeros(())
    with window():
        for x in XS:
            last = inner.step(w.loss(x) * (1 + 0.3 * last))
            w.kept.append(last)
        return weighted(w.kept) + w.outer()


def changed_in_place(w: World, window: Callable) -> Tensor:
    inner, losses = w.sgd(), []
    with window():
        for x in XS:
            loss = inner.step(w.loss(x))
            w.kept.append(loss)
            changed = loss * 1.0
            changed += w.weight
            losses.append(changed)
        return weighted(losses)


def by_a_closure(w: World, window: Callable) -> Tensor:
    inner = w.sgd()
    with window():
        for x in XS:
            w.kept.append(inner.step(closure=lambda x=x: w.loss(x)))
        return weighted(w.kept)


def first_order(w: World, window: Callable) -> Tensor:
    inner = w.sgd(first_order=True)
    with window():
        w.kept = [inner.step(w.loss(x)) for x in XS]
        return weighted(w.kept) + w.outer()


def with_a_hook_on_cotangents(w: World, window: Callable) -> Tensor:
    inner = w.sgd()
    with window(backward_hook=lambda c: 0.5 * c):
        w.kept = [inner.step(w.loss(x)) for x in XS]
        return weighted(w.kept) + w.outer()


def with_tensor_hooks(w: World, window: Callable) -> Tensor:
    inner = w.sgd()
    with window():
        for x in XS:
            h = w.net(x)
            h.register_hook(lambda g: g * 0.5)
            w.kept.append(inner.step((h - w.shift).square().mean()))
        return weighted(w.kept)


def by_turns(w: World, window: Callable) -> Tensor:
    one, two = w.sgd(), w.sgd(w.head)
    with window():
        for x in XS:
            w.kept.append(one.step(w.loss(x)))
            w.kept.append(two.step(w.outer().exp()))
        return weighted(w.kept) + w.outer()


def sharing_a_graph(w: World, window: Callable) -> Tensor:
    one, two = w.sgd(), w.sgd(w.head)
    with window():
        for x in XS:
            h = w.net(x)
            first, second = w.head(h).square().mean() * w.weight, w.head(h.tanh()).exp().mean()
            one.step(first)
            two.step(second)
            w.kept += [first, second]
        total = weighted(w.kept) + w.outer()
        w.kept = w.kept[:-2]  # the last super-step may not be over
        return total


def one_loss_for_two(w: World, window: Callable) -> Tensor:
    one, two = w.sgd(), w.sgd(w.head)
    with window():
        for x in XS:
            loss = w.head(w.net(x)).square().mean() + w.loss(x)
            one.step(loss)
            two.step(loss)
            w.kept.append(loss)
        return weighted(w.kept) + w.outer()


def one_loss_twice(w: World, window: Callable) -> Tensor:
    inner = w.sgd()
    with window():
        for x in XS[:3]:
            loss = w.loss(x)
            inner.step(loss)
            inner.step(loss)
            w.kept.append(loss)
        return weighted(w.kept) + w.outer()


def one_in_the_other(w: World, window: Callable) -> Tensor:
    one, two = w.sgd(), w.sgd(w.head)
    with window():
        for x in XS[:3]:
            first = w.head(w.net(x)).square().mean()
            one.step(first)
            second = first * w.weight + w.head(w.shift).sum().square()
            two.step(second)
            w.kept.append(second)
        return weighted(w.kept)


def with_a_network_that_rests(w: World, window: Callable) -> Tensor:
    one, two = w.sgd(), w.sgd(w.head)
    with window():
        for k, x in enumerate(XS):
            if k % 3 == 1:
                w.kept.append(two.step(w.head(w.shift).square().mean()))
            w.kept.append(one.step(w.head(w.net(x)).square().mean()))
        total = weighted(w.kept)
        w.kept.pop()
        return total


def with_written_parameters(w: World, window: Callable) -> Tensor:
    inner = w.sgd()
    with window():
        for x in XS:
            w.kept.append(inner.step(w.loss(x)))
            with torch.no_grad():
                for p in w.net.parameters():
                    p.clamp_(-0.5, 0.5)
        return weighted(w.kept) + w.outer()


CASES = [
    a_list, without_an_outer_loss, a_running_sum, a_view, of_one_element, used_before_its_step, used_in_the_next_loss,
    changed_in_place, by_a_closure, first_order, with_a_hook_on_cotangents, with_tensor_hooks, by_turns,
    sharing_a_graph, one_loss_for_two, one_loss_twice, one_in_the_other, with_a_network_that_rests,
    with_written_parameters,
]  # fmt: skip


def gradients(case: Callable, window: Callable) -> tuple[dict[str, Tensor | None], list[Tensor]]:
    w = World()
    total = case(w, window)
    found = torch.autograd.grad(total, list(w.leaves().values()), allow_unused=True)
    return dict(zip(w.leaves(), found, strict=True)), w.kept


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_gradients_are_those_of_the_tape(case: Callable, options: dict[str, Any]) -> None:
    options = {"offline": True, **options}

    def oracle(**more: Any) -> Any:
        return full_tape(offline=options["offline"], **more)

    def window(**more: Any) -> Any:
        return metaoptim.SlidingWindow(**options, **more)

    expected, _ = gradients(case, oracle)
    got, kept = gradients(case, window)
    if not (
        "window" in options and case is one_in_the_other
    ):  # which reads one version of theta by two tensors
        assert all(stepped(loss) for loss in kept)
    assert expected["weight"] is None or float(expected["weight"].abs()) > 1e-4
    agree(got, expected)
