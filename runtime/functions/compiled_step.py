"""A compiled inner step inside an ordinary window: captured once, then one call of the engine each time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.programs.calls import Operand, StepCall
from metaoptim.compiler.ir.programs.program import Program
from metaoptim.compiler.ir.step import Lowering, Role, StepGraph
from metaoptim.compiler.ir.values import Input, Noise
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.compiler.lower.derivatives import begin, divisible, lowered, taken
from metaoptim.compiler.passes.pipeline import FEW, Record
from metaoptim.errors import CaptureError, WindowError, user_location

from ..engine.engine import Engine
from ..engine.graph import nodes_below
from ..engine.inputs import Snapshot
from ..engine.noise import redrawn
from ..windows.recorded_step import StepPlaces
from ..windows.recording_session import RecordedSession
from ..windows.updates.hyper import COUNT
from ..windows.updates.update import InnerOptimizer

# an optimizer, a parameter or `COUNT`, the name of a state
StateKey: TypeAlias = tuple[InnerOptimizer, Any, str]


@dataclass(eq=False)
class CompiledStep:
    """A captured step function at work."""

    step: StepGraph
    records: list[Record]  # what the passes have done
    thetas: list[Tensor]  # parameters, optimizer states and buffers that have a new value after it
    states: list[StateKey]
    buffers: list[tuple[nn.Module, str]]
    left: list[Input]  # inputs that the function writes into
    live: list[bool]  # for each tensor that the function returns: whether it can be differentiated
    current: list[list[Tensor]]  # for each that can: the parameters from whose last version it is computed
    reads: list[Tensor]  # the parameters and optimizer states that the graph is given
    reads_state: list[StateKey]
    given: list[Any]  # the inputs that the graph is given after these
    reaches_loss: list[bool]  # for each of `given`: whether an inner loss depends on it
    # for each of `given` that is a buffer its place: the tensor there is another one after each step
    buffers_given: list[tuple[nn.Module, str] | None]
    taken: list[tuple[InnerOptimizer, int]]  # the optimizers that step in it, and how often each does
    _runs: int = 0
    _divided: bool = False  # whether the graphs that save residuals and go on from them are there

    def run(
        self, window: RecordedSession, tensor_of: Callable[[Input], Tensor], lowering: Lowering
    ) -> list[Tensor]:
        """Take the step: the function's results. ``tensor_of``: the tensor behind an input, in this call."""
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
                own = [networks.originals[i] for i in window.ordinals(optimizer)]
                window.opt_states.bring(optimizer, [*own, COUNT])
            given: list[Tensor | None] = []
            for x, place in zip(self.given, self.buffers_given, strict=True):
                own = None if isinstance(x, Noise) or place is not None else tensor_of(x)
                given.append(own if place is None else place[0]._buffers[place[1]])
            self._check_given(window, given)
            noise = iter(redrawn([x for x in self.given if isinstance(x, Noise)]))
            held: list[Any] = [next(noise) if t is None else view.hold(t) for t in given]
            self._runs += 1
            if self._runs <= FEW:  # many never run again: the first step of all, with no optimizer state yet
                lowering = lowering.uncompiled
            places = window.places.get(self) or self._places(window)
            call = StepCall(self.step, places.reads, places.writes, held, user_location(), lowering=lowering)
            self._divided = self._divided or (self._runs > FEW and divisible(self.step, lowering))
            call.saved = self._divided and engine.saves(call)
            kind = "forward" if call.saved else "replay"
            if self._runs == FEW + 1:
                begin(self.step, lowering, call.saved)
            ports = self.step.inputs[self.step.states :]
            metas = [t for t, p in zip(given, ports, strict=True) if p.role is Role.META and t is not None]
            view.reads.prepare(call, metas)
            # what has been held just now is not overwritten yet, and need not be looked at again
            inputs = [engine.state[i] for i in call.reads]
            inputs += [h.tensor if isinstance(h, Snapshot) else h.get() for h in held]
            now = taken(self.step, kind, inputs, lowering)
            results = lowered(self.step, kind, inputs, now, at_once=True)(*inputs)
            if call.saved:
                engine.save(call, results)
            if now is not lowering:
                call.lowering = lowering.recorded
                begin(self.step, lowering.recorded)
            results = list(results[: len(call.writes)])
            del inputs  # under a budget, the engine may run the step's derivative now, on numbers drawn again
            changes = [(i, v) for i, v in zip(call.writes, results, strict=True) if i >= 0]
            self._show_state(window, call, results)
            updated = [self._ordinal(window, p) for p in self.thetas]
            view.take(call, changes, view.recording.epoch, metas, updated)
            window.places[self] = places
            window.opt_states.at.update(places.states)
            for optimizer, steps in self.taken:
                window.members[id(optimizer)].steps += steps
        results = results[len(self.thetas) + len(self.states) + len(self.buffers) :]
        with torch.no_grad():
            for x, value in zip(self.left, results, strict=False):
                tensor_of(x).copy_(value)
        return self._results(window, places, results[len(self.left) :])

    @property
    def program(self) -> Program:
        """What it does: one call."""
        given = [Operand("input", x) for x in self.given]
        return Program([StepCall(self.step, (), (), given, "")])

    def fits(self, window: RecordedSession) -> bool:
        """Whether the parameters that it reads are those of the window's networks."""
        index_of = window.networks.index_of
        return all(index_of(p) is not None for p in (*self.reads, *self.thetas))

    def _check_given(self, window: RecordedSession, given: list[Tensor | None]) -> None:
        """Refuse what depends on the parameters that the step trains, as they are: see `depends_on`."""
        learnt = [t for t, at in zip(given, self.reaches_loss) if at and t is not None and t.requires_grad]
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

    def _places(self, window: RecordedSession) -> StepPlaces:
        """Where it reads and leaves its values, in its first call of a window; what is new is put at the end."""
        view, known, free = window.view, window.opt_states.at, len(window.engine.state)
        keys = [window.opt_states.key(*key) for key in self.states]
        new = {key: free + i for i, key in enumerate(dict.fromkeys(k for k in keys if k not in known))}
        free += len(new)
        results = tuple(range(free, free + sum(self.live)))
        left = iter(results)
        reads = [view.indices[self._ordinal(window, p)] for p in self.reads]
        reads += [known[window.opt_states.key(*key)] for key in self.reads_state]
        writes = [view.indices[self._ordinal(window, p)] for p in self.thetas]
        writes += [new[key] if key in new else known[key] for key in keys]
        writes += [-1] * (len(self.buffers) + len(self.left))
        writes += [next(left) if live else -1 for live in self.live]
        return StepPlaces(tuple(reads), tuple(writes), new, results)

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

    def _results(
        self, window: RecordedSession, places: StepPlaces, results: Sequence[Tensor]
    ) -> list[Tensor]:
        found = list(results)
        at = [k for k, live in enumerate(self.live) if live]
        if at:
            with window.recorder.paused(), torch.enable_grad():
                reads = window.view.reads.results(list(places.results))
            shown: Any = window.networks.shown
            node: Any = reads[0].grad_fn  # of all of them
            node.current = {
                t.output_nr: [weakref.ref(shown[self._ordinal(window, p)]) for p in of]
                for t, of in zip(reads, self.current, strict=True)
            }
            for k, t in zip(at, reads, strict=True):
                found[k] = t
        return [t if live else t.clone() for t, live in zip(found, self.live, strict=True)]


def depends_on(tensor: Tensor, shown: Sequence[Tensor]) -> bool:
    """Whether a gradient of ``tensor`` reaches one of ``shown``, the parameters as they are, other than by the tape.

    The inner gradient of a compiled step is taken by the parameters that it reads itself. A path that leads to them
    through an argument would be missed, where the same code without the decorator follows it.
    """
    current = {id(p) for p in shown}
    if tensor.grad_fn is None:
        return id(tensor) in current
    edges = {(id(p.grad_fn), p.output_nr) for p in shown if p.grad_fn is not None}
    # what was computed before the parameters were shown cannot depend on them; leaves have been there from the start
    oldest = min((0 if p.grad_fn is None else p.grad_fn._sequence_nr() for p in shown), default=0)

    def ends(node: Any) -> bool:
        return node._sequence_nr() < oldest or isinstance(getattr(node, "engine", None), Engine)

    def leads(node: Any, number: int) -> bool:
        marked = getattr(node, "current", {}).get(number, ())
        met = (id(node), number) in edges or id(getattr(node, "variable", None)) in current
        return met or any(id(ref()) in current for ref in marked)

    below = (edge for node in nodes_below([tensor], ends) if not ends(node) for edge in node.next_functions)
    return leads(tensor.grad_fn, tensor.output_nr) or any(leads(*edge) for edge in below)
