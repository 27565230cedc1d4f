"""Passes on three unrelated programs: each changes what is executed, is idempotent, and leaves the numbers alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compile import CompiledFunction
from metaoptim.compiler.cost.step import step_cost
from metaoptim.compiler.ir.programs.program import Kept, Program
from metaoptim.compiler.ir.step import EAGER
from metaoptim.compiler.ir.traces.trace import Partition, Trace
from metaoptim.compiler.lower.derivatives import derived, replayed, residuals
from metaoptim.compiler.passes.options import OPTIONAL, Options
from metaoptim.compiler.passes.pipeline import PIPELINE, checkpoint, compile_trace, loop, mode, sizes_of
from metaoptim.compiler.passes.roll import roll
from metaoptim.compiler.passes.traces.canonicalize import canonicalize
from metaoptim.compiler.passes.traces.prune import prune
from metaoptim.compiler.passes.traces.rows import rows
from metaoptim.compiler.passes.traces.split import split
from metaoptim.functions.specialization import trace_of
from metaoptim.runtime.budget.simulate import predict

T = 3


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """A function of (window options, learnt tensors) and what it is called with."""

    fn: Callable[..., Any]
    build: Callable[[int], tuple[tuple, list[Tensor]]]  # of the number of steps


# -- an MLP with SGD; its accuracy is kept count of and forgotten ------------------------------------------------------


def _mlp(net: Any, lr: Tensor, xs: Tensor, ys: Tensor, **window: Any) -> Tensor:
    inner = metaoptim.MetaSGD([net], lr=lr.exp(), momentum=0.5)
    right = torch.zeros(())
    with metaoptim.SlidingWindow(**window):
        for t in range(len(xs) - 1):
            logits = net(xs[t])
            right = right + (logits.argmax(1) == ys[t]).to(xs.dtype).mean()
            inner.step(F.cross_entropy(logits, ys[t]))
        return F.cross_entropy(net(xs[-1]), ys[-1])


def _build_mlp(steps: int) -> tuple[tuple, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    lr = torch.tensor(-1.0, requires_grad=True)
    ys = torch.randint(2, (steps + 1, 6), generator=torch.Generator().manual_seed(2))
    return (net, lr, numbers(steps + 1, 6, 3, seed=1), ys), [lr, *net.parameters()]


# -- convolution and batch norm with Adam; a head computed and not used ------------------------------------------------


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.head(h), (h @ h.T).softmax(1) @ h


def _conv(net: Any, weight: Tensor, xs: Tensor, ys: Tensor, **window: Any) -> Tensor:
    inner = metaoptim.MetaAdam([net], lr=0.05)
    smooth: Any = 0.0
    with metaoptim.SlidingWindow(**window):
        for t in range(len(xs) - 1):
            out, tail = net(xs[t])
            smooth = 0.9 * smooth + tail
            inner.step(F.mse_loss(out, ys[t]) * weight.sigmoid())
        return F.mse_loss(net(xs[-1])[0], ys[-1])


def _build_conv(steps: int) -> tuple[tuple, list[Tensor]]:
    torch.manual_seed(1)
    net, weight = _TwoHeads(), torch.tensor(0.4, requires_grad=True)
    return (net, weight, numbers(steps + 1, 5, 1, 4, seed=3), numbers(steps + 1, 5, 2, seed=4)), [
        weight,
        *net.parameters(),
    ]


# -- actor and critic, whose losses are computed before either steps; an entropy that is only watched ------------------


def _actor_critic(
    actor: Any, critic: Any, gamma: Tensor, xs: Tensor, rewards: Tensor, **window: Any
) -> Tensor:
    critic_optim, actor_optim = metaoptim.MetaAdam([critic], lr=0.05), metaoptim.MetaSGD([actor], lr=0.1)
    entropy: Any = 0.0
    with metaoptim.SlidingWindow(**window):
        for t in range(len(xs) - 1):
            logs = actor(xs[t]).log_softmax(1)
            entropy = entropy - (logs.exp() * logs).sum()
            returns = rewards[t] + gamma.sigmoid() * rewards[t + 1]
            values = critic(xs[t]).squeeze(1)
            critic_loss = (returns - values).square().mean()
            actor_loss = -(logs[:, 0] * (returns - values.detach())).mean()
            critic_optim.step(critic_loss)
            actor_optim.step(actor_loss)
        logs, values = actor(xs[-1]).log_softmax(1), critic(xs[-1]).squeeze(1)
        return (rewards[-1] - values).square().mean() - (logs[:, 0] * rewards[-1]).mean()


def _build_actor_critic(steps: int) -> tuple[tuple, list[Tensor]]:
    torch.manual_seed(2)
    actor, critic = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    gamma = torch.tensor(0.8, requires_grad=True)
    arguments = (actor, critic, gamma, numbers(steps + 1, 5, 3, seed=5), numbers(steps + 1, 5, seed=6))
    return arguments, [gamma, *actor.parameters(), *critic.parameters()]


CASES = {
    "mlp": Case(_mlp, _build_mlp),
    "conv": Case(_conv, _build_conv),
    "actor_critic": Case(_actor_critic, _build_actor_critic),
}
aten = torch.ops.aten
OPTIONS = Options(lowering=EAGER)
every_case = pytest.mark.parametrize("name", CASES)


def traced(name: str, offline: bool = True, steps: int = T) -> Trace:
    case = CASES[name]
    arguments, _ = case.build(steps)
    return trace_of(case.fn, arguments, {"offline": offline})[0]


def executed(program: Program) -> dict[str, int]:
    """What runs: operators of all calls and their derivatives, those of the distinct graphs, and bytes alive."""
    costs = {id(g): step_cost(g, EAGER) for g in program.step_graphs}
    operators = {k: c.replay_operators + c.vjp_operators for k, c in costs.items()}
    return {
        "run": sum(count * operators[id(call.step)] for call, count in program.counted()),
        "compiled": sum(operators.values()),
        "bytes": predict(program, None).peak_bytes,
    }


@functools.cache
def compiled(name: str, *skip: str, steps: int = T) -> tuple[Program, list[Any]]:
    return compile_trace(traced(name, steps=steps), Options(lowering=EAGER, skip=frozenset(skip)))


# -- numbers ---------------------------------------------------------------------------------------------------------


def gradients(name: str, run: Callable[..., Any], **window: Any) -> list[Any]:
    arguments, learnt = CASES[name].build(T)
    loss = run(*arguments, **window)
    return [loss, *torch.autograd.grad(loss, learnt, allow_unused=True)]


@functools.cache
def on_the_full_tape(name: str) -> list[Any]:
    return gradients(name, CASES[name].fn, offline=True, strategy="full_tape")


@pytest.mark.parametrize(
    "skip", [(), ("rows",), ("enter",), ("canonicalize",), ("prune",), ("roll",), ("loop",), ("rows", "loop")]
)
@every_case
def test_numbers_are_those_of_the_full_tape_whichever_passes_run(name: str, skip: tuple[str, ...]) -> None:
    fn = CASES[name].fn
    expected = on_the_full_tape(name)
    got = gradients(name, CompiledFunction(fn, Options(lowering=EAGER, skip=frozenset(skip))), offline=True)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


@every_case
def test_numbers_of_an_online_window_are_those_of_the_full_tape(name: str) -> None:
    """The mode pass cannot be left out: it is what makes the window online."""
    fn = CASES[name].fn
    ends = []
    for run, options in (
        (fn, {"strategy": "full_tape"}),
        (CompiledFunction(fn, Options(lowering=EAGER)), {}),
    ):
        arguments, learnt = CASES[name].build(T)
        (grad,) = torch.autograd.grad(run(*arguments, offline=False, **options), learnt[:1])
        networks = [a for a in arguments if isinstance(a, nn.Module)]
        ends.append([grad, *(v for net in networks for v in net.state_dict().values())])
    for full, mine in zip(*ends, strict=True):
        torch.testing.assert_close(mine, full, rtol=1e-9, atol=1e-12)


def test_a_step_with_optimizer_state_from_before_is_as_the_others() -> None:
    """Online, in the second window: what it reads of the state gets no gradient, and all else the right one."""
    xs, ys = numbers(2, 6, 4, 3, seed=1), numbers(2, 6, 4, 2, seed=2)

    def run(wrap: Callable[..., Any], **options: Any) -> tuple[list[Tensor], Any]:
        torch.manual_seed(0)
        net, lr = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.tensor(-3.0)
        lr.requires_grad_()
        inner = metaoptim.MetaAdam([net], amsgrad=True)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            inner.param_groups[0]["lr"] = lr.exp()
            with metaoptim.SlidingWindow(**options) as window:
                for a, b in window.scan(x, y):
                    inner.step(F.mse_loss(net(a), b))
                return F.mse_loss(net(x[0]), y[0])

        fn = wrap(loss)
        found = [torch.autograd.grad(fn(x, y), lr)[0] for x, y in zip(xs, ys)]
        return [*found, *net.parameters(), *(v for s in inner.state.values() for v in s.values())], (
            loss,
            xs[0],
            ys[0],
        )

    expected, _ = run(lambda fn: fn, strategy="full_tape")
    for skip, distinct in (((), 1), (("enter",), 2)):
        options = Options(lowering=EAGER, skip=frozenset(skip))
        got, (loss, *given) = run(lambda fn, options=options: CompiledFunction(fn, options))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)
        program, _ = compile_trace(trace_of(loss, tuple(given), {})[0], options)
        assert len([step for step in program.step_graphs if step.steps]) == distinct


# -- effect ----------------------------------------------------------------------------------------------------------


@every_case
def test_canonicalize_drops_what_nothing_needs(name: str) -> None:
    with_it, records = compiled(name)
    without, _ = compiled(name, "canonicalize")
    record = next(r for r in records if r.name == "canonicalize")
    assert record.after["entries"] < record.before["entries"]
    assert executed(with_it)["run"] < executed(without)["run"]
    assert executed(with_it)["bytes"] <= executed(without)["bytes"]


@every_case
def test_prune_spares_derivatives_nobody_asks_for(name: str) -> None:
    with_it, without = executed(compiled(name)[0]), executed(compiled(name, "prune")[0])
    assert with_it["run"] < without["run"]
    assert with_it["bytes"] <= without["bytes"]


@every_case
def test_roll_shares_step_graphs(name: str) -> None:
    with_it, records = compiled(name)
    without, _ = compiled(name, "roll")
    assert len(with_it.step_graphs) < len(without.step_graphs)
    assert executed(with_it)["compiled"] < executed(without)["compiled"]
    assert next(r for r in records if r.name == "roll").after["step_graphs"] == len(with_it.step_graphs)


@every_case
def test_rows_spares_taking_tensors_apart(name: str) -> None:
    with_it, without = executed(compiled(name)[0]), executed(compiled(name, "rows")[0])
    assert with_it["run"] < without["run"]
    assert with_it["bytes"] <= without["bytes"]


@every_case
def test_loop_makes_the_program_as_long_for_any_number_of_steps(name: str) -> None:
    lengths = [len(compiled(name, steps=steps)[0].calls) for steps in (8, 16)]
    lists = [len(compiled(name, "loop", steps=steps)[0].calls) for steps in (8, 16)]
    assert lengths[0] == lengths[1] < lists[0] == lists[1] - 8
    looped, listed = (predict(compiled(name, *skip, steps=8)[0], None) for skip in ((), ("loop",)))
    assert replace(looped, reached=listed.reached) == listed  # what is run and held is the same


@every_case
def test_mode_cuts_theta_off_and_writes_back(name: str) -> None:
    trace = traced(name, offline=False)
    partition, _ = split(trace, OPTIONS)  # as if the window were offline
    canonicalize(partition, OPTIONS)
    prune(partition, OPTIONS)
    without, _ = roll(partition, OPTIONS)
    with_it, _ = compile_trace(traced(name, offline=False), OPTIONS)
    learnt = CASES[name].build(T)[1]
    assert len(predict(without, None).reached) == len(learnt)
    assert len(predict(with_it, None).reached) == 1
    assert len(with_it.writes) >= len(learnt) - 1 and not without.writes
    assert executed(with_it)["run"] < executed(without)["run"]  # no derivatives by theta_0


# -- idempotence -----------------------------------------------------------------------------------------------------


def state_of(partition: Partition) -> Any:
    return (
        sizes_of(partition),
        [u.segment.key for u in partition.parts],
        [(sorted(b.outputs), sorted(b.active), sorted(b.active_outputs)) for b in partition.kinds],
    )


@every_case
def test_passes_are_idempotent(name: str) -> None:
    trace = traced(name, offline=False)
    _, first = mode(trace, OPTIONS)
    writes, window = trace.writes, trace.window
    assert writes and mode(trace, OPTIONS)[1] == first and trace.window == window
    assert all(a[1] is b[1] for a, b in zip(writes, trace.writes, strict=True))
    assert rows(trace, OPTIONS)[1] != "0 reads of 0 rows of inputs" == rows(trace, OPTIONS)[1]
    partition, _ = split(trace, OPTIONS)
    for pass_ in (canonicalize, prune, canonicalize, prune):
        pass_(partition, OPTIONS)
    settled = state_of(partition)
    assert canonicalize(partition, OPTIONS)[1].startswith("0 of ")
    prune(partition, OPTIONS)
    assert state_of(partition) == settled
    rolled, again = (roll(partition, OPTIONS)[0] for _ in range(2))
    assert str(rolled) == str(again)
    loop(rolled, OPTIONS)
    looped = str(rolled)
    loop(rolled, OPTIONS)
    assert str(rolled) == looped


# -- records ---------------------------------------------------------------------------------------------------------


def test_every_pass_leaves_a_record() -> None:
    _, records = compile_trace(traced("mlp"), OPTIONS, texts={})
    *passes, check = records
    names = ["capture", *(p.name for p in PIPELINE[:-1])]
    assert [r.name for r in passes] == names and check.name == "verify"
    assert all(r.done and r.milliseconds >= 0 and r.text and r.after for r in passes)
    by_name = {r.name: r for r in records}
    assert by_name["capture"].milliseconds > 0 and check.milliseconds > 0
    assert by_name["capture"].after == by_name["mode"].before == by_name["mode"].after
    assert by_name["mode"].after == by_name["rows"].before == by_name["rows"].after
    assert "rows of them 11 times" in by_name["rows"].text and "rows of them" not in by_name["mode"].text
    assert by_name["canonicalize"].after == by_name["prune"].before | {"differentiable": 0}
    assert by_name["prune"].after["differentiable"] > 0
    assert f"{by_name['canonicalize'].after['entries']} calls in " in by_name["canonicalize"].text


def test_the_pipeline_prints() -> None:
    lines = [str(p) for p in PIPELINE]
    names = "mode rows split enter canonicalize prune roll loop differentiate lower checkpoint"
    assert [line.split()[0] for line in lines] == names.split()
    assert all(len(line) > 30 for line in lines) and set(OPTIONAL) < set(names.split())


def test_only_optional_passes_can_be_left_out() -> None:
    with pytest.raises(
        ValueError,
        match=r"skip: got 'mode', expected some of 'rows', 'enter', 'canonicalize', 'prune', 'roll', 'loop'",
    ):
        Options(skip=frozenset({"mode"}))


@every_case
def test_checkpoint_trades_states_and_residuals_for_work(name: str) -> None:
    program = replace(compiled(name, steps=16)[0])
    _, said = checkpoint(program, replace(OPTIONS, kept=Kept(2)))
    assert program.kept == Kept(2) and "kept: at most 2 states" in str(program)
    few, every = predict(program, 2), predict(program, None)
    assert few.peak_bytes < every.peak_bytes and few.extra_forwards > 0 == every.extra_forwards
    assert checkpoint(program, replace(OPTIONS, kept=Kept(2)))[1] == said

    def products(*modules: Any) -> int:
        heavy = (aten.mm.default, aten.addmm.default, aten.convolution.default)
        return sum(n.target in heavy for m in modules for n in m.graph.nodes)

    _, said = checkpoint(program, replace(OPTIONS, kept=Kept(None, program.positions)))
    assert f"residuals of the last {program.positions} calls" in said and "divided" in said
    before = after = 0  # over all calls whose steps are divided
    for call, count in program.counted():
        if (two := residuals(call.step, "reverse")) is not None:
            before += count * products(replayed(call.step), derived(call.step, "reverse"))
            after += count * products(two.forward, two.backward)
    assert 0 < after < 0.9 * before
