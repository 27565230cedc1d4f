"""The Program is what runs: counts of steps, nodes and programs, and corruption that must show."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import metaoptim
from metaoptim.compiler.ir.step import Derived, gradient
from metaoptim.compiler.lower.library import library
from oracle import agree, run_oracle, run_window
from problems import problem

aten = torch.ops.aten


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()


def batch(t: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(t)
    return (
        torch.randn(5, 3, generator=g, dtype=torch.float64),
        torch.randn(5, 2, generator=g, dtype=torch.float64),
    )


def loss_of(net: Any, t: int) -> Tensor:
    x, y = batch(t)
    return F.mse_loss(net(x), y)


def loop(steps: int, every: bool = False, **options: Any) -> tuple[Any, Tensor, list[Tensor]]:
    net, lr = network(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.5)
    total: Any = 0.0
    with metaoptim.SlidingWindow(offline=True, **options) as window:
        for t in range(steps):
            if every:
                total = total + loss_of(net, 50 + t)
            inner.step(loss_of(net, t))
        engine = window._session.engine
        total = total + loss_of(net, 99)
    return engine, total, [*net.parameters(), lr]


@pytest.mark.parametrize("slots", [None, 3])
def test_one_sweep_for_a_loss_summed_over_steps(slots: int | None) -> None:
    engine, total, _ = loop(12, every=True, slots=slots)
    total.backward()
    assert engine.vjps == 12
    assert engine.replays == 0 if slots is None else engine.replays > 0


def graph_nodes(root: Any) -> int:
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("options", [{}, {"slots": 2}, {"window": 3}])
def test_graph_behind_theta_T_does_not_grow_with_T(options: dict) -> None:
    counts = {graph_nodes(loop(steps, **options)[1].grad_fn) for steps in (4, 8, 40)}
    assert len(counts) == 1


def test_equal_steps_share_one_program() -> None:
    library.clear()
    counts = []
    for steps in (3, 30):
        engine, _, _ = loop(steps)
        counts.append(len(engine.program.step_graphs))
        assert engine.program.horizon == steps
    assert counts == [2, 2]  # the first step creates the momentum buffer


def test_numbers_that_differ_between_steps_are_lifted() -> None:
    library.clear()
    net, lr = network(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    table = torch.linspace(0.5, 1.5, 30, dtype=torch.float64, requires_grad=True)
    inner = metaoptim.MetaSGD([net], lr=lr)
    with metaoptim.SlidingWindow() as window:
        for t in range(20):
            inner.param_groups[0]["lr"] = 0.1 / (1 + t)
            inner.step(
                loss_of(net, t) * (1 + 0.1 * t) * table[t]
                + table[t : t + 2].sum() * net(torch.ones(1, 3).double()).sum()
            )
        assert len(window.program.step_graphs) <= 3
        loss_of(net, 99).backward()
    assert (table.grad[:21] != 0).all()


def test_a_program_prints_as_text() -> None:
    engine, _, _ = loop(5)
    text = str(engine.program)
    assert "5 inner steps, 2 distinct" in text and "gradient(" in text and "theta[float64 4×3]" in text
    assert "momentum_buffer" in text


def nodes_of(step: Any) -> list[Any]:
    """Nodes whose value is a tensor: operators, and what comes out of the gradient and the update."""
    return [
        n
        for n in step.graph.nodes
        if isinstance(n.target, torch._ops.OpOverload)
        or (n.target is operator.getitem and not any(u.target is operator.getitem for u in n.users))
    ]


def looped_in_b(slots: int | None) -> tuple[Any, Tensor, list[Tensor]]:
    """The step graph of a compiled step in an ordinary window, the outer loss, and what to differentiate by."""
    net, lr = layer(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.5)

    @metaoptim.compile(backend="eager")
    def step(x: Tensor, y: Tensor) -> None:
        inner.step(F.mse_loss(net(x), y))

    with metaoptim.SlidingWindow(offline=True, slots=slots) as window:
        for t in range(4):
            step(*batch(t))
        total = loss_of(net, 99)
        return window.program.step_graphs[-1], total, [*net.parameters(), lr]


def looped_in_c(slots: int | None) -> tuple[Any, Tensor, list[Tensor]]:
    """Likewise of a whole function."""
    net, lr = layer(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    xs, ys = map(torch.stack, zip(*map(batch, range(4))))

    @metaoptim.compile(backend="eager", slots=slots)
    def meta_loss(net: nn.Module, lr: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.5)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x, y in window.scan(xs, ys):
                inner.step(F.mse_loss(net(x), y))
            return F.mse_loss(net(xs[0]), ys[1])

    total = meta_loss(net, lr)
    ((program,),) = meta_loss._specializations.known.values()
    return program.program.calls[1].step, total, [*net.parameters(), lr]


def looped_in_a(slots: int | None) -> tuple[Any, Tensor, list[Tensor]]:
    """Likewise of an ordinary window."""
    library.clear()
    engine, total, own = loop(4, slots=slots)
    return engine.program.step_graphs[-1], total, own


FORMS = {"A": looped_in_a, "B": looped_in_b, "C": looped_in_c}
_MOVES = (aten.t.default, aten.view.default, aten.detach.default, aten.expand.default)


def corruptions(graph: fx.Graph, nodes: list[Any]) -> Iterator[Any]:
    """Each node in turn, while what reads it is given twice its value."""
    for node in nodes:
        with graph.inserting_after(node):
            twice = graph.call_function(aten.mul.Tensor, (node, 2.0))
        users = [u for u in node.users if u is not twice]
        for user in users:
            user.replace_input_with(node, twice)
        yield node
        for user in users:
            user.replace_input_with(twice, node)
        graph.erase_node(twice)


def differ(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return any(not torch.allclose(x, y, rtol=1e-6, atol=1e-12) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("form, slots", [("A", 2), ("B", None), ("C", 2)])
def test_corrupting_a_node_changes_the_gradient(form: str, slots: int | None) -> None:
    """Every arithmetic node of the step graph: replaced by twice itself, it must show in the meta-gradient."""
    step, total, own = FORMS[form](slots)
    honest = torch.autograd.grad(total, own, retain_graph=True)
    nodes = [n for n in nodes_of(step) if n.target not in _MOVES and n.users]
    assert len(nodes) >= 8
    for node in corruptions(step.graph, nodes):
        step.derived = Derived()
        assert differ(honest, torch.autograd.grad(total, own, retain_graph=True)), node
    step.derived = Derived()
    again = torch.autograd.grad(total, own)
    assert all(map(torch.equal, honest, again))
    library.clear()


@pytest.mark.parametrize("form", FORMS)
def test_corrupting_a_derivative_changes_the_gradient(form: str) -> None:
    """Every arithmetic node of the flat graph of a step's derivative."""
    step, total, own = FORMS[form](None)
    honest = torch.autograd.grad(total, own, retain_graph=True)
    (graph,) = step.derived.vjp.values()
    nodes = [
        n
        for n in graph.graph.nodes
        if n.op == "call_function"
        and n.target not in _MOVES
        and any(u.target is not aten.ones_like.default for u in n.users)  # which reads the shape only
    ]
    assert len(nodes) >= 20
    lowered = [key for key in step.derived.lowered if key[0] == "vjp"]
    for node in corruptions(graph.graph, nodes):
        vars(graph).pop("program", None)  # its code
        for key in lowered:
            step.derived.lowered.pop(key, None)
        assert differ(honest, torch.autograd.grad(total, own, retain_graph=True)), node
    step.derived = Derived()
    library.clear()


def test_every_step_graph_has_one_gradient_node_and_complete_roles() -> None:
    engine, _, _ = loop(3)
    for step in engine.program.step_graphs:
        assert len(step.graph.find_nodes(op="call_function", target=gradient)) == 1
        assert len(step.graph.find_nodes(op="placeholder")) == len(step.inputs)
        assert {p.role.value for p in step.inputs} >= {"theta", "meta", "scan"}


def test_no_backward_builds_a_graph_over_more_than_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps run without grad mode, on tensors without history."""
    from metaoptim.runtime.engine import engine as engine_module

    real, seen = engine_module.lowered, []

    def spy(step: Any, kind: str, inputs: Any, lowering: Any, at_once: bool) -> Any:
        seen.append(kind)
        assert not torch.is_grad_enabled() and all(t.grad_fn is None for t in inputs)
        return real(step, kind, inputs, lowering, at_once)

    monkeypatch.setattr(engine_module, "lowered", spy)
    engine, total, _ = loop(6, slots=2)
    total.backward()
    assert seen.count("vjp") == 6 and all(t.grad_fn is None for t in engine.state)


def test_slots_bound_the_states_kept() -> None:
    for slots in (1, 2, 3, 5):
        net, lr = network(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(slots=slots) as window:
            most = 0
            store = window._session.engine.store
            for t in range(25):
                inner.step(loss_of(net, t))
                most = max(most, len(store))
            loss_of(net, 99).backward()
            assert most <= slots and len(store) <= slots
        assert lr.grad is not None


def test_random_stream_ends_where_it_would_have() -> None:
    ends = []
    for strategy in ("auto", "full_tape", "plain"):
        torch.manual_seed(1)
        net = nn.Sequential(network(), nn.Dropout(0.3))
        if strategy == "plain":
            for t in range(3):
                loss_of(net, t).backward()
            loss_of(net, 9).backward()
        else:
            inner = metaoptim.MetaSGD([net], lr=0.1)
            with metaoptim.SlidingWindow(
                offline=True, strategy=strategy, **({"slots": 1} if strategy == "auto" else {})
            ):
                for t in range(3):
                    inner.step(loss_of(net, t))
                loss_of(net, 9).backward()
        ends.append(torch.get_rng_state())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("window", [1, 2, 5])
def test_overlapping_windows_give_each_loss_its_own_steps(window: int) -> None:
    case = problem("linear", "momentum", 9, False, window, per_step=True)
    expected = run_oracle(case)
    for slots in (None, 1, 3):
        agree(run_window(case, slots=slots), expected)


@pytest.mark.parametrize("slots", [None, 1, 4])
def test_a_sliding_window_keeps_a_tape_of_W(slots: int | None) -> None:
    net, lr = network(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    inner = metaoptim.MetaSGD([net], lr=lr)
    outer = torch.optim.SGD([lr], lr=1e-3)
    with metaoptim.SlidingWindow(window=4, slots=slots) as w:
        for t in range(60):
            inner.step(loss_of(net, t))
            if t % 10 == 9:
                outer.zero_grad()
                loss_of(net, 99).backward()
                assert lr.grad is not None and lr.grad != 0
                outer.step()  # in place, between overlapping windows
            assert w.program.end - w.program.start <= 30 and len(w._session.engine.store) <= 30
