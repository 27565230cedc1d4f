"""Loops of compiled functions in blocks of several steps a graph, and when they are taken up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from forms import full_tape, in_form_c, run_compiled
from metaoptim.compiler.ir.programs.program import Kept, Program
from metaoptim.compiler.passes import block as blocks
from metaoptim.functions.specialization import Specialization
from oracle import agree, leaves, run_oracle
from problems import NETWORKS, OPTIMIZERS, problem


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Program | None]:
    """Programs in blocks of three steps, which functions run by from their first call on, uncompiled."""
    monkeypatch.setattr(blocks, "LONGEST", 3)
    monkeypatch.setattr(blocks, "FEWEST", 1)
    found: list[Program | None] = []

    def at_once(self: Specialization) -> Program | None:
        found.append(blocks.block(self.program, "auto")[0])
        return found[-1]

    monkeypatch.setattr(Specialization, "_in_blocks", at_once)
    return found


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_gradient_is_the_tapes(
    made: list[Program | None], monkeypatch: pytest.MonkeyPatch, network: str, optimizer: str
) -> None:
    """By residuals, and by derivatives that run the block again."""
    for offline, saving in ((True, True), (False, True), (True, False)):
        if not saving:
            monkeypatch.setattr("metaoptim.functions.specialization.Kept", lambda slots, saved=0: Kept(slots))
        case = problem(network, optimizer, 12, offline)
        agree(run_compiled(case), run_oracle(case))
    if network not in ("dropout", "lstm"):  # which draw, or write in place
        assert all(p is not None and p.horizon == 12 and p.positions < 10 for p in made)


def test_steps_of_a_scan(made: list[Program | None]) -> None:
    """Rows of a tensor that is learnt, a tensor that all read, a state laid out in columns, and what is not learnt."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    net.weight = nn.Parameter(torch.randn(3, 2).t())
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.9)
    xs, ys, shift = torch.randn(14, 4, 3), torch.randn(14, 4, 2).requires_grad_(), torch.ones(2).requires_grad_()

    def loss(window: Any) -> Tensor:
        with window as opened:
            rows = opened.scan(xs, ys) if isinstance(opened, metaoptim.SlidingWindow) else zip(xs, ys)
            for x, y in rows:
                inner.step((net(x) * shift - y).square().mean())
            return net(xs[0]).sin().sum()

    learnt = [ys, shift, *net.parameters()]
    expected = torch.autograd.grad(loss(full_tape(offline=True)), learnt)
    compiled = metaoptim.compile(lambda: loss(metaoptim.SlidingWindow(offline=True)), backend="eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(), learnt), expected)
    (program,) = made
    assert program is not None and program.horizon == 14


def test_windows_that_have_none(made: list[Program | None]) -> None:
    """W counts steps, and a loop of few has no room."""
    for case in (problem("linear", "adam", 12, False, window=3), problem("linear", "sgd", 1, True)):
        agree(run_compiled(case), run_oracle(case))
    assert made == [None, None]


def test_they_are_taken_up_when_they_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call waits for the graphs of single steps, the second for those of blocks, which `explain` names."""
    monkeypatch.setenv("METAOPTIM_WAIT", "1")
    case = problem("linear", "momentum", 40, True)
    ran: list[int] = []
    monkeypatch.setattr(
        "metaoptim.functions.specialization.Run", lambda program, *rest: _noted(ran, program, *rest)
    )
    meta_loss, expected = in_form_c(case, backend="inductor"), run_oracle(case)
    torch.manual_seed(3)
    net, metas = case.build(), leaves(case.metas)
    learnt = {**dict(net.named_parameters()), **metas}
    for _ in range(3):
        grads = torch.autograd.grad(meta_loss(net, metas), list(learnt.values()))
        agree(dict(zip(learnt, grads, strict=True)), expected, rtol=1e-9)
    assert ran[0] == 41 > ran[1] == ran[2]
    (record,) = (p for p in meta_loss.explain(net, metas).passes if p["name"] == "block")
    assert record["done"] == "loops run 4 steps a graph"


def _noted(ran: list[int], program: Program, *rest: Any) -> Any:
    from metaoptim.runtime.engine.function import Run

    ran.append(program.positions)
    return Run(program, *rest)
