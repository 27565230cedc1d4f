"""The verifier: what holds of every program, between passes and after them. A failure is a defect of a pass.

It reads and computes nothing but structure, in time linear in the program's text: a loop counts as two iterations.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from metaoptim.errors import ProgramError

from .operators import aten, is_operator, is_several, op_info, op_text, written
from .programs.calls import Loop, Operand, StepCall, calls_of
from .programs.program import Program
from .step import RANK, Port, Role, StepGraph, show
from .tensors import tensor_spec
from .text import registers_text
from .traces.trace import Partition, arguments
from .values import Noise, Value, reached

_INNER = (Role.THETA, Role.OPT_STATE)
_INPUTS = (*RANK, Role.META, Role.SCAN, Role.NOISE)
_OUTPUTS = (Role.THETA, Role.OPT_STATE, Role.CARRY, Role.GRADIENT)


def _refuse(faults: Iterator[str]) -> None:
    for fault in faults:
        raise ProgramError(fault)


# -- a partition -----------------------------------------------------------------------------------------------------


def verify_partition(partition: Partition, *, outlined: bool = True) -> None:
    """Check a program in the making.

    Args:
        partition: parts, between two passes.
        outlined: whether what is passed between parts is known, as it is from canonicalize on.

    Raises:
        ProgramError: it names the part and the call.
    """
    _refuse(_partition_faults(partition, outlined))


def _partition_faults(partition: Partition, outlined: bool) -> Iterator[str]:
    kinds = {id(b) for b in partition.kinds}
    for n, part in enumerate(partition.parts):
        first = part.kind.parts[0] if id(part.kind) in kinds and part.kind.parts else None
        if first is None or (first is not part and first.segment.key != part.segment.key):
            yield f"part {n} shares its kind with a part of another structure"
        for k, entry in enumerate(part.segment.entries):
            listed = partition.part_of.get(id(entry))
            if listed != n:
                yield f"part {n}: call {k} ({op_text(entry.op)}) is listed in part {listed}"
            for a in arguments(entry):
                if isinstance(a, Value):
                    for wrong in _value_faults(partition, a, n, k, outlined):
                        yield f"part {n}: call {k} ({op_text(entry.op)}) reads {wrong}"
            if any(part.segment.number_of.get(id(write), k) >= k for write in entry.deps):
                yield f"part {n}: call {k} ({op_text(entry.op)}) depends on a write that is not before it"
    for i, value in enumerate(partition.finals()):
        if isinstance(value, Value):
            for wrong in _value_faults(partition, value, len(partition.parts), 0, outlined):
                yield f"result {i} is {wrong}"


def _value_faults(partition: Partition, value: Value, n: int, k: int, outlined: bool) -> Iterator[str]:
    """What is wrong with reading ``value`` in call ``k`` of part ``n``."""
    what, at = f"an output of {op_text(value.entry.op)}", partition.part_of.get(id(value.entry))
    if at is None:
        yield f"{what}, which is part of the program no more"
        return
    part = partition.parts[at]
    number = part.segment.number_of[id(value.entry)]
    if (at, number) >= (n, k):
        yield f"{what} in part {at}, which comes later"
    if outlined and at != n:
        spec = part.kind.outputs.get((number, value.index))
        if spec is None:
            yield f"{what} in part {at}, which that part does not give"
        elif spec != value.ref:
            yield f"{what} in part {at}: got {spec}, expected {value.ref}"


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
    _refuse(_program_faults(program, names, folded))


def _program_faults(program: Program, names: dict[int, str], folded: bool) -> Iterator[str]:
    held: dict[int, Port] = {}
    before: StepCall | None = None
    for n, item in enumerate(program.calls):
        calls = calls_of(item)
        if not calls:
            yield f"call {n}: a loop of no calls"
            return
        named: list[tuple[StepCall, str]] = []
        for k, call in enumerate(calls):
            place = f"{n}.{k}" if calls[1:] else f"{n}"
            where = f", {call.location}" if call.location else ""
            named.append((call, f"call {place} ({names[id(call.step)]}{where})"))
            yield from _argument_faults(*named[-1], program.registers)
        if isinstance(item, Loop):
            yield from _loop_faults(item, named)
            if before is not None and not folded and before.step is calls[0].step:
                yield from _closing_faults(*named[0], before)
        # in a second iteration of a loop what the first has left must do as well
        for again in ("", " in its second iteration") if isinstance(item, Loop) else ("",):
            for call, name in named:
                yield from _register_faults(call, name + again, held)
                held.update((r, call.step.outputs[k]) for k, r in enumerate(call.writes) if r >= 0)
        before = calls[-1]
    yield from _result_faults(program, held)


def _argument_faults(call: StepCall, name: str, registers: int) -> Iterator[str]:
    step, count = call.step, call.step.states
    for what, got, expected in (
        ("registers read", call.reads, step.inputs[:count]),
        ("inputs from outside", call.inputs, step.inputs[count:]),
        ("registers written", call.writes, step.outputs),
    ):
        if len(got) != len(expected):
            yield f"{name}: got {len(got)} {what}, the step graph has {len(expected)}"
    for r in (*call.reads, *call.writes):
        if not -1 <= r < registers or (r < 0 and r in call.reads):
            yield f"{name}: got register r{r}, expected one of r0 to r{registers - 1}"
    kept = [r for r in call.writes if r >= 0]
    if len(set(kept)) < len(kept):
        twice = sorted({r for r in kept if kept.count(r) > 1})
        yield f"{name}: two outputs go to one register, {registers_text(twice)}"
    for given, port in zip(call.inputs, step.inputs[count:], strict=True):
        yield from _operand_faults(given, port, name)


def _operand_faults(given: Operand, port: Port, name: str) -> Iterator[str]:
    if given.kind == "each":
        for one in given.of:
            yield from _operand_faults(one, port, name)
        return
    where = f"{name}: input {port.name}"
    if (given.kind == "noise") != (port.role is Role.NOISE):
        yield f"{where} has the role {port.role.value}, but is given as {given.kind}"
    if given.kind == "number":
        if port.spec.shape or not isinstance(given.of, (int, float)):
            yield f"{where}: got the number {given.of!r} for {port.spec}"
        return
    spec = given.of.spec
    if given.kind == "scan":
        if not spec.shape or not 0 <= given.at < spec.shape[0]:
            yield f"{where}: slice {given.at} of {spec} does not exist"
        spec = spec.row
    if spec != port.spec:
        yield f"{where}: got {spec}, expected {port.spec}"
    if not isinstance(given.of, Noise) and given.of.grad and port.role is not Role.META:
        yield f"{where} requires grad, but has the role {port.role.value}: it would receive no gradient"


def _register_faults(call: StepCall, name: str, held: dict[int, Port]) -> Iterator[str]:
    for register, port in zip(call.reads, call.step.inputs[: call.step.states], strict=True):
        writer, where = held.get(register), f"{name}: input {port.name} reads r{register}"
        if writer is None:
            yield f"{where}, which nothing has been written to before"
            return
        if writer.spec != port.spec:
            yield f"{where}, which holds {writer.name}, {writer.spec}; expected {port.spec}"
        if (port.role in _INNER) != (writer.role in _INNER):
            yield f"{where} as {port.role.value}, which holds {writer.name} as {writer.role.value}"
        if writer.differentiable and not port.differentiable:
            yield f"{where}, which holds {writer.name} and its gradient, but passes no gradient on"


def _loop_faults(loop: Loop, named: list[tuple[StepCall, str]]) -> Iterator[str]:
    if loop.count < 1:
        yield f"{named[0][1]}: a loop of {loop.count} iterations"
    for call, name in named:
        for given, port in zip(call.inputs, call.step.inputs[call.step.states :], strict=True):
            where = f"{name}: input {port.name}"
            if given.stride and given.kind not in ("scan", "number", "each"):
                yield f"{where} is the same for every iteration, but has stride {given.stride}"
            last = given.after(loop.count - 1)
            if given.kind == "each" and not 0 <= last.at < len(given.of):
                yield f"{where}: {len(given.of)} are listed for {loop.count} iterations"
            if given.stride and given.kind == "scan":
                yield from _operand_faults(last, port, f"{name} in its last iteration")


def _closing_faults(call: StepCall, name: str, before: StepCall) -> Iterator[str]:
    """The iteration before a loop is of the same kind: what this one reads of it, the next one reads of this one."""
    for port, was, now in zip(call.step.outputs, before.writes, call.writes, strict=True):
        if was >= 0 and was in call.reads and now != was:
            yield (
                f"{name}: the loop is not closed: an iteration reads {port.name} of the one before it from r{was}, but "
                f"leaves its own in {registers_text([now])}"
            )


def _result_faults(program: Program, held: dict[int, Port]) -> Iterator[str]:
    left = [where for _, where in program.writes]
    for kind, places in (("output", program.outputs), ("value left in a tensor", left)):
        for i, where in enumerate(places):
            if isinstance(where, int) and where not in held:
                yield f"{kind} {i} is read from r{where}, which nothing has been written to"
    for i, where in enumerate(program.outputs):
        if i in program.dead and isinstance(where, int) and held[where].differentiable:
            yield f"output {i} is declared to carry no gradient, but r{where} holds {held[where].name}, which does"
    for i, (target, where) in enumerate(program.writes):
        spec = held[where].spec if isinstance(where, int) else where.spec
        if isinstance(target, Tensor) and tensor_spec(target)[:2] != spec[:2]:
            yield f"value {i} left in a tensor is {spec}, the tensor is {tensor_spec(target)}"


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
    _refuse(f"{name}: {fault}" for fault in _step_faults(step, pruned))


def _step_faults(step: StepGraph, pruned: bool) -> Iterator[str]:
    nodes = list(step.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    yield from _port_faults(step, placeholders)
    seen: set[fx.Node] = set()
    for node in nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                yield f"node {node.name} reads {used.name}, which is not defined before it"
        seen.add(node)
        if node.op not in ("placeholder", "call_function", "output"):
            yield f"node {node.name} is a {node.op}; a step graph consists of calls of functions"
        yield from _operator_faults(node)
    if pruned:
        live = _live(nodes)
        # what is drawn is drawn as eager draws it, read or not: the random stream must not depend on who reads
        drawn = {n for n, p in zip(placeholders, step.inputs, strict=True) if p.role is Role.NOISE}
        for node in nodes:
            copies = node.target in (aten.alias.default, aten.clone.default)
            if copies and drawn.issuperset(node.all_input_nodes):
                drawn.add(node)
        for node in nodes:
            if node not in live and node not in drawn:
                what = "input" if node.op == "placeholder" else "node"
                yield f"{what} {node.name} is dead: no output depends on it"


def _port_faults(step: StepGraph, placeholders: list[fx.Node]) -> Iterator[str]:
    if len(placeholders) != len(step.inputs):
        yield f"got {len(placeholders)} placeholders for {len(step.inputs)} inputs"
    rank = 0
    for node, port in zip(placeholders, step.inputs, strict=True):
        if port.role not in _INPUTS:
            yield f"input {port.name} has the role of an output, {port.role.value}"
        if RANK.get(port.role, 3) < rank:
            yield (
                f"input {port.name} ({port.role.value}) comes after inputs it must precede; expected theta, then "
                "state, then what is given from outside"
            )
        rank = RANK.get(port.role, 3)
        if node.meta.get("spec", port.spec) != port.spec:
            yield (f"input {port.name} is declared as {port.spec}, its placeholder holds {node.meta['spec']}")
    results = step.graph.find_nodes(op="output")
    values: Any = results[0].args[0] if len(results) == 1 else None
    got: Sequence[Any] | None = values if is_several(values) else None
    if got is None or len(got) != len(step.outputs):
        yield f"got {'none' if got is None else len(got)} results for {len(step.outputs)} outputs"
        return
    for value, port in zip(got, step.outputs, strict=True):
        if port.role not in _OUTPUTS:
            yield f"output {port.name} has the role of an input, {port.role.value}"
        if not isinstance(value, fx.Node):
            yield f"output {port.name} is not computed: got the constant {value!r}"


def _operator_faults(node: fx.Node) -> Iterator[str]:
    target: Any = node.target
    if node.op != "call_function" or not is_operator(target):
        return
    off = target is aten.native_dropout.default and not node.args[2]
    if op_info(target).random and not off:
        yield (
            f"node {node.name} draws random numbers ({target}); a replay would draw others, so they must be inputs of "
            "the role noise"
        )
    for root in map(_memory_of, _written(node)):
        if root.op == "placeholder":
            yield f"node {node.name} ({target}) writes into the input {root.name}, which belongs to the caller"


def _written(node: fx.Node) -> list[fx.Node]:
    return written(node.target, node.args, node.kwargs, fx.Node)


def _memory_of(node: Any) -> fx.Node:
    """The node that made the memory ``node`` lies in."""
    while node.op == "call_function":
        target: Any = node.target
        same = target in (show, operator.getitem) or getattr(target, "__name__", "") == "with_hooks"
        if is_operator(target):
            same = target.is_view or target is aten.type_as.default or bool(op_info(target).writes)
        if not same:
            break
        node = node.args[0]
    return node


def _live(nodes: list[fx.Node]) -> set[fx.Node]:
    roots = [n for n in nodes if n.op == "output" or _written(n)]
    return set(reached(roots, lambda node: node.all_input_nodes))
