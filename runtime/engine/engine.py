"""The engine: appends inner steps to a Tape, replays them, and sweeps cotangents back over them.

It holds detached tensors only, so that autograd nodes may refer to it without a cycle.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaoptim.compiler.compat import disable_current_modes, keeps_graph, queue_callback
from metaoptim.compiler.derive.flat import uncollected
from metaoptim.compiler.derive.interpret import hooking
from metaoptim.compiler.ir.programs.calls import Assign, StepCall
from metaoptim.compiler.ir.programs.program import Tape
from metaoptim.compiler.ir.step import Lowering, Role
from metaoptim.compiler.ir.tensors import TensorSpec, memory_key, memory_of
from metaoptim.compiler.ir.weak import WeakTable
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.compiler.lower.derivatives import Lowered, lowered, residuals, taken
from metaoptim.errors import CaptureError, StaleInputError, WindowError

from ..states.slots import Action, Advance, Slots, State
from ..states.streams import coming, rebase, shrink, slide
from ..states.tier import Tier
from .interpreter import Interpreter, changed, may_keep
from .monitoring import progress, times
from .monitoring.few_bits import tell_of_few_bits
from .noise import Stream
from .sweep import Sweep, Tell

if TYPE_CHECKING:
    from .estimators.evolution import Particles
    from .estimators.tangents import Tangents

Lower = Callable[[StepCall, str, Sequence[Tensor]], Lowered]
Check = Callable[[StepCall, str, Sequence[Tensor]], None]


def lowered_for(call: StepCall, kind: str, operands: Sequence[Tensor]) -> Lowered:
    """One of a call's graphs, as a callable that is called with ``operands`` now."""
    return lowered(call.step, kind, operands, call.lowering, at_once=True)


class Held:
    """Entries of a state that may be gone back to: detached values, and tensors whose history is theirs."""

    def __init__(self, values: list[Tensor], roots: Sequence[Tensor]) -> None:
        self.values, self.roots = values, roots


class Engine(Interpreter):
    """A Tape being recorded, the states kept of it, and its derivative.

    Args:
        slots: how many states may be kept, counting the initial one; None keeps every one.
        backward_hook: applied to the cotangent of each inner gradient.
        program: a complete one, to `run`; None for one that is appended to.
        tier: where states go that have no slot, closed when the engine dies; None gives them up.
        lower: gives a call's graph as a callable; where that is not the usual, it is run to find out something, and
            shows no progress.
    """

    def __init__(
        self,
        slots: int | None = None,
        backward_hook: Callable | None = None,
        program: Any = None,
        tier: Tier | None = None,
        lower: Lower = lowered_for,
    ) -> None:
        tape = Tape()
        super().__init__(tape if program is None else program, Slots(slots, tier))
        if program is None:
            self.keepable = lambda position: may_keep(tape[position])  # without a cycle
        self.tier = tier
        if tier is not None:
            weakref.finalize(self, tier.close)
        self.backward_hook, self._lower = backward_hook, lower
        self.tangents: Tangents | None = None  # in forward mode, what is carried along with the steps
        self.particles: Particles | None = None  # what estimates a gradient in the place of a sweep
        self.check: Check | None = None  # is shown each graph before it runs
        self.streaming: Any = None  # what keeps a window to a memory budget
        self._refused = False  # a step, for want of room
        self.reaches = False  # whether anything can receive a gradient through its steps
        self.thetas: dict[int, int] = {}  # state index -> id of the user's own parameter behind it
        self.closed: set[int] = set()  # ids of those that no gradient reaches
        self._watch = progress.current.get() if lower is lowered_for else None
        self._ran = 0  # calls that `run` has run
        self.later = (
            False  # whether compiled forms are taken over between calls only: a budget was planned without
        )
        self._reached = 0  # up to which position calls have been run
        self._since: dict[
            tuple[int, str], int
        ] = {}  # step and kind of graph -> from where on it ran compiled
        self.stream = Stream()
        self._sweeps: dict[int, Sweep] = {}
        self._memory = WeakTable[Tensor]()
        self._unlisted: list[Tensor] = []  # not in there yet: as a rule nobody ever asks
        # whether residuals go with the first sweep over them; None: as what autograd has saved, without retain_graph
        self.spending: bool | None = None
        self._shared: list[int] = []  # positions of residuals that a state may lie in the memory of
        self.held: weakref.WeakSet[Held] = weakref.WeakSet()  # what may be gone back to

    @property
    def position(self) -> int:
        """The position the state is at."""
        return self.program.end

    # -- forward -------------------------------------------------------------------------------------------------

    def append(
        self, call: StepCall | Assign, changes: Sequence[tuple[int, Tensor]], *, read: bool = False
    ) -> None:
        """Extend the tape by a call that leads to the current state with ``changes``: state index, new value.

        ``read``: a loss may have read theta since the last step, which the tape must then go back to.
        """
        if self.streaming is not None:
            if isinstance(call, Assign):
                self.streaming.assigned(call, self.program.begun)
                self.make_room()
            else:
                self.check_admitted()
                self._limit_to(lambda: self.streaming.slots(self, call, changes))
        if self.tangents is not None:
            self.tangents.through(self, call)
        if may_keep(call) or self.store.slots is None:
            for action in coming(self.store, self.program.end):
                self.store.apply(action, self.state)
        self._unlisted += [value for _, value in changes]
        self.program.append(call)
        self.state = changed(self.state, changes)
        if isinstance(call, Assign) and not self.program.begun and not read:
            for action in rebase(self.store, self.program.end):
                self.store.apply(action, self.state)
            self._list()
        elif self.store.slots is not None:  # states die, and may not be held here
            self._list()

    def _list(self) -> None:
        for value in self._unlisted:
            self._memory[value.untyped_storage()._cdata] = value
        self._unlisted.clear()

    def saves(self, call: StepCall) -> bool:
        """Whether ``call`` runs with residuals, so that its derivative does not run it again.

        As long as every state is kept, and there is ample room; if a sweep is to come at all.
        """
        return self.may_save and self.streaming.saves(self, call)

    @property
    def may_save(self) -> bool:
        """Whether calls run with residuals where there is room."""
        if self.streaming is None or self.store.slots is not None or self.tier is not None:
            return False
        return self.tangents is None and self.particles is None and self.streaming.saving

    def save(self, call: StepCall, results: Sequence[Tensor]) -> None:
        """Keep the residuals among the ``results`` of ``call``, the next one."""
        divided = residuals(call.step, call.lowering.hvp)
        assert divided is not None
        position = self.program.end
        self._residuals[position] = [results[i] for i in divided.residuals]
        if divided.shared:
            self._shared.append(position)

    def release(self, given: Iterable[int]) -> None:
        """Entries ``given`` of the last state are the user's from now on, who may write into them.

        No residual may lie there, nor an earlier state that a step has handed on as it was.
        """
        earlier = set(map(memory_key, self.store[self.store.kept[-1]]))
        for storage in {memory_key(self.state[i]) for i in given} & earlier:
            self.protect(storage)
        shown = set(map(memory_key, self.state))
        for saved in filter(None, map(self._residuals.get, self._shared)):
            saved[:] = [t.clone() if memory_key(t) in shown else t for t in saved]
        self._shared.clear()

    @property
    def saved_calls(self) -> int:
        """Over how many calls there are residuals."""
        return len(self._residuals)

    def drop_residuals(self) -> None:
        """Let derivatives run their steps again."""
        self._residuals.clear()

    def make_room(self, kept: Sequence[Tensor] = (), refusing: bool = True) -> None:
        """Give up states for what has come to be held since the last step, of which ``kept`` lies beside the tape.

        Where that is not enough, a `BudgetError` is raised if ``refusing``; otherwise one state is kept.
        """
        if self.streaming is None or self._refused:
            return
        self.streaming.aside += memory_of(kept)
        if self.streaming.acts:
            with disable_current_modes(), unaffected():
                self._limit_to(lambda: self.streaming.slots_between(self, refusing))

    def _limit_to(self, slots: Callable[[], int | None]) -> None:
        """Keep as many states as ``slots`` says; where it raises, a step is half taken, and the window useless."""
        self._refused = True
        most = slots()
        self._refused = False
        if most is not None:
            self.limit(most)

    def limit(self, slots: int) -> None:
        """Keep no more than ``slots`` states from here on."""
        within: set[int] = set()
        if self.store.slots is None:  # so far, those within super-steps were worth keeping as well
            within = {p for p in range(self.program.start, self.program.end) if not may_keep(self.program[p])}
        self._list()
        self.drop_residuals()
        for action in shrink(self.store, slots, within):
            self.store.apply(action)
        self.store.slots = slots

    def check_admitted(self) -> None:
        """Raise if a step has been refused for want of room."""
        if self._refused:
            raise WindowError(
                "a step of this window was refused for want of room (BudgetError), so its steps can neither go on nor "
                "be differentiated; leave the block, which puts everything back, and begin again with a larger budget"
            )

    def run(self, state: State, actions: Iterable[Action] | None = None) -> State:
        """Run a complete program from its initial state; states are kept as the slots allow."""
        if self._watch is not None:
            watch, total = self._watch, 2 * self.program.end
            self.passing = lambda position: watch(position + 1, total)
        with times.part("loop"), uncollected():
            super().run(state, actions)
        self.passing, self._ran = None, self.program.end
        return self.state

    def holds(self, storage: int) -> bool:
        """Whether a tensor of the tape lies in ``storage``."""
        self._list()
        return self._memory.get(storage) is not None or (self.tier is not None and self.tier.holds(storage))

    def protect(self, storage: int) -> None:
        """Someone is about to write into ``storage``: keep what the tape holds of it."""
        self._list()
        offloaded = self.tier is not None and self.tier.overwritten(storage)
        if self._memory.pop(storage) is None and not offloaded:
            return
        copies: dict[int, Tensor] = {}

        def kept(t: Tensor) -> Tensor:
            if t.untyped_storage()._cdata != storage:
                return t
            if id(t) not in copies:
                copies[id(t)] = copy = t.clone()
                self._memory[copy.untyped_storage()._cdata] = copy
            return copies[id(t)]

        written = [c.values for c in self.program.calls if isinstance(c, Assign)]
        with disable_current_modes(), unaffected():
            held = (h.values for h in self.held)
            for values in [self.state, *self.store.states, *self._residuals.values(), *written, *held]:
                values[:] = [kept(t) for t in values]

    def trim(self, needed: int) -> None:
        """Forget what lies before ``needed``: no sweep will go there."""
        if needed <= self.program.start or needed < self.store.base:
            return
        self._list()
        for action in slide(self.store, needed, self.program.end):
            if isinstance(action, Advance):
                with disable_current_modes(), unaffected():
                    self.carry_out([action])
            else:
                self.store.apply(action)
        if self.store.base > self.program.start:
            for position in range(self.program.start, self.store.base):
                self._residuals.pop(position, None)
            self.program.forget(self.store.base)

    # -- calls ---------------------------------------------------------------------------------------------------

    def _cotangent(self, spec: TensorSpec, cotangent: Tensor | None) -> Tensor:
        """A cotangent as the step's VJP was traced for: zeros for none, with the strides of what it belongs to."""
        shape, dtype, stride, device = spec
        if cotangent is None:
            return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
        if cotangent.stride() == stride or cotangent.layout is not torch.strided:
            return cotangent
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(cotangent)

    def _lowered(self, call: StepCall, kind: str, operands: Sequence[Tensor], position: int) -> Lowered:
        try:
            if self.check is not None:
                self.check(call, kind, operands)
            if kind in ("vjp", "backward") and self._lower is lowered_for:
                tell_of_few_bits(call, operands, self._is_limited)
            with times.part("lower"):
                if self._lower is lowered_for:
                    lowering = call.lowering
                    if lowering.backend in ("inductor", "auto"):
                        lowering = self._taken(call, kind, operands, position)
                    program = lowered(call.step, kind, operands, lowering, at_once=True)
                else:
                    program = self._lower(call, kind, operands)
        except CaptureError as error:
            where = f"of the inner step at {call.location}: " if call.location else ""
            raise CaptureError(f"{where}{error.reason}") from error
        return times.timed(call, kind, program)

    def _is_limited(self) -> bool:
        """Whether memory is limited."""
        return self.store.slots is not None or (self.streaming is not None and self.streaming.acts)

    def _taken(self, call: StepCall, kind: str, operands: Sequence[Tensor], position: int) -> Lowering:
        """How a graph runs: compiled once that is done, but a replay does what the first run of its position did."""
        if kind in ("vjp", "backward", "loss") or isinstance(
            self.program, Tape
        ):  # whose calls say how they have run
            return taken(call.step, kind, operands, call.lowering, self.later)
        graph = id(call.step), kind
        if position < self._reached:
            compiled = position >= self._since.get(graph, sys.maxsize)
            return call.lowering.compiled if compiled else call.lowering.uncompiled
        self._reached = position + 1
        lowering = taken(call.step, kind, operands, call.lowering, self.later)
        if lowering.backend != "eager":
            self._since.setdefault(graph, position)
        return lowering

    def _values(self, call: StepCall, state: State, position: int) -> list[Tensor]:
        """What a call is given besides the state."""
        with times.part("data"):
            return self._inputs(call, state, position)

    def _inputs(self, call: StepCall, state: State, position: int) -> list[Tensor]:
        if call.rng < 0:
            try:
                return [held if isinstance(held, Tensor) else held.get() for held in call.inputs]
            except StaleInputError as error:
                raise StaleInputError(f"the inner step at {call.location}: {error.reason}") from None
        values, self._drawn = self.stream.draw(call.inputs, position, state[call.rng])
        return values

    # -- backward ------------------------------------------------------------------------------------------------

    def sweep_of(self, task: int) -> Sweep:
        """The sweep that belongs to one call of backward."""
        if task not in self._sweeps:
            self._sweeps[task] = Sweep() if self.particles is None else self.particles.sweep()
            queue_callback(lambda: self._sweeps.pop(task, None))
        return self._sweeps[task]

    def pull_back(self, sweep: Sweep, bottom: int, tell: Tell | None = None) -> None:
        """Sweep from the highest deposit (or where the sweep stands) down to ``bottom``; progress is shown."""
        self.check_admitted()
        if sweep.position < 0:
            # for batches, say, that the user has let go of: it is too late to refuse them
            self.make_room(refusing=False)
        if self._watch is not None:
            watch, ran, start = self._watch, self._ran, self.program.start
            tell = lambda position: watch(ran + sweep.top - position, ran + sweep.top - start)
        self.spends = not keeps_graph() if self.spending is None else self.spending
        with times.part("sweep"), disable_current_modes(), unaffected(), hooking(self.backward_hook):
            with uncollected():
                super().pull_back(sweep, bottom, tell)

    def _through(
        self, call: StepCall, position: int, kind: str, received: dict[int, Tensor]
    ) -> Iterable[tuple[Role, Any, Tensor]]:
        if any(spy.removed for spy in call.spies):
            raise CaptureError(
                f"the inner step at {call.location} has a tensor hook that changes a gradient, and that was removed "
                "before the outer loss's backward, which needs it; remove it after that"
            )
        return super()._through(call, position, kind, received)
