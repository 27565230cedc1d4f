"""The verifier: hand-made programs that it must reject, one per rule, next to the sound ones they differ from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from metaoptim.compiler.ir.programs.calls import Loop, Operand, StepCall
from metaoptim.compiler.ir.programs.program import Program
from metaoptim.compiler.ir.step import Port, Role, StepGraph
from metaoptim.compiler.ir.tensors import TensorSpec
from metaoptim.compiler.ir.values import Input, Noise
from metaoptim.compiler.ir.verify import verify_program, verify_step
from metaoptim.errors import ProgramError

aten = torch.ops.aten
CPU = torch.device("cpu")
THREE = TensorSpec((3,), torch.float64, (1,), CPU)
TWO = TensorSpec((2,), torch.float64, (1,), CPU)


def port(role: Role, name: str, spec: TensorSpec = THREE, active: bool = True) -> Port:
    return Port(role, spec, name, active)


def graph(
    inputs: list[Port], outputs: list[Port], body: Callable[[fx.Graph, list[fx.Node]], list[Any]]
) -> StepGraph:
    """A step graph whose results ``kind`` adds to it."""
    g = fx.Graph()
    nodes = []
    for p in inputs:
        nodes.append(g.placeholder(p.name))
        nodes[-1].meta["spec"] = p.spec
    g.output(tuple(body(g, nodes)))
    return StepGraph(g, tuple(inputs), tuple(outputs))


def begin() -> StepGraph:
    """The state, from a parameter."""
    return graph(
        [port(Role.META, "x")],
        [port(Role.OPT_STATE, "s"), port(Role.CARRY, "c")],
        lambda g, n: [
            g.call_function(aten.clone.default, (n[0],)),
            g.call_function(aten.neg.default, (n[0],)),
        ],
    )


def move() -> StepGraph:
    """One iteration: state and carry, from themselves and a slice."""
    return graph(
        [port(Role.THETA, "s"), port(Role.CARRY, "c"), port(Role.SCAN, "d", active=False)],
        [port(Role.OPT_STATE, "s'"), port(Role.CARRY, "c'")],
        lambda g, n: [
            g.call_function(aten.add.Tensor, (n[0], n[2])),
            g.call_function(aten.mul.Tensor, (n[1], n[0])),
        ],
    )


def end() -> StepGraph:
    """The loss."""
    return graph(
        [port(Role.OPT_STATE, "s"), port(Role.CARRY, "c")],
        [port(Role.CARRY, "loss", TensorSpec((), torch.float64, (), CPU))],
        lambda g, n: [g.call_function(aten.sum.default, (g.call_function(aten.add.Tensor, (n[0], n[1])),))],
    )


def call(step: StepGraph, read: tuple, written: tuple, *given: Operand) -> StepCall:
    return StepCall(step, read, written, list(given), "user.py:7")


def program(loop_at: int = 2, count: int = 5) -> Program:
    """x -> (s, c), seven times moved on, summed: registers 0 and 1."""
    x = Input(torch.ones(3, dtype=torch.float64, requires_grad=True))
    data = Input(torch.ones(7, 3, dtype=torch.float64))
    moved = move()
    return Program(
        calls=[
            call(begin(), (), (0, 1), Operand("input", x)),
            call(moved, (0, 1), (0, 1), Operand("scan", data, 0)),
            call(moved, (0, 1), (0, 1), Operand("scan", data, 1)),
            Loop((call(moved, (0, 1), (0, 1), Operand("scan", data, loop_at, 1)),), count),
            call(end(), (0, 1), (2,)),
        ],
        registers=3,
        outputs=[2],
    )


def test_a_sound_program_passes() -> None:
    verify_program(program())


# -- programs --------------------------------------------------------------------------------------------------------


def _replace(at: int, **changes: Any) -> Callable[[Program], None]:
    def act(p: Program) -> None:
        item = p.calls[at]
        if isinstance(item, Loop):
            p.calls[at] = dataclasses.replace(item, calls=(dataclasses.replace(item.calls[0], **changes),))
        else:
            p.calls[at] = dataclasses.replace(item, **changes)

    return act


def _with_step(at: int, make: Callable[[], StepGraph]) -> Callable[[Program], None]:
    return lambda p: _replace(at, step=make())(p)


def _ports(step: StepGraph, k: int, **changes: Any) -> StepGraph:
    """``step`` with its ``k``-th input declared otherwise."""
    inputs = list(step.inputs)
    inputs[k] = dataclasses.replace(inputs[k], **changes)
    if "spec" in changes:
        step.graph.find_nodes(op="placeholder")[k].meta["spec"] = changes["spec"]
    return StepGraph(step.graph, tuple(inputs), step.outputs)


def _random_input() -> Operand:
    return Operand("noise", Noise(aten.rand.generator, ([3],), {}, THREE))


def _learnt(of: Tensor) -> Operand:
    return Operand("scan", Input(of.requires_grad_()), 0)


REJECTED: dict[str, tuple[Callable[[Program], Any], str]] = {
    "a register nothing was written to": (
        _replace(1, reads=(0, 2)),
        r"call 1 .*user\.py:7.*c reads r2, which nothing",
    ),
    "a register that does not exist": (
        _replace(1, writes=(0, 3)),
        r"call 1.*got register r3, expected.*r0 to r2",
    ),
    "a dropped value read": (_replace(1, reads=(-1, 1)), r"call 1.*got register r-1"),
    "too few registers": (_replace(1, reads=(0,)), r"got 1 registers read, the step graph has 2"),
    "too many inputs": (
        _replace(0, inputs=[Operand("number", 1)] * 2),
        r"got 2 inputs from outside, .* has 1",
    ),
    "two outputs in one register": (_replace(0, writes=(1, 1)), r"two outputs go to one register, r1"),
    "another shape along a register": (
        _with_step(4, lambda: _ports(end(), 1, spec=TWO)),
        r"call 4.*c reads r1, which holds c', float64 3 .*expected float64 2",
    ),
    "another dtype along a register": (
        _with_step(4, lambda: _ports(end(), 1, spec=TensorSpec((3,), torch.float32, (1,), CPU))),
        r"which holds c', float64 3.*expected float32 3",
    ),
    "other strides along a register": (
        _with_step(4, lambda: _ports(end(), 1, spec=TensorSpec((3,), torch.float64, (2,), CPU))),
        r"strides \(1,\).*expected.*strides \(2,\)",
    ),
    "another device along a register": (
        _with_step(
            4, lambda: _ports(end(), 1, spec=TensorSpec((3,), torch.float64, (1,), torch.device("meta")))
        ),
        r"cpu.*expected.*meta",
    ),
    "state read as a carry": (
        _replace(4, reads=(1, 0)),
        r"s reads r1 as opt_state, which holds c' as carry",
    ),
    "a gradient that is not passed on": (
        _with_step(4, lambda: _ports(end(), 1, active=False)),
        r"holds c' and its gradient, but passes no gradient on",
    ),
    "an input of another shape": (
        _replace(0, inputs=[Operand("input", Input(torch.ones(2, dtype=torch.float64)))]),
        r"call 0.*input x: got float64 2.*expected float64 3",
    ),
    "a learnable input without a gradient": (
        _replace(1, inputs=[_learnt(torch.ones(7, 3, dtype=torch.float64))]),
        r"d requires grad, but has the role scan",
    ),
    "noise where none is drawn": (
        _replace(1, inputs=[_random_input()]),
        r"has the role scan, but is given as noise",
    ),
    "a number for a vector": (_replace(1, inputs=[Operand("number", 2)]), r"got the number 2 for float64 3"),
    "a slice that does not exist": (
        lambda p: p.calls.__setitem__(3, dataclasses.replace(p.calls[3], count=6)),
        r"call 3.*in its last iteration: input d: slice 7 of float64 7×3",
    ),
    "a loop of nothing": (
        lambda p: p.calls.__setitem__(3, dataclasses.replace(p.calls[3], count=0)),
        r"a loop of 0",
    ),
    "a loop of no calls": (
        lambda p: p.calls.__setitem__(3, dataclasses.replace(p.calls[3], calls=())),
        r"call 3: a loop of no calls",
    ),
    "a moving invariant": (
        _replace(3, inputs=[Operand("input", Input(torch.ones(3, dtype=torch.float64)), 0, 1)]),
        r"d is the same for every iteration, but has stride 1",
    ),
    "a loop that is not closed": (
        _replace(3, writes=(0, 2)),
        r"call 3.*the loop is not closed: an iteration reads c' of the one before it from r1, but leaves its own in r2",
    ),
    "a loop whose second iteration reads something else": (
        _replace(3, writes=(1, 0)),
        r"the loop is not closed",
    ),
    "an output that is never computed": (lambda p: setattr(p, "outputs", [7]), r"output 0 is read from r7"),
    "a gradient declared dead": (
        lambda p: setattr(p, "dead", (0,)),
        r"output 0 is declared to carry no gradient, but r2",
    ),
    "a value left in a tensor of another shape": (
        lambda p: p.writes.append((torch.zeros(2, dtype=torch.float64), 0)),
        r"value 0 left in a tensor is float64 3.*the tensor is float64 2",
    ),
    "a value left behind that is never computed": (
        lambda p: p.writes.append((torch.zeros(3, dtype=torch.float64), 9)),
        r"value left in a tensor 0 is read from r9",
    ),
}


@pytest.mark.parametrize("rule", REJECTED)
def test_an_unsound_program_is_rejected(rule: str) -> None:
    spoil, match = REJECTED[rule]
    broken = program()
    spoil(broken)
    with pytest.raises(ProgramError, match=match):
        verify_program(broken)


def test_a_loop_that_its_own_first_iteration_spoils() -> None:
    """Without an equal call before it, what a second iteration would read shows."""
    p = program()
    del p.calls[1:3]
    p.calls[1] = dataclasses.replace(
        p.calls[1], calls=(dataclasses.replace(p.calls[1].calls[0], writes=(1, 0)),)
    )  # type: ignore[union-attr]
    with pytest.raises(
        ProgramError, match=r"call 1.*in its second iteration.*reads r0 as theta, which holds c'"
    ):
        verify_program(p)


def test_the_error_says_what_to_do() -> None:
    broken = program()
    broken.outputs = [7]
    with pytest.raises(
        ProgramError, match=r"defect of metaoptim; please report.*Without @metaoptim\.compile"
    ):
        verify_program(broken)


# -- step graphs -----------------------------------------------------------------------------------------------------


def _single(body: Callable[[fx.Graph, list[fx.Node]], list[Any]], **changes: Any) -> StepGraph:
    step = graph([port(Role.META, "x"), port(Role.SCAN, "d", active=False)], [port(Role.CARRY, "y")], body)
    return dataclasses.replace(step, **changes)


def _sum(g: fx.Graph, n: list[fx.Node]) -> list[Any]:
    return [g.call_function(aten.add.Tensor, (n[0], n[1]))]


def _writes_into_a_view(g: fx.Graph, n: list[fx.Node]) -> list[Any]:
    view = g.call_function(aten.slice.Tensor, (g.call_function(aten.view.default, (n[0], [3])), 0, 0, 2))
    g.call_function(aten.mul_.Tensor, (view, 2.0))
    return _sum(g, n)


def _writes_into_a_copy(g: fx.Graph, n: list[fx.Node]) -> list[Any]:
    copy = g.call_function(aten.clone.default, (n[0],))
    g.call_function(aten.mul_.Tensor, (g.call_function(aten.slice.Tensor, (copy, 0, 0, 2)), n[1]))
    return [copy]


def _draws(g: fx.Graph, n: list[fx.Node]) -> list[Any]:
    return [g.call_function(aten.add.Tensor, (*_sum(g, n), g.call_function(aten.rand_like.default, (n[0],))))]


def _with_a_dead_node(g: fx.Graph, n: list[fx.Node]) -> list[Any]:
    g.call_function(aten.exp.default, (n[0],))
    return _sum(g, n)


def _out_of_order(g: fx.Graph, n: list[fx.Node]) -> list[Any]:
    (total,) = _sum(g, n)
    first = g.call_function(aten.exp.default, (n[0],))
    total.args = (first, n[1])
    return [total]


STEPS: dict[str, tuple[Callable[[], StepGraph], str]] = {
    "a random operator": (lambda: _single(_draws), r"rand_like.* draws random numbers"),
    "a write into an input": (
        lambda: _single(lambda g, n: [g.call_function(aten.add_.Tensor, (n[0], n[1]))]),
        r"add_.*writes into the input x",
    ),
    "a write into a view of an input": (
        lambda: _single(_writes_into_a_view),
        r"mul_.*writes into the input x",
    ),
    "a dead node": (lambda: _single(_with_a_dead_node), r"node exp_default is dead"),
    "an unused input": (
        lambda: _single(lambda g, n: [g.call_function(aten.neg.default, (n[0],))]),
        r"input d is dead",
    ),
    "use before definition": (
        lambda: _single(_out_of_order),
        r"reads exp_default, which is not defined before it",
    ),
    "a constant output": (
        lambda: _single(lambda g, n: [1.0]),
        r"output y is not computed: got the constant 1\.0",
    ),
    "an output too many": (lambda: _single(lambda g, n: _sum(g, n) * 2), r"got 2 results for 1 outputs"),
    "an input too many": (
        lambda: dataclasses.replace(_single(_sum), inputs=(port(Role.META, "x"),)),
        r"got 2 placeholders for 1 inputs",
    ),
    "inputs out of order": (
        lambda: graph([port(Role.META, "x"), port(Role.THETA, "s")], [port(Role.CARRY, "y")], _sum),
        r"input s \(theta\) comes after inputs it must precede",
    ),
    "an input that is an output": (
        lambda: graph([port(Role.GRADIENT, "x"), port(Role.SCAN, "d")], [port(Role.CARRY, "y")], _sum),
        r"input x has the role of an output, gradient",
    ),
    "an output that is an input": (
        lambda: graph([port(Role.META, "x"), port(Role.SCAN, "d")], [port(Role.SCAN, "y")], _sum),
        r"output y has the role of an input, scan",
    ),
    "a placeholder of another shape": (
        lambda: dataclasses.replace(
            _single(_sum), inputs=(port(Role.META, "x", TWO), port(Role.SCAN, "d", active=False))
        ),
        r"input x is declared as float64 2.*its placeholder holds float64 3",
    ),
    "a module": (
        lambda: _single(lambda g, n: [g.call_module("layer", (*_sum(g, n),))]),
        r"is a call_module; a step graph consists of calls of functions",
    ),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a call_module:UserWarning")
@pytest.mark.parametrize("rule", STEPS)
def test_an_unsound_step_graph_is_rejected(rule: str) -> None:
    make, match = STEPS[rule]
    with pytest.raises(ProgramError, match=match):
        verify_step(make())


def test_sound_step_graphs_pass() -> None:
    verify_step(_single(_sum))
    verify_step(_single(_writes_into_a_copy))
    verify_step(_single(_with_a_dead_node), pruned=False)


def test_numbers_drawn_and_not_read_are_inputs_all_the_same() -> None:
    """They advance the generator; what is computed from them and not read is dead."""

    def drawing(op: Any) -> StepGraph:
        def body(g: fx.Graph, n: list[fx.Node]) -> list[Any]:
            g.call_function(op, (n[1],))
            return [g.call_function(aten.neg.default, (n[0],))]

        return graph([port(Role.META, "x"), port(Role.NOISE, "r")], [port(Role.CARRY, "y")], body)

    verify_step(drawing(aten.alias.default))
    with pytest.raises(ProgramError, match=r"node exp_default is dead"):
        verify_step(drawing(aten.exp.default))
