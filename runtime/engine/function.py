"""A captured function at work: its program bound to tensors, run by the engine, joined to autograd as one node."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.derive.interpret import measuring_hook
from metaoptim.compiler.ir.programs.calls import Loop, Operand, StepCall, calls_of
from metaoptim.compiler.ir.programs.program import Kept, Program
from metaoptim.compiler.ir.step import Lowering, Port, Role
from metaoptim.compiler.ir.values import Input, Noise
from metaoptim.compiler.lower.ambient import unaffected

from ..states.disk import check_device, tier_for
from .engine import Engine, Lower, lowered_for
from .inputs import snapshot
from .nodes import defined, hooked, refuse_third_order
from .noise import generator_of
from .sweep import GradientSweep, TruncatedSweep

#: An input that changes from one iteration to the next: its place, what it is in the first one, its place among the
#: call's metas (-1 for none), and what it is in each.
Moving = tuple[int, Operand, int, Callable[[int], Any]]


class BoundProgram:
    """A rolled program with tensors for its inputs: position -> call, made when asked for.

    ``bind`` says what a call is given for an operand, at a port. The register after the program's own is for the state
    of the random generator.
    """

    start = reach = 0
    calls: tuple = ()

    def __init__(self, rolled: Program, bind: Callable[[Operand, Port], Any], lowering: Lowering) -> None:
        self.rolled, self.bind, self.lowering = rolled, bind, lowering
        sizes = [len(calls_of(c)) * (c.count if isinstance(c, Loop) else 1) for c in rolled.calls]
        self._ends = list(accumulate(sizes))
        self.end = self._ends[-1] if sizes else 0
        self._begins = [end - size for end, size in zip(self._ends, sizes, strict=True)]
        self._first: dict[tuple[int, int], tuple[StepCall, list[Moving]]] = {}

    def __getitem__(self, position: int) -> StepCall:
        at = bisect_right(self._ends, position)
        iteration, k = divmod(position - self._begins[at], len(calls_of(self.rolled.calls[at])))
        call, moving = self._first.get((at, k)) or self._bind(at, k)
        if not iteration:
            return call
        inputs, metas = list(call.inputs), list(call.metas)
        for i, given, meta, value in moving:
            inputs[i] = value(iteration)
            if meta >= 0:
                metas[meta] = _target(given.after(iteration))
        return _with(call, inputs, metas, call.rng, call.lowering)

    def takes_step(self, position: int) -> bool:
        """Whether an inner step is taken there."""
        at = bisect_right(self._ends, position)
        calls = calls_of(self.rolled.calls[at])
        return calls[(position - self._begins[at]) % len(calls)].step.steps > 0

    def _bind(self, at: int, k: int) -> tuple[StepCall, list[Moving]]:
        """A call in its first iteration, and which inputs move."""
        call = calls_of(self.rolled.calls[at])[k]
        given: list[Operand] = call.inputs
        ports = call.step.inputs[call.step.states :]
        metas, moving = [], []
        for i, (g, port) in enumerate(zip(given, ports, strict=True)):
            meta = len(metas) if port.role is Role.META else -1
            if meta >= 0:
                metas.append(_target(g))
            if g.stride:
                moving.append((i, g, meta, self._moving(g, port)))
        inputs = [self.bind(g, port) for g, port in zip(given, ports, strict=True)]
        rng = self.rolled.registers if any(g.kind == "noise" for g in given) else -1
        first = _with(call, inputs, metas, rng, self.rolled.lowering_of(call.step, self.lowering))
        self._first[at, k] = first, moving
        return first, moving

    def _moving(self, given: Operand, port: Port) -> Callable[[int], Any]:
        """Iteration -> what a call is given there."""
        if given.kind != "scan":
            return lambda iteration: self.bind(given.after(iteration), port)
        rows, at, stride = self.bind(Operand("input", given.of), port), given.at, given.stride
        return lambda iteration: rows[at + stride * iteration]


def _with(call: StepCall, inputs: list[Any], metas: list[Any], rng: int, lowering: Lowering) -> StepCall:
    """A call of the same step, by hand: one is made for every step that runs."""
    return StepCall(
        call.step, call.reads, call.writes, inputs, call.location, call.back, tuple(metas), rng, lowering
    )


def bound(held: dict[Input, Tensor], given: Operand, port: Port) -> Tensor | Noise:
    """What a call is given for an operand, the program's inputs being ``held``."""
    given = given.chosen
    if given.kind == "noise":
        return given.of
    if given.kind == "number":
        return torch.tensor(given.of, dtype=port.spec.dtype)
    tensor = held[given.of]
    return tensor[given.at] if given.kind == "scan" else tensor


def _target(given: Operand) -> Any:
    """Where the gradient of what a call is given goes: an input, or a slice of one."""
    given = given.chosen
    return (given.of, given.at) if given.kind == "scan" else given.of


class Run:
    """One call of a compiled function.

    Args:
        rolled: its program.
        tensors: the tensors behind the program's inputs.
        lowering: the backend and HVP mode of the step graphs.
        kept: what is kept for the backward.
        written: tensors that this call will overwrite when it has run; what is read of them is copied.
        rehearsal: whether it is run to find out something: then the process's random generator stays where it is, and
            the user's hook is not called.
        lower: gives a call's graph as a callable.
    """

    def __init__(
        self,
        rolled: Program,
        tensors: dict[Input, Tensor],
        lowering: Lowering,
        kept: Kept,
        written: Sequence[Tensor] = (),
        rehearsal: bool = False,
        lower: Lower = lowered_for,
    ) -> None:
        self.rolled, self.rehearsal = rolled, rehearsal
        overwritten = {id(t) for t in written}
        self.held = {key: snapshot(t, t.requires_grad or id(t) in overwritten) for key, t in tensors.items()}
        self.generator = generator_for(rolled)
        values = {key: held.tensor.detach() for key, held in self.held.items()}
        self.program = BoundProgram(rolled, partial(bound, values), lowering)
        check_device(kept.offload, [x.spec.device for x in rolled.inputs])
        tier = None if kept.slots is None else tier_for(kept.offload)
        hook = measuring_hook if rehearsal else rolled.backward_hook
        self.engine = Engine(kept.slots, hook, self.program, tier, lower)
        self.engine.saving = self.program.end - kept.saved
        self.engine.begin = self.program.end - rolled.swept

    def forward(self) -> list[Tensor]:
        """The function's outputs; what it leaves in tensors from outside is in `last`."""
        state: list[Any] = [None] * (self.rolled.registers + 1)
        if self.generator is not None:
            state[-1] = self.generator.get_state()
        with unaffected():
            self.engine.stream.first = not self.rehearsal
            try:
                state = self.engine.run(state)
            except BaseException:
                if self.engine.tier is not None:
                    self.engine.tier.close("the call has ended with an exception")
                raise
            finally:
                self.engine.stream.first = False
            self.last = [(target, self._found(where, state)) for target, where in self.rolled.writes]
            return [self._found(where, state).clone() for where in self.rolled.outputs]

    def _found(self, where: int | Input, state: list[Tensor]) -> Tensor:
        return state[where] if isinstance(where, int) else self.held[where].tensor.detach()

    def backward(self, cotangents: Sequence[Tensor | None]) -> dict[Input, Tensor]:
        """Gradients of the inputs, from cotangents of the outputs."""
        for held in self.held.values():
            held.get()  # raises for what was overwritten
        sweep = sweep_over(self.rolled, self._zeros)
        for where, cotangent in zip(self.rolled.outputs, cotangents, strict=True):
            if cotangent is not None and isinstance(where, int):
                sweep.deposit(self.program.end, where, cotangent)
        self.engine.pull_back(sweep, 0)
        return sweep.gradients()

    def _zeros(self, source: Input) -> Tensor:
        return torch.zeros_like(self.held[source].tensor, memory_format=torch.contiguous_format)


def sweep_over(rolled: Program, zeros: Callable[[Input], Any]) -> GradientSweep:
    """A sweep over a program, truncated where it says so; ``zeros`` are like an input."""
    if rolled.window is None:
        return GradientSweep(zeros)
    return TruncatedSweep(zeros, rolled.window, rolled.offline)


def generator_for(rolled: Program) -> torch.Generator | None:
    """The process's generator that a program draws from, or None."""
    devices = [g.of.spec.device for call, _ in rolled.counted() for g in call.inputs if g.kind == "noise"]
    return generator_of(devices[0]) if devices else None


class Call(torch.autograd.Function):
    """A compiled function as a node of the user's graph: it may be pulled back any number of times, once deep."""

    @staticmethod
    def forward(ctx: Any, run: Run, keys: Sequence[Input], dead: Sequence[int], *tensors: Tensor) -> tuple:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.run, ctx.keys = run, keys
        outputs = tuple(run.forward())
        ctx.mark_non_differentiable(*(outputs[i] for i in dead))
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:  # type: ignore[override]
        refuse_third_order()
        grads = ctx.run.backward(cotangents)
        tensors = [ctx.run.held[key].tensor for key in ctx.keys]
        return None, None, None, *defined([grads.get(key) for key in ctx.keys], hooked(tensors))
