"""What a schedule takes: it is carried out on sizes, so that what will be held and run again is known."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from metaoptim.compiler.cost.step import step_cost
from metaoptim.compiler.ir.programs.calls import Assign, StepCall
from metaoptim.compiler.ir.programs.program import Program
from metaoptim.compiler.ir.step import EAGER, Lowering, ResultMemory, Role
from metaoptim.compiler.ir.tensors import TensorSpec, memory_bytes, nbytes
from metaoptim.compiler.ir.values import Input

from ..engine.function import BoundProgram, generator_for, sweep_over
from ..engine.interpreter import Interpreter, may_keep
from ..engine.noise import GENERATOR_BYTES
from ..engine.sweep import Sweep
from ..states.slots import Slots, State
from ..states.streams import keeping
from ..states.tier import WRITING


@dataclass(frozen=True)
class Prediction:
    """What a call of a compiled function, or a window's steps, and the backward will take."""

    peak_bytes: int  # most that are held at once beyond the caller's own tensors
    forward_bytes: int  # the same without the backward
    extra_forwards: int  # steps run a second time
    kept: int  # most states kept at a time, counting the initial one
    reached: frozenset[Input]  # inputs that a cotangent of the results reaches


class _Meter:
    """Bytes alive, and the most there have been."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def note(self, momentary: int) -> None:
        self.peak = max(self.peak, self.alive + momentary)


class _Block:
    """Stands for a tensor: it counts as long as anything refers to it.

    A cotangent is ``reached`` if one of the results' is behind it, and not only zeros.
    """

    __slots__ = ("meter", "size", "reached", "_within")

    def __init__(self, meter: _Meter, size: int, reached: bool = False, within: _Block | None = None) -> None:
        self.meter, self.size, self.reached, self._within = meter, size, reached, within
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
        return self if self._within is None else self._within.root

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
        self._writing: deque[State] = deque(maxlen=WRITING)
        self._ahead: tuple[int, State] = -1, []

    def save(self, position: int, state: State) -> None:
        self._writing.append(list(state))
        self._kept[position] = [b and (id(b.root), b.whole) for b in state]

    def prefetch(self, position: int) -> None:
        if self._ahead[0] != position:
            self.rest()
            kept = self._kept[position]
            blocks = {memory: _Block(self.meter, memory[1]) for memory in {*kept} - {None}}
            self._ahead = position, [memory and blocks[memory] for memory in kept]

    def load(self, position: int) -> State:
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


class _Sizes(Interpreter):
    """Carries out a schedule on blocks."""

    def __init__(self, program: Any, slots: int | None, meter: _Meter, offload: bool) -> None:
        super().__init__(program, Slots(slots, _Shelf(meter) if offload and slots is not None else None))
        self.meter = meter
        self.kept = 0  # most states that were kept at a time

    def _values(self, call: StepCall, state: State, position: int) -> list[Any]:
        if call.rng >= 0:
            self._drawn = _Block(self.meter, GENERATOR_BYTES)
        ports = call.step.inputs[call.step.states :]
        values = [_Block(self.meter, nbytes(p.spec)) if p.role is Role.NOISE else None for p in ports]
        if any(values):
            self.meter.note(GENERATOR_BYTES)  # of one state more, while they are drawn
        return values

    def _cotangent(self, spec: TensorSpec, cotangent: Any) -> Any:
        return _Block(self.meter, nbytes(spec)) if cotangent is None else cotangent

    def _lowered(self, call: StepCall, kind: str, operands: Any, position: int) -> Callable[..., list[Any]]:
        step, cost = call.step, step_cost(call.step, call.lowering)
        self.kept = max(self.kept, len(self.store))

        def replay(*arguments: Any) -> list[Any]:
            self.meter.note(cost.replay_bytes)
            return self._blocks(cost.outputs, arguments)

        def vjp(*arguments: Any) -> list[Any]:
            self.meter.note(cost.vjp_bytes)
            given = zip(step.cotangents, arguments[len(step.inputs) :], strict=True)
            real = {i for i, c in given if c.reached}
            grads = self._blocks(cost.gradients, arguments)
            for grad, depends in zip(grads, cost.depends, strict=True):
                if grad is not None:
                    grad.reached = bool(depends & real)
            return grads

        return replay if kind in ("replay", "forward") else vjp

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

    def prediction(self, forward: int, sweep: Any) -> Prediction:
        """What it takes to have run the program, ``forward`` at its peak, and to pull ``sweep`` back through it."""
        steps = self.replays
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pull_back(sweep, 0)
        gradients = sweep.gradients() if hasattr(sweep, "gradients") else {}
        reached = frozenset(source for source, grad in gradients.items() if grad.reached)
        return Prediction(self.meter.peak, forward, self.replays - steps, self.kept, reached)


def predict(
    program: Program, slots: int | None, lowering: Lowering = EAGER, offload: bool = False
) -> Prediction:
    """Go through a call of a program, and a backward from all its results, on sizes.

    Takes time proportional to the number of steps run, some microseconds each; traces step graphs that have not been.
    What a backend allocates besides is known once it was measured.
    """
    meter = _Meter()
    targets = {id(t) for t, _ in program.writes}
    copied = [x for x in program.inputs if x.grad or id(getattr(x, "tensor", None)) in targets]
    held = [_Block(meter, nbytes(x.spec)) for x in copied]
    nothing = _Block(meter, 0)  # `_values` makes what calls are given
    calls = BoundProgram(program, lambda operand, port: nothing, lowering)
    engine = _Sizes(calls, slots, meter, offload)
    engine.begin = program.positions - program.swept
    state: list[Any] = [None] * (program.registers + 1)
    if generator_for(program) is not None:
        state[-1] = _Block(meter, GENERATOR_BYTES)
    engine.run(state)
    del state
    made = {r: call.step.outputs[k].spec for call, _ in program.counted() for k, r in enumerate(call.writes)}
    specs = [made[where] if isinstance(where, int) else where.spec for where in program.outputs]
    results = [_Block(meter, nbytes(spec)) for spec in specs]
    forward = meter.peak
    cotangents = [_Block(meter, block.size) for block in results]  # that autograd makes of ones
    sweep: Any = sweep_over(program, lambda source: _Block(meter, nbytes(source.spec)))
    for i, where in enumerate(program.outputs):
        if isinstance(where, int) and i not in program.dead:
            sweep.deposit(engine.program.end, where, _Block(meter, results[i].size, reached=True))
    found = engine.prediction(forward, sweep)
    del held, cotangents
    return found


class _Calls(list):
    """Calls by position."""

    end = property(list.__len__)
    reach = 0


def predict_sweep(
    calls: Iterable[StepCall | Assign],
    slots: int | None,
    offload: bool = False,
    initial: Sequence[Tensor] = (),
    kept: Sequence[int] | None = None,
) -> Prediction:
    """Go through a window's steps, and a sweep back from cotangents of all of its last state, on sizes.

    ``initial`` is the state where ``calls`` begin, or one of the same sizes; ``kept`` are positions of the states that
    a window has kept that did not know how many would come, None for the best ones.
    """
    meter = _Meter()
    calls = list(calls)
    # an assignment that stands there again sets the very same values
    set_to = {id(c.values): _blocks_like(c.values, meter) for c in calls if isinstance(c, Assign)}
    program = _Calls(
        replace(c, values=set_to[id(c.values)]) if isinstance(c, Assign) else replace(c, back=min(c.back, i))
        for i, c in enumerate(calls)
    )
    program.reach = max((c.back for c in program if isinstance(c, StepCall)), default=0)
    engine = _Sizes(program, slots, meter, offload)
    engine.keepable = lambda position: may_keep(program[position])
    known = None if kept is None or offload else keeping(kept, program.end)
    state: Any = engine.run(_blocks_like(initial, meter), known)
    forward, sweep = meter.peak, Sweep()
    for index, value in enumerate(state):
        sweep.deposit(engine.program.end, index, _Block(meter, value.whole))  # type: ignore[arg-type]
    del state
    return engine.prediction(forward, sweep)


def _blocks_like(values: Sequence[Tensor], meter: _Meter) -> list[Any]:
    return [_Block(meter, memory_bytes(v)) for v in values]
