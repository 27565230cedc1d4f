"""Residuals: a step's derivative goes on from what its forward has saved, and gives the same, in less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import in_form_c, mlp
from metaoptim.compiler.ir.step import FlatGraph, StepGraph
from metaoptim.compiler.lower import derivatives
from metaoptim.compiler.lower.derivatives import derived, replayed, residuals
from metaoptim.runtime.budget import amounts
from metaoptim.runtime.budget.meter import AllocatorMeter
from oracle import Problem, agree, leaves, run_oracle
from problems import OPTIMIZERS, problem

MUCH = "1GiB"


def run(case: Problem, **options: Any) -> tuple[dict[str, Tensor | None], Any]:
    """The gradients of a problem in form C, and its program."""
    torch.manual_seed(3)
    net, metas = case.build(), leaves(case.metas)
    meta_loss = in_form_c(case, **options)
    torch.manual_seed(11)
    meta_loss(net, metas).backward()
    ((program,),) = meta_loss._specializations.known.values()
    return {n: p.grad for n, p in (*net.named_parameters(), *metas.items())}, program


def arguments(step: StepGraph, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Positive inputs of a step graph, and cotangents."""
    g = torch.Generator().manual_seed(seed)

    def like(t: Tensor) -> Tensor:
        return t.copy_(torch.rand(t.shape, generator=g) + 0.2) if t.is_floating_point() else t.zero_()

    return [like(p.spec.empty()) for p in step.inputs], [
        like(step.outputs[i].spec.empty()) for i in step.cotangents
    ]


def operators(module: FlatGraph) -> int:
    return sum(n.op == "call_function" for n in module.graph.nodes)


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [*((("linear", o)) for o in OPTIMIZERS), ("conv_bn", "adam"), ("dropout", "momentum"), ("tied", "sgd")],
)
def test_both_graphs_together_are_replay_and_derivative(network: str, optimizer: str) -> None:
    _, program = run(problem(network, optimizer, 3, True), slots=None)
    checked = 0
    for step in program.program.step_graphs:
        split = residuals(step, "auto")
        if split is None:
            continue
        inputs, cotangents = arguments(step)
        with torch.no_grad():
            expected, outputs = derived(step, "auto")(*inputs, *cotangents), replayed(step)(*inputs)
            made = split.forward(*inputs)
            saved = [made[i] for i in split.residuals]
            got = split.backward(*inputs, *saved, *cotangents)
        assert len(made) - len(outputs) == split.fresh <= len(saved) and saved
        assert len({id(t) for t in made}) == len(made)
        torch.testing.assert_close(made[: len(outputs)], outputs, rtol=0, atol=0, equal_nan=True)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)
        assert split.saves > 0
        assert operators(split.backward) <= operators(derived(step, "auto")) - split.saves
        checked += step.steps > 0
    assert checked >= 2  # the first step and the others


def test_what_writes_in_place_keeps_its_derivative() -> None:
    """The cells of an LSTM: nothing is saved, and the gradient is the same."""
    case = problem("lstm", "momentum", 3, True)
    got, program = run(case, memory_budget=MUCH)
    agree(got, run_oracle(case))
    assert program.plan.slots is None and program.plan.saved == 0
    assert all(residuals(s, "auto") is None for s in program.program.step_graphs if s.steps)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("network", "optimizer", "offline", "window"),
    [
        ("linear", "momentum", True, None),
        ("dropout", "adam", False, None),
        ("conv_bn", "rmsprop", True, None),
        ("tied", "sgd", False, 2),
        ("unused", "amsgrad", True, None),
    ],
)
@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_equals_the_tape(
    network: str, optimizer: str, offline: bool, window: int | None, backend: str
) -> None:
    case = problem(network, optimizer, 6, offline, window, per_step=True)
    got, program = run(case, memory_budget=MUCH, backend=backend)
    agree(got, run_oracle(case))
    assert program.plan.slots is None and program.plan.saved == program.program.positions


def test_mixed_mode() -> None:
    case = problem("linear", "adam", 5, True)
    got, program = run(case, memory_budget=MUCH, hvp="mixed")
    agree(got, run_oracle(case))
    assert program.plan.slots is None and program.plan.saved == 0
    steps = [s for s in program.program.step_graphs if s.steps]
    assert steps and all(residuals(s, "mixed") is None for s in steps)  # layers are made again on purpose


def compiled(**options: Any) -> Any:
    @metaoptim.compile(**{"backend": "eager", **options})
    def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp(), momentum=0.9)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x in window.scan(xs):
                inner.step(F.mse_loss(net(x), x[:, :2]))
            return net(xs[0]).square().mean()

    return meta_loss


def setting(steps: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    xs = torch.randn(steps, 50, 3, generator=torch.Generator().manual_seed(2))
    return mlp(), torch.tensor(-2.0, requires_grad=True), xs


def test_the_budget_says_how_many_and_is_kept() -> None:
    """From every state on, each further budget saves over more calls; the gradient is the same."""
    net, log_lr, xs = setting()
    expected = torch.autograd.grad(compiled()(net, log_lr, xs), [log_lr, *net.parameters()])
    all_states = compiled(memory_budget=MUCH).explain(net, log_lr, xs)
    assert all_states.plan == "unrolled" and all_states.saved_calls == all_states.calls
    least = compiled().explain(net, log_lr, xs).predicted_peak_bytes
    found = []
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = int(least + 60_000 + share * (all_states.predicted_peak_bytes - least - 60_000))
        meta_loss = compiled(memory_budget=budget)
        meta_loss(net, log_lr, xs).backward()
        with AllocatorMeter() as meter:
            got = torch.autograd.grad(meta_loss(net, log_lr, xs), [log_lr, *net.parameters()])
        assert meter.peak <= budget
        assert all(map(torch.equal, got, expected))
        ((program,),) = meta_loss._specializations.known.values()
        assert program.plan.peak_bytes <= budget
        found.append(program.plan.saved)
    assert found == sorted(found) and len(set(found)) >= 3 and found[-1] > 30


def test_a_second_backward_runs_the_forwards_again() -> None:
    net, log_lr, xs = setting(8)
    loss = compiled(memory_budget=MUCH)(net, log_lr, xs)
    (first,) = torch.autograd.grad(loss, log_lr, retain_graph=True)
    (second,) = torch.autograd.grad(loss, log_lr)
    assert torch.equal(first, second)


def forget(step: StepGraph) -> None:
    """What follows from the residuals of a step is derived anew."""
    step.derived.splits.clear()
    step.derived.measured.clear()
    for key in [k for k in step.derived.lowered if k[0] == "backward"]:
        del step.derived.lowered[key]


def test_residuals_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one operator of a backward changed, the gradient is another."""
    net, log_lr, xs = setting(8)
    (expected,) = torch.autograd.grad(compiled(memory_budget=MUCH)(net, log_lr, xs), log_lr)
    real = derivatives.split

    def corrupted(*given: Any) -> Any:
        found = real(*given)
        if found is not None:
            node = next(n for n in found.backward.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
            node.target = torch.ops.aten.add.Tensor
        return found

    monkeypatch.setattr(derivatives, "split", corrupted)
    meta_loss = compiled(memory_budget=MUCH)
    with torch.no_grad():
        meta_loss(net, log_lr, xs)
    ((program,),) = meta_loss._specializations.known.values()
    for step in program.program.step_graphs:
        forget(step)
    (got,) = torch.autograd.grad(meta_loss(net, log_lr, xs), log_lr)
    for step in program.program.step_graphs:  # shared with other tests
        forget(step)
    assert abs(float(got - expected)) > 1e-3 * abs(float(expected))


def test_views_that_no_operator_calls_one() -> None:
    """A linear layer without bias shapes its result by `_unsafe_view`: it is no value to save."""

    def gradient(**options: Any) -> tuple[Tensor | None, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4, bias=False), nn.GELU(), nn.Linear(4, 2))
        log_lr, xs = torch.tensor(-1.0, requires_grad=True), torch.randint(7, (5, 2, 6))

        @metaoptim.compile(backend="eager", **options)
        def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
            inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
            with metaoptim.SlidingWindow(offline=True) as window:
                for x in window.scan(xs):
                    inner.step(F.cross_entropy(net(x).flatten(0, 1), torch.arange(12) % 2))
                return net(xs[0]).square().mean()

        meta_loss(net, log_lr, xs).backward()
        ((program,),) = meta_loss._specializations.known.values()
        return log_lr.grad, program.program.kept.saved

    (got, saved), (expected, none) = gradient(memory_budget=MUCH), gradient()
    assert saved and not none
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_what_is_filled_or_copied_into_another_type_is_made_again() -> None:
    """Of Adam's update nothing is saved but the gradient, for all that its square root's derivative looks at."""
    _, program = run(problem("linear", "adam", 3, True), memory_budget=MUCH)
    step = next(g for g in reversed(program.program.step_graphs) if g.steps)
    split = residuals(step, "auto")
    assert split is not None
    sizes = [p.spec.shape for p in step.inputs if p.role.value == "theta"]
    inputs, _ = arguments(step)
    made = split.forward(*inputs)
    saved = [t.shape for t in made[len(made) - split.fresh :]]
    assert all(saved.count(shape) <= sizes.count(shape) for shape in sizes)


# -- where nobody has asked for them -----------------------------------------------------------------------------------


def saved_by(meta_loss: Any) -> int:
    ((program,),) = meta_loss._specializations.known.values()
    return program.program.kept.saved


def test_compiled_functions_save_them_unasked() -> None:
    net, log_lr, xs = setting(8)
    expected = torch.autograd.grad(compiled()(net, log_lr, xs), [log_lr, *net.parameters()])
    meta_loss = compiled(backend="inductor")
    loss = meta_loss(net, log_lr, xs)
    for _ in range(2):  # the second backward goes on from them, too
        got = torch.autograd.grad(loss, [log_lr, *net.parameters()], retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    report = meta_loss.explain(net, log_lr, xs)
    assert saved_by(meta_loss) == report.saved_calls == report.calls and report.plan == "unrolled"
    ((program,),) = meta_loss._specializations.known.values()
    loops = [g for g, count in ((c.step, n) for c, n in program.program.counted()) if count > 2]
    ran = [{kind for kind, how in g.derived.lowered if how.backend == "inductor"} for g in loops]
    assert ran and all(kinds == {"forward", "backward"} for kinds in ran)
    planned = metaoptim.plan(meta_loss, horizon=500)(net, log_lr, xs)
    assert planned.saved_calls == 502 and planned.plan == "unrolled"


@pytest.mark.usefixtures("never_compiled")
def test_but_not_before_they_are_compiled() -> None:
    net, log_lr, xs = setting(8)
    expected = torch.autograd.grad(compiled()(net, log_lr, xs), [log_lr, *net.parameters()])
    meta_loss = compiled(backend="inductor")
    for _ in range(2):
        got = torch.autograd.grad(meta_loss(net, log_lr, xs), [log_lr, *net.parameters()])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
        assert saved_by(meta_loss) == 0


@pytest.mark.parametrize("why", ["no room", "slots"])
def test_nor_where_there_is_no_room(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, log_lr, xs = setting(8)
    expected = torch.autograd.grad(compiled()(net, log_lr, xs), [log_lr, *net.parameters()])
    if why == "no room":
        monkeypatch.setattr(amounts, "free_bytes", lambda device: 20_000)
    meta_loss = compiled(backend="inductor", slots=4 if why == "slots" else None)
    for _ in range(2):
        got = torch.autograd.grad(meta_loss(net, log_lr, xs), [log_lr, *net.parameters()])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
        assert saved_by(meta_loss) == 0


def test_they_are_taken_up_when_their_graphs_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """First replays and derivatives, then, once these have run compiled, forwards and backwards."""
    net, log_lr, xs = setting(8)
    expected = torch.autograd.grad(compiled()(net, log_lr, xs), [log_lr, *net.parameters()])
    monkeypatch.setenv("METAOPTIM_WAIT", "0")
    meta_loss, saved = compiled(backend="inductor"), []
    for _ in range(4):
        got = torch.autograd.grad(meta_loss(net, log_lr, xs), [log_lr, *net.parameters()])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
        ((program,),) = meta_loss._specializations.known.values()
        for step in program.program.step_graphs:
            for coming in step.derived.coming.values():
                coming.wait()
        saved.append(saved_by(meta_loss))
    assert saved[-1] == 10
