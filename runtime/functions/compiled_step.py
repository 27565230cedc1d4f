"""A compiled inner step inside an ordinary window (form B): captured once, then one call of the engine each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.capture import intercept
from metaoptim.compiler.capture.symbolic.tracer import Tracer
from metaoptim.compiler.compat import disable_current_modes
from metaoptim.compiler.ir.segments import Roles, ordered
from metaoptim.compiler.ir.step import Lowering, Role, StepCall
from metaoptim.compiler.ir.trace import Input, Noise
from metaoptim.compiler.ir.values import Value, exact, identity
from metaoptim.compiler.ir.verify_step import verify_step
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.compiler.lower.derivatives import lowered
from metaoptim.compiler.lower.library import library
from metaoptim.compiler.passes.build import build_segment
from metaoptim.compiler.passes.lower import FEW
from metaoptim.compiler.passes.pipeline import shaped
from metaoptim.compiler.passes.split import whole
from metaoptim.errors import CaptureError, WindowError, user_location

from ..engine.noise import redrawn
from ..windows.recording_session import RecordedSession
from ..windows.session import Options, _current
from .dependence import depends_on, loss_inputs, mark, shown_in
from .symbolic_session import CapturedSession


class CapturedStep(CapturedSession):
    """Stands in for the window while one of its steps is captured."""

    def __init__(self, window: RecordedSession, tracer: Tracer) -> None:
        super().__init__(Options(offline=True), tracer)
        self.window = window
        self.keeps_state = True
        self.left: list[tuple[Any, Value]] = []  # what has a new value after the step, and which
        self.thetas: dict[
            int, Tensor
        ] = {}  # id of an input that is a parameter as it is before the step -> whose
        self.shown: dict[
            int, Tensor
        ] = {}  # id of a call that shows a parameter as it is after the step -> whose

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """The window's optimizers step here, from the networks' own parameters."""
        self.open()
        members = [m.optimizer for m in self.window.members.values()]
        failed = True
        try:
            for optimizer in members:
                optimizer._session = None
                self.adopt(optimizer)
            yield
            failed = False
            self.taken = [(m.optimizer, m.steps) for m in self.members.values() if m.steps]
            for p, shown in zip(self.networks.originals, self.networks.shown, strict=True):
                self.shown[id(self.recorder.value_of(shown).entry)] = p
        finally:
            self.close(failed)
            for optimizer in members:
                optimizer._session = self.window

    def _last_state(self, target: tuple, last: Tensor) -> Tensor:
        self.left.append((target, self.recorder.give(last)))
        return last

    def _is_ordinary(self, i: int) -> bool:
        networks = self.window.networks
        return (
            super()._is_ordinary(i) and networks.index_of(self.networks.originals[i]) not in networks.joined
        )

    def _offer(self, ordinals: list[int]) -> None:
        super()._offer(ordinals)
        tracer = self.recorder
        for p in (self.networks.originals[i] for i in ordinals):
            self.thetas[id(tracer.value_of(p))] = p
            # the function reads theta from the networks; where it knows the very parameter, that is a constant
            tracer.bind_input(p)

    def _leave(self, target: Any, own: Tensor | None, last: Tensor, value: Any) -> None:
        self.left.append((target, self.recorder.give(last)))


@contextmanager
def aside(window: RecordedSession) -> Iterator[None]:
    """The window steps aside: its networks have their own parameters, its modes are off."""
    tokens: list[Any] = [(_current, _current.set(None))]
    tokens += [(v, v.set(None)) for v in (intercept.recording, intercept.binding)]
    with window.networks.hidden(), disable_current_modes():
        try:
            yield
        finally:
            for variable, token in reversed(tokens):
                variable.reset(token)


class CompiledStep:
    """A captured step function.

    Args:
        captured: the session it was captured in.
        outputs: what stands for the tensors the function returns.
        texts: as of `compile_trace`.
    """

    def __init__(
        self,
        captured: CapturedStep,
        outputs: list[Value],
        texts: Mapping[Input, str] | None = None,
    ) -> None:
        trace, window = captured.recorder.trace, captured.window
        own, thetas = {id(p) for p in captured.networks.originals}, captured.thetas
        states = {
            id(v): (optimizer, p, name)
            for optimizer in (m.optimizer for m in window.members.values())
            for p, state in optimizer.state.items()
            for name, v in state.items()
        }
        for x in trace.inputs:
            x.grad = x.grad or id(x.tensor) in states
        kinds: dict[str, list] = {"theta": [], "state": [], "buffer": []}
        for target, value in captured.left:
            kind = "state" if isinstance(target, tuple) else "theta" if id(target) in own else "buffer"
            kinds[kind].append((target, value))
        self.thetas = [p for p, _ in kinds["theta"]]
        self.states = [target for target, _ in kinds["state"]]
        where = {id(own): (module, name) for module, name, own in captured.networks._buffers}
        self.buffers = [where[id(target)] for target, _ in kinds["buffer"]]
        current = [shown_in(v, captured.shown) for v in outputs]
        input_of = {id(x.tensor): x for x in reversed(trace.inputs)}
        self.left = [input_of[id(t)] for t, _ in trace.left]
        trace.outputs = [v for kind in kinds.values() for _, v in kind]
        trace.outputs += [*(v for _, v in trace.left), *outputs]
        partition = whole(trace)
        self.records = shaped(partition, texts)
        (part,) = partition.parts
        segment, kind = part.segment, part.kind
        places = [(segment.number_of[id(v.entry)], v.index) for v in trace.outputs]
        self.results = places[len(places) - len(outputs) :]
        roles = self._roles(segment, kind, places, thetas, states)
        hooked = window.options.backward_hook is not None
        key = (
            segment.key,
            tuple(kind.outputs.items()),
            tuple(roles.inputs),
            exact(segment.numbers),
            hooked,
        )
        self.step = library.step((*key, "step"), lambda: build_segment(segment, kind, (), hooked, roles))
        verify_step(self.step)
        self.live = [place in kind.active_outputs for place in self.results]
        self.current = [of for of, live in zip(current, self.live, strict=True) if live]
        self.steps = len(trace.steps)
        refs = [segment.inputs[at] for at in roles.order]
        self.reads = [thetas[id(x)] for x in refs if id(x) in thetas]
        self.reads_state = [
            states[id(x.tensor)] for x in refs if isinstance(x, Input) and id(x.tensor) in states
        ]
        self.given = refs[len(self.reads) + len(self.reads_state) :]
        of_losses = loss_inputs(segment.entries)
        self._reaches_loss = [identity(x) in of_losses for x in self.given]
        # by place: the tensor there is another one after every step, and in the next window
        self._buffers_given = [where.get(id(x.tensor)) if isinstance(x, Input) else None for x in self.given]
        self.taken = captured.taken
        self._fresh = True
        self._runs = 0

    def _roles(self, segment: Any, kind: Any, places: list, thetas: dict, states: dict) -> Roles:
        def role(at: int, x: Any) -> Role:
            if isinstance(x, Noise):
                return Role.NOISE
            if id(x) in thetas:
                return Role.THETA
            if id(x.tensor) in states:
                return Role.OPT_STATE
            return Role.META if at in kind.active else Role.SCAN

        inputs = [role(at, x) for at, x in enumerate(segment.inputs)]
        last = [Role.THETA] * len(self.thetas) + [Role.OPT_STATE] * len(self.states)
        last += [Role.CARRY] * (len(places) - len(last))
        return Roles(inputs, ordered(inputs), dict(zip(places, last, strict=True)))

    def run(
        self, window: RecordedSession, tensor_of: Callable[[Input], Tensor], lowering: Lowering
    ) -> list[Tensor]:
        """Take the step.

        Args:
            window: the open window.
            tensor_of: the tensor behind an input, in this call.
            lowering: the backend and HVP mode of the step graphs.

        Returns:
            The function's results; those that depend on what is learnt can be differentiated.
        """
        if window.options.record_grad_tape or window.options.pickup_step >= 0:
            raise CaptureError(
                "a compiled step inside a window with record_grad_tape or pickup_step; take either off"
            )
        for optimizer, _ in self.taken:
            member = window.members.get(id(optimizer))
            if member is None or not member.joined:
                window.join(optimizer)
        view, engine, networks = window.view, window.engine, window.networks
        with window.recorder.paused(), unaffected():
            networks.check()
            view.settle()
            view.need(self._ordinal(window, p) for p in self.reads)
            for optimizer, _ in self.taken:
                window.bring(optimizer, window.ordinals(optimizer))
            given = [self._given(x, place, tensor_of) for x, place in zip(self.given, self._buffers_given)]
            self._check_given(window, given)
            if self._fresh:
                self._forget()
            noise = iter(redrawn([x for x in self.given if isinstance(x, Noise)]))
            held: list[Any] = [next(noise) if t is None else view.hold(t) for t in given]
            self._runs += 1
            if (
                self._runs <= FEW
            ):  # many are never run again: the first step of all, with no optimizer state yet
                lowering = replace(lowering, backend="eager")
            call = self._call(window, held, lowering)
            inputs = [engine.state[i] for i in (*call.theta, *call.opt_state_in)] + [h.get() for h in held]
            results = lowered(self.step, "replay", inputs, lowering, at_once=True)(*inputs)
            del inputs  # under a budget, the engine may run the step's derivative now, on numbers drawn again
            changes = [
                (i, v) for i, v in zip((*call.update, *call.opt_state_out), results, strict=True) if i >= 0
            ]
            self._show_state(window, call, results)
            ports = self.step.inputs[len(self.step.inputs) - len(held) :]
            metas = [
                t for t, port in zip(given, ports, strict=True) if port.role is Role.META and t is not None
            ]
            updated = [self._ordinal(window, p) for p in self.thetas]
            view.take(call, changes, view.recording.epoch, metas, updated)
            for optimizer, steps in self.taken:
                window.members[id(optimizer)].steps += steps
        results = list(results[len(self.thetas) + len(self.states) + len(self.buffers) :])
        with torch.no_grad():
            for x, value in zip(self.left, results, strict=False):
                tensor_of(x).copy_(value)
        return self._results(window, call, results[len(self.left) :])

    def fits(self, window: RecordedSession) -> bool:
        """Whether the parameters that it reads are those of the window's networks."""
        index_of = window.networks.index_of
        return all(index_of(p) is not None for p in (*self.reads, *self.thetas))

    def _given(self, x: Any, place: Any, tensor_of: Callable[[Input], Tensor]) -> Any:
        if isinstance(x, Noise):
            return None
        return tensor_of(x) if place is None else place[0]._buffers[place[1]]

    def _forget(self) -> None:
        """Let go of the tensors seen at capture, with all that hangs on them: from now on each call brings its own."""
        self._fresh = False
        for x in (*self.given, *self.left):
            if isinstance(x, Input):
                x.tensor = None  # type: ignore[assignment]

    def _check_given(self, window: RecordedSession, given: list[Tensor | None]) -> None:
        learnt = [
            t
            for t, reaches in zip(given, self._reaches_loss)
            if reaches and t is not None and t.requires_grad
        ]
        if not learnt:
            return
        shown = [window.networks.shown[i] for optimizer, _ in self.taken for i in window.ordinals(optimizer)]
        for t in learnt:
            if depends_on(t, shown):
                raise CaptureError(
                    f"a compiled step was given a tensor of shape {tuple(t.shape)} that was computed from the "
                    "parameters it trains, as they are now; its inner gradient would miss that path. Compute it inside "
                    "the step, or pass it detached"
                )

    def _ordinal(self, window: RecordedSession, p: Tensor) -> int:
        ordinal = window.networks.index_of(p)
        if ordinal is None:
            raise WindowError("a compiled step trains a network that is no part of this window")
        return ordinal

    def _call(self, window: RecordedSession, held: list[Any], lowering: Lowering) -> StepCall:
        view, known = window.view, window.opt_state
        free = len(window.engine.state)
        out = []
        for optimizer, p, name in self.states:
            key = (id(optimizer), self._ordinal(window, p), name)
            if key not in known:
                known[key], free = free, free + 1
            out.append(known[key])
        out += [-1] * (len(self.buffers) + len(self.left))
        for k, live in enumerate(self.live):
            if live and (id(self), k) not in window.results:
                window.results[id(self), k], free = free, free + 1
            out.append(window.results[id(self), k] if live else -1)
        return StepCall(
            self.step,
            tuple(view.indices[self._ordinal(window, p)] for p in self.reads),
            tuple(view.indices[self._ordinal(window, p)] for p in self.thetas),
            tuple(known[id(o), self._ordinal(window, p), name] for o, p, name in self.reads_state),
            tuple(out),
            0,
            held,
            (),
            user_location(),
            lowering=lowering,
        )

    def _show_state(self, window: RecordedSession, call: StepCall, results: Sequence[Tensor]) -> None:
        """Let the optimizers and the networks' buffers have their new values."""
        values = iter(results[len(self.thetas) :])
        for optimizer, p, name in self.states:
            optimizer.state[p] = {**optimizer.state[p], name: next(values)}
        for module, name in self.buffers:
            # in a new tensor: an outer loss may have saved the old one for its backward
            old, new = module._buffers[name], next(values).clone()
            for m, n, _ in window.networks._buffers:
                if m._buffers.get(n) is old:
                    m._buffers[n] = new

    def _results(self, window: RecordedSession, call: StepCall, results: Sequence[Tensor]) -> list[Tensor]:
        found = list(results)
        at = [k for k, live in enumerate(self.live) if live]
        if at:
            indices = [window.results[id(self), k] for k in at]
            with window.recorder.paused(), torch.enable_grad():
                reads = window.view.reads.results(indices)
            networks = window.networks
            mark(reads, [[networks.shown[self._ordinal(window, p)] for p in of] for of in self.current])
            for k, t in zip(at, reads, strict=True):
                found[k] = t
        return [t if live else t.clone() for t, live in zip(found, self.live, strict=True)]
