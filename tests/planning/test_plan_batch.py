"""metaoptim.plan(batch=...): its formulas are what plan says of arguments that have such a batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.cost.model import A, B, D, E, H, K, R, S, T, b, c
from metaoptim.compiler.cost.model import F as FLOPS
from metaoptim.compiler.cost.polynomials import difference, formula, largest, largest_difference, size_text
from metaoptim.compiler.cost.step import measured
from metaoptim.compiler.ir.derived import Measured
from metaoptim.compiler.lower.library import library
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.budget.planner import FEW_SLOTS, lengths

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


def at_batch(cost: Any, size: int) -> dict[Any, Any]:
    return {s: p.subs(b, size) for s, p in cost.model.sizes.items()}


def degree(size: Any) -> int:
    return max(p.as_poly(b).degree() if p else 0 for p in (size.args if size.has(sympy.Max) else [size]))


@pytest.mark.parametrize("name", PROBLEMS)
def test_formulas_are_what_plan_says_of_such_arguments(name: str) -> None:
    """Below and far above what was looked at, and whatever part takes most there."""
    fn, given, dims = PROBLEMS[name]
    cost = metaoptim.plan(compiled(fn), batch=dims)(*given(SIZE))
    assert cost.batch == SIZE
    for size in (2, SIZE, 3 * SIZE + 1, 100 * SIZE):
        asked = metaoptim.plan(compiled(fn))(*given(size))
        assert asked.batch is None and asked.model.sizes == at_batch(cost, size)
        for kind in ({}, {"saved": 3}):
            steps = STEPS + 1
            assert asked.model.at(steps, steps, **kind) == cost.model.at(steps, steps, **kind, batch=size)
    sizes = cost.model.sizes
    assert degree(sizes[A]) == degree(sizes[R]) == degree(sizes[H]) == (2 if name == "contrastive" else 1)
    assert degree(sizes[B]) == (name == "distillation") and degree(sizes[S]) == (name == "hidden state")
    assert all(x.is_Integer for p in sizes.values() for x in p.atoms(sympy.Number))
    assert sizes[K].has(sympy.Max) == (name == "validation")  # the outer loss takes most, with small batches


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
    cost = metaoptim.plan(compiled(fn, **options), horizon=100, batch=dims)(*given(SIZE))
    asked = metaoptim.plan(compiled(fn, **options), horizon=100)(*given(5 * SIZE))
    assert asked.model.sizes == at_batch(cost, 5 * SIZE)
    assert (cost.model.sizes[D] != 0) == (cost.plan == "tiered") == ("offload" in options)
    tiered = cost.plan == "tiered"
    values = cost.model.at(101, cost.slots, tiered=tiered, batch=5 * SIZE)
    assert values == asked.model.at(101, asked.slots, tiered=tiered)
    assert abs(values["peak_bytes"] - asked.peak_bytes) <= 4 * asked.model.state_bytes
    assert values["offloaded_bytes"] == asked.offloaded_bytes


@pytest.mark.parametrize("budget", ["40KiB", "1MiB"])
def test_a_budget_is_kept_to_as_without(budget: str) -> None:
    fn, given, dims = PROBLEMS["hidden state"]
    cost = metaoptim.plan(compiled(fn), horizon=90, memory_budget=budget, batch=dims)(*given(SIZE))
    asked = metaoptim.plan(compiled(fn), horizon=90, memory_budget=budget)(*given(SIZE))
    assert cost.plan == {"40KiB": "scheduled", "1MiB": "unrolled"}[budget]
    assert replace(cost, batch=None, model=asked.model) == asked
    assert replace(cost.model, by_batch={}) == asked.model
    assert list(cost.curve(8)) == list(asked.curve(8))
    counts = 91, cost.slots, cost.saved_calls
    assert cost.model.at(*counts) == cost.model.at(*counts, batch=SIZE) == asked.model.at(*counts)
    (peak,) = (line for line in str(cost).splitlines() if "peak = " in line)
    assert f"S = {size_text(cost.model.sizes[S])} (a state)" in peak and peak.count("·batch") >= 2
    assert f" on batches of {SIZE}, within" in str(cost) and "batch" not in str(asked)


def test_the_peak_is_a_formula() -> None:
    fn, given, dims = PROBLEMS["contrastive"]
    model = metaoptim.plan(compiled(fn), batch=dims)(*given(SIZE)).model
    peak = model.peak.subs(model.sizes)
    assert peak.free_symbols == {T, c, b}
    assert peak.subs({T: STEPS, c: 2, b: 64}) == model.at(STEPS, 2, batch=64)["peak_bytes"]
    assert (
        model.peak.subs({T: STEPS, c: 2, **{s: p.subs(b, SIZE) for s, p in model.sizes.items()}})
        == (model.at(STEPS, 2)["peak_bytes"])
    )


def test_text_of_a_size() -> None:
    assert size_text(1536) == size_text(b * 0 + 1536) == "1.5 KiB"
    assert size_text(0) == "0 B"
    assert size_text(8 * b**2 - 2048 * b + 100) == "100 B - 2.0 KiB·batch + 8 B·batch²"
    assert size_text(-3 * b) == "-3 B·batch"
    peak = sympy.Max(2048, 3 * b)
    assert size_text(peak) == "max(2.0 KiB, 3 B·batch)" and size_text(
        -2 * peak + 1
    ) == "1 B - 2·" + size_text(peak)
    assert size_text(7 * b + sympy.Max(0, 4 * b - peak)) == "7 B·batch + max(...)"


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_of_polynomials(seed: int) -> None:
    at = random.Random(seed)
    found = [
        (
            Fraction(at.randint(-50, 500)),
            Fraction(at.randint(-20, 60), at.randint(1, 3)),
            Fraction(at.randint(0, 2), 3),
        )
        for _ in range(at.randint(1, 12))
    ]
    chosen, some = largest(found), largest(found[:3])
    pairs = [(largest(found[i : i + 2]), largest(found[i + 1 : i + 4])) for i in range(len(found) - 1)]
    formulas = formula(chosen), difference(chosen, some)
    apart = largest_difference(pairs) if pairs else sympy.Integer(0)
    for x in (*range(1, 30), 100, 1000):
        value = {p: p[0] + p[1] * x + p[2] * x * x for p in found}
        most = max(value.values())
        assert max(value[p] for p in chosen) == formulas[0].subs(b, x) == most
        assert formulas[1].subs(b, x) == most - max(value[p] for p in some)
        each = [max(value[p] for p in of) - max(value[p] for p in less) for of, less in pairs]
        assert apart.subs(b, x) == max(each, default=0)
    assert largest(chosen) == chosen


def test_what_is_nowhere_the_largest_is_left_out() -> None:
    low, between, high = (
        (Fraction(90), Fraction(0), Fraction(0)),
        (Fraction(40), Fraction(1), Fraction(0)),
        (Fraction(0), Fraction(2), Fraction(0)),
    )
    assert largest([between, high, low]) == [low, high]


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

    cost = metaoptim.plan(compiled(by_turns), batch={"xs": 1})(*given(7))
    assert not cost.model.sizes[FLOPS].subs(b, 7).is_Integer
    for size in (7, 30):
        asked = metaoptim.plan(compiled(by_turns))(*given(size))
        assert asked.model.sizes == at_batch(cost, size)
        assert asked.model.at(25, 25) == cost.model.at(25, 25, batch=size)


def test_a_list_of_learnt_tensors() -> None:
    """Gradients add up on the way back, more of them than in the iterations that are gone through."""

    def meta_loss(net: nn.Module, xs: list[Tensor]) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                inner.step(net(x).square().mean())
            return net(xs[0]).square().mean()

    def given(size: int) -> tuple:
        return net_of(), [torch.ones(size, 3, requires_grad=True) for _ in range(lengths(FEW_SLOTS)[0] + 3)]

    cost = metaoptim.plan(compiled(meta_loss), batch={"xs": 0})(*given(SIZE))
    for size in (2, 50):
        assert metaoptim.plan(compiled(meta_loss))(*given(size)).model.sizes == at_batch(cost, size)


# -- what the larger arguments are ------------------------------------------------------------------------------------


def test_larger_arguments_are_like_those_given() -> None:
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
    metaoptim.plan(meta_loss, batch={"data": 1, "images": -4})(net_of(), data, ys, rates=rates, images=images)
    assert [found["xs"][0].shape[1] for found, *_ in seen] == [10, 20, 30, 40]
    (first, *_), (larger, again, pictures, others) = seen[0], seen[1]
    assert first is data and larger["note"] == "kept" and others is rates
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
    programs, steps = dict(meta_loss._programs), library.steps()
    metaoptim.plan(meta_loss, batch=dims)(*arguments)
    assert meta_loss._programs == programs and library.steps() == steps
    meta_loss(*arguments).backward()
    assert meta_loss._programs == programs


def test_larger_arguments_take_no_memory() -> None:
    fn, given, dims = PROBLEMS["sgd"]
    arguments = given(50_000)
    with AllocatorMeter() as meter:
        cost = metaoptim.plan(compiled(fn), batch=dims)(*arguments)
    assert cost.peak_bytes > 2**23 and meter.peak < 2**16


def test_what_was_measured_is_left_out() -> None:
    """It is known of the batch that has run alone."""
    fn, given, dims = PROBLEMS["sgd"]
    arguments = given(SIZE)
    asked = metaoptim.plan(compiled(fn), batch=dims)(*arguments)
    meta_loss = compiled(fn, memory_budget="1MiB")
    meta_loss(*arguments).backward()
    for step in library.steps():
        found = measured(step, "vjp", meta_loss._options.lowering)
        assert isinstance(found, Measured)
        more = replace(found, peak_bytes=2 * found.peak_bytes)
        step.derived.measured["vjp", meta_loss._options.lowering] = more
    assert metaoptim.plan(compiled(fn))(*arguments).model.sizes[A] > 1.5 * asked.model.transient_bytes
    again = metaoptim.plan(compiled(fn), batch=dims)(*arguments)
    assert again == asked


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
        metaoptim.plan(compiled(fn), batch=dims)(*given(SIZE))


def test_what_cannot_be_the_batch() -> None:
    fn, given, dims = PROBLEMS["sgd"]
    net, log_lr, xs, _ = given(3)
    with pytest.raises(ValueError, match=r"dimensions 1 and 2 of one tensor .*'ys'"):
        metaoptim.plan(compiled(fn), batch={"xs": 1, "ys": 2})(net, log_lr, xs, xs)
    with pytest.raises(ValueError, match="at least 1"):
        metaoptim.plan(compiled(fn), batch=dims)(*given(0))
    with pytest.raises(ValueError, match=r"layout torch\.sparse_coo"):
        metaoptim.plan(compiled(fn), batch={"xs": 1})(net, log_lr, xs.to_sparse(), xs)
    with pytest.raises(ValueError, match=r"got 16 inner steps in 18 calls, expected 8 in 10"):
        metaoptim.plan(compiled(fn), batch={"xs": 0, "ys": 0})(*given(SIZE))


def test_an_argument_that_is_not_named() -> None:
    fn, given, _ = PROBLEMS["weights"]
    message = r"xs enlarged from a batch of 5 to 10 .* RuntimeError: .*Name every argument"
    with pytest.raises(metaoptim.WindowError, match=message) as refused:
        metaoptim.plan(compiled(fn), batch={"xs": 1})(*given(SIZE))
    assert isinstance(refused.value.__cause__, RuntimeError)
    assert metaoptim.plan(compiled(fn))(*given(SIZE)).batch is None


def test_an_error_without_a_larger_batch_is_its_own() -> None:
    fn, given, dims = PROBLEMS["sgd"]
    net, log_lr, xs, _ = given(SIZE)
    with pytest.raises(TypeError, match="missing"):
        metaoptim.plan(compiled(fn), batch=dims)(net, log_lr, xs)
    with pytest.raises(RuntimeError) as refused:
        metaoptim.plan(compiled(fn), batch=dims)(nn.Linear(4, 2), log_lr, xs, torch.ones(STEPS, SIZE, 2))
    assert not isinstance(refused.value, metaoptim.WindowError)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda z: torch.einsum("ia,ja,ka->ijk", z, z, z).mean(),
            r"no polynomial of degree 2 or less in the batch: got",
        ),
        (
            lambda z: (z if len(z) < 3 * SIZE else z.sin()).square().mean(),
            r"another one with another batch: got",
        ),
    ],
)
def test_what_has_no_formula(loss: Callable, message: str) -> None:
    def meta_loss(net: nn.Module, xs: Tensor) -> Tensor:
        return looped(net, metaoptim.MetaSGD([net], lr=0.1), lambda x, _: loss(net(x)), xs, xs)

    given = net_of(), torch.ones(STEPS, SIZE, 3, requires_grad=True)
    batches = r"[\d,]+ .* with batches of 5, 10, 15, 20, expected"
    with pytest.raises(metaoptim.WindowError, match=rf"the call at .*{message} {batches}"):
        metaoptim.plan(compiled(meta_loss), batch={"xs": 1})(*given)


def test_numbers_have_no_batch() -> None:
    fn, given, _ = PROBLEMS["sgd"]
    model = metaoptim.plan(compiled(fn))(*given(SIZE)).model
    assert model.by_batch == {} and all(type(x) is int for x in model.sizes.values())
    with pytest.raises(ValueError, match="batch: got 64, expected None"):
        model.at(STEPS, 2, batch=64)


def test_of_a_method() -> None:
    class Learner:
        @metaoptim.compile(backend="eager")
        def meta_loss(self, net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
            return sgd(net, log_lr, xs, ys)

    _, given, dims = PROBLEMS["sgd"]
    cost = metaoptim.plan(Learner().meta_loss, batch=dims)(*given(SIZE))
    assert cost.batch == SIZE and cost.model.sizes[K].is_Integer and cost.model.sizes[E].has(b)
