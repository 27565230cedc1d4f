"""The verifier: what holds of every program, between passes and after them. A failure is a defect of a pass.

It reads and computes nothing but structure, in time linear in the program's text: a loop counts as two iterations.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import OpOverload
from metaoptim.errors import ProgramError

from .calls import Loop, Operand, StepCall, calls_of
from .operators import op_info, written
from .program import Program
from .step import RANK, Port, Role, StepGraph, show
from .tensors import tensor_spec
from .text import registers_text
from .trace import Noise
from .values import reached

aten = torch.ops.aten
_INNER = (Role.THETA, Role.OPT_STATE)
_INPUTS = (*RANK, Role.META, Role.SCAN, Role.NOISE)
_OUTPUTS = (Role.THETA, Role.OPT_STATE, Role.CARRY, Role.GRADIENT)


# -- a program -------------------------------------------------------------------------------------------------------


def verify_program(program: Program, *, pruned: bool = True, folded: bool = False) -> None:
    """Check a program and its step graphs.

    Args:
        program: what roll made.
        pruned: see `verify_step`.
        folded: whether its loops may be folded calls, which are alike by themselves. The loop of a scan must go on from
            where the captured iteration before it leaves its results.

    Raises:
        ProgramError: it names the call and the register.
    """
    names = program.names()
    for step in program.step_graphs:
        verify_step(step, names[id(step)], pruned=pruned)
    held: dict[int, Port] = {}
    done: list[StepCall] = []
    for n, item in enumerate(program.calls):
        calls = calls_of(item)
        if not calls:
            raise ProgramError(f"call {n}: a loop of no calls")
        places = [f"{n}.{k}" if len(calls) > 1 else f"{n}" for k in range(len(calls))]
        named = [
            f"call {place} ({names[id(c.step)]}{f', {c.location}' if c.location else ''})"
            for place, c in zip(places, calls, strict=True)
        ]
        for call, name in zip(calls, named, strict=True):
            _verify_arguments(call, name, program.registers)
        if isinstance(item, Loop):
            _verify_loop(item, named)
            if done and not folded:
                _verify_closed(item, named[0], done[-1])
        # in a second iteration of a loop what the first has left must do as well
        for again in (False, True) if isinstance(item, Loop) else (False,):
            for call, name in zip(calls, named, strict=True):
                _verify_reads(call, name + (" in its second iteration" if again else ""), held)
                for k, register in enumerate(call.writes):
                    if register >= 0:
                        held[register] = call.step.outputs[k]
        done += calls
    _verify_results(program, held)


def _verify_arguments(call: StepCall, name: str, registers: int) -> None:
    count = call.step.states
    states, given = call.step.inputs[:count], call.step.inputs[count:]
    for what, got, expected in (
        ("registers read", call.reads, states),
        ("inputs from outside", call.inputs, given),
        ("registers written", call.writes, call.step.outputs),
    ):
        if len(got) != len(expected):
            raise ProgramError(f"{name}: got {len(got)} {what}, the step graph has {len(expected)}")
    for r in (*call.reads, *call.writes):
        if not -1 <= r < registers or (r < 0 and r in call.reads):
            raise ProgramError(f"{name}: got register r{r}, expected one of r0 to r{registers - 1}")
    kept = [r for r in call.writes if r >= 0]
    twice = sorted({r for r in kept if kept.count(r) > 1}) if len(set(kept)) < len(kept) else []
    if twice:
        raise ProgramError(f"{name}: two outputs go to one register, {registers_text(twice)}")
    for g, port in zip(call.inputs, given, strict=True):
        _verify_given(g, port, name)


def _verify_given(given: Operand, port: Port, name: str) -> None:
    where = f"{name}: input {port.name}"
    if given.kind == "each":
        for one in given.of:
            _verify_given(one, port, name)
        return
    if (given.kind == "noise") != (port.role is Role.NOISE):
        raise ProgramError(f"{where} has the role {port.role.value}, but is given as {given.kind}")
    if given.kind == "number":
        if port.spec.shape or not isinstance(given.of, (int, float)):
            raise ProgramError(f"{where}: got the number {given.of!r} for {port.spec}")
        return
    if given.kind == "scan":
        spec = given.of.spec
        if not spec.shape or not 0 <= given.at < spec.shape[0]:
            raise ProgramError(f"{where}: slice {given.at} of {spec} does not exist")
        spec = spec.row
    else:
        spec = given.of.spec
    if spec != port.spec:
        raise ProgramError(f"{where}: got {spec}, expected {port.spec}")
    if not isinstance(given.of, Noise) and given.of.grad and port.role is not Role.META:
        raise ProgramError(
            f"{where} requires grad, but has the role {port.role.value}: it would receive no gradient"
        )


def _verify_reads(call: StepCall, name: str, held: dict[int, Port]) -> None:
    for register, port in zip(call.reads, call.step.inputs[: call.step.states], strict=True):
        writer = held.get(register)
        where = f"{name}: input {port.name} reads r{register}"
        if writer is None:
            raise ProgramError(f"{where}, which nothing has been written to before")
        if writer.spec != port.spec:
            raise ProgramError(f"{where}, which holds {writer.name}, {writer.spec}; expected {port.spec}")
        if (port.role in _INNER) != (writer.role in _INNER):
            raise ProgramError(
                f"{where} as {port.role.value}, which holds {writer.name} as {writer.role.value}"
            )
        if writer.differentiable and not port.differentiable:
            raise ProgramError(
                f"{where}, which holds {writer.name} and its gradient, but passes no gradient on"
            )


def _verify_loop(loop: Loop, named: list[str]) -> None:
    if loop.count < 1:
        raise ProgramError(f"{named[0]}: a loop of {loop.count} iterations")
    if len(loop.strides) != len(loop.calls):
        raise ProgramError(
            f"{named[0]}: got the strides of {len(loop.strides)} calls for {len(loop.calls)} of them"
        )
    for call, strides, name in zip(loop.calls, loop.strides, named, strict=True):
        if len(strides) != len(call.inputs):
            raise ProgramError(
                f"{name}: got {len(strides)} strides for {len(call.inputs)} inputs from outside"
            )
        for given, stride, port in zip(
            call.inputs, strides, call.step.inputs[call.step.states :], strict=True
        ):
            if stride and given.kind not in ("scan", "number", "each"):
                raise ProgramError(
                    f"{name}: input {port.name} is the same for every iteration, but has stride {stride}"
                )
            if given.kind == "each" and not 0 <= given.at + stride * (loop.count - 1) < len(given.of):
                raise ProgramError(
                    f"{name}: input {port.name}: {len(given.of)} are listed for {loop.count} iterations"
                )
            if stride and given.kind == "scan":
                _verify_given(
                    given.advanced(stride * (loop.count - 1)), port, f"{name} in its last iteration"
                )


def _verify_closed(loop: Loop, name: str, before: StepCall) -> None:
    call = loop.calls[0]
    if before.step is not call.step:
        return
    # The iteration before the loop is of the same kind: what this one reads of it, the next one reads of this one.
    for port, was, now in zip(call.step.outputs, before.writes, call.writes, strict=True):
        if was >= 0 and was in call.reads and now != was:
            raise ProgramError(
                f"{name}: the loop is not closed: an iteration reads {port.name} of the one before it from r{was}, but "
                f"leaves its own in {registers_text([now])}"
            )


def _verify_results(program: Program, held: dict[int, Port]) -> None:
    for kind, places in (
        ("output", list(enumerate(program.outputs))),
        ("value left in a tensor", [(i, where) for i, (_, where) in enumerate(program.writes)]),
    ):
        for i, where in places:
            if isinstance(where, int) and where not in held:
                raise ProgramError(f"{kind} {i} is read from r{where}, which nothing has been written to")
    for i, where in enumerate(program.outputs):
        if i in program.dead and isinstance(where, int) and held[where].differentiable:
            raise ProgramError(
                f"output {i} is declared to carry no gradient, but r{where} holds {held[where].name}, which does"
            )
    for i, (target, where) in enumerate(program.writes):
        spec = held[where].spec if isinstance(where, int) else where.spec
        if isinstance(target, Tensor) and tensor_spec(target)[:2] != spec[:2]:
            raise ProgramError(f"value {i} left in a tensor is {spec}, the tensor is {tensor_spec(target)}")


# -- a step graph ---------------------------------------------------------------------------------------------------


def verify_step(step: StepGraph, name: str = "a step graph", *, pruned: bool = True) -> None:
    """Check one step graph.

    Args:
        step: the graph.
        name: what errors call it.
        pruned: whether dead nodes and unused inputs are errors: canonicalize promises that there are none.

    Raises:
        ProgramError: it names the node or the port.
    """
    nodes = list(step.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    _verify_ports(step, name, placeholders)
    seen: set[fx.Node] = set()
    for node in nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                raise ProgramError(
                    f"{name}: node {node.name} reads {used.name}, which is not defined before it"
                )
        seen.add(node)
        if node.op not in ("placeholder", "call_function", "output"):
            raise ProgramError(
                f"{name}: node {node.name} is a {node.op}; a step graph consists of calls of functions"
            )
        _verify_operator(node, name)
    if pruned:
        live = _live(nodes)
        # what is drawn is drawn as eager draws it, read or not: the random stream must not depend on who reads
        drawn = {n for n, p in zip(placeholders, step.inputs, strict=True) if p.role is Role.NOISE}
        for node in nodes:
            if node.target in (aten.alias.default, aten.clone.default) and drawn.issuperset(
                node.all_input_nodes
            ):
                drawn.add(node)
        live |= drawn
        for node in nodes:
            if node not in live:
                what = "input" if node.op == "placeholder" else "node"
                raise ProgramError(f"{name}: {what} {node.name} is dead: no output depends on it")


def _verify_ports(step: StepGraph, name: str, placeholders: list[fx.Node]) -> None:
    if len(placeholders) != len(step.inputs):
        raise ProgramError(f"{name}: got {len(placeholders)} placeholders for {len(step.inputs)} inputs")
    rank = 0
    for node, port in zip(placeholders, step.inputs, strict=True):
        if port.role not in _INPUTS:
            raise ProgramError(f"{name}: input {port.name} has the role of an output, {port.role.value}")
        if RANK.get(port.role, 3) < rank:
            raise ProgramError(
                f"{name}: input {port.name} ({port.role.value}) comes after inputs it must precede; expected theta, "
                "then state, then what is given from outside"
            )
        rank = RANK.get(port.role, 3)
        if node.meta.get("spec", port.spec) != port.spec:
            raise ProgramError(
                f"{name}: input {port.name} is declared as {port.spec}, its placeholder holds "
                f"{node.meta['spec']}"
            )
    results = step.graph.find_nodes(op="output")
    values = results[0].args[0] if len(results) == 1 else None
    if not isinstance(values, tuple) or len(values) != len(step.outputs):
        got = len(values) if isinstance(values, tuple) else "none"
        raise ProgramError(f"{name}: got {got} results for {len(step.outputs)} outputs")
    for value, port in zip(values, step.outputs, strict=True):
        if port.role not in _OUTPUTS:
            raise ProgramError(f"{name}: output {port.name} has the role of an input, {port.role.value}")
        if not isinstance(value, fx.Node):
            raise ProgramError(f"{name}: output {port.name} is not computed: got the constant {value!r}")


def _verify_operator(node: fx.Node, name: str) -> None:
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return
    off = target is torch.ops.aten.native_dropout.default and not node.args[2]
    if op_info(target).random and not off:
        raise ProgramError(
            f"{name}: node {node.name} draws random numbers ({target}); a replay would draw others, so they must be "
            "inputs of the role noise"
        )
    for changed in _written(node):
        root = _memory_of(changed)
        if root.op == "placeholder":
            raise ProgramError(
                f"{name}: node {node.name} ({target}) writes into the input {root.name}, which belongs to the caller"
            )


def _written(node: fx.Node) -> list[fx.Node]:
    return written(node.target, node.args, node.kwargs, fx.Node)


def _memory_of(node: Any) -> fx.Node:
    """The node that made the memory ``node`` lies in."""
    while node.op == "call_function":
        target = node.target
        overload = isinstance(target, OpOverload)
        same = overload and (
            target.is_view or target is torch.ops.aten.type_as.default or op_info(target).writes
        )
        if not (same or target in (show, operator.getitem) or target.__class__.__name__ == "WithHooks"):
            break
        node = node.args[0]
    return node


def _live(nodes: list[fx.Node]) -> set[fx.Node]:
    roots = [n for n in nodes if n.op == "output" or _written(n)]
    return set(reached(roots, lambda node: node.all_input_nodes))
