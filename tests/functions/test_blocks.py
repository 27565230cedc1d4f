"""Loops of compiled functions in blocks of several steps a graph, and when they are taken up."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from forms import full_tape, in_form_c, run_compiled
from metaoptim.compiler.ir.programs.program import Kept, Program
from metaoptim.compiler.passes import block as blocks
from metaoptim.functions.specialization import Specialization
from metaoptim.runtime.budget import planner
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine.function import Run
from oracle import agree, leaves, run_oracle
from problems import NETWORKS, OPTIMIZERS, problem


class Made(list["Program | None"]):
    """Programs in blocks that functions have run by; with residuals if ``saving``."""

    saving = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Blocks of three steps, from a function's first call on, uncompiled."""
    monkeypatch.setattr(blocks, "LONGEST", 3)
    monkeypatch.setattr(blocks, "FEWEST", 1)
    found = Made()

    def at_once(self: Specialization, tensors: Any) -> Program | None:
        found.append(made := blocks.block(self.program, "auto"))
        if made is not None:
            made.kept = Kept(None, made.positions if found.saving else 0)
        return made

    monkeypatch.setattr(Specialization, "_in_blocks", at_once)
    return found


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_gradient_is_the_tapes(made: Made, network: str, optimizer: str) -> None:
    """By residuals, and by derivatives that run the block again."""
    for offline, made.saving in ((True, True), (False, True), (True, False)):
        case = problem(network, optimizer, 12, offline)
        agree(run_compiled(case), run_oracle(case))
    if network not in ("dropout", "lstm"):  # which draw, or write in place
        assert all(p is not None and p.horizon == 12 and p.positions < 10 for p in made)


def test_steps_of_a_scan(made: Made) -> None:
    """Rows of a tensor that is learnt, a tensor that all read, a state laid out in columns, and what is not learnt."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    net.weight = nn.Parameter(torch.randn(3, 2).t())
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.9)
    xs, ys, shift = (
        torch.randn(14, 4, 3),
        torch.randn(14, 4, 2).requires_grad_(),
        torch.ones(2).requires_grad_(),
    )

    def loss(window: Any) -> Tensor:
        with window as opened:
            for x, y in opened.scan(xs, ys):
                inner.step((net(x) * shift - y).square().mean())
            return net(xs[0]).sin().sum()

    learnt = [ys, shift, *net.parameters()]
    expected = torch.autograd.grad(loss(full_tape(offline=True)), learnt)
    compiled = metaoptim.compile(lambda: loss(metaoptim.SlidingWindow(offline=True)), backend="eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(), learnt), expected)
    (program,) = made
    assert program is not None and program.horizon == 14


def test_windows_that_have_none(made: Made) -> None:
    """W counts steps, and a loop of few has no room."""
    for case in (problem("linear", "adam", 12, False, window=3), problem("linear", "sgd", 1, True)):
        agree(run_compiled(case), run_oracle(case))
    assert made == [None, None]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs of functions, whose calls wait until their graphs are compiled."""
    monkeypatch.setenv("METAOPTIM_WAIT", "1")
    found: list[Run] = []

    def noted(*args: Any) -> Run:
        found.append(Run(*args))
        return found[-1]

    monkeypatch.setattr("metaoptim.functions.specialization.Run", noted)
    return found


def test_they_are_taken_up_when_they_are_compiled(ran: list[Run]) -> None:
    """The first call waits for the graphs of single steps, the second for those of blocks."""
    case = problem("linear", "momentum", 40, True)
    meta_loss, expected = in_form_c(case, backend="inductor"), run_oracle(case)
    torch.manual_seed(3)
    net, metas = case.build(), leaves(case.metas)
    learnt = {**dict(net.named_parameters()), **metas}
    for _ in range(3):
        grads = torch.autograd.grad(meta_loss(net, metas), list(learnt.values()))
        agree(dict(zip(learnt, grads, strict=True)), expected, rtol=1e-9)
    first, *later = (run.program.end for run in ran)
    assert first == 41 and later == [later[0]] * 2 and later[0] < 15
    assert named(meta_loss, net, metas) == [
        "loops run 4 steps a graph, once the graphs of single steps are in use"
    ]


def test_none_where_there_is_no_room_for_residuals(ran: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is said, half of the free memory is the limit."""
    monkeypatch.setattr(planner, "default_budget", lambda device: 50_000)
    case = problem("linear", "momentum", 40, True)
    meta_loss, net, metas = in_form_c(case, backend="inductor"), case.build(), leaves(case.metas)
    for _ in range(3):
        meta_loss(net, metas)
    assert [run.program.end for run in ran] == [41] * 3


def named(meta_loss: Any, net: nn.Module, metas: dict[str, Tensor]) -> list[str]:
    return [p["done"] for p in meta_loss.explain(net, metas).passes if p["name"] == "block"]


@pytest.mark.parametrize(
    "options", [{"slots": 5}, {"slots": 5, "offload": "host"}, {"backend": "eager"}, {"deterministic": True}]
)
def test_functions_that_have_none(options: dict[str, Any]) -> None:
    case, deterministic = problem("linear", "sgd", 40, True), options.pop("deterministic", False)
    torch.use_deterministic_algorithms(deterministic)
    try:
        meta_loss = in_form_c(case, **{"backend": "inductor", **options})
        assert named(meta_loss, case.build(), leaves(case.metas)) == []
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_budget_is_kept_with_fewer_steps_run_again(ran: list[Run]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
    inner, xs = metaoptim.MetaSGD([net], lr=0.1, momentum=0.9), torch.randn(200, 8, 20)

    def loss(window: Any) -> Tensor:
        with window as opened:
            for x in opened.scan(xs):
                inner.step(net(x).square().mean())
            return net(xs[0]).sin().sum()

    learnt = list(net.parameters())
    expected = torch.autograd.grad(loss(full_tape(offline=True)), learnt)
    compiled = metaoptim.compile(
        lambda: loss(metaoptim.SlidingWindow(offline=True)), memory_budget="700KiB", backend="inductor"
    )
    for n in range(4):
        with AllocatorMeter() if n > 1 else nullcontext() as meter:  # in the first two it is planned
            grads = torch.autograd.grad(compiled(), learnt)
        torch.testing.assert_close(grads, expected)
        assert meter is None or meter.peak <= 700 << 10
    again = [run.engine.replays - run.program.end for run in ran]
    assert again[0] > 20 > again[1] == again[3]
