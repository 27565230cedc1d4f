"""The engine: appends inner steps to a Tape, replays them, and sweeps cotangents back over them.

It holds detached tensors only, so that autograd nodes may refer to it without a cycle.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.compat import disable_current_modes, queue_callback
from metaoptim.compiler.derive import cotangent_hook
from metaoptim.compiler.derive.reverse import cotangent_outputs
from metaoptim.compiler.ir.program import memory_of
from metaoptim.compiler.ir.step import Assign, Role, StepCall
from metaoptim.compiler.ir.tape import Tape
from metaoptim.compiler.ir.tensors import TensorSpec
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.compiler.lower.derivatives import Lowered, lowered, residuals
from metaoptim.errors import CaptureError, StaleInputError, WindowError

from ..states.schedule import Marks
from ..states.slots import SlotStore, State
from ..states.tier import Tier
from ..states.tiered import TieredStore
from .noise import Stream
from .progress import watching
from .sweep import LOSS, Sweep


class Engine:
    """A Tape being recorded, the states kept of it, and its derivative.

    Args:
        slots: how many states may be kept, counting the initial one; None keeps every one.
        backward_hook: applied to the cotangent of each inner gradient.
        program: a complete one, to `run`; None for one that is appended to.
        tier: where states go that have no slot, closed when the engine dies; None gives them up.
    """

    def __init__(
        self,
        slots: int | None = None,
        backward_hook: Callable | None = None,
        program: Any = None,
        tier: Tier | None = None,
    ) -> None:
        self.program = Tape() if program is None else program
        horizon = None if program is None else program.end
        self.store = SlotStore(slots, horizon) if tier is None else TieredStore(slots, tier)
        self.tier = tier
        if tier is not None:
            weakref.finalize(self, tier.close)
        self.state: State = []
        self.backward_hook = backward_hook
        self.saving = sys.maxsize  # position from which on `run` saves residuals
        self.begin = 0  # no sweep goes back further over inner steps that `run` runs
        self._initial: State = []  # of `run`: what comes before all steps is run again from there
        self.streaming: Any = None  # what keeps a window to a memory budget
        self._refused = False  # a step, for want of room
        self.reaches = False  # whether anything can receive a gradient through its steps
        self.thetas: dict[int, int] = {}  # state index -> id of the user's own parameter behind it
        self.closed: set[int] = set()  # ids of those that no gradient reaches
        # state indices of parameters that no optimizer steps: written into, they are the leaves that they were
        self.untrained: set[int] = set()
        self._watch = watching() if type(self) is Engine else None  # not while it is run to plan
        self._ran = 0  # calls that `run` has run
        self.vjps = 0
        self.replays = 0
        self.stream = Stream()
        self._drawn: Tensor | None = None  # the generator's state after the last call that drew
        self._sweeps: dict[int, Sweep] = {}
        self._work: dict[int, State] = {}
        self._residuals: dict[int, list[Tensor]] = {}
        self._memory: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    @property
    def position(self) -> int:
        """The position the state is at."""
        return self.program.end

    # -- forward -------------------------------------------------------------------------------------------------

    def append(
        self, call: StepCall | Assign, changes: Sequence[tuple[int, Tensor]], *, read: bool = False
    ) -> None:
        """Extend the tape by a call that leads to the current state with ``changes``.

        Args:
            call: the call.
            changes: state index, new value.
            read: whether a loss may have read theta since the last step, which the tape must then go back to.
        """
        position = self.program.end
        if self.streaming is not None:
            if isinstance(call, Assign):
                self.streaming.assigned(call, self.program.begun)
                self.make_room()
            else:
                self._admit(call, changes)
        if _may_keep(call) or self.store.slots is None:
            self.store.offer(position, self.state)
        state = list(self.state)
        for index, value in changes:
            self._memory[value.untyped_storage()._cdata] = value
            if index == len(state):
                state.append(value)
            else:
                state[index] = value
        self.program.append(call)
        self.state = state
        if isinstance(call, Assign) and not self.program.begun and not read:
            self.store.rebase(self.program.end, state)

    def _admit(self, call: StepCall, changes: Sequence[tuple[int, Tensor]]) -> None:
        """Give up states for a step; where even that is not enough, the step is half taken, and the window useless."""
        self.check_admitted()
        self._refused = True
        slots = self.streaming.slots(self, call, changes)
        self._refused = False
        if slots is not None:
            self.limit(slots)

    def limit(self, slots: int) -> None:
        """Keep no more than ``slots`` states from here on."""
        within: set[int] = set()
        if self.store.slots is None:  # so far, those within super-steps were worth keeping as well
            within = {
                p for p in range(self.program.start, self.program.end) if not _may_keep(self.program[p])
            }
        self.store.limit(slots, within)

    def make_room(self, kept: Sequence[Tensor] = (), refusing: bool = True) -> None:
        """Give up states for what has come to be held since the last step.

        Args:
            kept: of it, what lies beside the tape.
            refusing: whether to raise if that is not enough; otherwise one state is kept.
        """
        if self.streaming is None or self._refused:
            return
        self.streaming.aside += memory_of(kept)
        if not self.streaming.acts:
            return
        self._refused = True
        with disable_current_modes(), unaffected():
            slots = self.streaming.slots_between(self, refusing)
        self._refused = False
        if slots is not None:
            self.limit(slots)

    def check_admitted(self) -> None:
        """Raise if a step has been refused for want of room."""
        if self._refused:
            raise WindowError(
                "a step of this window was refused for want of room (BudgetError), so its steps can neither go on nor "
                "be differentiated; leave the block, which puts everything back, and begin again with a larger budget"
            )

    def run(self, state: State) -> State:
        """Run a complete program from its initial state; states are kept as the slots allow."""
        self.store.rebase(0, state)
        self._initial = state
        passed: dict[int, State] = {}
        for position in range(self.program.end):
            call = self.program[position]
            if position == self.begin:
                self.store.rebase(position, state)
            elif position > self.begin and (_may_keep(call) or self.store.slots is None):
                self.store.offer(position, state)
            state = self._advance(call, position, state, passed, saving=position >= self.saving)
            self._ran = position + 1
            if self._watch is not None:
                self._watch(self._ran, 2 * self.program.end)
        if self.tier is not None:
            self.tier.settle()
        self.state = state
        return state

    def holds(self, storage: int) -> bool:
        """Whether a tensor of the tape lies in ``storage``."""
        return storage in self._memory or (self.tier is not None and self.tier.holds(storage))

    def protect(self, storage: int) -> None:
        """Someone is about to write into ``storage``: keep what the tape holds of it."""
        offloaded = self.tier is not None and self.tier.overwritten(storage)
        if self._memory.pop(storage, None) is None and not offloaded:
            return
        copies: dict[int, Tensor] = {}

        def kept(t: Tensor) -> Tensor:
            if t.untyped_storage()._cdata != storage:
                return t
            if id(t) not in copies:
                copies[id(t)] = copy = t.clone()
                self._memory[copy.untyped_storage()._cdata] = copy
            return copies[id(t)]

        with disable_current_modes(), unaffected():
            for values in [
                self.state,
                *self.store.states,
                *self._work.values(),
                *(c.values for c in self.program.items if isinstance(c, Assign)),
            ]:
                values[:] = [kept(t) for t in values]

    def trim(self, needed: int) -> None:
        """Forget what lies before ``needed``: no sweep will go there."""
        start = self.program.start
        if needed <= start or needed < self.store.base:
            return
        base, state = self.store.nearest(needed), None
        if base == self.store.base and needed - base > max(16, self.program.end - needed):
            with disable_current_modes(), unaffected():
                base, state = needed, self._walk(base, needed)
        elif base <= start:
            return
        self.store.rebase(base, state)
        self.program.forget(base)

    # -- states --------------------------------------------------------------------------------------------------

    def _load(self, wanted: Sequence[int]) -> None:
        """Have the states at ``wanted`` (ascending) at hand, for a sweep that has come down to the last of them."""
        self._work = {p: s for p, s in self._work.items() if p in wanted}
        self.store.release(max(wanted[-1], self.store.base))
        for target in wanted:
            if target in self._work or target in self.store:
                continue
            if target < self.store.base:
                self._work[target] = self._walk(0, target)
                continue
            start = self.store.nearest(target)
            at_hand = max((p for p in self._work if p < target), default=start)
            if at_hand > start:
                self._work[target] = self._walk(at_hand, target)
            else:
                self._work[target] = self._walk(start, target, self.store.marks(start, target))

    def _walk(self, start: int, target: int, marks: Marks | None = None) -> State:
        """Replay from ``start``, which is at hand, to ``target``; states at ``marks`` are kept."""
        state, passed = self._at(start), dict[int, State]()
        for p in range(start, target):
            call = self.program[p]
            if marks is not None and _may_keep(call) and marks.due(p):
                self.store.put(p, state)
            state = self._advance(call, p, state, passed)
        return state

    def _at(self, position: int) -> State:
        found = self._work.get(position)
        if found is None:
            found = self._initial if position < self.store.base else self.store[position]
        return found

    def _advance(
        self,
        call: StepCall | Assign,
        position: int,
        state: State,
        passed: dict[int, State],
        saving: bool = False,
    ) -> State:
        """The state after ``call``; ``passed`` has those that a super-step may still read, by position."""
        new = list(state)
        passed[position] = state
        if isinstance(call, Assign):  # after it, a super-step may go on that has begun before it
            for index, value in zip(call.indices, call.values, strict=True):
                if index == len(new):
                    new.append(value)
                else:
                    new[index] = value
            return new
        self.replays += 1
        for old in [q for q in passed if q < position - self.program.reach]:
            del passed[old]
        base = passed.get(position - call.back)
        if base is None:
            base = self.state_at(position - call.back)
        inputs = self.inputs_of(call, state, base, position)
        divided = residuals(call.step, call.lowering.hvp) if saving else None
        results = self._lowered(call, "replay" if divided is None else "forward", inputs)(*inputs)
        if divided is not None:
            self._residuals[position] = [results[i] for i in divided.residuals]
        for index, value in zip((*call.update, *call.opt_state_out), results, strict=False):
            if index == len(new):
                new.append(value)
            elif index >= 0:
                new[index] = value
        if call.rng >= 0:
            new[call.rng] = self._drawn  # type: ignore[call-overload]
        return new

    def _cotangent(self, spec: TensorSpec, cotangent: Tensor | None) -> Tensor:
        """A cotangent as the step's VJP was traced for: zeros for none, with the strides of what it belongs to."""
        shape, dtype, stride, device = spec
        if cotangent is None:
            return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
        if cotangent.stride() == stride or cotangent.layout is not torch.strided:
            return cotangent
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(cotangent)

    def _lowered(self, call: StepCall, kind: str, inputs: Sequence[Tensor]) -> Lowered:
        return lowered(call.step, kind, inputs, call.lowering, at_once=True)

    def state_at(self, position: int) -> State:
        """The state at a position, replayed if it was not kept."""
        if position in self._work or position in self.store:
            return self._at(position)
        return self._walk(self.store.nearest(position), position)

    def inputs_of(self, call: StepCall, state: State, base: State, position: int) -> list[Tensor]:
        """What a call's graphs are given, from the state at its position and the one its loss has read."""
        inputs = [base[i] for i in call.theta]
        if call.step.positions(Role.THETA_NOW):
            inputs += [state[i] for i in call.update]
        inputs += [state[i] for i in call.opt_state_in]
        return inputs + self._values(call, state, position)

    def _values(self, call: StepCall, state: State, position: int) -> list[Tensor]:
        """What it is given besides the state."""
        if call.rng < 0:
            try:
                return [held.get() for held in call.inputs]
            except StaleInputError as error:
                raise StaleInputError(f"the inner step at {call.location}: {error.reason}") from None
        values, self._drawn = self.stream.draw(call.inputs, position, state[call.rng])
        return values

    # -- backward ------------------------------------------------------------------------------------------------

    def sweep_of(self, task: int) -> Sweep:
        """The sweep that belongs to one call of backward."""
        found = self._sweeps.get(task)
        if found is None:
            found = self._sweeps[task] = Sweep()

            def forget() -> None:
                self._sweeps.pop(task, None)

            queue_callback(forget)
        return found

    def pull_back(self, sweep: Sweep, bottom: int) -> None:
        """Sweep from the highest deposit (or where the sweep stands) down to ``bottom``."""
        self.check_admitted()
        if sweep.position < 0:
            # for batches, say, that the user has let go of: it is too late to refuse them
            self.make_room(refusing=False)
        top = max(sweep.deposits, default=bottom)
        if sweep.position < 0 or sweep.position < bottom:
            sweep.position = max(top, bottom)
        if top > sweep.position:
            raise AssertionError(f"a cotangent came for position {top} after the sweep had passed it")
        with self.sweeping():
            sweep.top = max(sweep.top, sweep.position)
            sweep.arrive(sweep.position)
            while sweep.position > bottom:
                position = sweep.position - 1
                call = self.program[position]
                if isinstance(call, Assign):
                    for index in call.indices:
                        if index in self.untrained and not call.adoption:
                            continue
                        arrived = sweep.cotangents.pop(index, None)
                        if call.adoption and arrived is not None:
                            sweep.adopted[position, index] = arrived
                else:
                    self._pull(call, position, sweep)
                sweep.arrive(position)
                self.tell(sweep, position)

    def tell(self, sweep: Sweep, position: int) -> None:
        """A sweep has come down to ``position``: show progress, if anyone watches."""
        if self._watch is not None:
            self._watch(self._ran + sweep.top - position, self._ran + sweep.top - self.program.start)

    @contextmanager
    def sweeping(self) -> Iterator[None]:
        """Circumstances of a sweep; the states it works on are dropped in the end."""
        if self.tier is not None:
            self.tier.settle()  # what waits to be written takes memory
        with disable_current_modes(), unaffected(), cotangent_hook.active(self.backward_hook):
            try:
                yield
            finally:
                self._work = {}
                if self.tier is not None:
                    self.tier.rest()

    def _pull(self, call: StepCall, position: int, sweep: Sweep) -> None:
        of_loss = sweep.cotangents.pop(LOSS, None)
        received = {k: sweep.cotangents.pop(index, None) for k, index in call.changed()}
        found = self.vjp(call, position, received)
        if of_loss is not None:
            found = chain(found, self._through(call, position, "loss", {0: of_loss}))
        for role, index, grad in found:
            if role is Role.META:
                sweep.meta(index, grad)
            elif role is Role.THETA and call.back:
                sweep.deposit(position - call.back, index, grad)
            else:
                sweep.add(index, grad)

    def vjp(
        self, call: StepCall, position: int, received: dict[int, Tensor | None]
    ) -> Iterator[tuple[Role, Any, Tensor]]:
        """Pull cotangents of one call's outputs back through it.

        Args:
            call: the call, at ``position``.
            position: its position.
            received: cotangent by output; those it takes are taken out.

        Yields:
            For each input that has a gradient: its role, its state index or meta-parameter, the gradient.
        """
        if any(c is not None for c in received.values()):
            yield from self._through(call, position, "vjp", received)

    def _through(
        self, call: StepCall, position: int, kind: str, received: dict[int, Tensor | None]
    ) -> Iterator[tuple[Role, Any, Tensor]]:
        """The same through one of a call's graphs: its "vjp", or that of its "loss" alone, then the only output."""
        step = call.step
        if any(spy.removed for spy in call.spies):
            raise CaptureError(
                f"the inner step at {call.location} has a tensor hook that changes a gradient, and that was removed "
                "before the outer loss's backward, which needs it; remove it after that"
            )
        base = position - call.back
        self._load(sorted({base, position}))
        arguments = self.inputs_of(call, self._at(position), self._at(base), position)
        if kind == "loss":
            arguments += [c.new_empty(c.shape).copy_(c) for c in received.values() if c is not None]
        else:
            saved = self._residuals.pop(position, None)
            kind = "vjp" if saved is None else "backward"
            arguments += saved or ()
            for i in cotangent_outputs(step):
                arguments.append(self._cotangent(step.outputs[i].spec, received.pop(i, None)))
            self.vjps += 1
        try:
            vjp = self._lowered(call, kind, arguments)
        except CaptureError as error:
            raise CaptureError(f"of the inner step at {call.location}: {error.reason}") from error
        state = iter(call.opt_state_in)
        indices = {
            Role.THETA: iter(call.theta),
            Role.THETA_NOW: iter(call.update),
            Role.OPT_STATE: state,
            Role.CARRY: state,
            Role.META: iter(call.metas),
        }
        for port, grad in zip(step.inputs, vjp(*arguments), strict=True):
            index = next(indices[port.role]) if port.role in indices else None
            if grad is not None and index is not None:
                yield port.role, index, grad


def _may_keep(call: StepCall | Assign) -> bool:
    """Whether a state before ``call`` is worth keeping: one can go on from it alone.

    Within a super-step an earlier state is read too, and whether an assignment lies within one shows only later.
    """
    return isinstance(call, StepCall) and not call.back
