"""The interpreter carries out a schedule over the calls of a program: what to keep it does not decide."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from metaoptim.compiler.ir.programs.calls import Assign, StepCall
from metaoptim.compiler.ir.step import Role
from metaoptim.compiler.ir.tensors import TensorSpec
from metaoptim.compiler.lower.derivatives import residuals

from ..states.slots import Action, Advance, Keep, PullBack, Slots, State
from ..states.streams import Keepable, always, forward, reverse
from .sweep import LOSS, Sweep, Tell


class Interpreter:
    """Runs calls and pulls cotangents back through them, on tensors or on what stands for them.

    ``program`` maps a position to a call, and knows the position at its ``end`` and how far back calls ``reach`` for
    theta; ``store`` has the states.
    """

    def __init__(self, program: Any, store: Slots) -> None:
        self.program, self.store = program, store
        self.state: State = []  # the last one
        self.begin = 0  # no sweep goes back further over inner steps that `run` runs
        self.saving = sys.maxsize  # from which position on `run` saves residuals
        self.spends = False  # whether residuals go with the sweep that goes on from them
        self.replays = self.vjps = 0  # calls that were run, and pulled back through
        self.keepable: Keepable = always
        self.passing: Tell | None = None  # told of every call that is run, by position
        # state indices of parameters that no optimizer steps: written into, they are the leaves they were
        self.untrained: set[int] = set()
        self._passed: dict[int, State] = {}  # states that a super-step may still read
        self._stands = -1  # where the last advance has ended
        self._drawn: Any = None  # the generator's state after the last call that drew
        self._residuals: dict[int, list[Any]] = {}

    # -- what calls are run on -------------------------------------------------------------------------------------

    def _lowered(
        self, call: StepCall, kind: str, operands: list[Any], position: int
    ) -> Callable[..., Sequence[Any]]:
        """One of the graphs of the call at ``position``, as a callable."""
        raise NotImplementedError

    def _values(self, call: StepCall, state: State, position: int) -> list[Any]:
        """What a call is given besides the state."""
        raise NotImplementedError

    def _cotangent(self, spec: TensorSpec, cotangent: Any) -> Any:
        """A cotangent as the call's VJP was traced for; zeros for None."""
        raise NotImplementedError

    # -- the schedule ----------------------------------------------------------------------------------------------

    def carry_out(self, actions: Iterable[Action], sweep: Sweep | None = None) -> None:
        """Do what a schedule says; ``sweep`` has the cotangents to pull back."""
        try:
            for action in actions:
                if isinstance(action, Advance):
                    self._advance(*action)
                elif isinstance(action, PullBack):
                    self._passed = {}
                    assert sweep is not None
                    self._pull(action.position, sweep)
                else:
                    self.store.apply(action)
        finally:
            self._passed = {}

    def run(self, state: State, actions: Iterable[Action] | None = None) -> State:
        """Run all calls from the initial state; states are kept as the slots allow, or as ``actions`` say."""
        end, store = self.program.end, self.store
        store.initial = state
        store.apply(Keep(0), state)
        if actions is None:
            actions = forward(store, self.begin, end, self.saving, self.keepable)
        self.carry_out(actions)
        store.settle()
        self.state = store.work.pop(end)
        return self.state

    def pull_back(self, sweep: Sweep, bottom: int, tell: Tell | None = None) -> None:
        """Sweep from the highest deposit (or where the sweep stands) down to ``bottom``; see `Sweep.targets`."""
        top = max(sweep.deposits, default=bottom)
        if sweep.position < 0 or sweep.position < bottom:
            sweep.position = max(top, bottom)
        if top > sweep.position:
            raise AssertionError(f"a cotangent came for position {top} after the sweep had passed it")
        sweep.top = max(sweep.top, sweep.position)
        self.store.settle()
        targets = sweep.targets(self.program, bottom, tell, self.untrained)
        try:
            self.carry_out(reverse(self.store, targets, self.keepable), sweep)
        finally:
            self.store.rest()

    def _advance(self, start: int, stop: int, saving: bool) -> None:
        if self._stands != start:
            self._passed = {}
        state, passed = self.store[start], self._passed
        for position in range(start, stop):
            state = self._after(position, state, passed, saving)
            if self.passing is not None:
                self.passing(position)
        reach = self.program.reach
        self._passed = {p: s for p, s in passed.items() if p >= stop - reach} if reach else {}
        self._stands = stop
        self.store.work[stop] = state

    def state_at(self, position: int) -> State:
        """The state at a position, made again if it was not kept."""
        if self.store.at_hand(position):
            return self.store[position]
        start = self.store.nearest(position)
        state, passed = self.store[start], dict[int, State]()
        for p in range(start, position):
            state = self._after(p, state, passed)
        return state

    # -- calls -----------------------------------------------------------------------------------------------------

    def _after(self, position: int, state: State, passed: dict[int, State], saving: bool = False) -> State:
        """The state after the call at ``position``; ``passed`` has those that a super-step may still read."""
        call = self.program[position]
        passed[position] = state
        if not isinstance(call, StepCall):  # after it, a super-step may go on that has begun before it
            return changed(state, zip(call.indices, call.values, strict=True))
        self.replays += 1
        for old in [q for q in passed if q < position - self.program.reach]:
            del passed[old]
        base = passed.get(position - call.back)
        if base is None:
            base = self.state_at(position - call.back)
        operands = self.operands(call, state, base, position)
        divided = residuals(call.step, call.lowering.hvp) if saving or call.saved else None
        kind = "replay" if divided is None else "forward"
        results = self._lowered(call, kind, operands, position)(*operands)
        if saving and divided is not None:
            self._residuals[position] = [results[i] for i in divided.residuals]
        new = changed(state, zip(call.writes, results, strict=False))
        if call.rng >= 0:
            new[call.rng] = self._drawn
        return new

    def operands(self, call: StepCall, state: State, base: State, position: int) -> list[Any]:
        """What a call's graphs are given, from the state at its position and the one its loss has read."""
        thetas = call.step.thetas
        found = [base[i] for i in call.reads[:thetas]] + [state[i] for i in call.reads[thetas:]]
        return found + self._values(call, state, position)

    def _pull(self, position: int, sweep: Sweep) -> None:
        """Pull what ``sweep`` has received back through the call at ``position``."""
        call, received, sweep.received = sweep.call, sweep.received, {}
        of_loss = received.pop(LOSS, None)
        if received:
            sweep.take(position, self._through(call, position, "vjp", received))
        if of_loss is not None:
            sweep.take(position, self._through(call, position, "loss", {0: of_loss}))

    def _through(
        self, call: StepCall, position: int, kind: str, received: dict[int, Any]
    ) -> Iterable[tuple[Role, Any, Any]]:
        """Pull cotangents back through one of a call's graphs: its "vjp", or that of its "loss", then the only output.

        ``received`` has the cotangents by output. Returns the role, the state index or meta-parameter, and the gradient
        of each input that has one.
        """
        step, store = call.step, self.store
        operands = self.operands(call, store[position], store[position - call.back], position)
        if kind == "loss":
            operands += [c.new_empty(c.shape).copy_(c) for c in received.values()]
        else:
            saved = (self._residuals.pop if self.spends else self._residuals.get)(position, None)
            kind = "vjp" if saved is None else "backward"
            operands += saved or ()
            operands += [self._cotangent(step.outputs[i].spec, received.get(i)) for i in step.cotangents]
            received.clear()  # what is not needed any more takes no memory meanwhile
            self.vjps += 1
        grads = self._lowered(call, kind, operands, position)(*operands)
        indices = (*call.reads, *call.metas)
        return [
            (role, index, grads[i])
            for (i, role), index in zip(step.gradients, indices, strict=True)
            if index is not None and grads[i] is not None
        ]


def may_keep(call: StepCall | Assign) -> bool:
    """Whether a state before ``call`` is worth keeping: one can go on from it alone.

    Within a super-step an earlier state is read too, and whether an assignment lies within one shows only later.
    """
    return isinstance(call, StepCall) and not call.back


def changed(state: State, changes: Iterable[tuple[int, Any]]) -> State:
    """A state with other entries; the next one may be new."""
    new = list(state)
    for index, value in changes:
        if index == len(new):
            new.append(value)
        elif index >= 0:
            new[index] = value
    return new
