"""A plain `for` whose iterations make several calls, or read lists of learnt tensors: it is a Loop all the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import Made, compare, full_tape, leaf, mlp, outcome
from metaoptim.compiler.ir.programs.calls import Loop
from metaoptim.compiler.ir.programs.program import Program
from metaoptim.compiler.passes.options import Options
from metaoptim.compiler.passes.pipeline import loop
from metaoptim.runtime.budget.meter import AllocatorMeter

ROUNDS = 6  # enough for what each round leaves to have found its place


def numbers(steps: int, last: int, seed: int = 1) -> Tensor:
    return torch.randn(steps, 5, last, generator=torch.Generator().manual_seed(seed))


def program_of(made: Made) -> Program:
    compiled = metaoptim.compile(made.of, backend="eager")
    compiled(metaoptim.SlidingWindow)
    ((program,),) = compiled._specializations.known.values()
    return program.program


def sizes(program: Program) -> tuple[int, ...]:
    loops = [c for c in program.calls if isinstance(c, Loop)]
    return len(program.calls), len(loops), len(program.step_graphs), program.registers


# -- optimizers by turns ---------------------------------------------------------------------------------------------


def _by_turns(rounds: int, critic_steps: int = 1, **window: Any) -> Made:
    """A critic that takes some steps for each one of the actor."""
    actor, critic = mlp(), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    rate, weight = leaf(-1.0), leaf(0.3)
    xs = numbers(rounds, 3)

    def of(make: Any) -> Tensor:
        critic_optim = metaoptim.MetaAdam([critic], lr=0.1 * rate.exp())
        actor_optim = metaoptim.MetaSGD([actor], lr=0.2 * weight.sigmoid(), momentum=0.5)
        with make(**window):
            for x in xs:
                for _ in range(critic_steps):
                    critic_optim.step((critic(actor(x).detach()) - weight).square().mean())
                actor_optim.step(-critic(actor(x)).sigmoid().mean())
            return critic(actor(xs[0])).mean()

    own = [*actor.parameters(), *critic.parameters()]
    if window["offline"]:
        return Made(of, [rate, weight, *own])
    return Made(of, [rate, weight], lambda: own)


def _shared(rounds: int) -> Made:
    """Two optimizers over one trunk."""
    trunk, heads = nn.Linear(3, 3), [nn.Linear(3, 2), nn.Linear(3, 1)]
    rate = leaf(-2.0)
    xs = numbers(rounds, 3)

    def of(make: Any) -> Tensor:
        optimizers = [
            metaoptim.MetaAdam([trunk, heads[0]], lr=rate.exp()),
            metaoptim.MetaSGD([trunk, heads[1]], lr=rate.exp()),
        ]
        with make(offline=True):
            for x in xs:
                for head, optimizer in zip(heads, optimizers, strict=True):
                    optimizer.step(head(trunk(x).tanh()).square().mean())
            return sum((head(trunk(xs[0]).tanh()).square().mean() for head in heads), start=torch.zeros(()))

    return Made(of, [rate, *trunk.parameters(), *(p for head in heads for p in head.parameters())])


def _noisy(rounds: int) -> Made:
    """Random numbers, a number of the round, and a value carried from one round to the next."""
    net, other, weight = mlp(), mlp(1), leaf(0.3)
    xs = numbers(rounds, 3)

    def of(make: Any) -> Tensor:
        first, second = metaoptim.MetaSGD([net], lr=0.1), metaoptim.MetaSGD([other], lr=0.1 * weight.exp())
        with make(offline=True):
            mean = torch.zeros(2)
            for t in range(rounds):
                out = net(F.dropout(xs[t], 0.3)) * (1 + t / 7)
                mean = 0.9 * mean + out.mean(0)
                first.step((out - weight).square().mean())
                second.step((other(xs[t]) - mean.detach() + 0.1 * torch.randn(2)).square().mean())
            return (other(xs[0]) * mean).square().mean()

    return Made(of, [weight, *net.parameters(), *other.parameters()])


TURNS: dict[str, Callable[[int], Made]] = {
    "offline": lambda n: _by_turns(n, offline=True),
    "online": lambda n: _by_turns(n, offline=False),
    "truncated": lambda n: _by_turns(n, offline=False, window=3),
    "two steps to one": lambda n: _by_turns(n, critic_steps=2, offline=True),
    "a shared trunk": _shared,
    "noise": _noisy,
}


@pytest.mark.parametrize("name", TURNS)
def test_steps_by_turns_equal_the_tape(name: str) -> None:
    # the tape keeps everything; what an ordinary window truncates has tests of its own
    oracle = metaoptim.SlidingWindow if name == "truncated" else full_tape
    compare(lambda: TURNS[name](ROUNDS + 2), oracle)


@pytest.mark.parametrize("name", TURNS)
def test_steps_by_turns_are_a_loop(name: str) -> None:
    """As many calls, loops, step graphs and registers for any number of rounds."""
    found = set()
    for rounds in (ROUNDS + 2, 3 * ROUNDS):
        program = program_of(TURNS[name](rounds))
        longest = max((c for c in program.calls if isinstance(c, Loop)), key=lambda c: c.count)
        assert len(longest.calls) == (3 if name == "two steps to one" else 2)
        assert program.horizon == rounds * len(longest.calls)
        found.add(sizes(program))
        before = str(program)
        loop(program, Options())
        assert str(program) == before  # idempotent
    assert len(found) == 1


def test_the_text_shows_a_round() -> None:
    text = program_of(TURNS["offline"](ROUNDS + 2)).text().splitlines()
    at = next(i for i, line in enumerate(text) if line.startswith("  loop "))
    assert text[at].endswith(" times, t = 0, 1, ...:")
    assert all(line.startswith("    r") and " + t]" in line for line in text[at + 1 : at + 3])


def test_a_value_of_one_step_that_all_later_ones_read() -> None:
    """The steps after it are a loop, although the one before them, of the same graph, leaves more behind."""

    def make(steps: int = 10) -> Made:
        net, weight = mlp(), leaf(0.3)
        xs = numbers(steps, 3)

        def of(window: Any) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=0.1 * weight.exp())
            anchor = weight * xs[0, :, :2]
            with window(offline=True):
                for t, x in enumerate(xs):
                    out = net(x)
                    inner.step((out - anchor).square().mean())
                    anchor = out if t == 3 else anchor
                return net(xs[0]).square().mean()

        return Made(of, [weight, *net.parameters()])

    compare(make)
    assert sizes(program_of(make(10))) == sizes(program_of(make(20)))


# -- lists of learnt tensors -----------------------------------------------------------------------------------------


def _rates(steps: int, parameters: bool = False) -> Made:
    """A learnt learning rate for every step."""
    net, xs = mlp(), numbers(steps, 3)
    values = torch.linspace(-2.0, -1.0, steps)
    rates: Any = [leaf(float(v)) for v in values]
    rates = nn.ParameterList(nn.Parameter(v.clone()) for v in values) if parameters else rates

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaAdam([net])
        with window(offline=True):
            for t, x in enumerate(xs):
                inner.param_groups[0]["lr"] = 0.1 * rates[t].exp()
                inner.step(net(x).square().mean())
            return net(xs[0]).square().mean()

    return Made(of, [*rates, *net.parameters()])


def _weights(steps: int) -> Made:
    """Learnt weights, two to a round of two optimizers, some of which come twice."""
    net, other, xs = mlp(), mlp(1), numbers(steps, 3)
    weights = [leaf(0.1 * k) for k in range(steps)]

    def of(window: Any) -> Tensor:
        first, second = metaoptim.MetaSGD([net], lr=0.1), metaoptim.MetaSGD([other], lr=0.1)
        with window(offline=True):
            for t, x in enumerate(xs):
                first.step((net(x) - weights[t]).square().mean())
                second.step((other(x) - net(x).detach() * weights[5 * t % steps].exp()).square().mean())
            return other(xs[0]).square().mean()

    return Made(of, [*weights, *net.parameters(), *other.parameters()])


LISTS: dict[str, Callable[[int], Made]] = {
    "rates": _rates,
    "a ParameterList": lambda n: _rates(n, parameters=True),
    "weights by turns": _weights,
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_learnt_tensors_equal_the_tape(name: str) -> None:
    compare(lambda: LISTS[name](9))


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_learnt_tensors_are_a_loop(name: str) -> None:
    found = {sizes(program_of(LISTS[name](steps))) for steps in (12, 24)}
    assert len(found) == 1


def test_a_budget_counts_the_gradients_of_a_whole_list() -> None:
    """A plan is found on a few iterations; every tensor of a list that is learnt gets a gradient."""
    steps = 200
    net, batches = mlp(), [x.clone().requires_grad_() for x in numbers(steps, 3)]

    def of() -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            for x in batches:
                inner.step(net(x).square().mean())
            return net(batches[0]).square().mean()

    with pytest.raises(metaoptim.BudgetError) as caught:
        metaoptim.compile(of, backend="eager", memory_budget=100)()
    budget = int(1.2 * caught.value.minimum)
    fn = metaoptim.compile(of, backend="eager", memory_budget=budget)
    torch.autograd.grad(fn(), batches)  # compiles
    with AllocatorMeter() as meter:
        torch.autograd.grad(fn(), batches)
    assert 2 * steps * batches[0].nbytes < meter.peak <= budget  # a copy and a gradient each
    report = metaoptim.explain(fn)()
    assert report.predicted_peak_bytes == pytest.approx(meter.peak, rel=0.01)
    assert len(report.gradient_targets) == steps + 4 and report.num_programs == 3


def _actor_critic(
    clip: bool, optimizer: Any = metaoptim.MetaSGD, meter: Any = None, **options: Any
) -> tuple[Tensor, int, int]:
    """A gradient, replays and what is predicted of them: rounds of two steps, and writes between the two."""
    told, engine = -1, None
    torch.manual_seed(0)
    actor, critic = nn.Linear(6, 5), nn.Linear(6, 1)
    lr, xs = torch.tensor(0.05, requires_grad=True), torch.randn(30, 4, 6)
    of_actor, of_critic = optimizer([actor], lr=lr), metaoptim.MetaSGD([critic], lr=lr * 2)
    with meter or nullcontext(), metaoptim.SlidingWindow(**options) as window:
        for x in xs:
            value, action = critic(x), actor(x)
            losses = (value - action.sum(-1, keepdim=True)).square(), action.sin() * (1 + value)
            of_critic.step(losses[0].mean())
            if clip:
                with torch.no_grad():
                    for p in critic.parameters():
                        p.clamp_(-0.3, 0.3)
            of_actor.step(losses[1].mean())
        if "strategy" not in options:
            engine = window._session.engine
            told = window.explain().extra_forwards if meter is None else -1
        (actor(xs[0]).square().mean() + critic(xs[0]).sum()).backward()
    assert lr.grad is not None
    return lr.grad, 0 if engine is None else engine.replays, told


def test_writing_between_the_steps_of_a_round_replays_no_more() -> None:
    """The loss of a round's second step was computed before what was written."""
    expected, *_ = _actor_critic(True, strategy="full_tape")
    for slots in (3, 5, 8):
        found, replays, told = _actor_critic(True, slots=slots)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        assert 0 < replays <= 1.2 * _actor_critic(False, slots=slots)[1]
        assert told == replays


@pytest.mark.parametrize("optimizer", [metaoptim.MetaSGD, metaoptim.MetaAdam])
@pytest.mark.parametrize("clip", [False, True])
def test_rounds_keep_to_a_budget(optimizer: Any, clip: bool) -> None:
    """Planned with what is assigned inside a round, be it once (Adam's first state) or every time."""
    expected, *_ = _actor_critic(clip, optimizer, strategy="full_tape")
    assert _actor_critic(clip, optimizer)[1:] == (0, 0)  # also states inside rounds are kept
    with pytest.raises(metaoptim.BudgetError) as caught:
        _actor_critic(clip, optimizer, memory_budget=100)
    least = caught.value.minimum
    while True:
        try:
            _actor_critic(clip, optimizer, memory_budget=least)
            break
        except metaoptim.BudgetError as error:  # later steps needed more
            assert error.minimum > least
            least = error.minimum
    for budget in (least, int(1.4 * least), 3 * least):
        meter = AllocatorMeter()
        found, replays, _ = _actor_critic(clip, optimizer, meter, memory_budget=budget)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        assert meter.peak <= budget and replays < 30 * 2 * 30


def test_a_round_is_not_parted_when_a_sliding_window_forgets() -> None:
    """States inside rounds are kept until a budget needs their room; the tape must not begin at one."""

    def run(**options: Any) -> Tensor:
        torch.manual_seed(0)
        actor, critic = nn.Linear(6, 5), nn.Linear(6, 1)
        lr, xs, large = torch.tensor(0.05, requires_grad=True), torch.randn(40, 4, 6), torch.randn(300, 6)
        of_actor, of_critic = metaoptim.MetaSGD([actor], lr=lr), metaoptim.MetaSGD([critic], lr=lr * 2)
        with metaoptim.SlidingWindow(window=20, **options):
            for t in range(53):
                x = xs[t] if t < 40 else large  # of which derivatives need the room
                value, action = critic(x), actor(x)
                losses = (value - action.sum(-1, keepdim=True)).square(), action.sin() * (1 + value)
                of_critic.step(losses[0].mean())
                of_actor.step(losses[1].mean())
            (actor(xs[0]).square().mean() + critic(xs[0]).sum()).backward()
        assert lr.grad is not None
        return lr.grad

    expected = run()
    with pytest.raises(metaoptim.BudgetError) as caught:
        run(memory_budget=60_000)
    for more in range(13_600, 22_440, 680):
        found = run(memory_budget=caught.value.minimum + more)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def _independent(kind: str, **window: Any) -> Made:
    """Networks that do not read one another, with steps of their own before, between or after losses of a round."""
    nets, rate = [mlp(seed) for seed in range(3)], leaf(0.1)
    xs = numbers(5, 3)

    def of(make: Any) -> Tensor:
        first, second, third = (metaoptim.MetaSGD([net], lr=rate) for net in nets)
        with make(**window):
            for x in xs:
                if kind == "by turns":
                    first.step(nets[0](x).square().mean())
                    second.step(nets[1](x).sin().mean())
                elif kind == "one more step before":
                    first.step(nets[0](x).square().mean())
                    losses = [nets[0](x).tanh().mean(), nets[1](x).sin().mean(), nets[2](x).cos().mean()]
                    second.step(losses[1])
                    first.step(losses[0])
                    third.step(losses[2])
                else:
                    losses = [nets[0](x).tanh().mean(), nets[2](x).cos().mean()]
                    first.step(losses[0])
                    second.step(nets[1](x).sin().mean())
                    third.step(losses[1])
            return (nets[0](xs[0]) * nets[1](xs[1]) * nets[2](xs[2])).square().mean()

    if window.get("offline"):
        return Made(of, [rate, *(p for net in nets for p in net.parameters())])
    return Made(of, [rate])


@pytest.mark.parametrize("kind", ["by turns", "one more step before", "one more step between"])
def test_steps_of_independent_networks(kind: str) -> None:
    """A loss belongs to the parameters that it was computed from, whatever has not changed since others."""
    expected = dict(outcome(made := _independent(kind, offline=True), made.of, full_tape))
    for options in ({}, {"slots": 2}):
        made = _independent(kind, offline=True, **options)
        for name, found in outcome(made, made.of, metaoptim.SlidingWindow):
            torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("kind", ["by turns", "one more step before"])
def test_sliding_windows_and_functions_count_the_same_super_steps(kind: str, window: int) -> None:
    compare(lambda: _independent(kind, window=window), metaoptim.SlidingWindow)


def test_a_sliding_window_refuses_a_loss_from_before_the_super_step() -> None:
    """A compiled function, which sees the whole loop, counts such a round as one."""
    made = _independent("one more step between", window=2)
    with pytest.raises(metaoptim.LossError, match="left over from before a step by a later loss"):
        made.of(metaoptim.SlidingWindow)


@pytest.mark.parametrize("late", [True, False])
def test_rounds_that_overlap(late: bool) -> None:
    """A loss stepped one round late, or a write between loss and step: exact, and refused where rounds are counted."""

    def run(**options: Any) -> tuple[Tensor, int]:
        torch.manual_seed(0)
        a, c = nn.Linear(3, 2), nn.Linear(3, 2)
        lr, xs, old = torch.tensor(0.1, requires_grad=True), torch.randn(12, 4, 3), None
        of_a, of_c = metaoptim.MetaSGD([a], lr=lr), metaoptim.MetaSGD([c], lr=0.5 * lr)
        with metaoptim.SlidingWindow(**options) as window:
            for x in xs:
                new = (a(x) - c(x).tanh()).square().mean()
                of_critic = (c(x) * a(x).sin()).square().mean()
                if not late:
                    with torch.no_grad():
                        c.weight.mul_(0.9)
                    of_a.step(new)
                    continue
                if old is not None:
                    of_a.step(old)
                of_c.step(of_critic)
                old = new
            engine = getattr(window._session, "engine", None)
            (a(xs[0]) + c(xs[0])).square().mean().backward()
        assert lr.grad is not None
        return lr.grad, getattr(engine, "replays", 0)

    expected, _ = run(strategy="full_tape")
    for slots in (None, 3):
        found, replays = run(slots=slots)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        assert replays < 24 * 24  # the square of the steps, where it was exponential
    torch.testing.assert_close(run(window=12)[0], expected, rtol=1e-10, atol=0)  # nothing need be forgotten
    with pytest.raises(metaoptim.CaptureError, match="such rounds overlap"):
        run(window=3)
