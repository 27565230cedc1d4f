"""A window under a memory budget: how many states it may keep, decided as it goes, since nobody knows its length."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from metaoptim.errors import BudgetError

from ..compiler.differentiate import cotangent_outputs
from ..compiler.ir import Assign, Role, StepCall
from ..compiler.lower import lowered
from ..compiler.program import nbytes, readable_bytes
from ..compiler.recorded_program import Program
from ..compiler.stepcost import measured
from .budget import budget_bytes
from .dry_run import predict_sweep
from .engine import Engine
from .inputs import Held, Memory
from .meter import profiling
from .noise import GENERATOR_BYTES
from .planner import FEW_SLOTS, MANY, Peaks
from .rehearsal import metered

_REPEATS = 2  # of each step, before the last one repeats


class Streaming:
    """Keeps a window to its budget: states are given up when inputs that only the window holds take their room.

    Args:
        budget: bytes, text or a fraction; see `budget_bytes`.
        offload: whether states without a slot go to a lower tier.
    """

    def __init__(self, budget: int | float | str, offload: bool = False) -> None:
        self._budget, self.offload = budget, offload
        self.budget = -1  # bytes, when the device is known
        self.retained = Retained()
        self.aside = 0  # bytes kept beside the tape: gradients to put back, buffers that modules show
        self._shown = 0  # bytes of the theta before the current one, which a loss may still read
        self._growth = 0  # most bytes of inputs that a step adds
        self._peaks: Peaks | None = None
        self._known: dict[Any, Any] = {}  # the step is held: its id stays its own
        self._start = 0  # of the program, when its inputs were last counted
        self._slots = sys.maxsize

    def slots(self, engine: Engine, call: StepCall) -> int:
        """How many states may be kept when ``call`` is appended.

        Raises:
            BudgetError: if not even one may.
        """
        if self.budget < 0:
            self.budget = budget_bytes(self._budget, engine.state[0].device)
        key = id(call.step), call.how
        if key not in self._known or self._peaks is None:
            self._known[key] = call.step
            _measure(engine, call)
            theta = (p.spec for p in call.step.inputs if p.role is Role.THETA)
            self._shown = max(self._shown, sum(map(nbytes, theta)))
            calls = [*engine.program, call]
            # with a tier, it is a matter of how many steps there are after the last state that went there
            lengths = range(MANY, MANY + FEW_SLOTS + 1) if self.offload else [MANY]
            programs = [_repeated(calls, length) for length in lengths]
            initial = engine.state if engine.program.start else []  # what has made it may be forgotten
            found = Peaks(
                lambda k: max(
                    predict_sweep(p, k, self.offload, initial).peak_bytes for p in programs[: k + 1]
                )
            )
            former = self._peaks
            self._peaks = found if former is None else Peaks(lambda k: max(found.exact(k), former.exact(k)))
        before = self.retained.bytes
        self.retained.take(call.inputs)
        self._growth = max(self._growth, self.retained.bytes - before)
        slots = self._fitting()
        if slots < self._slots and engine.program.start > self._start:  # a sliding window has forgotten some
            self._start = engine.program.start
            self.retained = Retained()
            for past in (*engine.program, call):
                if isinstance(past, StepCall):
                    self.retained.take(past.inputs)
            slots = self._fitting()
        self._slots = slots
        if slots < 1:
            minimum = self.minimum
            raise BudgetError(
                f"memory_budget: {readable_bytes(self.budget)} ({self.budget} bytes) is too small at inner step "
                f"{engine.program.horizon + 1}: up to here the smallest feasible budget is {minimum} bytes "
                f"({readable_bytes(minimum)}), of which {readable_bytes(self.retained.bytes)} are inputs of inner "
                "steps that only the window holds, or may hold once you let go of them; keep the batches in one tensor "
                "of yours and pass slices of it, or raise the budget",
                minimum,
            )
        return slots

    @property
    def beside(self) -> int:
        """Bytes held beside states and derivatives: inputs, the theta shown before, what is to be put back."""
        return self.retained.bytes + self._shown + self.aside

    @property
    def minimum(self) -> int:
        """The smallest budget for the steps so far."""
        return self.beside + (0 if self._peaks is None else self._peaks.least)

    def _fitting(self) -> int:
        assert self._peaks is not None
        room = self.budget - self.beside
        # when states are next given up, the inputs of one more step are there
        return self._peaks.fitting(room - self._growth, self._slots) or self._peaks.fitting(
            room, 2 if self.offload else 1
        )


def _measure(engine: Engine, call: StepCall) -> None:
    """Run the derivative of a step that was not met before, once, to see what it takes."""
    if measured(call.step, "vjp", call.how) is not None or profiling():
        return
    with _disable_current_modes(), torch.no_grad():
        base = engine.state_at(engine.position - call.back) if call.back else engine.state
        inputs = engine.inputs_of(call, engine.state, base)
        inputs += [call.step.outputs[i].empty().zero_() for i in cotangent_outputs(call.step)]
        metered(lowered(call.step, "vjp", inputs, call.how), call, "vjp", inputs)


def _repeated(calls: Sequence[StepCall | Assign], times: int) -> Program:
    """A program as long as `Peaks` needs, of which ``calls`` are the beginning.

    A few calls of every kind are left, and the last super-step repeats, so many times.
    """
    seen: Counter = Counter()
    chosen: list[StepCall | Assign] = []
    for call in calls:
        kind = tuple(call.indices) if isinstance(call, Assign) else id(call.step)
        seen[kind] += 1
        if seen[kind] <= _REPEATS:
            chosen.append(call)
    last = [c for c in reversed(calls) if isinstance(c, StepCall)]
    end = next((i for i, c in enumerate(last) if not c.back), len(last) - 1)
    chosen += last[end::-1] * times
    return Program(
        0, [replace(c, back=min(c.back, i)) if isinstance(c, StepCall) else c for i, c in enumerate(chosen)]
    )


class _Kept:
    """What is held of one piece of memory.

    Attributes:
        memories: ids of what refers to it, each by one tensor.
        last: the one that came last, weakly.
    """

    __slots__ = ("last", "memories")

    def __init__(self) -> None:
        self.memories: set[int] = set()
        self.last: Any = None

    def add(self, memory: Memory) -> None:
        self.memories.add(id(memory))
        self.last = weakref.ref(memory)

    def others(self, tensor: Tensor) -> int:
        """How many tensors of somebody else's refer to it, of which ``tensor`` is one of ours."""
        return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1 - len(self.memories)


class Retained:
    """Bytes of step inputs that only the window holds.

    What somebody else refers to when a step is taken may be dropped later (the variable of a loop), so it is looked at
    again, less and less often. What this step was given counts until it is.
    """

    def __init__(self) -> None:
        self._sure = self._recent = 0
        self._step = 0
        self._memories: dict[int, _Kept | int] = {}  # bytes: they are counted
        self._due: dict[
            int, list[tuple[int, int]]
        ] = {}  # step -> (memory, steps since it was last looked at)

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return self._sure + self._recent

    def take(self, inputs: Sequence[Any]) -> None:
        """A step reads ``inputs``."""
        self._step += 1
        self._recent = 0
        for key, age in self._due.pop(self._step, ()):
            self._look(key, age)
        for held in inputs:
            if not isinstance(held, Held):
                self._sure += GENERATOR_BYTES  # from which it is drawn again
                continue
            tensor = held.memory.tensor
            if tensor.layout is not torch.strided:
                self._sure += tensor.nbytes
                continue
            key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
            kept = self._memories.get(key)
            if isinstance(kept, int):  # in a sliding window, it may be other memory in the same place
                self._sure += size - kept
                self._memories[key] = size
            elif kept is None:
                self._memories[key] = kept = _Kept()
                kept.add(held.memory)
                self._look(key, 1)
            else:
                kept.add(held.memory)

    def _look(self, key: int, age: int) -> None:
        kept = self._memories.get(key)
        if not isinstance(kept, _Kept):
            return
        memory = kept.last()
        if memory is None:  # forgotten
            del self._memories[key]
            return
        size, others = memory.tensor.untyped_storage().nbytes(), kept.others(memory.tensor)
        if not others:
            self._memories[key] = size
            self._sure += size
        else:  # a single other one may be a variable, about to be bound to something else
            self._recent += size if age == 1 and others == 1 else 0
            self._due.setdefault(self._step + age, []).append((key, 2 * age))
