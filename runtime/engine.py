"""The engine: appends inner steps to a Program, replays them, and sweeps cotangents back over them.

It holds detached tensors only, so that autograd nodes may refer to it without a cycle.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from metaoptim.errors import CaptureError

from ..compiler import cotangent_hook
from ..compiler.differentiate import cotangent_outputs
from ..compiler.ir import Assign, Program, Role, StepCall
from ..compiler.lower import lowered
from .store import SlotStore, State


class Sweep:
    """Cotangents on their way back through the tape.

    Attributes:
        position: they have been pulled back to here.
        cotangents: state index -> cotangent at `position`.
        deposits: tape position -> cotangents that join there.
        metas: number of a meta-parameter -> its gradient so far.
        adopted: state index -> cotangent that arrived at the adoption of that parameter.
    """

    def __init__(self) -> None:
        self.position = -1
        self.cotangents: dict[int, Tensor] = {}
        self.deposits: dict[int, list[tuple[int, Tensor]]] = {}
        self.metas: dict[int, Tensor] = {}
        self.adopted: dict[int, Tensor] = {}

    def deposit(self, position: int, index: int, grad: Tensor) -> None:
        """Let a cotangent of state entry ``index`` join at ``position``."""
        self.deposits.setdefault(position, []).append((index, grad))

    def add(self, index: int, grad: Tensor) -> None:
        """Accumulate at the current position."""
        known = self.cotangents.get(index)
        self.cotangents[index] = grad if known is None else known + grad

    def arrive(self, position: int) -> None:
        """Move to ``position`` and merge what was deposited there."""
        self.position = position
        for index, grad in self.deposits.pop(position, ()):
            self.add(index, grad)


class Engine:
    """A Program being recorded, the states kept of it, and its derivative.

    Args:
        slots: how many states may be kept, counting the initial one; None keeps every one.
        backward_hook: applied to the cotangent of each inner gradient.
    """

    def __init__(self, slots: int | None = None, backward_hook: Callable | None = None) -> None:
        self.program = Program()
        self.store = SlotStore(slots)
        self.state: State = []
        self.backward_hook = backward_hook
        self.vjps = 0
        self.replays = 0
        self._sweeps: dict[int, Sweep] = {}
        self._work: dict[int, State] = {}
        self._memory: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    @property
    def position(self) -> int:
        """The position the state is at."""
        return self.program.end

    # -- forward -------------------------------------------------------------------------------------------------

    def append(self, call: StepCall | Assign, changes: Sequence[tuple[int, Tensor]]) -> None:
        """Extend the tape by a call that leads to the current state with ``changes``."""
        position = self.program.end
        if isinstance(call, Assign) or call.base == position or self.store.slots is None:
            self.store.offer(position, self.state)
        state = list(self.state)
        for index, value in changes:
            self._memory[value.untyped_storage()._cdata] = value
            if index == len(state):
                state.append(value)
            else:
                state[index] = value
        self.program.calls.append(call)
        self.state = state
        if isinstance(call, Assign) and self.program.horizon == 0:
            self.store.rebase(self.program.end, state)

    def holds(self, storage: int) -> bool:
        """Whether a tensor of the tape lies in ``storage``."""
        return storage in self._memory

    def protect(self, storage: int) -> None:
        """Someone is about to write into ``storage``: keep what the tape holds of it."""
        if self._memory.pop(storage, None) is None:
            return
        copies: dict[int, Tensor] = {}

        def kept(t: Tensor) -> Tensor:
            if t.untyped_storage()._cdata != storage:
                return t
            if id(t) not in copies:
                copies[id(t)] = copy = t.clone()
                self._memory[copy.untyped_storage()._cdata] = copy
            return copies[id(t)]

        with _disable_current_modes(), torch.no_grad():
            for values in [
                self.state,
                *self.store.states,
                *self._work.values(),
                *(c.values for c in self.program.calls if isinstance(c, Assign)),
            ]:
                values[:] = [kept(t) for t in values]

    def trim(self, needed: int) -> None:
        """Forget what lies before ``needed``: no sweep will go there."""
        start = self.program.start
        if needed <= start or needed < self.store.base:
            return
        base = self.store.nearest(needed)
        if base <= start and needed - start > max(16, self.program.end - needed):
            with _disable_current_modes(), torch.no_grad():
                self._load([needed])
            base, state = needed, self._work.pop(needed, None) or self.store[needed]
            self.store.rebase(base, state)
        if base > start:
            self.store.rebase(base, self.store[base])
            self.program = Program(base, self.program.calls[base - start :])

    # -- states --------------------------------------------------------------------------------------------------

    def _load(self, wanted: Sequence[int]) -> None:
        """Have the states at ``wanted`` (ascending) at hand."""
        self._work = {p: s for p, s in self._work.items() if p in wanted}
        for target in wanted:
            if target in self._work or target in self.store:
                continue
            start = self.store.nearest(target)
            state = self.store[start]
            marks = self.store.marks(start, target)
            passed: dict[int, State] = {}
            for p in range(start, target):
                call = self.program[p]
                if p in marks and (isinstance(call, Assign) or call.base == p):
                    self.store.put(p, state)
                passed[p] = state
                state = self._advance(call, p, state, passed)
                low = min((c.base for c in (call,) if isinstance(c, StepCall)), default=p)
                for old in [q for q in passed if q < low]:
                    del passed[old]
            self._work[target] = state

    def _at(self, position: int) -> State:
        found = self._work.get(position)
        return self.store[position] if found is None else found

    def _advance(
        self, call: StepCall | Assign, position: int, state: State, passed: dict[int, State]
    ) -> State:
        new = list(state)
        if isinstance(call, Assign):
            for index, value in zip(call.indices, call.values, strict=True):
                if index == len(new):
                    new.append(value)
                else:
                    new[index] = value
            return new
        self.replays += 1
        base = passed.get(call.base)
        if base is None:
            base = self._lookup(call.base)
        inputs = self._inputs(call, state, base)
        results = lowered(call.step, "replay", inputs)(*inputs)
        for index, value in zip((*call.update, *call.opt_state_out), results, strict=False):
            if index == len(new):
                new.append(value)
            else:
                new[index] = value
        return new

    def _lookup(self, position: int) -> State:
        if position in self._work or position in self.store:
            return self._at(position)
        start = self.store.nearest(position)
        state, passed = self.store[start], {}
        for p in range(start, position):
            passed[p] = state
            state = self._advance(self.program[p], p, state, passed)
        return state

    def _inputs(self, call: StepCall, state: State, base: State) -> list[Tensor]:
        inputs = [base[i] for i in call.theta]
        if call.step.positions(Role.THETA_NOW):
            inputs += [state[i] for i in call.update]
        inputs += [state[i] for i in call.opt_state_in]
        inputs += [held.get() for held in call.inputs]
        return inputs

    # -- backward ------------------------------------------------------------------------------------------------

    def sweep_of(self, task: int) -> Sweep:
        """The sweep that belongs to one call of backward."""
        found = self._sweeps.get(task)
        if found is None:
            found = self._sweeps[task] = Sweep()

            def forget() -> None:
                self._sweeps.pop(task, None)

            torch.autograd.Variable._execution_engine.queue_callback(forget)
        return found

    def pull_back(self, sweep: Sweep, bottom: int) -> None:
        """Sweep from the highest deposit (or where the sweep stands) down to ``bottom``."""
        top = max(sweep.deposits, default=bottom)
        if sweep.position < 0 or sweep.position < bottom:
            sweep.position = max(top, bottom)
        if top > sweep.position:
            raise AssertionError(f"a cotangent came for position {top} after the sweep had passed it")
        with _disable_current_modes(), torch.no_grad(), cotangent_hook.active(self.backward_hook):
            try:
                sweep.arrive(sweep.position)
                while sweep.position > bottom:
                    position = sweep.position - 1
                    call = self.program[position]
                    if isinstance(call, Assign):
                        for index in call.indices:
                            arrived = sweep.cotangents.pop(index, None)
                            if call.adoption and arrived is not None:
                                sweep.adopted[index] = arrived
                    else:
                        self._vjp(call, position, sweep)
                    sweep.arrive(position)
            finally:
                self._work = {}

    def _vjp(self, call: StepCall, position: int, sweep: Sweep) -> None:
        step = call.step
        changed = (*call.update, *call.opt_state_out)
        outputs = cotangent_outputs(step)
        received = {i: sweep.cotangents.pop(index, None) for i, index in enumerate(changed, start=1)}
        if all(c is None for c in received.values()):
            return
        if any(spy.removed for spy in call.spies):
            raise CaptureError(
                f"the inner step at {call.location} has a tensor hook that changes a gradient, and that was removed "
                "before the outer loss's backward, which needs it; remove it after that"
            )
        self._load(sorted({call.base, position}))
        inputs = self._inputs(call, self._at(position), self._at(call.base))
        cotangents = []
        for i in outputs:
            c = received[i]
            cotangents.append(_zeros(step.outputs[i].spec) if c is None else c)
        self.vjps += 1
        arguments = (*inputs, *cotangents)
        try:
            vjp = lowered(step, "vjp", arguments)
        except CaptureError:
            raise
        except RuntimeError as error:
            raise CaptureError(
                f"the inner step at {call.location} cannot be differentiated a second time: {error}"
            ) from error
        grads = vjp(*arguments)
        roles = [p.role for p in step.inputs]
        indices = {
            Role.THETA: iter(call.theta),
            Role.THETA_NOW: iter(call.update),
            Role.OPT_STATE: iter(call.opt_state_in),
            Role.META: iter(call.metas),
        }
        for role, grad in zip(roles, grads, strict=True):
            index = next(indices[role]) if role in indices else -1
            if grad is None or index < 0:
                continue
            if role is Role.META:
                known = sweep.metas.get(index)
                sweep.metas[index] = grad if known is None else known + grad
            elif role is Role.THETA and call.base != position:
                sweep.deposit(call.base, index, grad)
            else:
                sweep.add(index, grad)


def _zeros(spec: tuple) -> Tensor:
    return torch.zeros(spec[0], dtype=spec[1], device=spec[3])
