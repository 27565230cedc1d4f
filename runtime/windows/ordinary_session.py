"""An ordinary window: entry, steps whose values may be looked at, what it has to tell, and exit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.compiler.capture import intercept
from metaoptim.compiler.capture.eager.recorder import Recorder
from metaoptim.errors import LossError, WindowError, user_location, warn

from .networks import Networks
from .session import Member, Options, Session, _current, current_session
from .updates.hyper import Scheduled
from .updates.update import parameters_of
from .watching import oversights


class OrdinarySession(Session):
    """Base of the strategies on real tensors: they note what their user does besides stepping, and warn of it."""

    recorder: Recorder

    def __init__(self, options: Options, recorder: Recorder, networks: Networks) -> None:
        super().__init__(options, recorder, networks)
        self.held_inner = False  # whether there was a window inside it
        self._loss_told = False  # whether a loss that is not finite has been told of
        self._steps_of_others: dict[str, str] = {}  # parameter that an optimizer of torch moved -> where
        self._differentiated = WeakIdKeyDictionary()  # losses -> where their backward was called

    def _close(self, failed: bool) -> None:
        """Drop every reference to the user's graph."""

    def open(self) -> None:
        _watch_optimizers()
        intercept.patches.install()
        oversights.remember(None)
        _current.set(self)
        intercept.recording.set(self.recorder)
        intercept.networks.set(self.networks)
        self.recorder.__enter__()

    def _take(
        self, member: Member, schedules: Scheduled, losses: Any, loss: Tensor, allow_unused: bool
    ) -> None:
        optimizer, name = member.optimizer, type(member.optimizer).__name__
        before = []
        if self.options.record_grad_tape:
            named = [(self.networks.names[i], self.networks.shown[i]) for i in self.ordinals(optimizer)]
            before = [(f"step_{member.steps}:{name}", t.detach().clone()) for name, t in named]
            self._copied([t for _, t in before], now=False)
        super()._take(member, schedules, losses, loss, allow_unused)
        step = member.steps - 1
        optimizer._tape = [*(optimizer._tape if step else ()), *before]
        if step == self.options.pickup_step:
            self._pick(member)
        self._tell_of_step(name, step, loss)
        if self._checks_finite:
            self._check_finite(member)

    @property
    def _checks_finite(self) -> bool:
        """Whether values that are not finite are errors."""
        return self.options.check_finite or torch.is_anomaly_enabled()

    def _check_value(self, member: Member, loss: Tensor) -> None:
        if self._checks_finite and not bool(torch.isfinite(loss)):
            raise LossError(
                f"{type(member.optimizer).__name__}.step {member.steps} (counted from 0): the inner loss is "
                f"{float(loss.detach())}, expected a finite number; lower the learning rate, clip with "
                "metaoptim.transforms, or mend the loss"
            )

    def _pick(self, member: Member) -> None:
        """Copy what ``pickup_step`` wants of an optimizer and its networks."""
        optimizer = member.optimizer
        theta = {i: self.networks.shown[i].detach().clone() for i in self.ordinals(optimizer)}
        states = {p: {k: v.detach().clone() for k, v in s.items()} for p, s in optimizer.state.items()}
        buffers = [
            (m, name, b.detach().clone()) for m, name, b in self.networks.buffers_of(optimizer.networks)
        ]
        member.picked = theta, states, buffers
        of_states = [v for s in states.values() for v in s.values()]
        self._copied([*theta.values(), *of_states, *(b for _, _, b in buffers)], now=True)

    def _copied(self, copies: list[Tensor], now: bool) -> None:
        """The window keeps these: room is made for them ``now``, or by the step that is about to be taken."""

    def _check_finite(self, member: Member) -> None:
        for i in self.ordinals(member.optimizer):
            if not bool(torch.isfinite(self.networks.shown[i].detach()).all()):
                raise LossError(
                    f"{type(member.optimizer).__name__}.step {member.steps - 1} (counted from 0) made parameter "
                    f"{self.networks.names[i]!r} non-finite: its gradient or the update overflows; lower the learning "
                    "rate, or clip with metaoptim.transforms"
                )

    def _tell_of_step(self, name: str, step: int, loss: Tensor) -> None:
        """Warn of what the step just taken has taken no notice of; on the CPU, where nobody waits, look at its loss."""
        if self._differentiated and (where := self._differentiated.get(loss)) is not None:
            warn(
                f"loss.backward() at {where} has added the gradient of an inner loss to .grad, where the meta-gradient "
                f"goes; {name}.step(loss) takes the gradient itself. Take that backward out, or clone the loss if it "
                "is an outer loss too"
            )
        if not self._loss_told and loss.device.type == "cpu" and not math.isfinite(loss.item()):
            self._loss_told = True
            warn(
                f"{name}.step {step} (counted from 0): the inner loss is {loss.item()}; gradients through this step "
                "mean nothing. SlidingWindow(check_finite=True) makes this an error"
            )

    def note_backward(self, outputs: Iterable[Tensor]) -> None:
        where = user_location()
        self._differentiated.update((t, where) for t in outputs)

    def note_step_of(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of torch steps inside the block."""
        what = f"{type(optimizer).__name__}.step at {user_location()}"
        own = {id(p): name for p, name in zip(self.networks.originals, self.networks.names, strict=True)}
        self._steps_of_others.update((own[id(p)], what) for p in parameters_of(optimizer) if id(p) in own)

    def _tell_oversights(self, steps: int) -> None:
        """Warn of what the whole block shows."""
        if not steps and self._steps_of_others:
            names, what = [*self._steps_of_others], next(iter(self._steps_of_others.values()))
            warn(
                f"{what} moved {oversights.names_text(names)} in a window in which no inner optimizer has stepped, so "
                "nothing in it was differentiated or put back; take inner steps by inner.step(loss)"
            )
        shown = [self.networks.shown[i].detach() for i in self.networks.joined] if steps else []
        if not self._loss_told and not oversights.all_finite(shown):
            warn(
                f"the parameters are no longer finite {self._since_when(steps)}, so that gradients through this window "
                "mean nothing; SlidingWindow(check_finite=True) raises at the step where that begins, unless it is a "
                "compiled one"
            )

    def _since_when(self, steps: int) -> str:
        return f"after {steps} inner steps"

    def _ended(self, steps: int) -> oversights.Ended | None:
        """What is to be looked at afterwards."""
        return None

    def close(self, failed: bool) -> None:
        self.recorder.depth += 1  # from here on nothing is the window's any more
        self.recorder.close()
        ended, failing = None, True
        try:
            if not failed:
                steps = sum(member.steps for member in self.members.values())
                self._tell_oversights(steps)
                ended = self._ended(steps)
                self.networks.check()
                self._settle()
                self._check_pickup()
            failing = failed
        finally:
            try:
                if failing:
                    self._put_back()
                else:
                    self._commit()
            finally:
                for member in self.members.values():
                    member.optimizer._session = None
                intercept.recording.set(None)
                intercept.networks.set(None)
                _current.set(None)
                intercept.patches.uninstall()
                oversights.remember(ended)
                self._close(failing)
                self.members.clear()

    def _settle(self) -> None:
        """Wait for what goes on in the background."""

    def _check_pickup(self) -> None:
        k = self.options.pickup_step
        for m in self.members.values():
            if k >= 0 and m.steps and m.picked is None:
                raise WindowError(
                    f"pickup_step={k}: {type(m.optimizer).__name__} took only {m.steps} steps in this "
                    "window (they count from 0)"
                )

    def _put_back(self) -> None:
        self.networks.restore()
        self.networks.undo()
        for member in self.members.values():
            member.restore()
        for p, grad in zip(self.networks.originals, self._grads, strict=True):
            p.grad = grad

    def _commit(self) -> None:
        values = [shown.detach() for shown in self.networks.shown]
        for member in (m for m in self.members.values() if m.joined):
            if self.options.offline:
                member.restore()
                continue
            state = member.optimizer.state
            if member.picked is not None:
                theta, states, buffers = member.picked
                for i, value in theta.items():
                    values[i] = value
                state.clear()
                state.update(states)
                for module, name, value in buffers:
                    module._buffers[name] = value
            for of_parameter in state.values():
                of_parameter.update({name: value.detach() for name, value in of_parameter.items()})
        if (group := self.options.sync) is not False:
            for i in sorted(self.networks.joined):
                mean = values[i] = values[i].clone()
                torch.distributed.all_reduce(mean, group=group)
                mean /= torch.distributed.get_world_size(group)
        self.networks.commit(values, self.options.offline)


@functools.cache
def _watch_optimizers() -> None:
    """Look at every step of torch's optimizers, from the first window on."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    session = current_session()
    if isinstance(session, OrdinarySession):
        session.note_step_of(optimizer)
    elif session is None and (ended := oversights.last_ended()) is not None:
        ended.step(optimizer)
