"""Theta as the user's code sees it: which tensors the networks show, and what writing into them means."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from metaoptim.compiler.capture.eager.recorder import Recorder
from metaoptim.compiler.ir.calls import Assign, StepCall
from metaoptim.compiler.ir.slices import Slice
from metaoptim.compiler.ir.tensors import memory_of
from metaoptim.compiler.ir.values import Epoch, Theta
from metaoptim.errors import CaptureError, WindowError

from ..engine.engine import Engine
from ..engine.inputs import Inputs, Snapshot
from ..engine.nodes import Begin, InnerParameter, Life, Link, Read, Results, new_token
from . import partial_gradients
from .networks import Networks
from .session import AS_GRADIENT, Options
from .sliding import Sliding
from .stepped import Stepped


class ThetaView:
    """Shows the engine's theta through the networks; the recorder's guard against writes behind the tape's back.

    Attributes:
        indices: ordinal of a parameter -> its state index, -1 while nothing has read it.
        epochs: the epochs of the super-step at hand, oldest first.
        late: id of the user's own parameter -> its theta, while the loss at hand may have read it itself.
    """

    def __init__(
        self, options: Options, engine: Engine, networks: Networks, entering: Callable[[list[int]], None]
    ) -> None:
        self.offline, self.engine, self.networks = options.offline, engine, networks
        self._entering = (
            entering  # called with the ordinals of parameters that are about to be put on the tape
        )
        self.recorder = Recorder(self)
        self.recording = self.recorder.recording
        self.indices: list[int] = []
        self.epochs: list[Epoch] = [self.recording.epoch]
        self.late: dict[int, Theta] = {}
        self._versions: dict[int, object] = {}  # state index -> equal for all that is shown for one value
        self._since: dict[int, int] = {}  # state index -> the position from which on it is there
        self._beside: dict[int, list[int]] = {}  # ordinal that nothing has read -> those that enter with it
        self._unlinked: list[
            tuple[int, tuple[int, ...], list[Tensor]]
        ] = []  # position and indices of what entered
        self._written: set[int] = set()  # ordinals that were overwritten before anything read them
        self.sliding = None if options.window is None else Sliding(engine, options.window)
        self.stepped = Stepped(engine, self.sliding, self._versions)
        self._superstep = 0
        self._overlapping: set[int] = set()  # where rounds begin that this super-step has swallowed
        self._dirty: set[int] = set()
        self._storages: dict[int, int] | None = None
        self._token = new_token()
        self.reads: weakref.WeakSet[Life] = weakref.WeakSet()  # that live, since a Link, at their super-steps
        self.inputs = Inputs(networks.is_buffer, counted=options.retention.slots is None)
        self._metas: dict[tuple, tuple[int, Tensor]] = {}  # identity -> number, the tensor
        self._numbered = 0

    # -- showing -------------------------------------------------------------------------------------------------

    def offer(self, ordinals: list[int]) -> None:
        """Show parameters of an optimizer that may step. They are put on the tape when a loss first reads them."""
        own = [self.networks.originals[i] for i in ordinals]
        with torch.enable_grad():
            shown = Begin.apply(self.engine.closed, [p.detach().clone() for p in own], *own)
        for i, t in zip(ordinals, shown, strict=True):
            self.indices.append(-1)
            self._beside[i] = ordinals
            self.networks.show(i, t)
            self.recording.epoch.theta[id(t)] = Theta(-1, t, object())
        self._storages = None

    def enter(self, theta: Theta) -> None:
        """A loss reads parameters for the first time (the recording asks)."""
        i = next(i for i, t in enumerate(self.networks.shown) if t is theta.tensor)
        self._enter(self._beside[i])

    def _enter(self, ordinals: list[int]) -> None:
        self._entering(ordinals)
        engine, epoch = self.engine, self.recording.epoch
        shown = [self.networks.shown[i] for i in ordinals]
        own: list[Tensor] = [self.networks.originals[i] for i in ordinals]
        indices = tuple(range(len(engine.state), len(engine.state) + len(ordinals)))
        self._unlinked.append((engine.position, indices, own))
        with self.recorder.paused(), torch.no_grad():
            values = [t.detach() for t in shown]
            changes = list(zip(indices, values, strict=True))
            # what was read in an only epoch is still there after it
            read = self.read and len(self.epochs) > 1
            engine.append(Assign(indices, values, adoption=True), changes, read=read)
        epoch.position = engine.position  # theta is the same here
        engine.reaches |= self.offline
        for i, t, p, index in zip(ordinals, shown, own, indices, strict=True):
            theta = epoch.theta[id(t)]
            self.indices[i] = theta.index = index
            if i not in self.networks.joined:
                engine.untrained.add(index)
            self._versions[index], self._since[index] = theta.version, engine.position
            engine.thetas[index] = id(p)
            partial_gradients.note_theta(t, engine, engine.position, index)

    def need(self, ordinals: Iterable[int]) -> None:
        """Put those of these parameters on the tape that are not there yet."""
        for i in ordinals:
            if self.indices[i] < 0:
                self._enter(self._beside[i])

    def join(self, ordinals: list[int], late: list[int]) -> None:
        """An optimizer of these parameters steps from now on; of ``late`` its loss has read the user's own."""
        self.need(ordinals)
        own = self.networks.originals
        self.engine.untrained.difference_update(self.indices[i] for i in ordinals)
        self.engine.closed.update(id(own[i]) for i in ordinals if i in self._written)
        if late:
            indices = [self.indices[i] for i in late]
            self.late = {
                id(own[i]): Theta(x, own[i], self._versions[x]) for i, x in zip(late, indices, strict=True)
            }

    def start(self, ordinals: list[int], values: list[Tensor]) -> None:
        """Let theta go on from ``values``, which receive its gradient from here on."""
        engine = self.engine
        self.settle()
        self._link()
        indices = tuple(self.indices[i] for i in ordinals)
        copies = [v.detach().clone() for v in values]
        position = engine.position
        engine.append(
            Assign(indices, copies, adoption=True), list(zip(indices, copies, strict=True)), read=self.read
        )
        engine.reaches |= any(v.requires_grad for v in values)
        if self.sliding is None:
            with torch.enable_grad():
                self._token = Link.apply(engine, position, (), indices, self._token, *values)
        else:
            self.sliding.start(indices, values)
        # all, so that no inner gradient goes by way of the values to what they were computed from
        self._show([i for i, index in enumerate(self.indices) if index >= 0])

    def _link(self) -> None:
        """Link what has entered: not before a step, since losses may be computed where autograd does not look."""
        for position, indices, own in self._unlinked:
            if self.sliding is None:
                with torch.enable_grad():
                    self._token = Link.apply(self.engine, position, (), indices, self._token, *own)
        self._unlinked.clear()

    def _show(self, ordinals: Sequence[int]) -> None:
        engine, own = self.engine, self.networks.originals
        self._versions.update((self.indices[i], object()) for i in ordinals)
        if self.sliding is not None:
            ordinals = [i for i, index in enumerate(self.indices) if index >= 0]
            oldest = min((e.position for e in self.epochs if e.read), default=engine.position)
            open_ = [k for k, i in enumerate(ordinals) if i not in self.networks.joined]
            shown = self.sliding.read(
                [self.indices[i] for i in ordinals],
                [self._since[self.indices[i]] - 1 for i in ordinals],
                [own[i] for i in ordinals],
                self.offline,
                open_,
                oldest,
            )
        else:
            life = Life(self._superstep)
            self.reads.add(life)
            with torch.enable_grad():
                shown = Read.apply(
                    engine,
                    engine.position,
                    [self.indices[i] for i in ordinals],
                    [own[i] for i in ordinals],
                    life,
                    self._token,
                )
        for i, t in zip(ordinals, shown, strict=True):
            self.networks.show(i, t)
            if self.sliding is not None:
                t.version = self._versions[self.indices[i]]  # type: ignore[attr-defined]
        old, theta = self.recording.epoch.theta, {}
        for index, t in zip(self.indices, self.networks.shown, strict=True):
            theta[id(t)] = old.get(id(t)) or Theta(index, t, self._versions[index])
        self._open(theta)

    def _part(self) -> None:
        """Where losses of some steps ago wait for their backward, a Link separates reads from theirs.

        So the cotangents of many losses do not have to be there at once. A super-step is never parted, of which a sweep
        makes some states once for all its steps.
        """
        engine, older = self.engine, self._superstep - 3  # the last losses are there in any case
        if any(life.at < older for life in self.reads):
            with torch.enable_grad():
                self._token = Link.apply(engine, engine.position, (), (), self._token)
            if engine.streaming is not None:
                theta = memory_of(engine.state[i] for i in self.indices if i >= 0)
                engine.streaming.waiting = max(engine.streaming.waiting, (1 + len(self.reads)) * theta)
            self.reads.clear()

    def _note_leaves(self, ordinals: Sequence[int], shown: Sequence[Tensor]) -> None:
        """Parameters shown without a Read: `bypass` must know what they are."""
        for i, t in zip(ordinals, shown, strict=True):
            partial_gradients.note_theta(t, self.engine, self.engine.position, self.indices[i])

    def _open(self, theta: dict[int, Theta]) -> None:
        epoch = self.recording.epoch = Epoch(self.engine.position, self._superstep, theta)
        self.epochs.append(epoch)
        self.late = {}
        self._storages = None

    def _keep_epochs(self, kept: list[Epoch]) -> None:
        """Drop the others, with the circle of calls that write and the epoch they were made in."""
        for epoch in self.epochs:
            if epoch not in kept:
                epoch.writes.clear()
        self.epochs = kept

    # -- what a loss has read ------------------------------------------------------------------------------------

    @property
    def read(self) -> bool:
        """Whether a loss of the super-step at hand may have read theta."""
        return any(epoch.read for epoch in self.epochs)

    def slice(self, roots: list[Any]) -> tuple[Slice, Epoch]:
        """The ancestor slice of a loss (first root) and hyper-parameters, and the epoch whose theta it read."""
        loss, *others = roots
        for carry in (True, False):
            sliced = Slice([loss, *others], self.late, carry)
            epoch = self._epoch_of(sliced) if sliced.consistent else None
            if epoch is not None:
                self._check_parted(epoch)
                return sliced, epoch
        raise CaptureError(
            "the loss reads parameters of several inner steps in a way that cannot be told apart; compute "
            "each loss from the networks as they are at one step"
        )

    def _epoch_of(self, sliced: Slice) -> Epoch | None:
        """The epoch in which a loss first read theta, or a later one if what it read there was not yet the same.

        So a compiled function divides its steps, too.
        """
        first = sliced.entries[0].epoch
        begun = self.epochs.index(first) if first in self.epochs else 0
        for epoch in self.epochs[begun:]:
            if all(self._is_of(t, epoch) for t in sliced.thetas):
                break
        else:
            return None
        oldest = self.epochs[0]
        if self.sliding is None and epoch is self.epochs[-1] and all(_same(t, oldest) for t in sliced.thetas):
            return oldest  # the super-step goes on where it can: losses may be left that were computed before
        return epoch

    def _check_parted(self, epoch: Epoch) -> None:
        """Raise where a sliding window finds no end of a super-step that has swallowed more than W rounds."""
        if self.sliding is None or not self._superstep or epoch in (self.epochs[0], self.epochs[-1]):
            return
        self._overlapping.add(epoch.position)
        if len(self._overlapping) < self.sliding.window:
            return
        raise CaptureError(
            f"window={self.sliding.window}: this loss was computed before the last step of another optimizer, or "
            "before values were written into parameters, but after the round of losses before it had been stepped "
            "by; such rounds overlap, and cannot be told apart. Step by all losses of a round before the next one is "
            "computed, and write into parameters before the loss or after the step"
        )

    def _is_of(self, theta: Theta, epoch: Epoch) -> bool:
        if epoch.position < self._since[theta.index]:
            return False
        return id(theta.tensor) in self.late or _same(theta, epoch)

    def unchanged(self, theta: Theta) -> bool:
        """Whether this version is still the one shown."""
        return self._is_of(theta, self.recording.epoch)

    def meta_params(self) -> list[tuple[int, Tensor]]:
        """What steps have read that requires grad and that a backward from here reaches, with its number."""
        sliding = self.sliding
        return [(n, t) for n, t in self._metas.values() if sliding is None or sliding.reads(n)]

    # -- a step --------------------------------------------------------------------------------------------------

    def take(
        self,
        call: Any,
        changes: list[tuple[int, Tensor]],
        epoch: Epoch,
        metas: list[Tensor],
        ordinals: list[int],
    ) -> None:
        """Append a step that read ``epoch`` and ``metas``, and show the new values of ``ordinals``."""
        engine = self.engine
        self._link()
        fresh = epoch is self.epochs[-1] or not self._superstep
        if fresh:
            self._superstep += 1
            epoch.superstep = self._superstep
            self._keep_epochs([epoch])
            self.recording.keep_only(epoch)
            self._overlapping.clear()
            self.stepped.settle(over=True)
            if self.sliding is None:
                self._part()
        keys = [
            (id(t), None if t.is_leaf else t._version) for t in metas
        ]  # in-place calls change where it leads
        new = {key: t for key, t in zip(keys, metas, strict=True) if key not in self._metas}
        for key, t in new.items():
            self._metas[key] = (self._numbered, t)
            self._numbered += 1
        call.metas = tuple(self._metas[key][0] for key in keys)
        engine.reaches |= bool(keys)
        if self.sliding is not None:
            self.sliding.step(engine.position, fresh, dict(zip(call.metas, metas, strict=True)))
            self._metas = {k: (n, t) for k, (n, t) in self._metas.items() if self.sliding.reads(n)}
        elif new:
            with torch.enable_grad():
                numbers = [self._metas[key][0] for key in new]
                self._token = Link.apply(engine, engine.position, numbers, (), self._token, *new.values())
        engine.append(call, changes)
        self._show(ordinals)
        self.stepped.settle(over=False)

    def leave(self, loss: Tensor, call: StepCall, sliced: Slice) -> None:
        """``loss`` has been stepped by, in the ``call`` that was taken last: its gradient comes from the tape now."""
        self.stepped.leave(loss, call, sliced, self._token)

    def results(self, indices: list[int]) -> tuple[Tensor, ...]:
        """State entries that a compiled step has just left, as tensors of the user's."""
        if self.sliding is not None:
            raise CaptureError(
                "a compiled step that returns what depends on the parameters, in a window with window=W; return "
                "detached values, and compute outer losses outside the step"
            )
        return Results.apply(self.engine, self.engine.position, indices, self._token)

    # -- what is read from outside (the recorder asks) -----------------------------------------------------------

    def hold(self, tensor: Tensor) -> Snapshot:
        """The value of ``tensor`` as it is read now."""
        return self.inputs.hold(tensor)

    def preserve(self, targets: list[Tensor]) -> None:
        """``targets`` are about to be overwritten."""
        copied, backups = self.inputs.preserve(targets), self.networks.back_up(targets)
        if copied or backups:
            self.engine.make_room(backups)

    def statistics(self, stats: Sequence[Tensor], training: bool) -> list[Tensor]:
        """The running statistics for a batch norm to use."""
        fresh = self.networks.statistics(stats, training)
        if training:
            self.inputs.preserve(fresh)
        return fresh

    # -- what steps have read and autograd does not see (the recorder asks) ---------------------------------------

    def outlived(self, tensor: Tensor, steps: tuple[int, ...]) -> None:
        """The recording forgets ``tensor``, which the steps at these positions have read."""
        partial_gradients.note_value(tensor, self.engine, steps)

    def was_read(self, tensor: Tensor) -> bool:
        """Whether steps have read ``tensor``, of which the recording itself knows nothing any more."""
        old = isinstance(tensor, InnerParameter) and id(tensor) not in self.recording.epoch.theta
        return old or partial_gradients.is_noted(tensor)

    def still_shown(self, tensor: Tensor) -> Theta | None:
        """Theta, if ``tensor`` was shown before another optimizer's step for a value that has not changed since."""
        node, version = tensor.grad_fn, getattr(tensor, "version", None)
        if version is None or getattr(node, "engine", None) is not self.engine:
            return None
        index = node.indices[tensor.output_nr]  # type: ignore[union-attr]
        return Theta(index, tensor, version) if self._versions.get(index) is version else None

    def on_tape(self, storage: int) -> bool:
        """Whether the tape holds what lies in ``storage``."""
        return self.engine.holds(storage)

    # -- writes into theta (the recorder asks) -------------------------------------------------------------------

    def before_write(self, targets: list[Tensor], op: Any) -> list[int]:
        """Ordinals of the parameters about to be overwritten, after saving what the tape holds of them."""
        if self._storages is None:
            self._storages = {t.untyped_storage()._cdata: i for i, t in enumerate(self.networks.shown)}
        hit = []
        for t in targets:
            storage = t.untyped_storage()._cdata
            ordinal = self._storages.get(storage)
            if ordinal is None:
                self.engine.protect(
                    storage
                )  # an alias of what an earlier step has shown, or of optimizer state
                continue
            if torch.is_grad_enabled() and t.requires_grad:
                raise WindowError(
                    f"parameter {self.networks.names[ordinal]!r} was changed in place by {op} with grad mode "
                    f"on; {AS_GRADIENT}"
                )
            if ordinal not in self._dirty:
                self.engine.protect(storage)
            if self.indices[ordinal] < 0:
                self._written.add(ordinal)
            hit.append(ordinal)
        return hit

    def after_write(self, hit: list[int]) -> None:
        """Overwritten parameters are leaves from now on: a history cut, for those that an optimizer steps."""
        with self.recorder.paused(), enable_reentrant_dispatch():
            for ordinal in hit:
                shown = self.networks.shown[ordinal]
                if self.indices[ordinal] >= 0 and ordinal in self.networks.joined and not shown.is_leaf:
                    Tensor.detach_(shown)
                    shown.requires_grad_()
        self._dirty.update(i for i in hit if self.indices[i] >= 0)

    def settle(self) -> None:
        """Put overwritten parameters on the tape before theta is read again."""
        if not self._dirty:
            return
        ordinals = sorted(self._dirty)
        self._dirty.clear()
        with self.recorder.paused(), torch.no_grad():
            indices = tuple(self.indices[i] for i in ordinals)
            values = [self.networks.shown[i].detach() for i in ordinals]
            changes = list(zip(indices, values, strict=True))
            self.engine.append(Assign(indices, values), changes, read=self.read)
        cut = [i for i in ordinals if i in self.networks.joined]
        self._note_leaves(cut, [self.networks.shown[i] for i in cut])
        theta = dict(self.recording.epoch.theta)
        for i in ordinals:
            version = self._versions[self.indices[i]] = object()
            theta[id(self.networks.shown[i])] = Theta(self.indices[i], self.networks.shown[i], version)
        self._open(theta)

    def close(self) -> None:
        """Drop every reference to the user's graph."""
        self.stepped.settle(over=True)
        self._metas.clear()
        self._unlinked.clear()
        self._entering = lambda ordinals: None
        self.inputs.clear()
        self._keep_epochs([])
        self.late = {}
        self._token = new_token()
        self.recorder.release()
        if self.sliding is not None:
            self.sliding.close()


def _same(theta: Theta, epoch: Epoch) -> bool:
    """Whether the networks showed this version in ``epoch``, on the tape or not yet."""
    if epoch.theta.get(id(theta.tensor)) is theta:
        return True
    return any(t.index == theta.index and t.version is theta.version for t in epoch.theta.values())
