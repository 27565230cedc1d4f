"""The recording strategy: steps become StepGraphs of a Tape, and meta-gradients come out of sweeps over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaoptim.compiler.ir.programs.calls import StepCall
from metaoptim.compiler.ir.programs.program import Tape
from metaoptim.compiler.ir.step import Lowering
from metaoptim.compiler.ir.traces.slices import Slice
from metaoptim.compiler.ir.values import Entry, Epoch, External, Spy, Theta, Value, is_cut, parents, reached
from metaoptim.errors import CaptureError, LossError

from ..budget.streaming import Streaming
from ..engine.engine import Engine, Held
from ..engine.estimators.evolution import Particles
from ..engine.nodes import gradient_of_loss, stepped
from ..states.disk import tier_for
from . import known_steps
from .known_steps import Taken
from .networks import Networks
from .opt_states import OptStates, names_of
from .ordinary_session import OrdinarySession
from .recorded_step import RecordedStep, StepPlaces, applied, unrecorded
from .session import Options, Place, by_optimizer, read_outside, refuse_overwritten
from .theta_view import ThetaView
from .updates.hyper import Hyper, Scheduled, hyper_of
from .updates.update import InnerOptimizer, Update, added, sums_of_gradients, trained, update_by
from .watching.oversights import Ended, all_finite, tell_unreachable, watch_backward


class _Losses(NamedTuple):
    """The losses that a step is taken by, differentiated."""

    roots: list[Any]  # what stands for them
    hyper: Hyper
    sliced: Slice  # what the last one and the hyper-parameters depend on
    epoch: Epoch  # whose theta it has read
    read: frozenset[int]  # state indices of theta that any has read
    spies: list[Spy]  # the hooks in all of them
    # sums of their gradients by each of the optimizer's parameters, or how the step may be taken without
    grads: list[Tensor | None] | Lowering


class RecordedSession(OrdinarySession):
    """A window that records its steps."""

    def __init__(self, options: Options) -> None:
        retention = options.retention
        slots = retention.slots if options.evolution is None else 1  # of which every run begins
        self.engine = Engine(slots, options.backward_hook, tier=tier_for(retention.offload))
        # "auto" compiles nothing under a budget: the check would take memory that nobody has planned
        self.engine.later = retention.memory_budget is not None and options.lowering.backend == "auto"
        watch_backward(self.engine)
        networks = Networks()
        self.view = ThetaView(options, self.engine, networks)
        super().__init__(options, self.view.recorder, networks)
        self.engine.closed, self.view.grads = self.closed, self._grads
        self._offer, self._join, self._start = self.view.offer, self.view.join, self.view.start
        if slots is None:
            offloads = retention.offload is not None
            slides = options.forward or options.window is not None
            self.engine.spending = False if slides else None  # sweeps overlap
            ledger = self.view.inputs.ledger
            self.engine.streaming = Streaming(retention.memory_budget, ledger, offloads, slides)
        self._looked_at: dict[int, Tensor] = {}  # parameters that steps have read and do not train, by id
        self.opt_states = OptStates(self.engine, networks, self.view)
        self.places: dict[object, StepPlaces] = {}  # of compiled steps
        if options.evolution is not None:
            names = partial(names_of, self.engine.thetas, self.view.indices, self.opt_states.at)
            self.engine.particles = Particles(options.evolution, names)

    @property
    def program(self) -> Tape:
        """What has been recorded."""
        return self.engine.program

    def look_at(self, tensors: Iterable[Tensor]) -> None:
        """Raise if a step is about to read a parameter that a network got inside the window."""
        new = [t for t in tensors if type(t) is torch.nn.Parameter and id(t) not in self._looked_at]
        if new:
            self.refuse_strangers(set(map(id, new)))
            self._looked_at.update((id(t), t) for t in new)

    def steps_reading(self, t: Tensor) -> tuple[Engine, tuple[int, ...]] | None:
        known = self.view.recording.known(t)
        return (self.engine, known.steps) if isinstance(known, Value) and known.steps else None

    def _copied(self, copies: list[Tensor], now: bool) -> None:
        if now:
            self.engine.make_room(copies)
        elif self.engine.streaming is not None:
            self.engine.streaming.keep(copies)

    def _since_when(self, steps: int) -> str:
        """Between which of the states that are kept it began."""
        last_good, first_bad = self.program.start, self.program.end
        for position in reversed(self.engine.store.kept):
            if all_finite(self.engine.store[position]):
                last_good = position
                break
            first_bad = position
        first, last = (
            steps
            - sum(
                isinstance(call := self.program[q], StepCall) and call.step.steps
                for q in range(p, self.program.end)
            )
            for p in (last_good, first_bad)
        )
        if first >= last - 1:
            return f"after inner step {last - 1}"
        return f"after one of the inner steps {first} to {last - 1}"

    def _ended(self, steps: int) -> Ended | None:
        if not steps:
            return None
        own = {self.networks.names[i]: self.networks.originals[i] for i in self.networks.joined}
        others = self.engine.tangents, self.engine.particles
        asked = self.engine.vjps > 0 or any(other is not None and other.asked for other in others)
        implicit = self.options.implicit is not None
        ended = Ended(
            self.options.offline, own, asked, self.engine.reaches, self.view.reads.waiting, implicit
        )
        if not asked:
            ended.unwatch = watch_backward(ended)
        return ended

    def _settle(self) -> None:
        if self.engine.particles is not None:
            self.engine.particles.close(self.engine)
        if self.engine.tier is not None:
            self.engine.tier.settle()

    def _close(self, failed: bool) -> None:
        there = len(
            self.engine.state
        )  # a step that has failed may have left places that nothing was put into
        self.engine.release(i for i in self.opt_states.at.values() if i < there)
        self.view.close()
        self._looked_at.clear()
        if failed and self.engine.tier is not None:  # otherwise when nothing can ask for it any more
            self.engine.tier.close("the window has ended with an exception")

    def _hold(self, places: Sequence[Place], linked: bool, copied: bool) -> Held:
        view, engine = self.view, self.engine
        view.settle()
        view.need(map(self.ordinal, places))
        for optimizer, of in by_optimizer(places).items():
            self.opt_states.bring(optimizer, dict.fromkeys(place.parameter for place in of))
        indices = self._indices(places)
        values = [engine.state[i].clone() if copied else engine.state[i] for i in indices]
        view.recording.epoch.read = True  # the tape can go back to here
        held = Held(values, view.reads.hold(indices) if linked else values)
        engine.held.add(held)
        return held

    def _go_on(self, places: Sequence[Place], held: Held) -> None:
        self.view.settle()
        self.view.go_on(self._indices(places), list(held.values), held.roots)
        for place, value in zip(places, held.values, strict=True):
            place.put(value)

    def _indices(self, places: Iterable[Place]) -> tuple[int, ...]:
        """The state indices of places; an optimizer state that is not on the tape yet is put at the end."""
        found, free = [], len(self.engine.state)
        for place in places:
            if place.optimizer is None:
                found.append(self.view.indices[self.ordinal(place)])
            else:
                found.append(
                    self.opt_states.at.setdefault(
                        self.opt_states.key(place.optimizer, place.parameter, place.name), free
                    )
                )
                free += found[-1] == free
        return tuple(found)

    def _sliced(self, optimizer: InnerOptimizer, schedules: Scheduled, loss: Tensor) -> _Losses:
        """What a loss has read, without its gradient."""
        view = self.view
        view.settle()
        root = view.recording.root_of(loss)
        if isinstance(root, External):
            raise LossError(
                f"{type(optimizer).__name__}.step: the loss was not computed inside this window, or is left over from "
                "before a step by a later loss; compute it inside the block, from the networks as they are now"
            )
        hyper = hyper_of(optimizer, schedules, view.recording.value_of, view.lifts)
        sliced, epoch = view.versions.slice([root, *hyper.roots])
        self._refuse_changed(sliced, optimizer)
        self.look_at([x.tensor for x in sliced.externals if x.tensor is not None])
        read = frozenset(t.index for t in sliced.thetas)
        return _Losses([root], hyper, sliced, epoch, read, sliced.spies, [])

    def _alone(self, optimizer: InnerOptimizer, schedules: Scheduled, loss: Tensor) -> _Losses:
        one = self._sliced(optimizer, schedules, loss)
        how = known_steps.expected(self, optimizer, loss, one.sliced)
        return one._replace(grads=how or self._gradient(optimizer, loss, one.sliced))

    def _added(
        self, optimizer: InnerOptimizer, schedules: Scheduled, loss: Tensor, losses: _Losses | None
    ) -> _Losses:
        one = self._sliced(optimizer, schedules, loss)
        grads = self._gradient(optimizer, loss, one.sliced)
        if losses is None:
            return one._replace(grads=grads)
        if spies := losses.spies + one.spies:
            raise CaptureError(
                "a tensor hook in the loss of a chunk, which is gone before the step is written down; compile the step "
                "(metaoptim.compile), or open the window with strategy='full_tape'"
            )
        assert isinstance(losses.grads, list)  # it was not alone
        roots, sums = [*losses.roots, *one.roots], added(losses.grads, grads)
        return one._replace(roots=roots, read=losses.read | one.read, spies=spies, grads=sums)

    def _moment(self) -> int:
        return self.view.recording.calls

    def _check_inside(self, optimizer: InnerOptimizer, losses: _Losses, before: int) -> None:
        mine = {self.view.indices[i] for i in self.ordinals(optimizer)}

        def earlier(a: Any) -> Iterable[Any]:
            return () if isinstance(a, Entry) and is_cut(a) else parents(a)

        for a in reached(losses.roots[-1:], earlier):
            if isinstance(a, Entry) and a.seq <= before:
                read = (theta for theta in earlier(a) if isinstance(theta, Theta))
                if any(theta.index in mine for theta in read):
                    raise LossError(read_outside(optimizer))

    def _step(
        self,
        optimizer: InnerOptimizer,
        schedules: Scheduled,
        losses: _Losses,
        loss: Tensor,
        allow_unused: bool,
    ) -> None:
        grads, sliced = losses.grads, losses.sliced
        if isinstance(grads, Lowering):
            stand_ins = known_steps.stand_ins(self, optimizer)
            update = self._update(optimizer, schedules, losses, stand_ins, allow_unused)
            taken = known_steps.take(self, optimizer, update, sliced, grads, self._fixed(optimizer))
            if taken is not None:
                self._leave(optimizer, taken, sliced, losses.epoch, loss)
                return
            grads = self._gradient(optimizer, loss, sliced)
        self._step_by_autograd(optimizer, schedules, losses, grads, loss, allow_unused)

    def _fixed(self, optimizer: InnerOptimizer) -> tuple[bool, bool]:
        """Whether inner gradients are constants of the meta-gradient, and whether the window has a backward_hook."""
        options = self.options
        return optimizer.first_order or options.first_order, options.backward_hook is not None

    def _step_by_autograd(
        self,
        optimizer: InnerOptimizer,
        schedules: Scheduled,
        losses: _Losses,
        grads: list[Tensor | None],
        loss: Tensor,
        allow_unused: bool,
    ) -> None:
        view, engine = self.view, self.engine
        hyper, sliced, epoch = losses.hyper, losses.sliced, losses.epoch
        update = self._update(optimizer, schedules, losses, grads, allow_unused)
        if losses.spies or losses.roots[1:]:  # only now have the hooks run
            if any(spy.mutated for spy in losses.spies):
                raise CaptureError(
                    "a tensor hook changed its gradient in place; return the new gradient instead"
                )
            sliced, epoch = view.versions.slice([*losses.roots, *hyper.roots])
        indices = tuple(view.indices[i] for i in update.ordinals)
        old = [engine.state[x] for x in indices]
        new, new_states = applied(update, old)
        if self.options.implicit is not None:
            self.options.implicit.check_state(any(new_states))
            self.options.implicit.check_real(old)
        changed = {t.index for t in sliced.thetas if not view.versions.unchanged(t)}
        back = engine.position - epoch.position if changed else 0
        count, fixed = len(losses.roots), self._fixed(optimizer)
        step = RecordedStep(
            engine, sliced, count, changed, back, update, indices, old, new, new_states, *fixed
        )
        before, after = self.opt_states.indices(optimizer, update, new_states)
        call = step.call(before, after, self.options.lowering, self.networks.names)
        taken = Taken(call, update, step.state, new_states)
        if count == 1 and not changed:
            known_steps.note(self, optimizer, sliced, taken, grads)
        grads.clear()  # a sliding window may replay below
        self._leave(optimizer, taken, sliced, epoch, loss)

    def _leave(
        self, optimizer: InnerOptimizer, taken: Taken, sliced: Slice, epoch: Epoch, loss: Tensor
    ) -> None:
        """Put a step on the tape, and show what it has made."""
        view, engine, (call, update, state, new_states, results) = self.view, self.engine, taken
        metas = [x.tensor for x in sliced.externals if x.tensor is not None]  # after the hooks
        view.reads.prepare(call, metas)
        if self.recorder.taint.of_storage and tell_unreachable(sliced, self.recorder.taint, self.networks):
            engine.reaches = True  # there is a better explanation
        update.grads.clear()  # a sliding window may replay below
        # nothing the user sees has changed so far, and nothing below fails
        outputs = iter(call.writes[len(update.ordinals) :])
        for i, new in zip(update.ordinals, new_states, strict=True):
            for name in new:
                self.opt_states.at[id(optimizer), i, name] = next(outputs)
            optimizer.state[self.networks.originals[i]] = new
        position = engine.position
        for value in sliced.values:
            if not value.steps or value.steps[-1] != position:
                value.steps += (position,)
        call.spies = tuple(spy for spies in sliced.hooks.values() for spy in spies)
        for spy in call.spies:
            spy.taken = True
        changes = list(zip(call.writes, state, strict=True))
        if results is not None:
            engine.save(call, results)
        view.take(call, changes, epoch, metas, update.ordinals)
        if loss.requires_grad:  # the sum of several has no history
            view.stepped.leave(loss, call, sliced)

    def _refuse_changed(self, sliced: Slice, optimizer: InnerOptimizer) -> None:
        """Raise for parameters that were written into between their use in the loss and the step."""
        view, networks = self.view, self.networks
        for theta in sliced.thetas:
            if theta.suspect:
                name = networks.names[view.indices.index(theta.index)]
                raise CaptureError(
                    f"parameter {name!r} was changed through .data between its use in the loss and the step; change it "
                    "before the loss or after the step"
                )
            if not view.versions.unchanged(theta):
                ordinal = view.indices.index(theta.index)
                if theta.tensor is networks.shown[ordinal] and ordinal in self.ordinals(optimizer):
                    refuse_overwritten(networks.names[ordinal])

    def _gradient(self, optimizer: InnerOptimizer, loss: Tensor, sliced: Slice) -> list[Tensor | None]:
        """∇ loss by the parameters of an optimizer as the loss has read them; ``sliced`` is what it has read."""
        indices, shown, view = self.view.indices, self.networks.shown, self.view
        read = {t.index: [t.tensor, *sliced.twins.get(k, ())] for k, t in enumerate(sliced.thetas)}
        ordinals = self.ordinals(optimizer)
        if view.stepped.behind:
            view.stepped.check(loss, [shown[i] for i in ordinals])
        if (node := stepped(loss)) is None:
            return sums_of_gradients(loss, [read.get(indices[i], [shown[i]]) for i in ordinals])
        sweep = gradient_of_loss(node.engine, node.position, torch.ones_like(loss))
        return [sweep.cotangents.get(indices[i]) for i in ordinals]

    def _update(
        self,
        optimizer: InnerOptimizer,
        schedules: Scheduled,
        losses: _Losses,
        grads: list[Tensor | None],
        allow_unused: bool,
    ) -> Update:
        indices, members = self.view.indices, trained(optimizer, self.networks)

        def prepare(used: list[int]) -> bool:
            for i in used:
                if indices[i] not in losses.read:
                    raise unrecorded(self.networks.names[i])
            return self.opt_states.sync(optimizer, schedules, used)

        return update_by(
            optimizer,
            self.networks,
            members,
            grads,
            losses.hyper,
            allow_unused=allow_unused,
            prepare=prepare,
        )
