"""Schedules against exhaustive search and dynamic programmes; the store and the engine against what they predict."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from math import comb
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import metaoptim
from metaoptim.runtime.states.schedule import advances, crowded_out, extra_forwards, places
from metaoptim.runtime.states.slots import Action, Advance, Keep, PullBack, Slots
from metaoptim.runtime.states.streams import carried_out, coming, drawn, forward, reverse, revolve, whole

# -- references ------------------------------------------------------------------------------------------------------


@cache
def optimum(states: int, slots: int) -> int:
    """`advances` by dynamic programming over the first place."""
    if states <= 1:
        return 0
    if slots == 1:
        return states * (states - 1) // 2
    return min(m + optimum(m, slots) + optimum(states - m, slots - 1) for m in range(1, states))


def searched(states: int, slots: int) -> int:
    """`advances` by shortest path over all that could be done: run a step, keep, drop, go back to a kept state."""
    begin = (frozenset([0]), 0, states - 1)  # kept, where the computation stands, what is needed next
    queue: list[tuple[int, int, tuple]] = [(0, 0, begin)]
    done, ticket = set(), 0
    while True:
        cost, _, node = heapq.heappop(queue)
        kept, at, needed = node
        if needed < 0:
            return cost
        if node in done:
            continue
        done.add(node)
        moves = [(0, (kept - {k}, at, needed)) for k in kept] + [(0, (kept, k, needed)) for k in kept]
        if at == needed:
            moves.append((0, (kept, at, needed - 1)))
        if at < needed:
            moves.append((1, (kept, at + 1, needed)))
        if len(kept) < slots:
            moves.append((0, (kept | {at}, at, needed)))
        for step, then in moves:
            ticket += 1
            heapq.heappush(queue, (cost + step, ticket, then))


def swept(kept: list[int], end: int, slots: int, cost: Any = advances) -> int:
    """What a sweep from ``end`` over kept states costs."""
    bounds = [*kept, end]
    return sum(cost(bounds[i + 1] - p, slots - i) for i, p in enumerate(kept))


def streamed(slots: int, horizon: int) -> Iterator[list[int]]:
    """The states kept after 0, 1, … steps whose end is unknown."""
    kept = [0]
    yield kept
    for position in range(1, horizon + 1):
        # Offered once a step goes on from there; the state at the end itself takes no slot.
        yield kept
        if len(kept) < slots:
            kept = [*kept, position]
        else:
            lost = crowded_out(kept, position, slots)
            kept = [p for p in [*kept, position] if p != lost]


class Loop:
    """Schedules carried out on positions; the state at p is [p]."""

    def __init__(self, slots: int) -> None:
        self.store = Slots(slots)
        self.store.apply(Keep(0), [0])
        self.end = self.steps = self.most = 0
        self.again: Counter[int] = Counter()  # step -> how often it was run again

    def carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Advance):
                (state,) = self.store[action.start]
                self.store.work[action.stop] = [state + action.stop - action.start]
                self.steps += action.stop - action.start
                self.again.update(range(action.start, action.stop))
            elif isinstance(action, PullBack):
                assert self.store[action.position] == [action.position]
            else:
                self.store.apply(action)
            self.most = max(self.most, len(self.store))

    def forward(self, steps: int, known: bool = False) -> None:
        if known:
            assert not self.end
            self.carry_out(forward(self.store, 0, steps))
            self.store.rest()
            self.end, self.steps = steps, 0
            self.again.clear()
            return
        for _ in range(steps):
            for action in coming(self.store, self.end):
                self.store.apply(action, [self.end])
            self.most = max(self.most, len(self.store))
            self.end += 1

    def sweep(self, top: int, bottom: int = 0) -> int:
        """Visit top − 1, …, bottom; the steps that took."""
        before = self.steps
        self.carry_out(reverse(self.store, ((p, p) for p in range(top - 1, bottom - 1, -1))))
        self.store.rest()
        return self.steps - before


# -- the optimum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_closed_form_is_what_an_exhaustive_search_finds(slots: int) -> None:
    for states in range(1, 9 if slots < 3 else 8):
        assert advances(states, slots) == searched(states, slots)


def test_the_closed_form_and_the_places_equal_the_dynamic_programme() -> None:
    for slots in range(1, 9):
        for steps in range(41):
            assert advances(steps, slots) == optimum(steps, slots)
            # θ_T is the first of T + 1 states to be at hand; the way there is the forward pass
            assert extra_forwards(steps, slots) == optimum(steps + 1, slots) - steps
            loop = Loop(slots)
            assert loop.sweep(steps) == optimum(steps, slots) and loop.most <= slots


def test_the_places_of_long_loops() -> None:
    for steps, slots in ((1000, 2), (1000, 7), (2000, 20), (300, 60), (300, 299), (300, 1000)):
        loop = Loop(slots)
        assert loop.sweep(steps) == advances(steps, slots)
        assert loop.most <= slots


@settings(max_examples=60, deadline=None)
@given(slots=st.integers(1, 9), horizon=st.integers(1, 120), seed=st.integers(0, 99))
def test_unequal_steps_take_at_most_r_times_their_forward_pass(slots: int, horizon: int, seed: int) -> None:
    """No step is run again more than r times, the least r with T + 1 ≤ C(c + r, c), whatever each of them costs."""
    loop = Loop(slots)
    loop.forward(horizon, known=True)
    loop.sweep(horizon)
    repeats = next(r for r in itertools.count() if horizon + 1 <= comb(slots + r, slots))
    assert max(loop.again.values(), default=0) <= repeats
    costs = [random.Random(seed + p).random() ** 3 for p in range(horizon)]
    assert sum(n * costs[p] for p, n in loop.again.items()) <= repeats * sum(costs)


def test_integers_are_exact_however_large() -> None:
    steps = 10**9
    assert advances(steps, 1) == steps * (steps - 1) // 2
    assert advances(steps, steps) == steps - 1 and extra_forwards(steps, steps) == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="got -1 states and 2 slots"):
        advances(-1, 2)
    with pytest.raises(ValueError, match="got 6 states and 0 slots"):
        extra_forwards(5, 0)


def test_where_a_state_cannot_be_kept_the_next_one_is() -> None:
    every, some = (
        [a.position for a in carried_out(held, revolve(held, 0, 90, keepable)) if isinstance(a, Keep)]
        for held, keepable in ((Slots(9), lambda p: True), (Slots(9), lambda p: p % 20 == 5))
    )
    assert every == places(0, 90, 9) and len(every) == 8
    assert some == sorted({next(q for q in range(p, 999) if q % 20 == 5) for p in every if p <= 85})


def test_a_schedule_is_lazy_and_prints() -> None:
    held, end = Slots(3), 10**9
    first = list(
        itertools.islice(carried_out(held, reverse(held, ((p, p) for p in range(end - 1, -1, -1)))), 4)
    )
    kept = places(0, end - 1, 3)
    expected = Advance(0, kept[0]), Keep(kept[0]), Advance(*kept), Keep(kept[1])
    assert list(map(str, first)) == list(map(str, expected))
    assert list(map(str, whole(4, 2))) == [
        "advance 0 -> 3",
        "keep 3",
        "advance 3 -> 4",
        "drop 4",
        "pull back 3",
        "drop 3",
        "advance 0 -> 1",
        "keep 1",
        "advance 1 -> 2",
        "pull back 2",
        "drop 2",
        "pull back 1",
        "drop 1",
        "pull back 0",
    ]


def test_a_schedule_is_drawn() -> None:
    assert drawn(whole(5, 2)).splitlines() == [
        "█>·>·>",
        "█ · · █>·>",
        "█ · · █>",
        "█ · · █ ·<",
        "█ · · █<",
        "█>",
        "█ █>",
        "█ █ ·<",
        "█ █<",
        "█<",
    ]
    tiered = drawn(whole(5, 1, tiered=True, known=False)).splitlines()
    assert tiered[-4:] == ["▒ · █<· ▒", "█>· ▒ · ▒", "█ ·<▒ · ▒", "█<· ▒ · ▒"]
    for steps, slots in itertools.product((1, 6, 17), (None, 1, 2, 5)):
        lines = drawn(whole(steps, slots)).splitlines()
        assert sum(line.count("<") for line in lines) == steps
        runs = optimum(steps + 1, steps if slots is None else slots)
        assert sum(line.count(">") for line in lines) == runs
        assert max(line.count("█") for line in lines) <= (slots or steps)


# -- with the end unknown --------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), slots=st.integers(2, 9))
def test_given_up_is_what_makes_the_next_sweep_cheapest(data: st.DataObject, slots: int) -> None:
    above = data.draw(st.lists(st.integers(1, 60), min_size=slots, max_size=slots, unique=True))
    *kept, position = [0, *sorted(above)]
    costs = {
        lost: swept([p for p in [*kept, position] if p != lost], position + 1, slots, optimum)
        for lost in [*kept[1:], position]
    }
    assert crowded_out(kept, position, slots) == min(costs, key=lambda lost: (costs[lost], lost))


def factor(slots: int) -> float:
    """What the docstring of `crowded_out` states."""
    return 1.0 if slots == 1 else 1.22 if slots == 2 else 1.10


@settings(max_examples=25, deadline=None, derandomize=True)
@given(slots=st.integers(1, 60), horizon=st.integers(1, 4000))
def test_close_to_the_optimum_at_every_horizon(slots: int, horizon: int) -> None:
    for end, kept in enumerate(streamed(slots, horizon)):
        least, cost = extra_forwards(end, slots), swept(kept, end, slots)
        assert len(kept) <= slots and kept[0] == 0
        assert least <= cost <= factor(slots) * least
        if 2 * end <= (slots + 1) * (slots + 2):
            assert cost == least


def test_the_factor_is_1_02_on_average() -> None:
    for slots in (2, 3, 6, 20):
        pairs = [(swept(kept, end, slots), end) for end, kept in enumerate(streamed(slots, 2500))]
        ratios = [cost / extra_forwards(end, slots) for cost, end in pairs if extra_forwards(end, slots)]
        assert sum(ratios) / len(ratios) <= 1.02


@pytest.mark.parametrize(("slots", "least"), [(2, 1.15), (3, 1.0999), (4, 1.066)])
def test_no_online_scheme_does_better(slots: int, least: float) -> None:
    """Every way to keep and drop: none stays within ``least``, nor optimal beyond (c + 1)(c + 2)/2."""

    def fails_at(bound: float) -> int:
        reachable, end = {(0,)}, 0
        while True:
            end += 1
            limit = bound * extra_forwards(end, slots) + 1e-9
            reachable = {k for k in reachable if swept(list(k), end, slots, optimum) <= limit}
            if not reachable:
                return end
            kept = set(reachable)
            for k in reachable:
                kept |= {(*k, end)} if len(k) < slots else set()
                kept |= {(*k[:j], *k[j + 1 :], end) for j in range(1, len(k))}
            reachable = kept

    assert fails_at(least) < 100
    assert fails_at(1.0) == (slots + 1) * (slots + 2) // 2 + 1


# -- the store -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(slots=st.integers(1, 12), steps=st.integers(0, 150))
def test_a_sweep_takes_the_steps_predicted_and_a_second_one_the_optimum(slots: int, steps: int) -> None:
    loop = Loop(slots)
    loop.forward(steps)
    *_, kept = streamed(slots, steps)
    assert loop.sweep(steps) == swept(kept, steps, slots, optimum)
    assert loop.sweep(steps) == optimum(steps, slots)  # the forward pass's states are gone
    assert loop.most <= slots


def test_a_known_horizon_costs_the_optimum() -> None:
    for slots in (1, 2, 3, 5, 8):
        for steps in range(1, 60):
            loop = Loop(slots)
            loop.forward(steps, known=True)
            assert loop.sweep(steps) == optimum(steps + 1, slots) - steps and loop.most <= slots


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), slots=st.integers(1, 6), horizon=st.none() | st.integers(1, 40))
def test_sweeps_from_anywhere_to_anywhere(data: st.DataObject, slots: int, horizon: int | None) -> None:
    """Every state asked for is right (the loop asserts it), in the slots there are and at no more than their cost."""
    loop = Loop(slots)
    if horizon is not None:
        loop.forward(horizon, known=True)
    for _ in range(data.draw(st.integers(1, 6))):
        loop.forward(data.draw(st.integers(1, 25)))
        top = data.draw(st.integers(0, loop.end))
        bottom = data.draw(st.integers(0, top))
        kept = [p for p in loop.store.kept if p < top]
        cost = loop.sweep(top, bottom)
        predicted = swept(kept, top, slots, optimum) if top else 0
        assert cost == predicted if bottom == 0 else cost <= predicted
        assert loop.most <= slots


# -- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many states were held after each one that came."""
    found, real = [], Slots._keep

    def keep(self: Slots, position: int, state: Any) -> None:
        real(self, position, state)
        found.append(len(self))

    monkeypatch.setattr(Slots, "_keep", keep)
    return found


def data(t: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(t)
    return torch.randn(5, 3, generator=g), torch.randn(5, 2, generator=g)


def run(steps: int, **options: Any) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    net, lr = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        torch.tensor(0.1, requires_grad=True),
    )
    own = [*net.parameters(), lr]
    inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.5)
    with metaoptim.SlidingWindow(offline=True, **options) as window:
        engine: Any = getattr(window._session, "engine", None)
        for t in range(steps):
            x, y = data(t)
            inner.step(F.mse_loss(net(x), y))
        x, y = data(99)
        return engine, F.mse_loss(net(x), y), own


def agree(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("steps", "slots"), [(1, 1), (6, 1), (3, 2), (13, 2), (11, 3), (30, 3), (26, 4), (40, 6), (7, 8), (8, 8)]
)
def test_the_engine_replays_what_is_predicted(
    steps: int, slots: int, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, outer, own = run(steps, strategy="full_tape")
    expected = torch.autograd.grad(outer, own)
    *_, kept = streamed(slots, steps)

    engine, outer, own = run(steps, slots=slots)
    agree(torch.autograd.grad(outer, own, retain_graph=True), expected)
    first = engine.replays
    agree(torch.autograd.grad(outer, own), expected)
    assert first == swept(kept, steps, slots, optimum) and engine.replays - first == optimum(steps, slots)
    assert engine.vjps == 2 * steps

    def known(held: Slots, position: int) -> Iterator[Action]:
        if position in (held.base, *places(held.base, held.base + steps, slots)):
            yield Keep(position)

    monkeypatch.setattr("metaoptim.runtime.engine.engine.coming", known)
    engine, outer, own = run(steps, slots=slots)
    agree(torch.autograd.grad(outer, own), expected)
    assert engine.replays == optimum(steps + 1, slots) - steps
    assert max(held) <= slots


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_super_steps(slots: int, held: list[int]) -> None:
    """Two optimizers on a shared trunk: in the middle of a super-step no state can be kept."""

    def grads(**options: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        trunk, a, b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        lr = torch.tensor(0.1, requires_grad=True)
        own = [*trunk.parameters(), *a.parameters(), *b.parameters(), lr]
        first = metaoptim.MetaSGD([trunk, a], lr=lr)
        second = metaoptim.MetaSGD([b], lr=lr)
        with metaoptim.SlidingWindow(offline=True, **options) as window:
            engine: Any = getattr(window._session, "engine", None)
            for t in range(12):
                x, y = data(t)
                features = torch.tanh(trunk(x))
                losses = F.mse_loss(a(features), y), F.mse_loss(b(features), y)
                first.step(losses[0])
                second.step(losses[1])
            x, y = data(99)
            outer = F.mse_loss(a(torch.tanh(trunk(x))) + b(torch.tanh(trunk(x))), y)
            return engine, torch.autograd.grad(outer, own)

    engine, got = grads(slots=slots)
    agree(got, grads(strategy="full_tape")[1])
    assert max(held) <= slots
    # A schedule of the 12 super-steps would replay two steps for one, and one more to get inside each.
    assert engine.replays <= 1.1 * (2 * extra_forwards(12, slots) + 12)


def test_forgetting_computes_a_new_initial_state_and_keeps_those_above(held: list[int]) -> None:
    """`window=W` forgets what lies before the last W steps, also where the nearest kept state is far below."""
    everything, *_ = run(40)
    held.clear()
    engine, *_ = run(40, slots=3)
    initial, *above = engine.store.kept
    needed = above[0] - 1
    assert needed - initial > max(16, engine.position - needed)
    engine.trim(needed)
    assert engine.store.kept == [needed, *above] and engine.program.start == needed
    assert engine.replays == needed - initial and max(held) <= 3
    for p in (needed, *above):
        assert all(map(torch.equal, engine.store[p], everything.store[p]))
