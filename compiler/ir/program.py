"""A whole function as calls of step graphs on registers: what the passes arrive at and the engine runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .calls import Loop, StepCall, calls_of
from .retention import UNSAID, Retention
from .step import Lowering, Role, StepGraph
from .tensors import nbytes
from .text import plural, program_text, step_name
from .trace import Input


@dataclass(frozen=True)
class Kept:
    """What of an inner loop is kept for its derivative.

    Attributes:
        slots: how many states at a time, others being made again; None for all.
        saved: over how many of the last calls residuals are.
        offload: where states go that have no slot; see `metaoptim.compile`.
    """

    slots: int | None = None
    saved: int = 0
    offload: str | os.PathLike[str] | None = None

    def __str__(self) -> str:
        text = "every state" if self.slots is None else f"at most {plural(self.slots, 'state')}"
        text += f", residuals of the last {plural(self.saved, 'call')}" if self.saved else ""
        return text + ("" if self.offload is None else f", others in {os.fspath(self.offload)}")


class Calls:
    """Calls of step graphs, those of loops once: what a program is, of a function or of a window."""

    def counted(self) -> Iterator[tuple[StepCall, int]]:
        """Each call, and how many times it is made."""
        raise NotImplementedError

    @property
    def horizon(self) -> int:
        """Number of inner steps."""
        return sum(count * call.step.steps for call, count in self.counted())

    @property
    def step_graphs(self) -> list[StepGraph]:
        """The distinct step graphs, in order of appearance."""
        return list({id(call.step): call.step for call, _ in self.counted()}.values())

    def names(self) -> dict[int, str]:
        """Id of a step graph -> its name in the text."""
        return {id(g): step_name(i) for i, g in enumerate(self.step_graphs)}


@dataclass
class Program(Calls):
    """A whole function as calls on registers.

    Attributes:
        calls: in order.
        registers: how many values are alive at most.
        outputs, writes: where what the function returns, and what it leaves in tensors from outside, is found in the
            end: a register, or an `Input` passed through.
        dead: places of the outputs that carry no gradient.
        retention, backward_hook: options of its windows.
        kept: what the pass checkpoint has decided on.
        compiled: ids of the step graphs that go through the compiler, as the pass lower has decided; None for all.
        window: W, where gradients are truncated.
        offline: whether a window's own parameters receive a gradient.
    """

    calls: list[StepCall | Loop] = field(default_factory=list)
    registers: int = 0
    outputs: list[int | Input] = field(default_factory=list)
    writes: list[tuple[Any, int | Input]] = field(default_factory=list)
    dead: tuple[int, ...] = ()
    retention: Retention = UNSAID
    backward_hook: Callable[..., Any] | None = None
    kept: Kept | None = None
    compiled: frozenset[int] | None = None
    window: int | None = None
    offline: bool = False

    def lowering_of(self, step: StepGraph, stated: Lowering) -> Lowering:
        """The lowering of one of its step graphs, where ``stated`` is asked for."""
        if self.compiled is None or id(step) in self.compiled:
            return stated
        return replace(stated, backend="eager")

    @property
    def positions(self) -> int:
        """Number of calls when it runs, those of its loops one by one."""
        return sum(count for _, count in self.counted())

    @property
    def swept(self) -> int:
        """Over how many of its last positions a backward goes back, besides what comes before the inner steps.

        All of them, unless gradients are truncated and no loss lies between the steps.
        """
        _, inner, after = self._stretches()
        if self.window is None or self.loss_between or self.window >= sum(count for _, count in inner):
            return self.positions
        return self.window + sum(count for _, count in after)

    @property
    def loss_between(self) -> bool:
        """Whether a cotangent may come from between the inner steps."""
        return any(
            not step.steps or any(p.role is Role.CARRY and p.differentiable for p in step.outputs)
            for step, _ in self._stretches()[1]
        )

    def _stretches(self) -> tuple[list[tuple[StepGraph, int]], ...]:
        """Step graphs and how often they are called: before the inner steps, from the first to the last, after them."""
        items = [(call.step, count) for call, count in self.counted()]
        taking = [i for i, (step, _) in enumerate(items) if step.steps]
        first, end = (taking[0], taking[-1] + 1) if taking else (len(items), len(items))
        return items[:first], items[first:end], items[end:]

    @property
    def state_bytes(self) -> int:
        """Bytes in the registers, when there are most."""
        sizes: dict[int, int] = {}
        most = 0
        for call, _ in self.counted():
            for k, register in enumerate(call.writes):
                if register >= 0:
                    sizes[register] = nbytes(call.step.outputs[k].spec)
            most = max(most, sum(sizes.values()))
        return most

    @property
    def inputs(self) -> list[Input]:
        """What it reads of tensors from outside, in the order they are met."""
        given = [x for call, _ in self.counted() for g in call.inputs for x in g.sources]
        found = [*given, *self.outputs, *(where for _, where in self.writes)]
        return list({id(x): x for x in found if isinstance(x, Input)}.values())

    def counted(self) -> Iterator[tuple[StepCall, int]]:
        """Each call, and how many times it is made."""
        for item in self.calls:
            for call in calls_of(item):
                yield call, item.count if isinstance(item, Loop) else 1

    def text(self, inputs: Mapping[Input, str] | None = None, *, operators: bool = False) -> str:
        """See `text.program_text`."""
        return program_text(self, inputs, operators=operators)

    def __str__(self) -> str:
        return self.text()
