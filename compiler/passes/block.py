"""block: several iterations of a loop become one call, of a graph that takes several steps."""

from __future__ import annotations

from dataclasses import replace

from ..derive.blocks import block_of
from ..ir.programs.calls import Loop, StepCall
from ..ir.programs.program import Program
from ..ir.step import RANK
from ..ir.text import operator_count
from ..lower.derivatives import residuals

#: Steps in a block, at most, and operators: what is called in Python once for all of them is little by then, and
#: compiling takes longer than in proportion.
LONGEST, MOST = 4, 4000
#: Blocks in a loop, at least.
FEWEST = 8


def block(program: Program, hvp: str) -> Program | None:
    """The program with blocks of steps in its loops; None where no loop has room for any.

    Calls of Python, and tensors that pass through it, take a seventh of a small network's compiled step.
    """
    sizes = sizes_of(program, hvp)
    if not any(sizes):
        return None
    calls, made = list[StepCall | Loop](), set[int]()
    for item, size in zip(program.calls, sizes, strict=True):
        if not size or not isinstance(item, Loop):
            calls.append(item)
            continue
        call = item.calls[0]
        divided = residuals(call.step, hvp)
        assert divided is not None
        several = block_of(call, size, hvp, divided)
        count, rest = divmod(item.count, size)
        made.add(id(several.step))
        calls.append(Loop((several,), count))
        if rest:
            calls.append(Loop((replace(call, inputs=[g.after(count * size) for g in call.inputs]),), rest))
    compiled = None if program.compiled is None else program.compiled | made
    return replace(program, calls=calls, compiled=compiled, kept=None)


def sizes_of(program: Program, hvp: str) -> list[int]:
    """Steps in a block of each of a program's loops; 0 where there are none."""
    if program.window is not None:  # it counts steps
        return [0] * len(program.calls)
    sizes = [_size(item, hvp) if isinstance(item, Loop) else 0 for item in program.calls]
    return [size if size > 1 else 0 for size in sizes]


def _size(loop: Loop, hvp: str) -> int:
    """Steps in a block of a loop; 0 where there may be none."""
    if len(loop.calls) != 1:
        return 0
    (call,) = loop.calls
    step, divided = call.step, residuals(call.step, hvp)
    plain = not (step.opaque or step.dynamic or step.chunked or step.hooked or call.back)
    draws = any(given.kind == "noise" for given in call.inputs)
    if divided is None or not plain or not step.steps or draws or not _flows(call):
        return 0
    operators = operator_count(divided.forward.graph) + operator_count(divided.backward.graph)
    return min(LONGEST, MOST // operators, loop.count // FEWEST)


def _flows(call: StepCall) -> bool:
    """Whether what a step leaves is what the next one finds, and nothing else: each in a register, without gaps."""
    step = call.step
    specs = dict(zip(call.writes, (port.spec for port in step.outputs), strict=True))
    states = zip(call.reads, (port.spec for port in step.inputs))
    return (
        -1 not in specs
        and len(specs) == len(call.writes)
        and len(set(call.reads)) == len(call.reads)
        and all(port.role in RANK for port in step.outputs)
        and all(specs.get(register, spec) == spec for register, spec in states)
        and all(port.spec.dense for port in (*step.inputs[: step.states], *step.outputs))
    )
