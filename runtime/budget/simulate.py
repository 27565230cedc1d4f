"""What a schedule takes: it is carried out on sizes, so that what will be held and run again is known."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from metaoptim.compiler.cost.step import step_cost
from metaoptim.compiler.derive.reverse import cotangent_outputs
from metaoptim.compiler.ir.calls import Assign, StepCall
from metaoptim.compiler.ir.program import Program
from metaoptim.compiler.ir.step import EAGER, Lowering, ResultMemory, Role
from metaoptim.compiler.ir.tensors import TensorSpec, memory_bytes, nbytes
from metaoptim.compiler.ir.values import Input

from ..engine.function import BoundProgram, generator_for, sweep_over
from ..engine.interpreter import Interpreter, may_keep
from ..engine.noise import GENERATOR_BYTES
from ..engine.sweep import Sweep
from ..states.slots import Slots
from ..states.streams import keeping
from ..states.tier import WRITING


@dataclass(frozen=True)
class Prediction:
    """What a call of a compiled function, or a window's steps, and the backward will take.

    Attributes:
        peak_bytes: most bytes held at once beyond the caller's own tensors.
        forward_bytes: most bytes held at once in the call without its backward.
        extra_forwards: steps run a second time.
        kept: most states kept at a time, counting the initial one.
        reached: inputs that a cotangent of the results reaches.
    """

    peak_bytes: int
    forward_bytes: int
    extra_forwards: int
    kept: int
    reached: frozenset[Input]


class _Meter:
    """Bytes alive, and the most there have been."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def note(self, momentary: int) -> None:
        self.peak = max(self.peak, self.alive + momentary)


class _Block:
    """Stands for a tensor: it counts as long as anything refers to it.

    Attributes:
        reached: of a cotangent, whether one of the results' is behind it, or only zeros are.
        within: the block whose memory it shares.
    """

    __slots__ = ("meter", "size", "reached", "within")

    def __init__(self, meter: _Meter, size: int, reached: bool = False, within: _Block | None = None) -> None:
        self.meter, self.size, self.reached, self.within = meter, size, reached, within
        meter.alive += size
        meter.note(0)

    def __del__(self) -> None:
        self.meter.alive -= self.size

    def __getitem__(self, at: Any) -> _Block:
        return self

    def add_(self, other: _Block) -> None:
        """As a slice of it would."""
        self.reached |= other.reached

    def __add__(self, other: _Block) -> _Block:
        return _Block(self.meter, max(self.whole, other.whole), self.reached or other.reached)

    @property
    def root(self) -> _Block:
        """The block that has the memory it lies in."""
        return self if self.within is None else self.within.root

    @property
    def whole(self) -> int:
        """Bytes of the memory it lies in."""
        return self.root.size


class _Shelf:
    """A lower tier of sizes: a state counts while it may be on its way down, and when it is on its way up.

    That states share tensors is left out of account: then it is less.
    """

    def __init__(self, meter: _Meter) -> None:
        self.meter = meter
        self._kept: dict[int, list[Any]] = {}  # position -> for each entry, its memory and the size of that
        self._writing: deque[list[Any]] = deque(maxlen=WRITING)
        self._ahead: tuple[int, list[Any]] = -1, []

    def save(self, position: int, state: list[Any]) -> None:
        self._writing.append(list(state))
        self._kept[position] = [b and (id(b.root), b.whole) for b in state]

    def prefetch(self, position: int) -> None:
        if self._ahead[0] != position:
            self.rest()
            kept = self._kept[position]
            blocks = {memory: _Block(self.meter, memory[1]) for memory in {*kept} - {None}}
            self._ahead = position, [memory and blocks[memory] for memory in kept]

    def load(self, position: int) -> list[Any]:
        self.prefetch(position)
        _, state = self._ahead
        self.rest()
        return state

    def rest(self) -> None:
        self._ahead = -1, []

    def forget(self, positions: Iterable[int]) -> None:
        for position in positions:
            del self._kept[position]

    def settle(self) -> None:
        self._writing.clear()


class Sizes(Interpreter):
    """Carries out a schedule on blocks.

    Attributes:
        kept: most states that were kept at a time.
    """

    def __init__(self, program: Any, slots: int | None, meter: _Meter, offload: bool) -> None:
        shelf: Any = _Shelf(meter) if offload and slots is not None else None
        super().__init__(program, Slots(slots, shelf))
        self.meter, self.kept = meter, 0

    def _values(self, call: StepCall, state: Any, position: int) -> list[Any]:
        if call.rng >= 0:
            self._drawn = _Block(self.meter, GENERATOR_BYTES)  # type: ignore[assignment]
        ports = call.step.inputs[len(call.step.inputs) - len(call.inputs) :]
        values = [_Block(self.meter, nbytes(p.spec)) if p.role is Role.NOISE else None for p in ports]
        if any(values):
            self.meter.note(GENERATOR_BYTES)  # of one state more, while they are drawn
        return values

    def _cotangent(self, spec: TensorSpec, cotangent: Any) -> Any:
        return _Block(self.meter, nbytes(spec)) if cotangent is None else cotangent

    def _lowered(self, call: StepCall, kind: str, operands: Any) -> Any:
        step, cost = call.step, step_cost(call.step, call.lowering)
        self.kept = max(self.kept, len(self.store))

        def replay(*arguments: Any) -> list[Any]:
            self.meter.note(cost.replay_bytes)
            return self._blocks(cost.outputs, arguments)

        def vjp(*arguments: Any) -> list[Any]:
            self.meter.note(cost.vjp_bytes)
            given = zip(cotangent_outputs(step), arguments[len(step.inputs) :], strict=True)
            real = {i for i, c in given if c.reached}
            grads = self._blocks(cost.gradients, arguments)
            for grad, depends in zip(grads, cost.depends, strict=True):
                if grad is not None:
                    grad.reached = bool(depends & real)
            return grads

        return replay if kind == "replay" else vjp

    def _blocks(self, made: tuple[ResultMemory | None, ...], arguments: Sequence[Any]) -> list[Any]:
        blocks: list[Any] = []
        for m in made:
            within = None
            if m is not None and m.of_input >= 0:
                within = arguments[m.of_input]
            elif m is not None and m.of_result >= 0:
                within = blocks[m.of_result]
            blocks.append(None if m is None else _Block(self.meter, m.size, within=within))
        return blocks


def predict(
    program: Program,
    slots: int | None,
    lowering: Lowering = EAGER,
    offload: bool = False,
) -> Prediction:
    """Go through a call of a program, and a backward from all its results, on sizes.

    Takes time proportional to the number of steps run, some microseconds each; traces step graphs that have not been.

    Args:
        program: of the compiled function.
        slots: how many states may be kept; None for all.
        lowering: the backend and HVP mode of the step graphs; what a backend allocates besides is known once measured.
        offload: whether states without a slot go to a lower tier.
    """
    meter = _Meter()
    copied = [x for x in program.inputs if x.grad or _is_target(x, program)]
    held = [_Block(meter, nbytes(x.spec)) for x in copied]
    calls = BoundProgram(program, lambda operand, port: None, program.registers, lowering)
    engine = Sizes(calls, slots, meter, offload)
    engine.begin = program.positions - program.swept
    state: list[Any] = [None] * (program.registers + 1)
    if generator_for(program) is not None:
        state[-1] = _Block(meter, GENERATOR_BYTES)
    engine.run(state)
    del state
    results = [_Block(meter, _size(where, program, i)) for i, where in enumerate(program.outputs)]
    forward, forward_steps = meter.peak, engine.replays
    cotangents = [_Block(meter, block.size) for block in results]  # that autograd makes of ones
    sweep: Any = sweep_over(program, lambda source: _Block(meter, nbytes(source.spec)))
    for i, where in enumerate(program.outputs):
        if isinstance(where, int) and i not in program.dead:
            sweep.deposit(engine.program.end, where, _Block(meter, results[i].size, reached=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.pull_back(sweep, 0)
    reached = frozenset(source for source, grad in sweep.gradients().items() if grad.reached)
    extra = engine.replays - forward_steps
    del held, cotangents
    return Prediction(meter.peak, forward, extra, engine.kept, reached)


class _Calls(list):
    """Calls by position."""

    @property
    def end(self) -> int:
        return len(self)

    @cached_property
    def reach(self) -> int:
        return max((c.back for c in self if isinstance(c, StepCall)), default=0)


def predict_sweep(
    calls: Iterable[StepCall | Assign],
    slots: int | None,
    offload: bool = False,
    initial: Sequence[Tensor] = (),
    kept: Sequence[int] | None = None,
) -> Prediction:
    """Go through a window's steps, and a sweep back from cotangents of all of its last state, on sizes.

    Args:
        calls: of a window's program, from some position on.
        slots: how many states may be kept; None for all.
        offload: whether those without a slot go to a lower tier.
        initial: the state there, or one of the same sizes.
        kept: positions whose states a window has kept that did not know how many would come; None for the best ones.
    """
    meter = _Meter()
    calls = list(calls)
    # an assignment that stands there again sets the very same values
    set_to = {id(c.values): _blocks_like(c.values, meter) for c in calls if isinstance(c, Assign)}
    program = _Calls(
        replace(c, values=set_to[id(c.values)]) if isinstance(c, Assign) else replace(c, back=min(c.back, i))
        for i, c in enumerate(calls)
    )
    engine = Sizes(program, slots, meter, offload)
    engine.keepable = lambda position: may_keep(program[position])
    known = None if kept is None or offload else keeping(kept, program.end)
    state: Any = engine.run(_blocks_like(initial, meter), known)
    forward, forward_steps = meter.peak, engine.replays
    sweep: Any = Sweep()
    for index, value in enumerate(state):
        sweep.deposit(engine.program.end, index, _Block(meter, value.whole))
    del state
    engine.pull_back(sweep, 0)
    extra = engine.replays - forward_steps
    return Prediction(meter.peak, forward, extra, engine.kept, frozenset())


def _blocks_like(values: Sequence[Tensor], meter: _Meter) -> list[Any]:
    return [_Block(meter, memory_bytes(v)) for v in values]


def _size(where: int | Input, program: Program, i: int) -> int:
    if not isinstance(where, int):
        return nbytes(where.spec)
    for call, _ in reversed(list(program.counted())):
        for k, register in enumerate(call.writes):
            if register == where:
                return nbytes(call.step.outputs[k].spec)
    raise AssertionError(f"output {i} is read from r{where}, which nothing writes to")


def _is_target(x: Input, program: Program) -> bool:
    tensor = getattr(x, "tensor", None)
    return tensor is not None and any(t is tensor for t, _ in program.writes if isinstance(t, Tensor))
