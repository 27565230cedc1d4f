"""A window while the function around it is captured: its steps become calls of the trace."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from metaoptim.compiler.capture import intercept
from metaoptim.compiler.capture.symbolic.tracer import Tracer
from metaoptim.compiler.ir.operators import LIFTS
from metaoptim.compiler.ir.step import gradient, show
from metaoptim.compiler.ir.tensors import TensorSpec, tensor_spec
from metaoptim.compiler.ir.traces.slices import closed_over
from metaoptim.compiler.ir.traces.trace import WindowMark, sources
from metaoptim.compiler.ir.values import Entry, Input, Value, reached
from metaoptim.compiler.passes.build import GradientHooks
from metaoptim.errors import CaptureError, LossError, WindowError, user_location

from ..engine.engine import Held
from ..engine.graph import leaves_of
from ..windows.session import (
    AS_GRADIENT,
    WINDOW,
    Options,
    Place,
    Session,
    _current,
    read_outside,
    refuse_overwritten,
)
from ..windows.updates.hyper import Scheduled, hyper_of
from ..windows.updates.update import InnerOptimizer, Update, trained, update_by
from .fake_networks import FakeNetworks
from .loops import Loops

aten = torch.ops.aten
_Specs: TypeAlias = tuple[list[TensorSpec], list[dict[str, TensorSpec]]]
_REMEMBERED = 8  # versions of a parameter that a loss may have been computed from


class _Losses(NamedTuple):
    """The losses that a step is taken by: what stands for them, and ids of the leaves that their gradients go to."""

    roots: tuple[Any, ...]
    leaves: set[int]


class CapturedSession(Session):
    """A window inside a function that is captured."""

    recorder: Tracer

    def __init__(self, options: Options, tracer: Tracer) -> None:
        if options.record_grad_tape or options.pickup_step >= 0:
            raise CaptureError(
                "record_grad_tape and pickup_step need an ordinary window; take the decorator off, or compile the "
                "inner step only"
            )
        if options.sync is not False:
            raise CaptureError(
                "sync= of a window inside a compiled function, which waits for no other ranks; average the parameters "
                "after the call (torch.distributed.all_reduce), or use an ordinary window"
            )
        if options.lowering != WINDOW:
            raise WindowError(
                "backend, hvp or self_check of a window inside a compiled function; give them to metaoptim.compile"
            )
        super().__init__(options, tracer, FakeNetworks(tracer))
        self.keeps_state = not options.offline  # whether optimizers go on from where the window leaves them
        self.mark = WindowMark(options.offline, options.window, options.retention, options.backward_hook)
        self.loops = Loops(tracer)
        self._versions: dict[int, deque[Tensor]] = {}  # per parameter, what was shown, newest first
        self._lifts = True
        self._updates: dict[tuple, _Specs] = {}
        self._overwritten: set[int] = set()
        self._taken: dict[int, Entry] = {}  # calls that take in parameters of which no optimizer has stepped
        self._cut: list[tuple[int, Any]] = []  # overwritten parameters, and what had shown them

    def _own(self, value: Tensor) -> Tensor:
        return value  # nothing is written into

    # -- entry and exit ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin: optimizers step here."""
        _current.set(self)
        intercept.networks.set(self.networks)
        self.recorder.on_write = self._write

    def close(self, failed: bool) -> None:
        """End: modules have their own parameters back; online, the trace knows their last values."""
        tracer = self.recorder
        try:
            if not failed:
                self.networks.check()
                if self.loops.open:
                    raise CaptureError(
                        "window.scan or window.range was left by `break`; scan a shorter tensor"
                    )
                self._keep()
        finally:
            for member in self.members.values():
                member.optimizer._session = None
                if failed or self.options.offline:
                    member.optimizer.state.clear()
                    member.optimizer.state.update(member.entry)
            with tracer.paused():
                self.networks.restore()
            tracer.on_write = lambda t, directly: None
            intercept.networks.set(None)
            _current.set(None)
            self.members.clear()

    def _keep(self) -> None:
        """Parameters, buffers and optimizer states have a last value; from here on the trace reads that, detached."""
        tracer, networks = self.recorder, self.networks
        self._let_go()
        for p, shown in zip(networks.originals, networks.shown, strict=True):
            self._last(p, shown)
        for module, name, own in networks._buffers:
            last = module._buffers.get(name)
            if last is None or tensor_spec(last) != tensor_spec(own):
                raise CaptureError(
                    f"buffer {name!r} was replaced by another kind of tensor; use an ordinary window"
                )
            self._last(own, last)
        for member in self.members.values():
            optimizer = member.optimizer
            for p, state in optimizer.state.items():
                known = member.entry.get(p, {})
                for name, value in state.items():
                    if value is not known.get(name) and self.keeps_state:
                        state[name] = self._last_state((optimizer, p, name), value)
        tracer.trace.windows.append(self.mark)

    def _is_ordinary(self, i: int) -> bool:
        """Whether no optimizer of parameter ``i`` has stepped."""
        return i in self._taken

    def _let_go(self) -> None:
        """Who has read parameters of which no optimizer has stepped has read an input, as without the optimizer."""
        for i in filter(self._is_ordinary, self._overwritten):
            raise CaptureError(
                f"parameter {self.networks.names[i]!r} was changed in place, and its optimizer takes no step in this "
                "window of a compiled function; use an ordinary window, or delete that optimizer"
            )
        own: dict[int, Any] = {id(taken): taken.args[0] for taken in self._taken.values()}

        def read(a: Any) -> Any:
            if isinstance(a, Value):
                return own.get(id(a.entry), a)
            if isinstance(a, tuple):
                return tuple(map(read, a))
            return {k: read(v) for k, v in a.items()} if isinstance(a, dict) else a

        for entry in self.recorder.trace.entries if own else ():
            shown = entry.args[0] if entry.op is show else None  # an input, where `start` was given one
            if isinstance(shown, Value) and id(shown.entry) in own:  # it was not overwritten
                own[id(entry)] = own[id(shown.entry)]
            else:
                entry.args, entry.kwargs = read(entry.args), read(entry.kwargs)

    def _last_state(self, target: tuple, last: Tensor) -> Tensor:
        """What an optimizer has in a later window of the function."""
        tracer = self.recorder
        detached = self._call(aten.detach.default, tracer.value_of(last))
        detached.ref = tensor_spec(last)
        if not target[0].symbolic:  # others end with the call
            self.mark.last.append((target, detached))
        with tracer.paused():
            kept = tracer.faked(last).detach()
        tracer.bind(kept, detached)
        return kept

    def _last(self, own: Tensor, last: Tensor) -> None:
        value = root = self.recorder.value_of(last)
        while isinstance(root, Value) and root.entry.op in (show, aten.alias.default):
            root = root.entry.args[0]
        if not (isinstance(root, Input) and root.tensor is own):
            self._leave(own, last, value)

    def _leave(self, own: Tensor, last: Tensor, value: Any) -> None:
        """A parameter or buffer has another value after the window."""
        detached = self._call(aten.detach.default, value)
        detached.ref = tensor_spec(last)
        self.mark.last.append((own, detached))
        if not self.options.offline:
            self.recorder.bind(own, detached)

    def _offer(self, ordinals: list[int]) -> None:
        tracer = self.recorder
        self._lifts = all(p.dtype in LIFTS for p in self.networks.originals)
        for i in ordinals:
            p = self.networks.originals[i]
            taken = tracer.add(aten.alias.default, (tracer.value_of(p),), grad=True)
            self._taken[i] = taken
            self._show(i, tensor_spec(p), Value(taken, None))

    def _join(self, ordinals: list[int], late: list[int]) -> None:
        if late:
            raise CaptureError("build the optimizer before the loss of its first step is computed")
        self.mark.adopted += [self._taken.pop(i) for i in ordinals if i in self._taken]

    def _show(self, i: int, spec: TensorSpec, value: Any) -> None:
        shown = self.recorder.fakes.empty(spec).requires_grad_()
        shown._is_param = True  # type: ignore[attr-defined]
        self.recorder.bind(shown, self._call(show, value))
        self.networks.show(i, shown)
        self._versions.setdefault(i, deque(maxlen=_REMEMBERED)).appendleft(shown)

    def _start(self, ordinals: list[int], values: list[Tensor]) -> None:
        for i, v in zip(ordinals, values, strict=True):
            self._show(i, tensor_spec(v), self.recorder.value_of(v))
        self._show_others(ordinals)  # what the values were computed from, maybe

    def _hold(self, places: Sequence[Place], linked: bool, copied: bool) -> Held:
        op = aten.alias.default if linked else aten.detach.default
        roots = [self._renamed(op, self.tensor_at(place)) for place in places]
        return Held(roots, roots)

    def _go_on(self, places: Sequence[Place], held: Held) -> None:
        thetas = [
            (self.ordinal(p), t) for p, t in zip(places, held.roots, strict=True) if p.optimizer is None
        ]
        self._start([i for i, _ in thetas], [t for _, t in thetas])
        for place, t in zip(places, held.roots, strict=True):
            place.put(self._renamed(aten.alias.default, t))

    def _renamed(self, op: Any, t: Tensor) -> Tensor:
        """A fake tensor of its own for what ``op`` makes of ``t``."""
        new = self.recorder.fakes.empty(tensor_spec(t))
        self.recorder.bind(new, self._call(op, self.recorder.value_of(t)))
        return new

    def _show_others(self, ordinals: list[int], read: set[int] | None = None) -> None:
        """Show the parameters besides these anew, of all or of those whose ids are ``read``."""
        for i, t in enumerate(list(self.networks.shown)):
            if i not in ordinals and (read is None or id(t) in read):
                self._show(i, tensor_spec(t), self.recorder.value_of(t))

    # -- steps ---------------------------------------------------------------------------------------------------

    def _added(
        self, optimizer: InnerOptimizer, schedules: Scheduled, loss: Tensor, losses: _Losses | None
    ) -> _Losses:
        self.recorder.settle_hooks()
        root, leaves = self.recorder.value_of(loss), set(map(id, leaves_of(loss)))
        self._refuse_overwritten(root, self.ordinals(optimizer))
        return (
            _Losses((root,), leaves)
            if losses is None
            else _Losses((*losses.roots, root), losses.leaves | leaves)
        )

    def _moment(self) -> int:
        return len(self.recorder.trace.entries)

    def _check_inside(self, optimizer: InnerOptimizer, losses: _Losses, before: int) -> None:
        shown = (self.networks.shown[i] for i in self.ordinals(optimizer))
        mine = {id(self.recorder.value_of(t).entry) for t in shown}

        def earlier(entry: Entry) -> list[Entry]:
            return [] if entry.op is show else [a.entry for a in sources(entry) if isinstance(a, Value)]

        for entry in reached([a.entry for a in losses.roots[-1:] if isinstance(a, Value)], earlier):
            if entry.seq < before and not mine.isdisjoint(map(id, earlier(entry))):
                raise LossError(read_outside(optimizer))

    def _step(
        self,
        optimizer: InnerOptimizer,
        schedules: Scheduled,
        losses: _Losses,
        loss: Tensor,
        allow_unused: bool,
    ) -> None:
        tracer, networks = self.recorder, self.networks
        self.refuse_strangers()
        if any(t.check is not None for t in optimizer.transforms):
            raise CaptureError(
                "error_if_nonfinite needs a value while the function is captured; use an ordinary window"
            )
        members = trained(optimizer, networks)
        ordinals = [i for i, _ in members]
        hyper = hyper_of(optimizer, schedules, tracer.value_of, self._lifts)
        roots, leaves = losses
        read = self._read(leaves, roots[0], ordinals)
        # which parameters the loss depends on: a gradient has their shapes, so that nothing need be pulled back
        reached = [tracer.fakes.empty(tensor_spec(t)) if id(t) in leaves else None for t in read]
        update = update_by(optimizer, networks, members, reached, hyper, allow_unused=allow_unused)
        if any(isinstance(c, Tensor) for hooks in update.hooks for hook in hooks for c in closed_over(hook)):
            raise CaptureError(
                "a hook on a parameter closes over a tensor, whose values it would keep from the capture on; let it "
                "depend on its argument and on Python numbers only, or use an ordinary window"
            )
        by = dict(zip(ordinals, read, strict=True))
        of = roots if roots[1:] else roots[0]
        taken = self._call(gradient, of, tuple(tracer.value_of(by[i]) for i in update.ordinals))
        tokens = [Value(taken.entry, j) for j in range(len(update.ordinals))]
        hooked = zip(tokens, update.hooks, strict=True)
        tokens = [self._call(GradientHooks(h), t) if h else t for t, h in hooked]
        if optimizer.first_order or self.options.first_order:
            tokens = [self._call(aten.detach.default, t) for t in tokens]
        shown = [networks.shown[i] for i in update.ordinals]
        new, new_states = self._updated(update, shown)
        states = tuple({k: tracer.value_of(v) for k, v in s.items()} for s in update.states)
        thetas = tuple(map(tracer.value_of, shown))
        updated = self._call(update.plan, thetas, tuple(tokens), states, tuple(hyper.roots))
        new_thetas = self._part(updated, 0)
        for j, i in enumerate(update.ordinals):
            self._show(i, new[j], self._part(new_thetas, j))
        all_states = self._part(updated, 1) if any(new_states) else updated
        for j, (i, specs) in enumerate(zip(update.ordinals, new_states, strict=True)):
            state = {name: tracer.fakes.empty(spec) for name, spec in specs.items()}
            optimizer.state[networks.originals[i]] = state
            of = self._part(all_states, j) if any(new_states) else updated
            for name, value in state.items():
                tracer.bind(value, self._part(of, name))
        # An inner gradient is the derivative at the state it is taken at: what this step has read of other networks is
        # shown anew, so that their own steps do not look back through it.
        self._show_others(ordinals, leaves)
        if not optimizer.symbolic and optimizer not in tracer.stepped:
            tracer.stepped.append(optimizer)
        tracer.trace.steps.append((len(tracer.trace.entries), user_location()))

    def _refuse_overwritten(self, root: Any, ordinals: list[int]) -> None:
        cut = {entry: i for i, entry in self._cut if i in ordinals}

        def before(entry: Entry) -> list[Entry]:
            return [] if entry.op is show else [a.entry for a in sources(entry) if isinstance(a, Value)]

        for entry in reached([root.entry] if cut and isinstance(root, Value) else [], before):
            if entry in cut:
                refuse_overwritten(self.networks.names[cut[entry]])
        self._cut = [(i, entry) for i, entry in self._cut if i not in ordinals]

    def _read(self, reached: set[int], root: Any, ordinals: list[int]) -> list[Tensor]:
        """The parameters as a loss has read them that depends on the leaves ``reached``: those of now, or of before."""
        born = root.entry.seq if isinstance(root, Value) else len(self.recorder.trace.entries)
        for back in range(_REMEMBERED):
            found = []
            for i in ordinals:
                all_of, value_of = self._versions[i], self.recorder.value_of
                versions = [t for t in all_of if value_of(t).entry.seq <= born] or list(all_of)
                found.append(versions[min(back, len(versions) - 1)])
            if any(id(t) in reached for t in found):
                return found
        return [self.networks.shown[i] for i in ordinals]

    def _updated(self, update: Update, thetas: list[Tensor]) -> _Specs:
        """Specs of what an update makes of parameters and states; it is gone through once for all that are alike."""
        plan, grads, states, hyper_values = update.plan, update.grads, update.states, update.hyper_values
        key = (
            plan,
            *(tensor_spec(t) for t in (*thetas, *grads)),
            *(tensor_spec(v) for state in states for v in state.values()),
            *(tensor_spec(v) if isinstance(v, Tensor) else type(v) for v in hyper_values),
        )
        if key not in self._updates:
            with torch.no_grad():
                values = [t.detach() for t in thetas]
                new, new_states = plan(values, grads, states, self.recorder.faked(hyper_values))
            specs = [{k: tensor_spec(v) for k, v in state.items()} for state in new_states]
            self._updates[key] = list(map(tensor_spec, new)), specs
        return self._updates[key]

    def _call(self, op: Any, *tokens: Any) -> Value:
        """A call of the trace, whose results carry a gradient."""
        return Value(self.recorder.add(op, tokens, grad=True), None)

    def _part(self, of: Value, at: int | str) -> Value:
        """A piece of the update's nested result."""
        return self._call(operator.getitem, of, at)

    # -- in-place loads ------------------------------------------------------------------------------------------

    def _write(self, t: Tensor, directly: bool) -> Callable[[], None] | None:
        """The memory of a shown parameter is about to be overwritten: a history cut."""
        i = next((i for i, shown in enumerate(self.networks.shown) if shown is t), None)
        if i is None:
            return None
        if directly and torch.is_grad_enabled():
            raise WindowError(
                f"parameter {self.networks.names[i]!r} was changed in place with grad mode on; {AS_GRADIENT}"
            )
        tracer = self.recorder
        before = tracer.value_of(t).entry

        def cut() -> None:
            self._cut.append((i, before))
            self._overwritten.add(i)
            value = self._call(aten.detach.default, tracer.value_of(t))
            tracer.bind(t, self._call(show, value))

        return cut
