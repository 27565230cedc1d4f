"""Theta as the user's code sees it: which tensors the networks show, and what writing into them means."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from metaoptim.compiler.capture.eager.recorder import Recorder
from metaoptim.compiler.ir.operators import LIFTS
from metaoptim.compiler.ir.programs.calls import Assign, StepCall
from metaoptim.compiler.ir.tensors import memory_of
from metaoptim.compiler.ir.values import Epoch, Theta

from ..engine.engine import Engine
from ..engine.inputs import Inputs
from ..engine.nodes import Begin, InnerParameter
from ..states.disk import check_device
from .networks import Networks
from .reads import WholeReads
from .rooted_reads import ForwardReads, Reads, SlidingReads
from .session import Options, refuse_write
from .watching import oversights
from .watching.losses import Stepped, Versions


class ThetaView:
    """Shows the engine's theta through the networks; the recorder's `Guard`.

    Attributes:
        indices: ordinal of a parameter -> its state index, -1 while nothing has read it.
        versions: of theta, in the super-step at hand.
        reads: what joins the tape to autograd's graph.
        stepped: losses that steps have been taken by.
        inputs: what steps have read besides theta.
        lifts: whether hyper-parameters that are numbers may become inputs.
        grads: copies of the gradients that the user's own parameters had at entry.
    """

    def __init__(self, options: Options, engine: Engine, networks: Networks) -> None:
        self.options, self.engine, self.networks = options, engine, networks
        self.recorder = Recorder(self)
        self.recording = self.recorder.recording
        self.versions = Versions(self.recording, options.window)
        if options.forward:
            self.reads: Reads = ForwardReads(engine, options.offline)
        elif options.window is None:
            self.reads = WholeReads(engine)
        else:
            self.reads = SlidingReads(engine, options.window, options.offline, options.implicit)
        self.stepped = Stepped(engine, self.reads, self.versions.current)
        self.inputs = Inputs(networks.is_buffer, counted=options.retention.slots is None)
        self.hold, self.on_tape = self.inputs.hold, engine.holds
        self.indices: list[int] = []
        self.lifts = True
        self.grads: list[Tensor | None] = []
        self._counted = 0  # bytes beside the tape that the budget knows of
        self._sliding = options.window is not None
        self._beside: dict[int, list[int]] = {}  # ordinal that nothing has read -> those that enter with it
        self._written: set[int] = set()  # ordinals that were overwritten before anything read them
        self._dirty: set[int] = set()  # ordinals that were overwritten since

    @property
    def epochs(self) -> list[Epoch]:
        return self.versions.epochs

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
        self._weigh()

    def _weigh(self, entering: Collection[int] = ()) -> None:
        """Count what is kept beside the tape: to put gradients and buffers back, and copies that nothing has read."""
        streaming = self.engine.streaming
        if streaming is not None:
            shown = enumerate(self.networks.shown)
            unread = [t for i, t in shown if self.indices[i] < 0 and i not in entering]
            kept = memory_of([*(g for g in self.grads if g is not None), *self.networks.copies, *unread])
            streaming.aside += kept - self._counted
            self._counted = kept

    def enter(self, theta: Theta) -> None:
        i = next(i for i, t in enumerate(self.networks.shown) if t is theta.tensor)
        self._enter(self._beside[i])

    def _enter(self, ordinals: list[int]) -> None:
        engine, epoch = self.engine, self.recording.epoch
        shown = [self.networks.shown[i] for i in ordinals]
        own: list[Tensor] = [self.networks.originals[i] for i in ordinals]
        check_device(self.options.retention.offload, [p.device for p in own])
        self.lifts = self.lifts and all(p.dtype in LIFTS for p in own)
        self._weigh(set(ordinals))
        indices = tuple(range(len(engine.state), len(engine.state) + len(ordinals)))
        self.reads.enter(engine.position, indices, own)
        # what was read in an only epoch is still there after it
        read = self.versions.read and len(self.epochs) > 1
        with self.recorder.paused(), torch.no_grad():
            self._assign(indices, [t.detach() for t in shown], adoption=True, read=read)
        epoch.position = engine.position  # theta is the same here
        engine.reaches |= self.options.offline
        for i, t, p, index in zip(ordinals, shown, own, indices, strict=True):
            self.indices[i] = index
            self.versions.enter(epoch.theta[id(t)], index, engine.position)
            if i not in self.networks.joined:
                engine.untrained.add(index)
            engine.thetas[index] = id(p)
            oversights.note_theta(t, engine, engine.position, index)

    def _assign(
        self, indices: tuple[int, ...], values: list[Tensor], *, read: bool, adoption: bool = False
    ) -> None:
        changes = list(zip(indices, values, strict=True))
        self.engine.append(Assign(indices, values, adoption=adoption), changes, read=read)

    def need(self, ordinals: Iterable[int]) -> None:
        """Put those of these parameters on the tape that are not there yet."""
        for i in ordinals:
            if self.indices[i] < 0:
                self._enter(self._beside[i])

    def join(self, ordinals: list[int], late: list[int]) -> None:
        """An optimizer of these parameters steps from now on; of ``late`` its loss has read the user's own."""
        self.need(ordinals)
        own, current = self.networks.originals, self.versions.current
        self.engine.untrained.difference_update(self.indices[i] for i in ordinals)
        self.engine.closed.update(id(own[i]) for i in ordinals if i in self._written)
        if late:
            indices = [(i, self.indices[i]) for i in late]
            self.versions.late = {id(own[i]): Theta(x, own[i], current[x]) for i, x in indices}

    def start(self, ordinals: list[int], values: list[Tensor]) -> None:
        """Let theta go on from ``values``, which receive its gradient from here on."""
        self.settle()
        self.engine.reaches |= any(v.requires_grad for v in values)
        indices, copies = [self.indices[i] for i in ordinals], [v.detach().clone() for v in values]
        self.go_on(tuple(indices), copies, values)

    def go_on(self, indices: tuple[int, ...], values: list[Tensor], roots: Sequence[Tensor]) -> None:
        """Let entries of the state go on from ``values``; their gradient goes to ``roots``."""
        position = self.engine.position
        self._assign(indices, values, adoption=True, read=self.versions.read)
        self.reads.start(position, indices, roots)
        # all, so that no inner gradient goes by way of the values to what they were computed from
        self._show(self._entered())

    def _entered(self) -> list[int]:
        """Ordinals of the parameters that are on the tape."""
        return [i for i, index in enumerate(self.indices) if index >= 0]

    def _show(self, changed: Sequence[int]) -> None:
        """Show theta as it is now, of which ``changed`` are new values."""
        own = self.networks.originals
        ordinals = self._entered() if self._sliding else changed
        shown = self.reads.read([self.indices[i] for i in ordinals], [own[i] for i in ordinals])
        self.reads.trim(self.epochs)
        for i, t in zip(ordinals, shown, strict=True):
            self.networks.show(i, t)
        self._open(changed)
        if self._sliding:
            for i, t in zip(ordinals, shown, strict=True):
                t.version = self.versions.current[self.indices[i]]  # type: ignore[attr-defined]

    def _open(self, changed: Sequence[int]) -> None:
        """An epoch begins, in which ``changed`` are new values."""
        shown = zip(self.indices, self.networks.shown, strict=True)
        self.versions.show(self.engine.position, shown, [self.indices[i] for i in changed])

    def take(
        self,
        call: StepCall,
        changes: list[tuple[int, Tensor]],
        epoch: Epoch,
        metas: list[Tensor],
        ordinals: list[int],
    ) -> None:
        """Append a step that read ``epoch`` and ``metas``, and show the new values of ``ordinals``."""
        engine = self.engine
        if self.versions.begins(epoch):
            self.stepped.settle(over=True)
            self.reads.begin(engine.position, self.versions.superstep)
        call.metas = self.reads.step(engine.position, metas)
        engine.reaches |= bool(metas)
        engine.append(call, changes)
        self._show(ordinals)
        self.stepped.settle(over=False)

    # -- what is read from outside (the recorder asks) -----------------------------------------------------------

    def preserve(self, targets: list[Tensor]) -> None:
        copied, backups = self.inputs.preserve(targets), self.networks.back_up(targets)
        if copied or backups:
            self.engine.make_room(backups)

    def statistics(self, stats: Sequence[Tensor], training: bool) -> list[Tensor]:
        fresh = self.networks.statistics(stats, training)
        if training:
            self.inputs.preserve(fresh)
        return fresh

    # -- what steps have read and autograd does not see (the recorder asks) ---------------------------------------

    def outlived(self, tensor: Tensor, steps: tuple[int, ...]) -> None:
        oversights.note_value(tensor, self.engine, steps)

    def was_read(self, tensor: Tensor) -> bool:
        old = isinstance(tensor, InnerParameter) and id(tensor) not in self.recording.epoch.theta
        return old or oversights.is_noted(tensor)

    def still_shown(self, tensor: Tensor) -> Theta | None:
        node, version = tensor.grad_fn, getattr(tensor, "version", None)
        if version is None or getattr(node, "engine", None) is not self.engine:
            return None
        index = node.indices[tensor.output_nr]  # type: ignore[union-attr]
        return Theta(index, tensor, version) if self.versions.current.get(index) is version else None

    # -- writes into theta (the recorder asks) -------------------------------------------------------------------

    def before_write(self, targets: list[Tensor], op: Any) -> list[int]:
        """Ordinals of the parameters about to be overwritten, after saving what the tape holds of them."""
        hit = []
        for t in targets:
            storage, ordinal = t.untyped_storage()._cdata, self.networks.at(t)
            if ordinal is None:  # an alias of what an earlier step has shown, or of optimizer state
                self.engine.protect(storage)
                continue
            if torch.is_grad_enabled() and t.requires_grad:
                refuse_write(self.networks.names[ordinal], op)
            if ordinal not in self._dirty:
                self.engine.protect(storage)
            if self.indices[ordinal] < 0:
                self._written.add(ordinal)
            hit.append(ordinal)
        return hit

    def after_write(self, hit: list[int]) -> None:
        with self.recorder.paused(), enable_reentrant_dispatch():
            for ordinal in hit:
                shown = self.networks.shown[ordinal]
                if self.indices[ordinal] >= 0 and ordinal in self.networks.joined and not shown.is_leaf:
                    Tensor.detach_(shown)
                    shown.requires_grad_()
        self._dirty.update(i for i in hit if self.indices[i] >= 0)

    def settle(self) -> None:
        if not self._dirty:
            return
        ordinals, engine = sorted(self._dirty), self.engine
        self._dirty.clear()
        indices = tuple(self.indices[i] for i in ordinals)
        with self.recorder.paused(), torch.no_grad():
            values = [self.networks.shown[i].detach() for i in ordinals]
            self._assign(indices, values, read=self.versions.read)
        for i, index in zip(ordinals, indices, strict=True):
            if i in self.networks.joined:  # shown without a Read from now on
                oversights.note_theta(self.networks.shown[i], engine, engine.position, index)
        self._open(ordinals)

    def close(self) -> None:
        """Drop every reference to the user's graph."""
        self.stepped.settle(over=True)
        self.grads = []
        self.inputs.clear()
        self.versions.close()
        self.reads.close()
        self.recorder.release()
