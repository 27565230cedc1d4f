"""The verifier: what holds of every program between passes, and of every step graph. A failure is a defect of a pass.

It reads and computes nothing but structure, in time linear in the program's text: a loop counts as two iterations.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.errors import ProgramError

from .capture.entries import Value
from .capture.ops import op_info
from .capture.slicing import tensor_spec
from .capture.tracer import Noise
from .ir import Loop, Port, Role, StepCall, StepGraph, show
from .program import Given, RolledProgram, given_ports, registers_text, state_ports
from .segments import Draft, arguments

_INPUT_RANK = {Role.THETA: 0, Role.THETA_NOW: 1, Role.OPT_STATE: 2, Role.CARRY: 2}
_INPUTS = (*_INPUT_RANK, Role.META, Role.SCAN, Role.NOISE)
_OUTPUTS = (Role.LOSS, Role.THETA, Role.OPT_STATE, Role.CARRY, Role.GRADIENT)
_INNER = (Role.THETA, Role.OPT_STATE)


# -- a step graph ----------------------------------------------------------------------------------------------------


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
            raise ProgramError(f"{name}: input {port.name} has the role of an output, {_role(port)}")
        if _INPUT_RANK.get(port.role, 3) < rank:
            raise ProgramError(
                f"{name}: input {port.name} ({_role(port)}) comes after inputs it must come before; expected theta, "
                "then state, then what is given from outside"
            )
        rank = _INPUT_RANK.get(port.role, 3)
        if node.meta.get("spec", port.spec) != port.spec:
            raise ProgramError(
                f"{name}: input {port.name} is declared as {_spec(port.spec)}, its placeholder holds "
                f"{_spec(node.meta['spec'])}"
            )
    results = step.graph.find_nodes(op="output")
    values = results[0].args[0] if len(results) == 1 else None
    if not isinstance(values, tuple) or len(values) != len(step.outputs):
        got = len(values) if isinstance(values, tuple) else "none"
        raise ProgramError(f"{name}: got {got} results for {len(step.outputs)} outputs")
    for value, port in zip(values, step.outputs, strict=True):
        if port.role not in _OUTPUTS:
            raise ProgramError(f"{name}: output {port.name} has the role of an input, {_role(port)}")
        if not isinstance(value, fx.Node):
            raise ProgramError(f"{name}: output {port.name} is not computed: got the constant {value!r}")


def _verify_operator(node: fx.Node, name: str) -> None:
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return
    off = target is torch.ops.aten.native_dropout.default and not node.args[2]
    if op_info(target).random and not off:
        raise ProgramError(
            f"{name}: node {node.name} draws random numbers ({target}); a replay would draw others, so they must be "
            "inputs of the role noise"
        )
    for written in _written(node):
        root = _memory_of(written)
        if root.op == "placeholder":
            raise ProgramError(
                f"{name}: node {node.name} ({target}) writes into the input {root.name}, which belongs to the caller"
            )


def _written(node: fx.Node) -> Iterator[fx.Node]:
    target: Any = node.target
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload):
        for where in op_info(target).writes:
            value = (
                node.kwargs.get(where)
                if isinstance(where, str)
                else (node.args[where] if where < len(node.args) else None)
            )
            yield from (
                v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, fx.Node)
            )


def _memory_of(node: Any) -> fx.Node:
    """The node that made the memory ``node`` lies in."""
    while node.op == "call_function":
        target = node.target
        overload = isinstance(target, torch._ops.OpOverload)
        same = overload and (
            target.is_view or target is torch.ops.aten.type_as.default or op_info(target).writes
        )
        if not (same or target in (show, operator.getitem) or target.__class__.__name__ == "WithHooks"):
            break
        node = node.args[0]
    return node


def _live(nodes: list[fx.Node]) -> set[fx.Node]:
    live: set[fx.Node] = set()
    stack = [n for n in nodes if n.op == "output" or any(_written(n))]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += node.all_input_nodes
    return live


# -- a program -------------------------------------------------------------------------------------------------------


def verify_program(program: RolledProgram, *, pruned: bool = True) -> None:
    """Check a program and its step graphs.

    Args:
        program: what roll made.
        pruned: see `verify_step`.

    Raises:
        ProgramError: it names the call and the register.
    """
    names = program.names()
    for step in program.step_graphs:
        verify_step(step, names[id(step)], pruned=pruned)
    held: dict[int, Port] = {}
    before: StepCall | None = None
    for n, item in enumerate(program.calls):
        call = item.call if isinstance(item, Loop) else item
        name = f"call {n} ({names[id(call.step)]}{f', {call.location}' if call.location else ''})"
        _verify_arguments(call, name, program.registers)
        if isinstance(item, Loop):
            _verify_loop(item, name, before)
        # in a second iteration of a loop what the first has left must do as well
        for again in (False, True) if isinstance(item, Loop) else (False,):
            _verify_reads(call, name + (" in its second iteration" if again else ""), held)
            for k, register in call.changed():
                if register >= 0:
                    held[register] = call.step.outputs[k]
        before = call
    _verify_results(program, held)


def _verify_arguments(call: StepCall, name: str, registers: int) -> None:
    states, given = state_ports(call.step), given_ports(call.step)
    for what, got, expected in (
        ("registers read", call.opt_state_in, states),
        ("inputs from outside", call.inputs, given),
        ("registers written", call.opt_state_out, call.step.outputs),
    ):
        if len(got) != len(expected):
            raise ProgramError(f"{name}: got {len(got)} {what}, the step graph has {len(expected)}")
    for r in (*call.opt_state_in, *call.opt_state_out):
        if not -1 <= r < registers or (r < 0 and r in call.opt_state_in):
            raise ProgramError(f"{name}: got register r{r}, expected one of r0 to r{registers - 1}")
    kept = [r for r in call.opt_state_out if r >= 0]
    twice = sorted({r for r in kept if kept.count(r) > 1}) if len(set(kept)) < len(kept) else []
    if twice:
        raise ProgramError(f"{name}: two outputs go to one register, {registers_text(twice)}")
    for g, port in zip(call.inputs, given, strict=True):
        _verify_given(g, port, name)


def _verify_given(given: Given, port: Port, name: str) -> None:
    where = f"{name}: input {port.name}"
    if (given.kind == "noise") != (port.role is Role.NOISE):
        raise ProgramError(f"{where} has the role {_role(port)}, but is given as {given.kind}")
    if given.kind == "number":
        if port.spec[0] or not isinstance(given.of, (int, float)):
            raise ProgramError(f"{where}: got the number {given.of!r} for {_spec(port.spec)}")
        return
    if given.kind == "scan":
        shape, dtype, stride, device = given.of.spec
        if not shape or not 0 <= given.at < shape[0]:
            raise ProgramError(f"{where}: slice {given.at} of {_spec(given.of.spec)} does not exist")
        spec = (tuple(shape[1:]), dtype, tuple(stride[1:]), device)
    else:
        spec = given.of.spec
    if tuple(spec) != tuple(port.spec):
        raise ProgramError(f"{where}: got {_spec(spec)}, expected {_spec(port.spec)}")
    if not isinstance(given.of, Noise) and given.of.grad and port.role is not Role.META:
        raise ProgramError(
            f"{where} requires grad, but has the role {_role(port)}: it would receive no gradient"
        )


def _verify_reads(call: StepCall, name: str, held: dict[int, Port]) -> None:
    for register, port in zip(call.opt_state_in, state_ports(call.step), strict=True):
        writer = held.get(register)
        where = f"{name}: input {port.name} reads r{register}"
        if writer is None:
            raise ProgramError(f"{where}, which nothing has been written to before")
        if tuple(writer.spec) != tuple(port.spec):
            raise ProgramError(
                f"{where}, which holds {writer.name}, {_spec(writer.spec)}; expected {_spec(port.spec)}"
            )
        if (port.role in _INNER) != (writer.role in _INNER):
            raise ProgramError(f"{where} as {_role(port)}, which holds {writer.name} as {_role(writer)}")
        if writer.differentiable and not port.differentiable:
            raise ProgramError(
                f"{where}, which holds {writer.name} and its gradient, but passes no gradient on"
            )


def _verify_loop(loop: Loop, name: str, before: StepCall | None) -> None:
    call = loop.call
    if loop.count < 1:
        raise ProgramError(f"{name}: a loop of {loop.count} iterations")
    if len(loop.strides) != len(call.inputs):
        raise ProgramError(
            f"{name}: got {len(loop.strides)} strides for {len(call.inputs)} inputs from outside"
        )
    ports = given_ports(call.step)
    for given, stride, port in zip(call.inputs, loop.strides, ports, strict=True):
        if stride and given.kind not in ("scan", "number"):
            raise ProgramError(
                f"{name}: input {port.name} is the same for every iteration, but has stride {stride}"
            )
        if stride and given.kind == "scan":
            _verify_given(given.advanced(stride * (loop.count - 1)), port, f"{name} in its last iteration")
    if before is None or before.step is not call.step:
        return
    # The iteration before the loop is of the same kind: what this one reads of it, the next one reads of this one.
    for port, was, now in zip(call.step.outputs, before.opt_state_out, call.opt_state_out, strict=True):
        if was >= 0 and was in call.opt_state_in and now != was:
            raise ProgramError(
                f"{name}: the loop is not closed: an iteration reads {port.name} of the one before it from r{was}, but "
                f"leaves its own in {registers_text([now])}"
            )


def _verify_results(program: RolledProgram, held: dict[int, Port]) -> None:
    for kind, places in (
        ("output", list(enumerate(program.outputs))),
        ("value left in a tensor", [(i, where) for i, (_, where) in enumerate(program.writes)]),
    ):
        for i, where in places:
            if isinstance(where, int) and where not in held:
                raise ProgramError(f"{kind} {i} is read from r{where}, which nothing has been written to")
    for i, where in enumerate(program.outputs):
        carries = isinstance(where, int) and held[where].differentiable
        if carries and i in program.dead:
            raise ProgramError(
                f"output {i} is declared to carry no gradient, but r{where} holds {held[where].name}, which does"
            )
    for i, (target, where) in enumerate(program.writes):
        spec = held[where].spec if isinstance(where, int) else where.spec
        if isinstance(target, Tensor) and tuple(tensor_spec(target)[:2]) != tuple(spec[:2]):
            raise ProgramError(
                f"value {i} left in a tensor is {_spec(spec)}, the tensor is {_spec(tensor_spec(target))}"
            )


# -- a draft ---------------------------------------------------------------------------------------------------------


def verify_draft(draft: Draft, *, outlined: bool = True) -> None:
    """Check a program in the making.

    Args:
        draft: parts, between two passes.
        outlined: whether what is passed between parts is known, as it is from canonicalize on.

    Raises:
        ProgramError: it names the part and the call.
    """
    bodies = {id(b): b for b in draft.bodies}
    for n, unit in enumerate(draft.units):
        name = f"part {n}"
        first = unit.body.units[0] if id(unit.body) in bodies and unit.body.units else None
        if first is None or (first is not unit and first.segment.key != unit.segment.key):
            raise ProgramError(f"{name} shares its body with a part of another structure")
        for k, entry in enumerate(unit.segment.entries):
            if draft.unit_of.get(id(entry)) != n:
                raise ProgramError(
                    f"{name}: call {k} ({_op(entry.op)}) is listed in part {draft.unit_of.get(id(entry))}"
                )
            for a in arguments(entry):
                if isinstance(a, Value):
                    _verify_value(draft, a, n, k, f"{name}: call {k} ({_op(entry.op)}) reads", outlined)
            for write in entry.deps:
                if unit.segment.number_of.get(id(write), k) >= k:
                    raise ProgramError(
                        f"{name}: call {k} ({_op(entry.op)}) depends on a write that is not before it"
                    )
    for i, value in enumerate(draft.finals()):
        if isinstance(value, Value):
            _verify_value(draft, value, len(draft.units), 0, f"result {i} is", outlined)


def _verify_value(draft: Draft, value: Value, n: int, k: int, name: str, outlined: bool) -> None:
    at = draft.unit_of.get(id(value.entry))
    what = f"an output of {_op(value.entry.op)}"
    if at is None:
        raise ProgramError(f"{name} {what}, which is part of the program no more")
    unit = draft.units[at]
    number = unit.segment.number_of[id(value.entry)]
    if (at, number) >= (n, k):
        raise ProgramError(f"{name} {what} in part {at}, which comes later")
    if not outlined or at == n:
        return
    spec = unit.body.outputs.get((number, value.index))
    if spec is None:
        raise ProgramError(f"{name} {what} in part {at}, which that part does not give")
    if tuple(spec) != tuple(value.ref):
        raise ProgramError(f"{name} {what} in part {at}: got {_spec(spec)}, expected {_spec(value.ref)}")


# -- text ------------------------------------------------------------------------------------------------------------


def _role(port: Port) -> str:
    return port.role.value


def _spec(spec: tuple) -> str:
    shape, dtype, stride, device = spec
    size = "×".join(map(str, shape)) or "scalar"
    return f"{str(dtype).removeprefix('torch.')} {size} (strides {tuple(stride)}, {device})"


def _op(op: Any) -> str:
    return str(op) if isinstance(op, torch._ops.OpOverload) else getattr(op, "__name__", str(op))
