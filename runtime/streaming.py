"""A window under a memory budget: how many states it may keep, decided as it goes, since nobody knows its length."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from metaoptim.errors import BudgetError

from ..compiler.differentiate import cotangent_outputs
from ..compiler.ir import Assign, Role, StepCall
from ..compiler.lower import lowered
from ..compiler.program import nbytes, plural, readable_bytes
from ..compiler.stepcost import check_bytes, measured, step_cost
from .budget import budget_bytes, default_budget, tell_default
from .engine import Engine
from .meter import profiling
from .planner import Peaks, larger
from .rehearsal import metered
from .retained import Retained
from .window_peaks import REPEATS, window_peaks


class Streaming:
    """Keeps a window to its budget: states are given up when inputs that only the window holds take their room.

    As long as half of the budget would do for everything, nothing is planned and every state is kept.

    Args:
        budget: bytes, text or a fraction; see `budget_bytes`. None for half of the free memory, which is no promise:
            where not even one state fits, one is kept.
        offload: whether states without a slot go to a lower tier.
        sliding: whether each read of theta sweeps by itself, beside the cotangents that it was given.
    """

    def __init__(
        self, budget: int | float | str | None, offload: bool = False, sliding: bool = False
    ) -> None:
        self._budget, self.offload = budget, offload
        self.budget = -1  # bytes, when the device is known
        self.retained = Retained()
        self.aside = 0  # bytes kept beside the tape: gradients to put back, buffers that modules show
        self._thetas = 2 if sliding else 1
        self._shown = (
            0  # bytes of the theta before the current one, which a loss may still read, and as of ``sliding``
        )
        self._growth = 0  # most bytes of inputs that a step adds
        self._states = 0  # bytes of all states so far, at most
        self._sweep = 0  # bytes that a sweep takes beside states, at most
        self._peaks: Peaks | None = None
        self._known: dict[Any, Any] = {}  # the step is held: its id stays its own
        self._planned: set[Any] = set()  # kinds of steps that peaks were foreseen for
        self._start = 0  # of the program, when its inputs were last counted
        self._counted = 0  # bytes of them at the last step
        self._written: Counter = Counter()  # which entries were set from outside, how often
        self._slots = sys.maxsize
        self._told = False  # that states are given up although nobody has said so

    @property
    def acts(self) -> bool:
        """Whether the user has stated the budget, or states are given up for it."""
        return self._budget is not None or self._peaks is not None

    def slots(self, engine: Engine, call: StepCall, changes: Sequence[tuple[int, Tensor]] = ()) -> int | None:
        """How many states may be kept when ``call`` is appended, which makes ``changes``; None for all.

        Raises:
            BudgetError: if not even one may.
        """
        if self.budget < 0:
            self.budget = self._bytes(engine.state[0].device)
            self._states = sum(t.nbytes for t in engine.state)
        key = id(call.step), call.how
        if key not in self._known:
            self._meet(engine, call, key)
        self.retained.take(call.inputs)
        self._growth = max(self._growth, self.retained.bytes - self._counted)
        self._counted = self.retained.bytes
        if self._peaks is None:
            self._states += sum(value.nbytes for _, value in changes)
            if self._roomy(engine, call):
                return None
        if key not in self._planned:
            calls = [*engine.program, call]
            self._peaks = self._foreseen(engine, calls)
            self._planned.update(_kinds(calls))
        slots = self._fitting()
        if slots < self._slots and engine.program.start > self._start:  # a sliding window has forgotten some
            self._recount(engine, call)
            slots = self._fitting()
        self._slots = slots
        if self._budget is None:
            slots = max(slots, 1)
            if slots <= len(engine.store) and not self._told:
                self._told = True
                tell_default(
                    f"this window, after {plural(engine.program.horizon, 'inner step')},", self.budget
                )
        if slots >= 1:
            return slots
        minimum = self.minimum(engine)
        raise BudgetError(
            f"memory_budget: {readable_bytes(self.budget)} ({self.budget} bytes) is too small at inner step "
            f"{engine.program.horizon + 1}: up to here the smallest feasible budget is {minimum} bytes "
            f"({readable_bytes(minimum)}), of which {readable_bytes(self.retained.bytes)} are inputs of inner "
            "steps, or values written into parameters, that only the window holds, or may hold once you let go of "
            "them; keep the batches in one tensor of yours and pass slices of it, or raise the budget",
            minimum,
        )

    def assigned(self, call: Assign) -> None:
        """Entries of the state are set to values from outside, which a replay sets them to again."""
        self._states += sum(v.nbytes for v in call.values)
        self._written[call.indices] += 1
        if self._written[call.indices] > REPEATS:  # those before are part of what peaks are predicted by
            self.retained.keep(call.values)

    @property
    def beside(self) -> int:
        """Bytes held beside states and derivatives: inputs, the theta shown before, what is to be put back."""
        return self.retained.bytes + self._shown + self.aside

    def minimum(self, engine: Engine) -> int:
        """The smallest budget for the steps so far."""
        return self.beside + self._foreseen(engine, list(engine.program)).least

    def _bytes(self, device: torch.device) -> int:
        return default_budget(device) if self._budget is None else budget_bytes(self._budget, device)

    def _meet(self, engine: Engine, call: StepCall, key: Any) -> None:
        """A step that was not met before."""
        self._known[key] = call.step
        ports = call.step.inputs
        theta, metas, drawn = (
            sum(nbytes(p.spec) for p in ports if p.role is role)
            for role in (Role.THETA, Role.META, Role.NOISE)
        )
        self._shown = max(self._shown, self._thetas * theta)
        if self._budget is None and not call.step.dynamic:
            return  # half of the free memory is no promise, and there may never be a backward
        self._make_room(engine, call)
        _measure(engine, call)
        state = sum(t.nbytes for t in engine.state) + sum(nbytes(p.spec) for p in call.step.outputs)
        works = step_cost(call.step, call.how).vjp_bytes + drawn
        self._sweep = max(self._sweep, works + 4 * state + 3 * metas)

    def _make_room(self, engine: Engine, call: StepCall) -> None:
        """Compiling a derivative, and comparing it with the graph it is compiled from, takes more than running it."""
        if (
            call.how.backend_of("vjp") == "eager"
            or not call.how.check
            or measured(call.step, "vjp", call.how)
        ):
            return
        needed = self.beside + check_bytes(call.step, call.how)
        state = sum(t.nbytes for t in engine.state)
        fits = (self.budget - needed) // max(state, 1)
        if fits < 1:
            raise BudgetError(
                f"memory_budget: {readable_bytes(self.budget)} ({self.budget} bytes) is too small at inner step "
                f"{engine.program.horizon + 1} to compile its derivative and check it, which takes up to "
                f"{needed + state} bytes ({readable_bytes(needed + state)}); raise the budget, or say "
                "self_check=False or backend='eager'",
                needed + state,
            )
        if fits < len(engine.store):
            engine.limit(fits)

    def _roomy(self, engine: Engine, call: StepCall) -> bool:
        if self.offload:
            return False  # where a segment begins depends on the slots there are
        if 2 * (self._states + self.beside + self._growth + self._sweep) <= self.budget:
            return True
        if engine.program.start > self._start:
            self._recount(engine, call)
        self._states = sum({id(t): t.nbytes for state in engine.store.states for t in state}.values())
        # as much again must go by before they are counted once more
        return 4 * (self._states + self.beside + self._growth + self._sweep) <= self.budget

    def _foreseen(self, engine: Engine, calls: Sequence[StepCall | Assign]) -> Peaks:
        """Peaks by the number of slots, whichever kind of step the window goes on with."""
        initial = engine.state if engine.program.start else []  # what has made it may be forgotten
        found = self._peaks
        for kind, end in _kinds(calls).items():
            if kind not in self._planned:
                peaks = window_peaks(calls[:end], initial, self.offload)
                found = peaks if found is None else larger(found, peaks)
        assert found is not None
        return found

    def _recount(self, engine: Engine, call: StepCall) -> None:
        self._start = engine.program.start
        self.retained = Retained()
        self._written.clear()
        for past in (*engine.program, call):
            if isinstance(past, StepCall):
                self.retained.take(past.inputs)
            else:
                self.assigned(past)
        self._counted = self.retained.bytes

    def _fitting(self) -> int:
        assert self._peaks is not None
        room = self.budget - self.beside
        # when states are next given up, the inputs of one more step are there
        return self._peaks.fitting(room - self._growth, self._slots) or self._peaks.fitting(
            room, 2 if self.offload else 1
        )


def _kinds(calls: Sequence[StepCall | Assign]) -> dict[Any, int]:
    """Each kind of step -> how many calls there are up to its first."""
    found: dict[Any, int] = {}
    for end, call in enumerate(calls, start=1):
        if isinstance(call, StepCall):
            found.setdefault((id(call.step), call.how), end)
    return found


def _measure(engine: Engine, call: StepCall) -> None:
    """Derive a step that was not met before, on what it is given now, and run that once, to see what it takes."""
    if measured(call.step, "vjp", call.how) is not None:
        return
    with _disable_current_modes(), torch.no_grad():
        base = engine.state_at(engine.position - call.back) if call.back else engine.state
        inputs = engine.inputs_of(call, engine.state, base, engine.position)
        inputs += [call.step.outputs[i].empty().zero_() for i in cotangent_outputs(call.step)]
        program = lowered(call.step, "vjp", inputs, call.how)
        if not profiling():
            metered(program, call, "vjp", inputs)
