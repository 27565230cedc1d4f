"""Schedules: as by hand in every form, counted as the optimizer counts, and beside torch's own schedulers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import metaoptim
from by_hand import FORMS, STEPS, Metas, by_hand, data, descent, equal, in_function, leaves, network
from metaoptim import MetaAdam, MetaSGD, schedules
from metaoptim.compiler.lower.library import library
from metaoptim.optim.schedules import Schedule

s = schedules


def cosine_by_hand(t: int, m: Metas) -> Tensor:
    part = (0.5 * (1 + math.cos(math.pi * min(t, 5) / 5))) ** 1.5 if t < 5 else 0.0
    return m["lr"] * ((1 - m["alpha"]) * part + m["alpha"])


def between(t: int, m: Metas) -> Tensor:
    low, part = min(t // 3, 2), (t % 3) / 3
    return m["v"][low] if low == 2 else (1 - part) * m["v"][low] + part * m["v"][low + 1]


#: name -> values of the learnt numbers, the schedule, and its value at t, by hand
CASES: dict[str, tuple[dict[str, Any], Callable[[Metas], Schedule], Callable[[int, Metas], Any]]] = {
    "constant": ({"lr": 0.3}, lambda m: s.constant(m["lr"]), lambda t, m: m["lr"]),
    "linear": (
        {"a": 0.5, "b": 0.1, "T": 6.0},
        lambda m: s.linear(m["a"], m["b"], m["T"], 1),
        lambda t, m: m["b"] if t >= 7 else (m["a"] - m["b"]) * (1 - max(t - 1, 0) / m["T"]) + m["b"],
    ),
    "polynomial": (
        {"a": 0.5, "b": 0.1, "p": 0.5},
        lambda m: s.polynomial(m["a"], m["b"], m["p"], 6),
        lambda t, m: m["b"] if t >= 6 else (m["a"] - m["b"]) * (1 - t / 6) ** m["p"] + m["b"],
    ),
    "cosine": (
        {"lr": 0.4, "alpha": 0.2},
        lambda m: s.cosine(m["lr"], 5, m["alpha"], 1.5),
        cosine_by_hand,
    ),
    "restarts": (
        {"lr": 0.4, "alpha": 0.2},
        lambda m: s.cosine(m["lr"], 5, m["alpha"], 1.5, restarts=True),
        lambda t, m: cosine_by_hand(t % 5, m),
    ),
    "exponential": (
        {"lr": 0.5, "r": 0.6},
        lambda m: s.exponential(m["lr"], 3, m["r"], 1, staircase=True),
        lambda t, m: m["lr"] * m["r"] ** (max(t - 1, 0) // 3),
    ),
    "exponential, bounded": (
        {"lr": 0.5, "r": 0.6, "end": 0.2},
        lambda m: s.exponential(m["lr"], 2, m["r"], end_value=m["end"]),
        lambda t, m: torch.maximum(m["lr"] * m["r"] ** (t / 2), m["end"]),
    ),
    "piecewise": (
        {"lr": 0.5, "c": 0.5, "d": 0.3},
        lambda m: s.piecewise(m["lr"], {2: m["c"], 5: m["d"]}),
        lambda t, m: m["lr"] * (m["c"] if t >= 2 else 1) * (m["d"] if t >= 5 else 1),
    ),
    "table": (
        {"v": [0.5, 0.2, 0.3]},
        lambda m: s.table(m["v"], 2),
        lambda t, m: m["v"][min(t // 2, 2)],
    ),
    "table, interpolated": ({"v": [0.5, 0.2, 0.3]}, lambda m: s.table(m["v"], 3, interpolate=True), between),
    "warmup": (
        {"lr": 0.5, "first": 0.1, "r": 0.7},
        lambda m: s.warmup(s.exponential(m["lr"], 1, m["r"]), 3, m["first"]),
        lambda t, m: (
            m["first"] + (m["lr"] - m["first"]) * t / 3
            if t < 3
            else m["lr"] * m["r"] ** torch.tensor(t - 3.0)
        ),
    ),
    "join": (
        {"a": 0.5, "b": 0.2, "c": 0.1},
        lambda m: s.join([s.constant(m["a"]), s.linear(m["a"], m["b"], 4), s.constant(m["c"])], [2, 5]),
        lambda t, m: m["a"] if t < 2 else (m["a"] - m["b"]) * (1 - (t - 2) / 4) + m["b"] if t < 5 else m["c"],
    ),
    "product": (
        {"lr": 0.5, "c": 0.5, "k": 1.4},
        lambda m: m["k"] * s.piecewise(m["lr"], {4: m["c"]}) * s.linear(1.0, 0.5, 8) * 0.9,
        lambda t, m: m["k"] * m["lr"] * (m["c"] if t >= 4 else 1) * (1 - 0.5 * min(t, 8) / 8) * 0.9,
    ),
    "own": (
        {"lr": 0.5, "k": 0.3},
        lambda m: Schedule(lambda t, hyper: hyper["lr"] / (1 + hyper["k"] * t), lr=m["lr"], k=m["k"]),
        lambda t, m: m["lr"] / (1 + m["k"] * t),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_as_by_hand(name: str, form: str) -> None:
    values, made, at = CASES[name]
    equal(FORMS[form](descent(lr=made), values), by_hand(values, at))


@pytest.mark.parametrize("form", FORMS)
def test_everything_may_be_scheduled(form: str) -> None:
    """Numbers of transforms too, and one schedule twice."""
    values = {"wd": 0.4, "c": 0.3}

    def make(net: nn.Module, m: Metas) -> MetaSGD:
        falling = s.linear(m["wd"], 0.0, 6)
        decay = metaoptim.transforms.weight_decay(falling, mask="*weight")
        clip = metaoptim.transforms.clip_value(s.piecewise(m["c"], {4: 0.5}))
        return MetaSGD([net], lr=falling, transforms=[decay, clip])

    def change(t: int, grads: Any, theta: Any, m: Metas) -> Any:
        wd, c = m["wd"] * (1 - min(t, 6) / 6), m["c"] * (0.5 if t >= 4 else 1)
        decayed = {n: g + wd * theta[n] if "weight" in n else g for n, g in grads.items()}
        return {n: torch.minimum(torch.maximum(g, -c), c) for n, g in decayed.items()}

    equal(FORMS[form](make, values), by_hand(values, lambda t, m: m["wd"] * (1 - min(t, 6) / 6), change))


def test_compiled_by_inductor() -> None:
    values, made, at = CASES["warmup"]
    norm = 0.5

    def change(t: int, grads: Any, theta: Any, m: Metas) -> Any:
        total = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads.values()]))
        return {n: g * torch.clamp(norm / (total + 1e-6), max=1.0) for n, g in grads.items()}

    make = descent(lr=made, transforms=[metaoptim.transforms.clip_global_norm(norm)])
    equal(in_function(make, values, "inductor"), by_hand(values, at, change))


def test_a_network_may_be_one() -> None:
    """In a window, where its parameters are meta-parameters; by finite differences."""
    torch.manual_seed(1)
    rate, (xs, ys) = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double(), data()
    schedule = Schedule(lambda t: 0.3 * rate(t.reshape(1) / 5).sigmoid().squeeze())

    def outer(**window: Any) -> Tensor:
        net = network()
        inner = MetaSGD([net], lr=schedule)
        with metaoptim.SlidingWindow(**window):
            for t in range(4):
                inner.step((net(xs[t]) - ys[t]).square().mean())
            return (net(xs[5]) - ys[5]).square().mean()

    expected = torch.autograd.grad(outer(strategy="full_tape"), list(rate.parameters()))
    for found, value in zip(
        torch.autograd.grad(outer(slots=1), list(rate.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-13)


# -- the count --------------------------------------------------------------------------------------------------------


def losses(net: nn.Module, t: int) -> Tensor:
    xs, ys = data()
    return (net(xs[t]) - ys[t]).square().mean()


FALLING = s.exponential(0.2, 1, 0.6)


@pytest.mark.parametrize("form", ["window", "full tape", "function", "steps"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_the_count_goes_on_over_windows_and_state_dicts(name: str, form: str) -> None:
    """Online windows, a state_dict in between, then torch's optimizer with the numbers of then."""
    reference, net = network(), network()
    theirs = getattr(torch.optim, name)(reference.parameters(), lr=0.2)
    scheduler = lr_scheduler.ExponentialLR(theirs, 0.6)
    for t in range(7):
        theirs.zero_grad()
        losses(reference, t).backward()
        theirs.step()
        scheduler.step()
    inner = getattr(metaoptim, f"Meta{name}")([net], lr=FALLING)

    def steps(first: int, last: int) -> None:
        with metaoptim.SlidingWindow(strategy="full_tape" if form == "full tape" else "auto"):
            for t in range(first, last):
                step(t)

    xs, ys = data()

    def plain(t: int) -> None:
        inner.step(losses(net, t))

    @metaoptim.compile(backend="eager")
    def compiled(x: Tensor, y: Tensor) -> None:
        inner.step((net(x) - y).square().mean())

    @metaoptim.compile(backend="eager")
    def function(xs: Tensor, ys: Tensor) -> Tensor:
        with metaoptim.SlidingWindow() as window:
            for x, y in window.scan(xs, ys):
                inner.step((net(x) - y).square().mean())
            return net(xs).sum()

    step: Callable[[int], Any] = (lambda t: compiled(xs[t], ys[t])) if form == "steps" else plain
    if form == "function":
        function(xs[:2], ys[:2])
        function(xs[2:4], ys[2:4])
        function(xs[4:5], ys[4:5])
    else:
        steps(0, 2)
        steps(2, 5)
    packed = copy.deepcopy(inner.state_dict())
    assert packed["param_groups"][0]["lr"] == pytest.approx(0.2 * 0.6**5)
    inner = getattr(metaoptim, f"Meta{name}")([net], lr=FALLING)
    inner.load_state_dict(packed)
    assert inner.param_groups[0]["lr"] is FALLING
    step = plain
    steps(5, 6)
    continued = getattr(torch.optim, name)(net.parameters())
    continued.load_state_dict(inner.state_dict())
    losses(net, 6).backward()
    continued.step()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


def test_where_it_begins() -> None:
    """Adam's state of torch knows how many steps there have been, SGD's does not."""
    net = network()
    theirs = torch.optim.Adam(net.parameters(), lr=0.01)
    for t in range(3):
        losses(net, t).backward()
        theirs.step()
    inner = MetaAdam([net], lr=FALLING)
    inner.load_state_dict(theirs.state_dict())
    assert inner.state_dict()["param_groups"][0]["lr"] == pytest.approx(0.2 * 0.6**3)
    assert MetaSGD([net], lr=FALLING).state_dict()["param_groups"][0]["lr"] == pytest.approx(0.2)


def test_it_is_as_at_entry_after_an_offline_window_and_after_an_error() -> None:
    net = network()
    inner = MetaSGD([net], lr=FALLING)
    with metaoptim.SlidingWindow():
        inner.step(losses(net, 0))
    before = inner.state_dict()["param_groups"][0]["lr"]
    with metaoptim.SlidingWindow(offline=True):
        inner.step(losses(net, 1))
    with pytest.raises(KeyError), metaoptim.SlidingWindow():
        inner.step(losses(net, 1))
        raise KeyError
    assert inner.state_dict()["param_groups"][0]["lr"] == before == pytest.approx(0.2 * 0.6)
    with metaoptim.SlidingWindow(pickup_step=1):
        for t in range(4):
            inner.step(losses(net, t))
    assert inner.state_dict()["param_groups"][0]["lr"] == pytest.approx(0.2 * 0.6**3)


def test_it_counts_steps_also_of_parameters_that_are_not_used() -> None:
    net = network()
    inner = MetaSGD([net], lr=s.table([1.0, 0.5]))
    weight = net[0].weight.detach().clone()
    with metaoptim.SlidingWindow():
        inner.step(net[2](torch.ones(1, 4, dtype=torch.float64)).sum(), allow_unused=True)
        inner.step(net[0].weight.sum(), allow_unused=True)
    torch.testing.assert_close(net[0].weight, weight - 0.5)


@pytest.mark.parametrize("name", ["warmup", "table", "piecewise"])
def test_steps_share_a_program(name: str) -> None:
    values, made, _ = CASES[name]
    net, sizes = network(), []
    inner = MetaSGD([net], lr=made(leaves(values)))
    with metaoptim.SlidingWindow(offline=True):
        for t in range(STEPS):
            inner.step(losses(net, t))
            sizes.append(len(library.steps()))
    assert sizes == sizes[:1] * STEPS


def test_guards_notice_other_schedules() -> None:
    net, (xs, ys) = network(), data()
    inner = MetaSGD([net], lr=s.linear(0.3, 0.0, 6))

    def once() -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            for t in range(3):
                inner.step((net(xs[t]) - ys[t]).square().mean())
            return (net(xs[4]) - ys[4]).square().mean()

    run, seen = metaoptim.compile(backend="eager")(once), set()
    for change in (
        lambda: None,
        lambda: inner.param_groups[0]["lr"].hyper.update(init_value=0.2),
        lambda: inner.param_groups[0]["lr"].hyper.update(end_value=torch.tensor(0.1, requires_grad=True)),
        lambda: inner.param_groups[0].update(lr=s.cosine(0.2, 6)),
        lambda: inner.param_groups[0].update(lr=0.2),
    ):
        change()
        seen.add(float(run().detach()))
        assert float(run().detach()) == pytest.approx(float(once().detach()), rel=1e-12)
    assert len(seen) == 5


# -- torch's schedulers, and what is refused --------------------------------------------------------------------------


def test_cosine_is_torch_s() -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=0.3)
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5, eta_min=0.06)
    ours = s.cosine(0.3, 5, alpha=0.2, restarts=True)
    for t in range(13):
        assert float(ours(t)) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["LambdaLR", "StepLR", "CosineAnnealingLR"])
def test_a_scheduler_of_torch_drives_no_schedule(name: str) -> None:
    arguments: dict[str, tuple] = {"LambdaLR": (lambda t: 0.5,), "StepLR": (2,), "CosineAnnealingLR": (5,)}
    inner = MetaSGD([network()], lr=FALLING)
    with pytest.raises(metaoptim.WindowError, match=r"'lr', which is a schedule .*join or multiply"):
        getattr(lr_scheduler, name)(inner, *arguments[name]).step()


def test_what_is_no_schedule() -> None:
    net = network()
    with pytest.raises(
        TypeError, match=r"lr: got <function .*expected a number, a tensor or a schedule: .*Schedule\(f\)"
    ):
        MetaSGD([net], lr=lambda t: 0.1)  # type: ignore[arg-type]
    inner = MetaSGD([net])
    inner.param_groups[0]["lr"] = lambda t: 0.1
    with metaoptim.SlidingWindow(), pytest.raises(TypeError, match=r"\['lr'\] is <function .*or a schedule"):
        inner.step(losses(net, 0))
    with pytest.raises(TypeError, match="got 3, expected a function"):
        Schedule(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gives None, expected a number or a tensor"):
        Schedule(lambda t: None)(0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="2 schedules and 2 boundaries"):
        s.join([FALLING, FALLING], [1, 2])
    with pytest.raises(ValueError, match="transition_steps: got 0, expected a number that is positive"):
        s.linear(0.1, 0.0, 0)
    with pytest.raises(ValueError, match=r"values: got a tensor of shape \(0,\)"):
        s.table([])
    assert repr(s.warmup(s.cosine(0.1, 10), 2)).startswith(
        "warmup(schedule=cosine(init_value=0.1, decay_steps=10"
    )


def test_what_is_no_schedule_is_told_at_once() -> None:
    s = metaoptim.schedules
    mistakes: list[Callable[[], object]] = [
        lambda: s.warmup(0.1, 10),  # type: ignore[arg-type]
        lambda: s.warmup(10, s.cosine(0.1, 10)),  # type: ignore[arg-type]
        lambda: s.join([0.1, s.cosine(0.1, 10)], [5]),  # type: ignore[list-item]
        lambda: s.join([s.constant(0.1), s.cosine(0.1, 10)], 5),  # type: ignore[arg-type]
    ]
    for mistake in mistakes:
        with pytest.raises(TypeError, match=r"expected one of metaoptim\.schedules|expected a list"):
            mistake()


def test_a_table_of_learnt_values() -> None:
    first, second = (torch.tensor(v, requires_grad=True) for v in (0.5, 0.25))
    schedule = metaoptim.schedules.table([first, 1.0, second])
    (schedule(0) + 3 * schedule(2)).backward()
    assert (first.grad, second.grad) == (torch.tensor(1.0), torch.tensor(3.0))
