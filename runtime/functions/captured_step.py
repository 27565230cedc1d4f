"""Captures a step of an ordinary window: stands in for the window, then takes the trace through the passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.capture import intercept
from metaoptim.compiler.capture.symbolic.tracer import Tracer
from metaoptim.compiler.compat import disable_current_modes
from metaoptim.compiler.ir.step import Role, gradient, show
from metaoptim.compiler.ir.traces.trace import Roles, arguments, leaves
from metaoptim.compiler.ir.values import Entry, Input, Noise, Value, exact, identity, reached
from metaoptim.compiler.ir.verify import verify_step
from metaoptim.compiler.lower.library import library
from metaoptim.compiler.passes.build import build_step_graph
from metaoptim.compiler.passes.pipeline import shaped
from metaoptim.compiler.passes.traces.split import refuse_aliases_across, single
from metaoptim.errors import CaptureError

from ..windows.recording_session import RecordedSession
from ..windows.session import Options, _current
from ..windows.updates.update import InnerOptimizer
from .compiled_step import CompiledStep
from .symbolic_session import CapturedSession

aten = torch.ops.aten


class CapturedStep(CapturedSession):
    """Stands in for the window while one of its steps is captured."""

    def __init__(self, window: RecordedSession, tracer: Tracer) -> None:
        super().__init__(Options(offline=True, first_order=window.options.first_order), tracer)
        self.window, self.keeps_state = window, True
        self.left: list[tuple[Any, Value]] = []  # what has a new value after the step, and which
        self.thetas: dict[int, Tensor] = {}  # id of an input that is a parameter before the step -> which
        self.shown: dict[int, Tensor] = {}  # id of a call that shows a parameter after the step -> which
        self.taken: list[tuple[InnerOptimizer, int]] = []  # optimizers, and how many steps each takes

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
        own = self.window.networks
        return super()._is_ordinary(i) and own.index_of(self.networks.originals[i]) not in own.joined

    def _offer(self, ordinals: list[int]) -> None:
        super()._offer(ordinals)
        tracer = self.recorder
        for p in (self.networks.originals[i] for i in ordinals):
            self.thetas[id(tracer.value_of(p))] = p
            # the function reads theta from the networks; where it knows the very parameter, that is a constant
            tracer.bind_input(p)

    def _leave(self, own: Tensor, last: Tensor, value: Any) -> None:
        self.left.append((own, self.recorder.give(last)))


@contextmanager
def aside(window: RecordedSession) -> Iterator[None]:
    """The window steps aside: its networks have their own parameters, its modes are off."""
    variables: list[Any] = [_current, intercept.recording, intercept.networks]
    tokens = [v.set(None) for v in variables]
    with window.networks.showing(window.networks.originals), disable_current_modes():
        try:
            yield
        finally:
            for variable, token in zip(variables, tokens, strict=True):
                variable.reset(token)


def compiled(
    captured: CapturedStep, outputs: list[Value], texts: Mapping[Input, str] | None = None
) -> CompiledStep:
    """Take a step that returns ``outputs`` through the passes; ``texts``: names of inputs, for the passes' texts."""
    trace, window = captured.recorder.trace, captured.window
    mine, thetas = {id(p) for p in captured.networks.originals}, captured.thetas
    states = {
        id(v): (optimizer, p, name)
        for optimizer in (m.optimizer for m in window.members.values())
        for p, state in optimizer.state.items()
        for name, v in state.items()
    }
    for x in trace.inputs:
        x.grad = x.grad or id(x.tensor) in states
    kinds: dict[Role, list] = {Role.THETA: [], Role.OPT_STATE: [], Role.CARRY: []}
    for target, value in captured.left:
        of_network = Role.THETA if id(target) in mine else Role.CARRY
        kinds[Role.OPT_STATE if isinstance(target, tuple) else of_network].append((target, value))
    where = {id(own): (module, name) for module, name, own in captured.networks._buffers}
    input_of = {id(x.tensor): x for x in reversed(trace.inputs)}
    current = [[captured.shown[id(e)] for e in _ancestors(v) if id(e) in captured.shown] for v in outputs]
    last = [role for role, of_kind in kinds.items() for _ in of_kind]
    trace.outputs = [v for of_kind in kinds.values() for _, v in of_kind]
    trace.outputs += [*(v for _, v in trace.left), *outputs]

    partition = single(trace)
    refuse_aliases_across(partition)
    records = shaped(partition, texts)
    (part,) = partition.parts
    segment, kind = part.segment, part.kind
    places = [partition.made(v)[1] for v in trace.outputs]
    for (own, _), place in zip(kinds[Role.CARRY], places[len(last) - len(kinds[Role.CARRY]) :], strict=False):
        if place in kind.active_outputs:
            raise CaptureError(
                f"a compiled step leaves a value with a gradient in the buffer {where[id(own)][1]!r}, which later "
                "steps would read without it; detach what the module puts there, or take the decorator off"
            )
    last += [Role.CARRY] * (len(places) - len(last))

    def role(at: int, x: Any) -> Role:
        if isinstance(x, Noise) or id(x) in thetas:
            return Role.NOISE if isinstance(x, Noise) else Role.THETA
        return Role.OPT_STATE if id(x.tensor) in states else Role.META if at in kind.active else Role.SCAN

    inputs = list(starmap(role, enumerate(segment.inputs)))
    roles = Roles(inputs, dict(zip(places, last, strict=True)))
    hooked = window.options.backward_hook is not None
    key = (segment.key, tuple(kind.outputs.items()), tuple(inputs), exact(segment.numbers), hooked)
    step = library.step((*key, "step"), lambda: build_step_graph(part, (), hooked, roles))
    verify_step(step)

    live = [place in kind.active_outputs for place in places[len(places) - len(outputs) :]]
    refs = [segment.inputs[at] for at in roles.order]
    reads = [thetas[id(x)] for x in refs if id(x) in thetas]
    reads_state = [states[id(x.tensor)] for x in refs if isinstance(x, Input) and id(x.tensor) in states]
    given = refs[len(reads) + len(reads_state) :]
    of_losses = _loss_inputs(segment.entries)
    return CompiledStep(
        step=step,
        records=records,
        thetas=[p for p, _ in kinds[Role.THETA]],
        states=[target for target, _ in kinds[Role.OPT_STATE]],
        buffers=[where[id(target)] for target, _ in kinds[Role.CARRY]],
        left=[input_of[id(t)] for t, _ in trace.left],
        live=live,
        current=[of for of, is_live in zip(current, live, strict=True) if is_live],
        reads=reads,
        reads_state=reads_state,
        given=given,
        reaches_loss=[identity(x) in of_losses for x in given],
        buffers_given=[where.get(id(x.tensor)) if isinstance(x, Input) else None for x in given],
        taken=captured.taken,
    )


def _loss_inputs(entries: Sequence[Entry]) -> set[Any]:
    """Identities of what inner losses among ``entries`` depend on and that was not computed by them."""
    inside = {id(e) for e in entries}
    losses = [loss for e in entries if e.op is gradient for loss in leaves(e.args[0])]
    read = [*losses, *(a for loss in losses for entry in _ancestors(loss) for a in arguments(entry))]
    return {identity(a) for a in read if not (isinstance(a, Value) and id(a.entry) in inside)}


def _ancestors(value: Any) -> list[Entry]:
    """The calls that a gradient of ``value`` passes, down to those that show parameters."""

    def carrying(calls: Iterable[Entry]) -> list[Entry]:
        return [e for e in calls if e.grad and e.op is not aten.detach.default]

    def before(entry: Entry) -> list[Entry]:
        computed = [a.entry for a in arguments(entry) if isinstance(a, Value)]
        return [] if entry.op is show else carrying([*computed, *entry.deps])

    return list(reached(carrying([value.entry] if isinstance(value, Value) else []), before))
