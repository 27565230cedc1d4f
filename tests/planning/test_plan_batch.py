"""metaoptim.plan(batch=...): it says what plan says of arguments that have such a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.cost.model import D
from metaoptim.compiler.cost.model import F as FLOPS
from metaoptim.compiler.lower.library import library
from metaoptim.runtime.budget.meter import AllocatorMeter

STEPS, SIZE = 8, 5


@pytest.fixture(autouse=True)
def unmeasured() -> None:
    """Nothing has run in another test: a size without ``batch`` is that of the graphs, too."""
    library.clear()


def net_of(features: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 12), nn.Tanh(), nn.Linear(12, 2))


def looped(net: nn.Module, optimizer: Any, losses: Callable, *scanned: Tensor) -> Tensor:
    with metaoptim.SlidingWindow(offline=True) as window:
        for items in window.scan(*scanned):
            optimizer.step(losses(*items))
        return losses(*(t[0] for t in scanned))


def learnt_rate() -> Tensor:
    return torch.tensor(-2.0, requires_grad=True)


def sgd(net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
    return looped(net, inner, lambda x, y: F.mse_loss(net(x), y), xs, ys)


def adam(net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
    return looped(net, inner, lambda x, y: F.mse_loss(net(x), y), xs, ys)


def contrastive(net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
    return looped(net, inner, lambda x, y: F.cross_entropy(net(x) @ y.T, torch.arange(len(x))), xs, ys)


def regression(size: int, learnt: bool = False) -> tuple:
    data = torch.ones(STEPS, size, 3, requires_grad=learnt), torch.ones(STEPS, size, 2)
    return net_of(), learnt_rate(), *data


def weighted(net: nn.Module, weights: Tensor, xs: Tensor, at: Tensor) -> Tensor:
    inner = metaoptim.MetaSGD([net], lr=0.1)
    return looped(net, inner, lambda x, i: (weights[i] * net(x).square().mean(1)).mean(), xs, at)


def with_weights(size: int) -> tuple:
    at = torch.zeros(STEPS, size, dtype=torch.int64)
    return net_of(), torch.ones(40, requires_grad=True), torch.ones(STEPS, size, 3), at


def validated(net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor, others: Tensor) -> Tensor:
    inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
    with metaoptim.SlidingWindow(offline=True) as window:
        for x, y in window.scan(xs, ys):
            inner.step(F.mse_loss(net(x), y))
        return net(others).square().mean()


def recurrent(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
    inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
    with metaoptim.SlidingWindow(offline=True) as window:
        hidden = torch.zeros(xs.shape[1], 2)
        for x in window.scan(xs):
            hidden = net(torch.cat([x, hidden], 1)).tanh()
            inner.step(hidden.square().mean())
        return hidden.square().mean()


PROBLEMS: dict[str, tuple[Callable, Callable[[int], tuple], dict[str, int]]] = {
    "sgd": (sgd, regression, {"xs": 1, "ys": -2}),
    "adam": (adam, regression, {"xs": 1, "ys": 1}),
    "distillation": (sgd, lambda size: regression(size, True), {"xs": 1, "ys": 1}),
    "weights": (weighted, with_weights, {"xs": 1, "at": 1}),
    "validation": (validated, lambda size: (*regression(size), torch.ones(60, 3)), {"xs": 1, "ys": 1}),
    "hidden state": (
        recurrent,
        lambda size: (net_of(5), learnt_rate(), torch.ones(STEPS, size, 3)),
        {"xs": 1},
    ),
    "contrastive": (contrastive, regression, {"xs": 1, "ys": 1}),
}


def compiled(fn: Callable, **options: Any) -> Any:
    return metaoptim.compile(fn, backend="eager", **options)


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_what_plan_says_of_such_arguments(name: str) -> None:
    """Smaller and far larger ones, multiples or not."""
    fn, given, dims = PROBLEMS[name]
    for size in (2, SIZE, 3 * SIZE + 1, 100 * SIZE):
        cost = metaoptim.plan(compiled(fn), batch=dims, batch_size=size)(*given(SIZE))
        asked = metaoptim.plan(compiled(fn))(*given(size))
        assert cost.batch == size and asked.batch is None
        assert replace(cost, batch=None) == asked
        assert all(type(x) is int for x in cost.model.sizes.values())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"window": 3}),
        ("distillation", {}),
        ("hidden state", {"slots": 2}),
        ("hidden state", {"slots": 2, "offload": "disk"}),
    ],
)
def test_with_options(name: str, options: dict[str, Any]) -> None:
    fn, given, dims = PROBLEMS[name]
    cost = metaoptim.plan(compiled(fn, **options), horizon=100, batch=dims, batch_size=5 * SIZE)(*given(SIZE))
    asked = metaoptim.plan(compiled(fn, **options), horizon=100)(*given(5 * SIZE))
    assert replace(cost, batch=None) == asked
    assert (cost.model.sizes[D] != 0) == (cost.plan == "tiered") == ("offload" in options)


@pytest.mark.parametrize("budget", ["40KiB", "1MiB"])
def test_a_budget_is_kept_to_as_without(budget: str) -> None:
    fn, given, dims = PROBLEMS["hidden state"]
    cost = metaoptim.plan(compiled(fn), horizon=90, memory_budget=budget, batch=dims, batch_size=SIZE)(
        *given(2)
    )
    asked = metaoptim.plan(compiled(fn), horizon=90, memory_budget=budget)(*given(SIZE))
    assert cost.plan == {"40KiB": "scheduled", "1MiB": "unrolled"}[budget]
    assert replace(cost, batch=None) == asked
    assert list(cost.curve(8)) == list(asked.curve(8))
    assert f" on batches of {SIZE}, within" in str(cost) and "batch" not in str(asked)


def test_steps_of_several_kinds_by_turns() -> None:
    """Operations are of a round's mean, which need not be whole."""

    def by_turns(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                inner.step(net(x).square().mean())
                inner.step(net(x).square().sum())
                inner.step((net(x) * net(x + 1)).mean())
            return net(xs[0]).square().mean()

    def given(size: int) -> tuple:
        return nn.Linear(2, 1), learnt_rate(), torch.ones(STEPS, size, 2)

    cost = metaoptim.plan(compiled(by_turns), batch={"xs": 1}, batch_size=7)(*given(3))
    assert not isinstance(cost.model.sizes[FLOPS], int)
    assert cost.model == metaoptim.plan(compiled(by_turns))(*given(7)).model


# -- what the arguments of another batch are -----------------------------------------------------------------------


def test_other_arguments_are_like_those_given() -> None:
    seen: list[Any] = []

    @metaoptim.compile(backend="eager")
    def meta_loss(net: nn.Module, data: Any, again: Tensor, *, rates: list[Tensor], images: Tensor) -> Tensor:
        xs, *_ = data["xs"]
        seen.append((data, again, images, rates))
        inner = metaoptim.MetaSGD([net], lr=rates[0].exp())
        return looped(net, inner, lambda x, i: F.mse_loss(net(x) + i.mean(), again[0]), xs, images)

    xs, ys = torch.ones(10, STEPS, 3).transpose(0, 1), nn.Parameter(torch.ones(STEPS, 10, 2).double())
    images = torch.ones(STEPS, 10, 5, 4, 4).transpose(2, 4)[:, :, 1:, :, ::2]
    data = {"xs": [xs, ys, torch.ones(STEPS, 1, 3).expand(STEPS, 10, 3)], "note": "kept"}
    rates = [learnt_rate()]
    plan = metaoptim.plan(meta_loss, batch={"data": 1, "images": -4}, batch_size=20)
    plan(net_of(), data, ys, rates=rates, images=images)
    ((larger, again, pictures, others),) = seen
    assert larger["xs"][0].shape[1] == 20 and larger["note"] == "kept" and others is rates
    assert larger["xs"][1] is again and isinstance(again, nn.Parameter) and again.requires_grad
    assert (again.dtype, again.shape, again.stride()) == (torch.float64, (STEPS, 20, 2), (40, 2, 1))
    assert not larger["xs"][0].requires_grad and larger["xs"][0].stride() == (3, STEPS * 3, 1)
    assert pictures.shape == (STEPS, 20, 3, 4, 3)
    assert pictures.stride() == (2 * images.stride(0), *images.stride()[1:])
    assert larger["xs"][2].shape == (STEPS, 20, 3) and larger["xs"][2].stride() == (3, 0, 1)
    assert data["xs"][0] is xs


def test_planning_leaves_a_function_as_it_is() -> None:
    fn, given, dims = PROBLEMS["sgd"]
    meta_loss, arguments = compiled(fn), given(SIZE)
    meta_loss(*arguments).backward()
    programs = dict(meta_loss._specializations.known)
    metaoptim.plan(meta_loss, batch=dims, batch_size=20)(*arguments)
    assert meta_loss._specializations.known == programs
    meta_loss(*arguments).backward()
    assert meta_loss._specializations.known == programs


def test_larger_arguments_take_no_memory() -> None:
    fn, given, dims = PROBLEMS["sgd"]
    arguments = given(SIZE)
    with AllocatorMeter() as meter:
        cost = metaoptim.plan(compiled(fn), batch=dims, batch_size=50_000)(*arguments)
    assert cost.peak_bytes > 2**23 and meter.peak < 2**16


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({}, r"got no names, expected .*net, log_lr, xs, ys"),
        ({"zs": 1}, r"got 'zs', expected .*net, log_lr, xs, ys"),
        ({"net": 0}, r"'net' got a Sequential, expected a tensor"),
        ({"log_lr": 0}, r"'log_lr' got 0, expected a dimension of its tensor of shape \(\)"),
        ({"xs": 3}, r"'xs' got 3, expected a dimension of its tensor of shape \(8, 5, 3\)"),
        ({"xs": True}, r"'xs' got True, expected a dimension"),
        ({"xs": 1, "ys": 2}, r"got xs: \(8, 5, 3\)\[1\], ys: \(8, 5, 2\)\[2\], expected .* one size"),
    ],
)
def test_names_and_dimensions(dims: dict[str, int], message: str) -> None:
    fn, given, _ = PROBLEMS["sgd"]
    with pytest.raises(ValueError, match="^batch: " + message):
        metaoptim.plan(compiled(fn), batch=dims, batch_size=10)(*given(SIZE))


def test_what_cannot_be_the_batch() -> None:
    fn, given, dims = PROBLEMS["sgd"]
    net, log_lr, xs, _ = given(3)
    with pytest.raises(ValueError, match=r"dimensions 1 and 2 of one tensor .*'ys'"):
        metaoptim.plan(compiled(fn), batch={"xs": 1, "ys": 2}, batch_size=10)(net, log_lr, xs, xs)
    with pytest.raises(ValueError, match="at least 1"):
        metaoptim.plan(compiled(fn), batch=dims, batch_size=10)(*given(0))
    with pytest.raises(ValueError, match=r"layout torch\.sparse_coo"):
        metaoptim.plan(compiled(fn), batch={"xs": 1}, batch_size=10)(net, log_lr, xs.to_sparse(), xs)
    for options in ({"batch": dims}, {"batch_size": 10}):
        with pytest.raises(ValueError, match="expected both or neither"):
            metaoptim.plan(compiled(fn), **options)
    for size in (0, 2.5, True):
        with pytest.raises(ValueError, match=r"batch_size: got .*, expected a whole number, at least 1"):
            metaoptim.plan(compiled(fn), batch=dims, batch_size=size)  # type: ignore[arg-type]


def test_an_argument_that_is_not_named() -> None:
    fn, given, _ = PROBLEMS["weights"]
    message = r"with a batch of 10 in xs, in place of 5, .* RuntimeError: .*Name every argument"
    with pytest.raises(metaoptim.WindowError, match=message) as refused:
        metaoptim.plan(compiled(fn), batch={"xs": 1}, batch_size=10)(*given(SIZE))
    assert isinstance(refused.value.__cause__, RuntimeError)
    assert metaoptim.plan(compiled(fn))(*given(SIZE)).batch is None


def test_of_a_method() -> None:
    class Learner:
        @metaoptim.compile(backend="eager")
        def meta_loss(self, net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
            return sgd(net, log_lr, xs, ys)

    _, given, dims = PROBLEMS["sgd"]
    cost = metaoptim.plan(Learner().meta_loss, batch=dims, batch_size=10)(*given(SIZE))
    assert cost.batch == 10 and cost.horizon == STEPS
