"""A window under a memory budget: how many states it may keep, decided as it goes, since nobody knows its length."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metaoptim.compiler.compat import disable_current_modes, profiling
from metaoptim.compiler.cost.step import check_bytes, measured, residual_cost, step_cost
from metaoptim.compiler.derive.interpret import hooking, measuring_hook
from metaoptim.compiler.ir.programs.calls import Assign, StepCall
from metaoptim.compiler.ir.step import Role
from metaoptim.compiler.ir.tensors import memory_key, memory_of, nbytes
from metaoptim.compiler.ir.text import plural, readable_bytes
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.compiler.lower.derivatives import lowered, residuals
from metaoptim.errors import BudgetError

from ..engine.engine import Engine
from ..engine.ledger import Ledger
from .amounts import budget_bytes, default_budget, tell_default
from .measure import metered
from .peaks import REPEATS, Peaks, larger, window_peaks


class Streaming:
    """Keeps a window to its budget: states are given up when inputs that only the window holds take their room.

    As long as half of the budget would do for everything, nothing is planned and every state is kept. A budget of None
    is half of the free memory, and no promise: where not even one state fits, one is kept. In a ``sliding`` window each
    read of theta sweeps by itself, beside the cotangents that it was given.
    """

    def __init__(
        self, budget: int | float | str | None, ledger: Ledger, offload: bool = False, sliding: bool = False
    ) -> None:
        self._budget, self.offload, self.ledger = budget, offload, ledger
        self.budget = -1  # bytes, when the device is known
        self.aside = 0  # bytes kept beside the tape: gradients to put back, buffers that modules show, ...
        self.waiting = 0  # bytes of cotangents of earlier losses
        self._thetas = 2 if sliding else 1
        # bytes of theta beside the current one: the last, for a loss; what it was given, if sliding
        self._shown = 0
        self._tape = 0  # bytes of parameters kept for the user at every step
        self._set = 0  # bytes of values that entries of the state were set to
        self._set_to: set[int] = set()  # their memory: many calls may set to the same
        self._gradients = 0  # bytes of gradients of meta-parameters
        self._states = 0  # bytes of all states so far, at most
        self._sweep = 0  # bytes that a sweep takes beside states, at most
        self._growth = 0  # most bytes that a step adds to what grows
        self._counted = 0  # bytes of what grows at the last step
        self._met = -1  # the last meta-parameter that steps have read
        self._taken: Counter = Counter()  # how often each step was taken
        self._written: Counter = Counter()  # which entries were set from outside, how often
        self._start = 0  # of the program, when its inputs were last counted
        # of each kind of step: those of a call, with what runs beside them, and what the check of their graphs takes
        self._residual_bytes: dict[int, tuple[int, int]] = {}
        self._room = 0  # what of the half in which nothing is planned is left, doubled
        self.saved = 0  # bytes of residuals
        self.saving = True  # whether there is still room for any
        self._replayed = 0  # bytes of residuals that a replay makes of a step that ran with them, at most
        self._peaks: Peaks | None = None
        self._known: dict[Any, Any] = {}  # the step is held: its id stays its own
        self._planned: set[Any] = set()  # kinds of steps that peaks were foreseen for
        self._slots = sys.maxsize
        self._told = False  # that states are given up although nobody has said so

    @property
    def acts(self) -> bool:
        """Whether the user has stated the budget, or states are given up for it."""
        return self._budget is not None or self._peaks is not None

    # -- what comes ------------------------------------------------------------------------------------------------

    def saves(self, engine: Engine, call: StepCall) -> bool:
        """Whether there is ample room for the residuals of one more call."""
        if not self.saving or self._peaks is not None or self.offload:
            return False
        if self.budget < 0:
            self._look(engine)
            self._room = self.budget - 2 * self._held
        step = call.step
        found = self._residual_bytes.get(id(step))
        if found is None:
            found = self._residual_bytes[id(step)] = _cost_of_residuals(call)
        kept, checked = found
        return kept >= 0 and 2 * (kept + checked) <= self._room

    def slots(self, engine: Engine, call: StepCall, changes: Sequence[tuple[int, Tensor]]) -> int | None:
        """How many states may be kept when ``call`` is appended, which makes ``changes``; None for all."""
        self._look(engine)
        kind = _kind(call)
        if kind not in self._known:
            made = memory_of(value for _, value in changes)
            self._known[kind] = call.step, made
            self._meet(engine, call, made)
        self._take(call)
        self._growth = max(self._growth, self._grown - self._counted)
        self._counted = self._grown
        if self._peaks is None:
            self._states += self._known[kind][1]
        return self._decided(engine, [call])

    def _look(self, engine: Engine) -> None:
        """See what the budget is, when the device is known."""
        if self.budget < 0:
            device, stated = engine.state[0].device, self._budget
            self.budget = default_budget(device) if stated is None else budget_bytes(stated, device)
            self._states = memory_of(engine.state)

    def slots_between(self, engine: Engine, refusing: bool) -> int | None:
        """How many states may be kept between steps, and before a sweep, where something has come to be held."""
        if self.budget < 0 or (self._budget is None and not refusing):
            return None
        self.ledger.look()
        return self._decided(engine, [], refusing)

    def assigned(self, call: Assign, begun: bool) -> None:
        """``call`` sets entries of the state to values from outside, which a replay sets them to again.

        ``begun``: steps have come before; peaks are predicted by what comes before the first one.
        """
        size = memory_of(call.values)
        self._states += size
        self._written[call.indices] += 1
        if begun or (not call.adoption and self._written[call.indices] > REPEATS):
            self._set += memory_of(v for v in call.values if memory_key(v) not in self._set_to)
            self._set_to.update(map(memory_key, call.values))

    def keep(self, values: Sequence[Tensor]) -> None:
        """The step at hand makes the window keep these beside the tape."""
        self._tape += memory_of(values)

    def _take(self, call: StepCall) -> None:
        """A step reads its inputs; a sweep holds gradients of those that it was the first to read.

        Peaks show those of a few steps.
        """
        self.ledger.take(call.inputs)
        if call.saved and self.saving:
            kept, _ = self._residual_bytes[id(call.step)]
            self.saved += kept
            self._replayed = max(self._replayed, kept)
        self._taken[id(call.step)] += 1
        if max(call.metas, default=-1) <= self._met:
            return
        if self._taken[id(call.step)] > REPEATS:
            ports = zip(call.metas, call.step.metas, strict=True)
            self._gradients += sum(nbytes(call.step.inputs[i].spec) for n, i in ports if n > self._met)
        self._met = max(call.metas)

    def _recount(self, engine: Engine, more: Sequence[StepCall]) -> None:
        """Count anew what the tape holds, of which a sliding window has forgotten some."""
        self._start = engine.program.start
        self.ledger.restart()
        self._written.clear()
        self._taken.clear()
        self._met, self._set, self._gradients, self.saved = -1, 0, 0, 0
        self._set_to.clear()
        begun = self._start > 0
        for past in (*engine.program, *more):
            if isinstance(past, StepCall):
                begun = True
                self._take(past)
            else:
                self.assigned(past, begun)
        self._counted = self._grown

    # -- what it comes to ------------------------------------------------------------------------------------------

    @property
    def _grown(self) -> int:
        """Bytes of what may become more with every step."""
        return self.ledger.bytes + self._set + self._tape + self._gradients

    @property
    def beside(self) -> int:
        """Bytes held beside states and derivatives: inputs, the theta shown before, what is to be put back."""
        return self._grown + self._shown + self.waiting + self.aside + self._replayed

    def minimum(self, engine: Engine) -> int:
        """The smallest budget for the steps so far."""
        return self.beside + self._foreseen(engine, list(engine.program)).least

    def _decided(self, engine: Engine, more: Sequence[StepCall], refusing: bool = True) -> int | None:
        """How many states may be kept, ``more`` being not on the tape yet; where none may, a `BudgetError` is raised.

        Not so if a budget that nobody has stated is too small, or it is too late for ``refusing``: then it is one.
        """
        if self._peaks is None and self._roomy(engine, more):
            return None
        if self.saved:
            engine.drop_residuals()
            self.saved, self.saving = 0, False
            return self._decided(engine, more, refusing)
        if self._peaks is None or any(_kind(c) not in self._planned for c in more):
            calls = [*engine.program, *more]
            self._peaks = self._foreseen(engine, calls)
            self._planned.update(_kinds(calls))
        slots = self._fitting(self._peaks)
        if slots < self._slots and engine.program.start > self._start:
            self._recount(engine, more)
            slots = self._fitting(self._peaks)
        self._slots = slots = slots if refusing else max(slots, 1)
        if self._budget is None:
            slots = max(slots, 1)
            if slots <= len(engine.store) and not self._told:
                self._told = True
                steps = plural(engine.program.horizon, "inner step")
                tell_default(f"this window, after {steps},", self.budget)
        if slots >= 1:
            return slots
        horizon = engine.program.horizon
        at = f"at inner step {horizon + 1}" if more else f"after {horizon} steps"
        minimum, grown = self.minimum(engine), ""
        if self._grown:
            grown = (
                f"; {readable_bytes(self._grown)} of it grow with the steps (values written into parameters, inputs "
                "that only the window holds: keep the batches in one tensor and pass slices of it)"
            )
        raise BudgetError(
            f"memory_budget: {readable_bytes(self.budget)} ({self.budget} bytes) is too small {at}: the smallest "
            f"feasible budget so far is {minimum} bytes ({readable_bytes(minimum)}){grown}",
            minimum,
        )

    def _roomy(self, engine: Engine, more: Sequence[StepCall]) -> bool:
        if self.offload:
            return False  # where a segment begins depends on the slots there are
        self._room = self.budget - 2 * self._held
        if self._room >= 0:
            return True
        if engine.program.start > self._start:
            self._recount(engine, more)
        self._states = memory_of(t for state in engine.store.states for t in state)
        # as much again must go by before they are counted once more
        return 4 * self._held <= self.budget

    @property
    def _held(self) -> int:
        """Bytes where every state is kept."""
        return self._states + self.saved + self.beside + self._growth + self._sweep

    def _fitting(self, peaks: Peaks) -> int:
        room = self.budget - self.beside
        # when states are next given up, the inputs of one more step are there
        few = 2 if self.offload else 1
        return peaks.fitting(room - self._growth, self._slots) or peaks.fitting(room, few)

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

    # -- a step that was not met before ----------------------------------------------------------------------------

    def _meet(self, engine: Engine, call: StepCall, made: int) -> None:
        """A step that was not met before, which makes so many bytes of a new state."""
        self._shown = max(self._shown, self._thetas * memory_of(engine.state[i] for i in call.theta))
        if self._budget is None and not call.step.dynamic:
            return  # half of the free memory is no promise, and there may never be a backward
        self._make_room(engine, call)
        _measure(engine, call)
        metas, drawn = (
            sum(nbytes(p.spec) for p in call.step.inputs if p.role is role)
            for role in (Role.META, Role.NOISE)
        )
        works = step_cost(call.step, call.lowering).vjp_bytes + drawn
        self._sweep = max(self._sweep, works + 4 * (memory_of(engine.state) + made) + 3 * metas)

    def _make_room(self, engine: Engine, call: StepCall) -> None:
        """Compiling a derivative, and comparing it with the graph it is compiled from, takes more than running it."""
        lowering = call.lowering
        if (
            lowering.backend_of("vjp") == "eager"
            or not lowering.check
            or measured(call.step, "vjp", lowering)
        ):
            return
        needed = self.beside + check_bytes(call.step, lowering)
        state = memory_of(engine.state)
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


def _cost_of_residuals(call: StepCall) -> tuple[int, int]:
    """Bytes of a call's residuals (-1: it has none), with what runs beside them, and of their graphs' check."""
    step, lowering = call.step, call.lowering
    divided = residuals(step, lowering.hvp)
    if divided is None:
        return -1, 0
    # results that are no part of the state die with the call, unless they are residuals
    mine = [i for i in divided.residuals if i < len(call.writes) and call.writes[i] < 0]
    kept = sum(residual_cost(step, lowering)) + sum(nbytes(step.outputs[i].spec) for i in mine)
    checks = lowering.check and lowering.backend_of("backward") != "eager"
    return kept, check_bytes(step, lowering) if checks else 0


def _kind(call: StepCall) -> Any:
    return id(call.step), call.lowering


def _kinds(calls: Sequence[StepCall | Assign]) -> dict[Any, int]:
    """Each kind of step -> how many calls there are up to its first."""
    found: dict[Any, int] = {}
    for end, call in enumerate(calls, start=1):
        if isinstance(call, StepCall):
            found.setdefault(_kind(call), end)
    return found


def _measure(engine: Engine, call: StepCall) -> None:
    """Derive a step that was not met before, on what it is given now, and run that once, to see what it takes."""
    if measured(call.step, "vjp", call.lowering) is not None:
        return
    with disable_current_modes(), unaffected(), hooking(measuring_hook):
        base = engine.state_at(engine.position - call.back) if call.back else engine.state
        inputs = engine.operands(call, engine.state, base, engine.position)
        inputs += [call.step.outputs[i].spec.empty().zero_() for i in call.step.cotangents]
        program = lowered(call.step, "vjp", inputs, call.lowering)
        if not profiling():
            metered(program, call, "vjp", 0, *inputs)
