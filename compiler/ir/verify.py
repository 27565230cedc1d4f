"""The verifier: what holds of every program, between passes and after them. A failure is a defect of a pass.

It reads and computes nothing but structure, in time linear in the program's text: a loop counts as two iterations.
"""

from __future__ import annotations

from torch import Tensor

from metaoptim.errors import ProgramError

from .program import Operand, Program, given_ports, registers_text, state_ports
from .segments import Partition, arguments
from .step import Loop, Port, Role, StepCall, calls_of
from .tensors import tensor_spec
from .trace import Noise
from .values import Value
from .verify_step import op_text, verify_step

_INNER = (Role.THETA, Role.OPT_STATE)


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
                for k, register in call.changed():
                    if register >= 0:
                        held[register] = call.step.outputs[k]
        done += calls
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
    for register, port in zip(call.opt_state_in, state_ports(call.step), strict=True):
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
        for given, stride, port in zip(call.inputs, strides, given_ports(call.step), strict=True):
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
    for port, was, now in zip(call.step.outputs, before.opt_state_out, call.opt_state_out, strict=True):
        if was >= 0 and was in call.opt_state_in and now != was:
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


# -- a partition ----------------------------------------------------------------------------------------------------


def verify_partition(partition: Partition, *, outlined: bool = True) -> None:
    """Check a program in the making.

    Args:
        partition: parts, between two passes.
        outlined: whether what is passed between parts is known, as it is from canonicalize on.

    Raises:
        ProgramError: it names the part and the call.
    """
    kinds = {id(b): b for b in partition.kinds}
    for n, part in enumerate(partition.parts):
        name = f"part {n}"
        first = part.kind.parts[0] if id(part.kind) in kinds and part.kind.parts else None
        if first is None or (first is not part and first.segment.key != part.segment.key):
            raise ProgramError(f"{name} shares its kind with a part of another structure")
        for k, entry in enumerate(part.segment.entries):
            if partition.part_of.get(id(entry)) != n:
                raise ProgramError(
                    f"{name}: call {k} ({op_text(entry.op)}) is listed in part {partition.part_of.get(id(entry))}"
                )
            for a in arguments(entry):
                wrong = _wrong(partition, a, n, k, outlined) if isinstance(a, Value) else ""
                if wrong:
                    raise ProgramError(f"{name}: call {k} ({op_text(entry.op)}) reads {wrong}")
            for write in entry.deps:
                if part.segment.number_of.get(id(write), k) >= k:
                    raise ProgramError(
                        f"{name}: call {k} ({op_text(entry.op)}) depends on a write that is not before it"
                    )
    for i, value in enumerate(partition.finals()):
        wrong = (
            _wrong(partition, value, len(partition.parts), 0, outlined) if isinstance(value, Value) else ""
        )
        if wrong:
            raise ProgramError(f"result {i} is {wrong}")


def _wrong(partition: Partition, value: Value, n: int, k: int, outlined: bool) -> str:
    """What is wrong with reading ``value`` in call ``k`` of part ``n``; nothing is the rule, and costs no text."""
    at = partition.part_of.get(id(value.entry))
    if at is None:
        return f"an output of {op_text(value.entry.op)}, which is part of the program no more"
    part = partition.parts[at]
    number = part.segment.number_of[id(value.entry)]
    if (at, number) >= (n, k):
        return f"an output of {op_text(value.entry.op)} in part {at}, which comes later"
    if not outlined or at == n:
        return ""
    spec = part.kind.outputs.get((number, value.index))
    if spec is not None and spec == value.ref:
        return ""
    what = f"an output of {op_text(value.entry.op)} in part {at}"
    if spec is None:
        return f"{what}, which that part does not give"
    return f"{what}: got {spec}, expected {value.ref}"
