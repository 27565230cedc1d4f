"""The recording strategy: steps become StepGraphs of a Tape, and meta-gradients come out of sweeps over it."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaoptim.compiler.ir.calls import Assign, StepCall
from metaoptim.compiler.ir.operators import LIFTS
from metaoptim.compiler.ir.slices import Slice, hook_key
from metaoptim.compiler.ir.step import StepGraph
from metaoptim.compiler.ir.tape import Tape
from metaoptim.compiler.ir.tensors import memory_of, tensor_spec
from metaoptim.compiler.ir.update import UpdatePlan, initial_state
from metaoptim.compiler.ir.values import External
from metaoptim.compiler.lower.library import library
from metaoptim.compiler.passes.from_recording import StepSpec, build_step
from metaoptim.errors import CaptureError, LossError, MetaOptimError, WindowError, user_location

from ..budget.streaming import Streaming
from ..engine.engine import Engine
from ..engine.inputs import Snapshot
from ..engine.nodes import gradient_of_loss, stepped
from ..states.tiered import check_device, tier_for
from . import first_use, partial_gradients
from .hyper import Hyper, hyper_of
from .oversights import Ended, all_finite
from .session import Options, Session, gradient, refuse_overwritten
from .theta_view import ThetaView

_pure: weakref.WeakSet = weakref.WeakSet()  # updates that have been seen not to write into their arguments


class _Update(NamedTuple):
    """What a step does to which parameters."""

    ordinals: list[int]
    indices: tuple[int, ...]
    grads: list[Tensor]
    old: list[Tensor]
    states: list[dict[str, Tensor]]
    plan: UpdatePlan
    grad_hooks: tuple[tuple, ...]


class RecordedSession(Session):
    """A window that records its steps."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        retention = options.retention
        self.engine = Engine(retention.slots, options.backward_hook, tier=tier_for(retention.offload))
        self.engine.closed = self.closed
        partial_gradients.watch_backward(self.engine)
        self.view = ThetaView(options, self.engine, self.networks, self._entering)
        if retention.slots is None:
            self.engine.streaming = Streaming(
                retention.memory_budget,
                self.view.inputs.ledger,
                retention.offload is not None,
                options.window is not None,
            )
        self.recorder = self.view.recorder
        self._looked_at: dict[
            int, Tensor
        ] = {}  # parameters that steps have read and that they do not train, by id
        self._put_back = (
            0  # bytes that are kept to put gradients and buffers back, and of copies that nothing has read
        )
        self._lifts = True  # whether hyper-parameters that are numbers may become inputs
        self.opt_state: dict[tuple[int, int, str], int] = {}  # (optimizer, ordinal, name) -> state index
        self.results: dict[tuple[int, int], int] = {}  # (compiled step, number of its result) -> state index

    @property
    def program(self) -> Tape:
        """What has been recorded."""
        return self.engine.program

    def _offer(self, ordinals: list[int]) -> None:
        self.view.offer(ordinals)
        self._weigh()

    def _join(self, ordinals: list[int], late: list[int]) -> None:
        self.view.join(ordinals, late)

    def _start(self, ordinals: list[int], values: list[Tensor]) -> None:
        self.view.start(ordinals, values)

    def _entering(self, ordinals: list[int]) -> None:
        """Parameters are about to be put on the tape."""
        own = [self.networks.originals[i] for i in ordinals]
        check_device(self.options.retention.offload, [p.device for p in own])
        self._lifts = self._lifts and all(p.dtype in LIFTS for p in own)
        self._weigh(set(ordinals))

    def _weigh(self, entering: Collection[int] = ()) -> None:
        """Count what is kept beside the tape: to put gradients and buffers back, and copies that nothing has read."""
        if self.engine.streaming is not None:
            indices, shown = self.view.indices, self.networks.shown
            unread = [t for i, t in enumerate(shown) if indices[i] < 0 and i not in entering]
            kept = memory_of([*(g for g in self._grads if g is not None), *self.networks.copies, *unread])
            self.engine.streaming.aside += kept - self._put_back
            self._put_back = kept

    def look_at(self, tensors: Iterable[Tensor]) -> None:
        """Raise if a step is about to read a parameter that a network got inside the window."""
        new = [t for t in tensors if type(t) is torch.nn.Parameter and id(t) not in self._looked_at]
        if new:
            self.refuse_strangers(set(map(id, new)))
            self._looked_at.update((id(t), t) for t in new)

    def _close(self) -> None:
        self.view.close()
        self._looked_at.clear()

    def _record_tape(self, optimizer: Any, member: Any) -> list[tuple[str, Tensor]]:
        tape = super()._record_tape(optimizer, member)
        if self.engine.streaming is not None:
            self.engine.streaming.keep([t for _, t in tape])
        return tape

    def _pick(self, optimizer: Any, member: Any) -> list[Tensor]:
        copies = super()._pick(optimizer, member)
        self.engine.make_room(copies)
        return copies

    def _unsettled(self) -> BaseException | None:
        try:
            if self.engine.tier is not None:
                self.engine.tier.settle()
        except BaseException as error:  # waiting can be interrupted
            return error
        return None

    def _since_when(self, steps: int) -> str:
        """Between which of the states that are kept it began."""
        last_good, first_bad = self.program.start, self.program.end
        for position in reversed(self.engine.store.kept):
            if all_finite(self.engine.store[position]):
                last_good = position
                break
            first_bad = position
        taken = [steps] * 2
        for k, position in enumerate((last_good, first_bad)):
            rest = range(position, self.program.end)
            taken[k] -= sum(isinstance(call := self.program[q], StepCall) and call.step.steps for q in rest)
        first, last = taken[0], taken[1] - 1
        return (
            f"after inner step {last}" if first >= last else f"after one of the inner steps {first} to {last}"
        )

    def _ended(self) -> Ended | None:
        names = zip(self.networks.names, self.networks.originals, strict=True)
        own = {n: p for i, (n, p) in enumerate(names) if i in self.networks.joined}
        steps = sum(member.steps for member in self.members.values())
        asked = self.engine.vjps > 0
        ended = (
            Ended(self.options.offline, own, asked, self.engine.reaches, self.view.reads) if steps else None
        )
        if ended is not None and not asked:
            ended.unwatch = partial_gradients.watch_backward(ended)
        return ended

    def close(self, failed: bool) -> None:
        """End; what was offloaded is removed if the block failed, else when nothing can ask for it any more."""
        ended = False
        try:
            super().close(failed)
            ended = not failed
        finally:
            if not ended and self.engine.tier is not None:
                self.engine.tier.close("the window has ended with an exception")

    def _step(self, optimizer: Any, loss: Tensor, allow_unused: bool) -> None:
        self.view.settle()
        root = self.view.recording.root_of(loss)
        if isinstance(root, External):
            raise LossError(
                f"{type(optimizer).__name__}.step: the loss was not computed inside this window, or is left over from "
                "before a step by a later loss; compute it inside the block, from the networks as they are now"
            )
        hyper = hyper_of(optimizer, self.view.recording.value_of, self._lifts)
        sliced, epoch = self.view.slice([root, *hyper.roots])
        for theta in sliced.thetas:
            if theta.suspect:
                name = self.networks.names[self.view.indices.index(theta.index)]
                raise CaptureError(
                    f"parameter {name!r} was changed through .data between its use in the loss and the step; change it "
                    "before the loss or after the step"
                )
            if not self.view.unchanged(theta):
                ordinal = self.view.indices.index(theta.index)
                if theta.tensor is self.networks.shown[ordinal] and ordinal in self.ordinals(optimizer):
                    refuse_overwritten(self.networks.names[ordinal])
        metas = [x.tensor for x in sliced.externals if x.tensor is not None]
        self.look_at(metas)
        update = self._plan(optimizer, loss, sliced, hyper, allow_unused)
        if sliced.spies:  # only now have the hooks run
            if any(spy.mutated for spy in sliced.spies):
                raise CaptureError(
                    "a tensor hook changed its gradient in place; return the new gradient instead"
                )
            sliced, epoch = self.view.slice([root, *hyper.roots])
        new, new_states = self._apply(update, hyper.slots)
        call = self._capture(optimizer, sliced, update, epoch, new, new_states)
        first_use.tell_unreachable(self, sliced)
        update.grads.clear()  # a sliding window may replay below
        # nothing the user sees has changed so far, and nothing below fails
        outputs = iter(call.opt_state_out)
        for i, state in zip(update.ordinals, new_states, strict=True):
            for name in state:
                self.opt_state[id(optimizer), i, name] = next(outputs)
            optimizer.state[self.networks.originals[i]] = state
        changes = [
            *zip(call.update, new, strict=True),
            *zip(call.opt_state_out, (v for s in new_states for v in s.values()), strict=True),
        ]
        metas = [x.tensor for x in sliced.externals if x.tensor is not None]  # after the hooks
        position = self.engine.position
        for value in sliced.values:
            if not value.steps or value.steps[-1] != position:
                value.steps += (position,)
        call.spies = tuple(spy for spies in sliced.hooks.values() for spy in spies)
        for spy in call.spies:
            spy.taken = True
        self.view.take(call, changes, epoch, metas, update.ordinals)
        self.view.leave(loss, call, sliced)

    # -- the update ----------------------------------------------------------------------------------------------

    def _plan(self, optimizer: Any, loss: Tensor, sliced: Slice, hyper: Hyper, allow_unused: bool) -> _Update:
        indices, shown, engine = self.view.indices, self.networks.shown, self.engine
        read = {t.index: [t.tensor, *sliced.twins.get(k, ())] for k, t in enumerate(sliced.thetas)}
        members = [
            (i, k)
            for k, group in enumerate(optimizer.param_groups)
            for p in group["params"]
            if (i := self.networks.index_of(p)) is not None
        ]
        ordinals = [i for i, _ in members]
        by = [read.get(indices[i], [shown[i]]) for i in ordinals]
        if self.view.stepped.behind:
            self.view.stepped.check(loss, [shown[i] for i in ordinals])
        found = _sums_of_gradients(loss, by) if stepped(loss) is None else self._again(loss, ordinals)
        grads, hooks = self.gradients(optimizer, ordinals, found, False, allow_unused)
        used = [(i, k, g, h) for (i, k), g, h in zip(members, grads, hooks, strict=True) if g is not None]
        for i, *_ in used:
            if indices[i] not in read:
                raise first_use.unrecorded(self.networks.names[i])
        ordinals = [i for i, *_ in used]
        init = type(optimizer).init_state if self._sync_opt_state(optimizer, ordinals) else None
        states = [optimizer.state[self.networks.originals[i]] for i in ordinals]
        plan = UpdatePlan(
            type(optimizer).update,
            hyper.groups,
            tuple(k for _, k, _, _ in used),
            tuple(map(tuple, states)),
            hyper.clip,
            init,
        )
        where = tuple(indices[i] for i in ordinals)
        return _Update(
            ordinals,
            where,
            [g for _, _, g, _ in used],
            [engine.state[x] for x in where],
            states,
            plan,
            tuple(h for *_, h in used),
        )

    def _again(self, loss: Tensor, ordinals: list[int]) -> list[Tensor | None]:
        """The gradient of a loss that has been stepped by before, by the parameters as it has read them."""
        node = stepped(loss)
        sweep = gradient_of_loss(node.engine, node.position, torch.ones_like(loss))
        return [sweep.cotangents.get(self.view.indices[i]) for i in ordinals]

    def _apply(self, update: _Update, slots: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Υ, on copies the first time: an update that writes into its arguments must not reach the tape."""
        plan, old, grads, states = update.plan, update.old, update.grads, update.states
        known = plan.update in _pure
        with torch.no_grad():
            if not known:
                old, grads = [t.clone() for t in old], [t.clone() for t in grads]
                states = [{k: v.clone() for k, v in s.items()} for s in states]
            given = () if known else [*old, *grads, *(v for s in states for v in s.values())]
            versions = [t._version for t in given]
            try:
                results = plan(old, grads, states, slots)
            except MetaOptimError:
                raise
            except RuntimeError as error:
                shapes = ", ".join(str(tuple(s.shape)) for s in slots if isinstance(s, Tensor)) or "none"
                raise WindowError(
                    f"{plan.__name__} failed: {error}; shapes of the hyper-parameters that are tensors: {shapes}"
                ) from error
        if versions != [t._version for t in given]:
            raise CaptureError(f"{plan.__name__} changes its arguments in place; it must return new tensors")
        _pure.add(plan.update)
        return results

    def _sync_opt_state(self, optimizer: Any, ordinals: list[int]) -> bool:
        """Bring optimizer state that is not on the tape (new, from before the window, or just loaded) onto it.

        Returns whether there are initial states that depend on their parameter: those must be part of the step.
        """
        inside = False
        engine = self.engine
        for i in ordinals:
            p = self.networks.originals[i]
            state = optimizer.state[p]
            if not state:
                group = next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))
                with torch.enable_grad():
                    initial = initial_state(
                        optimizer.init_state,
                        engine.state[self.view.indices[i]].detach().requires_grad_(),
                        group,
                    )
                if any(v.requires_grad for v in initial.values()):
                    inside = True
                else:
                    state.update(initial)
        self.bring(optimizer, ordinals)
        return inside

    def bring(self, optimizer: Any, ordinals: list[int]) -> None:
        """Put optimizer state that is not on the tape onto it."""
        engine = self.engine
        known, new = self.opt_state, {}
        changes: list[tuple[int, Tensor]] = []
        for i in ordinals:
            for name, value in optimizer.state[self.networks.originals[i]].items():
                key = (id(optimizer), i, name)
                if key in known and engine.state[known[key]] is value:
                    continue
                if value.requires_grad:
                    raise WindowError(
                        f"the optimizer state {name!r} of {self.networks.names[i]!r} requires grad; detach it, or open "
                        "the window with strategy='full_tape' to differentiate by it"
                    )
                if key not in known:
                    new[key] = len(engine.state) + len(new)
                changes.append((known[key] if key in known else new[key], value))
        if changes:
            call = Assign(tuple(i for i, _ in changes), [v for _, v in changes])
            engine.append(call, changes, read=self.view.read)
            known.update(new)
            self.view.recording.epoch.position = engine.position  # theta is the same here

    # -- the step graph ------------------------------------------------------------------------------------------

    def _capture(
        self,
        optimizer: Any,
        sliced: Slice,
        update: _Update,
        epoch: Any,
        new_theta: list[Tensor],
        new_states: list[dict],
    ) -> StepCall:
        engine, view = self.engine, self.view
        place = {t.index: k for k, t in enumerate(sliced.thetas)}
        changed = {t.index for t in sliced.thetas if not view.unchanged(t)}
        back = engine.position - epoch.position if changed else 0
        spec = StepSpec(
            update.plan,
            params=tuple(place[x] for x in update.indices),
            stale=not changed.isdisjoint(update.indices),
            thetas=tuple(tensor_spec(t.tensor) for t in sliced.thetas),
            now=tuple(map(tensor_spec, update.old)),
            states=tuple(tuple((k, tensor_spec(v)) for k, v in s.items()) for s in update.states),
            grad_hooks=tuple(tuple(map(hook_key, h)) for h in update.grad_hooks),
            first_order=optimizer.first_order,
            hooked=self.options.backward_hook is not None,
        )
        key = (sliced.key, spec)

        def build(lifted: tuple[int, ...]) -> StepGraph:
            after = [{k: tensor_spec(v) for k, v in s.items()} for s in new_states]
            return build_step(sliced, spec, after, lifted, update.grad_hooks)

        _check_requires_grad(sliced)
        held = [x.held for x in sliced.externals]
        try:
            step, lifted, new = library.get(key, tuple(sliced.numbers), build)
        except CaptureError:
            raise
        except Exception as error:
            raise first_use.uncapturable(error) from error
        lowering = self.options.lowering
        if step.dynamic and lowering.backend != "eager":
            library.discard(key)  # it has not been checked
            raise CaptureError(
                f"backend={lowering.backend!r}: the shapes in this step depend on values, and such a step cannot be "
                "compiled; use backend='eager'"
            )
        dtypes = [port.spec.dtype for port in step.inputs[len(step.inputs) - len(lifted) :]]
        held += [
            Snapshot(torch.tensor(sliced.numbers[i], dtype=dtype, device="cpu"), None, "a number")
            for i, dtype in zip(lifted, dtypes, strict=True)
        ]
        inputs, outputs = self._state_indices(optimizer, update, new_states)
        call = StepCall(
            step,
            tuple(place),
            update.indices,
            inputs,
            outputs,
            back,
            held,
            (),
            user_location(),
            lowering=lowering,
        )
        suspect = any(x.suspect for x in (*sliced.externals, *sliced.values))
        if new or step.opaque or suspect:
            try:
                first_use.check(
                    engine,
                    call,
                    sliced,
                    update,
                    spec.stale,
                    [*new_theta, *(v for s in new_states for v in s.values())],
                    self.networks.names,
                )
            except CaptureError as error:
                if suspect:
                    raise CaptureError(
                        "a tensor was changed through .data or numpy between its use in the loss and the step, so that "
                        "autograd's gradient is that of neither value; change it before the loss or after the step"
                    ) from error
                library.discard(key)
                raise
        return call

    def _state_indices(
        self, optimizer: Any, update: _Update, new_states: list[dict]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """State indices of the optimizer state before a step and after; what is new is put at the end."""
        end, outputs = len(self.engine.state), []
        for i, state in zip(update.ordinals, new_states, strict=True):
            for name in state:
                index = self.opt_state.get((id(optimizer), i, name), end)
                end += index == end
                outputs.append(index)
        inputs = [
            self.opt_state[id(optimizer), i, name]
            for i, state in zip(update.ordinals, update.states, strict=True)
            for name in state
        ]
        return tuple(inputs), tuple(outputs)


def _check_requires_grad(sliced: Slice) -> None:
    for x in sliced.externals:
        # autograd looks at a saved leaf again in the backward: what it makes of it is neither the one nor the other
        source = x.source
        if source is None or x.written or (x.grad and x.tensor is not source):
            continue
        if x.grad != source.requires_grad:
            raise CaptureError(
                f"requires_grad of a tensor of shape {tuple(source.shape)} changed between its use in the loss "
                "and the step; change it before the loss or after the step, or use tensor.detach() in a part of it"
            )


def _sums_of_gradients(loss: Tensor, by: list[list[Tensor]]) -> list[Tensor | None]:
    """For each group of tensors, the sum of the gradients of ``loss`` by them."""
    flat = [t for group in by for t in group]
    found = iter(gradient(loss, flat, retain_graph=True))
    sums: list[Tensor | None] = []
    for group in by:
        parts = [g for _, g in zip(group, found, strict=False) if g is not None]
        sums.append(sum(parts[1:], parts[0]) if parts else None)
    return sums
