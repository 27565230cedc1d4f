"""A window inside another: its inner loop is a part of the loss that the outer window takes a step by.

Its steps stay on autograd's tape, as those of a full tape do, and its operators, those of its inner gradients and
updates among them, are calls that the outer window's recorder sees. So the outer step's graph holds the whole inner
loop, and is replayed and differentiated like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.compiler.capture import intercept
from metaoptim.compiler.compat import DisableAutocast
from metaoptim.compiler.ir.values import Value
from metaoptim.errors import WindowError

from ..networks import Networks
from ..ordinary_session import OrdinarySession
from ..session import Options, _current
from ..updates.update import InnerOptimizer, parameters_of
from .full_tape import FullTapeSession, open_tapes, show

_CLONE = torch.ops.aten.clone.default


class _Networks(Networks):
    """Networks that have their parameters and buffers from the window around."""

    def __init__(self, around: Networks) -> None:
        super().__init__()
        self.around = around

    def adopt(self, modules: Sequence[nn.Module], trained: Collection[int]) -> list[int]:
        """As the base; the user's own parameters are those of the window around."""
        with self.around.showing(self.around.originals):
            new = super().adopt(modules, trained)
        for i in new:
            self.shown[i] = self.before(i)
        return new

    def before(self, i: int) -> Tensor:
        """What the window around shows as parameter ``i``."""
        ordinal = self.around.index_of(self.originals[i])
        return self.originals[i] if ordinal is None else self.around.shown[ordinal]

    def restore(self) -> None:
        """Let modules show what the window around shows."""
        self._place([self.before(i) for i in range(len(self.originals))])

    def put_back(self, modules: Sequence[nn.Module]) -> None:
        """Let the buffers of these modules be what they were at entry."""
        inside = {id(m) for root in modules for m in root.modules()}
        for module, name, before in self._buffers:
            if id(module) in inside:
                module._buffers[name] = before


class NestedSession(FullTapeSession):
    """A window inside a window; see above."""

    networks: _Networks

    def __init__(self, options: Options, around: OrdinarySession) -> None:
        super().__init__(options, around.recorder, _Networks(around.networks))
        self.around, self.level = around, 1 + getattr(around, "level", 0)
        self._noted: dict[int, int] = {}  # ordinal -> version of what is shown

    def open(self) -> None:
        self.around.held_inner = True
        open_tapes(+1)
        _current.set(self)
        intercept.networks.set(self.networks)

    def adopt(self, optimizer: InnerOptimizer) -> list[int]:
        """As the base, for optimizers that have taken no step in the window around, which adopts them first."""
        if optimizer._session is not self:
            if optimizer._session is not self.around:
                self.around.adopt(optimizer)
            if self.around.members[id(optimizer)].steps:
                raise WindowError(
                    f"this {type(optimizer).__name__} has taken steps in the window around this one, and cannot take "
                    "any inside it; step by it after the block, or build another for the same networks"
                )
            optimizer._session = self
        return super().adopt(optimizer)

    def close(self, failed: bool) -> None:
        """End: the window around goes on with its own parameters, or with the last ones if this one is online."""
        members, own = list(self.members.values()), self.networks.originals
        failing = True
        try:
            if not failed:
                self.networks.check()
                self._check_unwritten()
            failing = failed
        finally:
            last = {id(p): t.detach() for p, t in zip(own, self.networks.shown, strict=True)}
            ended = [m for m in members if failing or (m.joined and self.options.offline)]
            self.networks.restore()
            self.networks.put_back([network for m in ended for network in m.optimizer.networks])
            for member in members:
                optimizer, done = member.optimizer, member in ended
                if done:
                    member.restore()
                if done and member.joined:  # one for each task, maybe, which the window around need not keep
                    del self.around.members[id(optimizer)]
                optimizer._session = self.around if id(optimizer) in self.around.members else None
            _current.set(self.around)
            intercept.networks.set(self.around.networks)
            self._versions.clear()
            self.members.clear()
            open_tapes(-1)
        for optimizer in [m.optimizer for m in members if m.joined and m not in ended]:
            for state in optimizer.state.values():
                state.update({name: value.detach() for name, value in state.items()})
            parameters = [p for p in parameters_of(optimizer) if id(p) in last]
            self.around.start(optimizer, parameters, [last[id(p)] for p in parameters])  # a history cut

    @contextmanager
    def _stepping(self, optimizer: InnerOptimizer) -> Iterator[None]:
        """Inside the block the step is taken, in sight of the recorder of the window around."""
        with self.recorder.paused():
            self.networks.check()
            self._check_unwritten()
        with DisableAutocast(), torch.enable_grad():
            yield

    def _offer(self, ordinals: list[int]) -> None:
        for i in ordinals:
            self.networks.show(i, self._shown_for(self.networks.before(i), self.networks.originals[i]))
        self._shown_anew(ordinals)

    def _shown_for(self, value: Tensor, own: nn.Parameter) -> Tensor:
        return self._recorded(lambda: show(value, own, self.level), value)

    def _copy(self, value: Tensor) -> Tensor:
        return self._recorded(value.clone, value)

    def _recorded(self, make: Callable[[], Tensor], value: Tensor) -> Tensor:
        """A copy of ``value`` that the recorder knows for one."""
        with self.recorder.paused(), torch.enable_grad():
            made = make()
        if self.recorder.record and value.requires_grad:
            recording = self.recorder.recording
            entry = recording.entry(_CLONE, (recording.value_of(value),), {}, (value,), True)
            recording.bind(made, Value(entry, None))
        return made

    def _shown_anew(self, changed: Sequence[int]) -> None:
        super()._shown_anew(changed)
        self._noted = {i: t._version for i, t in enumerate(self.networks.shown)}

    def _check_unwritten(self) -> None:
        for i, version in self._noted.items():
            if self.networks.shown[i]._version != version:
                raise WindowError(
                    f"parameter {self.networks.names[i]!r} was written into inside a window that is inside another; "
                    "let the loop go on from other values by inner.start({name: values}), or write before the block"
                )


def refuse_options(said: dict[str, Any]) -> None:
    """Raise for options that a window inside another cannot have: its loop is a part of one outer step.

    Raises:
        WindowError: it names the option.
    """
    for name, value in said.items():
        gradient = name == "gradient" and value == "first_order"
        if name not in ("offline", "strategy", "check_finite") and not gradient:
            raise WindowError(
                f"{name}={value!r} of a window inside another: its inner loop is a part of one step of the outer "
                "window, which keeps, replays and differentiates it whole; give the option to the outer window"
            )
