"""What an open window does whatever its strategy, captured or not: it adopts optimizers, and checks their steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaoptim.compiler.capture.modes import CaptureMode
from metaoptim.compiler.compat import DisableAutocast
from metaoptim.compiler.ir.retention import UNSAID, Retention
from metaoptim.compiler.ir.step import Lowering
from metaoptim.errors import CaptureError, LossError, WindowError

from ..engine.engine import Engine, Held
from ..engine.estimators.evolution import Evolution
from ..engine.estimators.implicit import Implicit
from ..engine.monitoring.times import part
from .networks import Networks
from .updates.hyper import COUNT, Scheduled, scheduled
from .updates.update import InnerOptimizer, parameters_of, trained

WINDOW = Lowering("auto", hvp="auto", replays=False, patient=True)  # of what an ordinary window records
_current: ContextVar[Session | None] = ContextVar("metaoptim_session", default=None)
current_session = _current.get  # the window open in this thread, or None


@contextmanager
def outside() -> Iterator[None]:
    """Inside the block it is as if no window were open in this thread."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class Options:
    """A window's options; see `metaoptim.SlidingWindow`."""

    offline: bool = False
    backward_hook: Callable[[Tensor], Tensor | None] | None = None
    record_grad_tape: bool = False
    pickup_step: int = -1
    window: int | None = None
    retention: Retention = UNSAID
    check_finite: bool = False
    sync: Any = False
    lowering: Lowering = WINDOW
    first_order: bool = False
    forward: bool = False
    implicit: Implicit | None = None  # with ``window=1``: only the last step is kept
    evolution: Evolution | None = None


class Member:
    """An optimizer that may step in the window, and belongs to it (``joined``) from its first step on.

    It has its state at entry, its steps so far, and what pickup_step asked to keep.
    """

    def __init__(self, optimizer: InnerOptimizer) -> None:
        self.optimizer, self.joined, self.steps = optimizer, False, 0
        self.entry = {p: dict(s) for p, s in optimizer.state.items()}
        self.picked: tuple[dict[int, Tensor], dict[Any, dict], list[tuple]] | None = None

    def restore(self) -> None:
        """Give the optimizer its state at entry back."""
        self.optimizer.state.clear()
        self.optimizer.state.update(self.entry)


class Place(NamedTuple):
    """Where a tensor is that inner steps change: a parameter, or an optimizer's state of it by that name."""

    parameter: Tensor  # the user's own
    optimizer: InnerOptimizer | None = None
    name: str = ""

    @property
    def all(self) -> dict[str, Tensor]:
        """All that the optimizer has for the parameter."""
        return {} if self.optimizer is None else self.optimizer.state.get(self.parameter, {})

    def put(self, value: Tensor) -> None:
        """Let the optimizer have ``value`` here; parameters are not put, but shown."""
        if self.optimizer is not None:
            self.optimizer.state[self.parameter][self.name] = value


def by_optimizer(places: Iterable[Place]) -> dict[InnerOptimizer, list[Place]]:
    """The places that are an optimizer's state, by optimizer."""
    found: dict[InnerOptimizer, list[Place]] = {}
    for place in places:
        if place.optimizer is not None:
            found.setdefault(place.optimizer, []).append(place)
    return found


AS_GRADIENT = (
    "wrap the change in torch.no_grad(), or, to begin at values that are to receive a gradient, call "
    "inner.start({name: values})"
)
_ALL_FROZEN = (
    "{}.step: none of its networks' parameters requires grad, so there is nothing to train; unfreeze some with "
    "requires_grad_(True)"
)


def refuse_overwritten(name: str) -> None:
    """Raise for a parameter that was changed in place between its use in a loss and the step by that loss."""
    raise CaptureError(
        f"parameter {name!r} was overwritten between its use in the loss and the step; change it before the loss or "
        "after the step"
    )


def read_outside(optimizer: InnerOptimizer) -> str:
    """What to say of a chunk's loss that reads what was computed from the parameters before."""
    return (
        f"{type(optimizer).__name__}.step_in_chunks: the loss function reads a value that was computed from the "
        "network's parameters before it was called, on the whole batch or by another chunk; compute it inside the loss "
        "function, from its arguments, or detach it if no gradient is to go through it"
    )


def refuse_write(name: str, op: Any) -> None:
    """Raise for a parameter that is changed in place where autograd would have to follow."""
    raise WindowError(f"parameter {name!r} was changed in place by {op} with grad mode on; {AS_GRADIENT}")


class Session:
    """Base of the strategies. A strategy shows parameters (`_offer`, `_join`, `_start`) and takes steps (`_step`).

    Optimizers that are alive when the window opens may step in it, and their networks are kept from the entry on. Those
    that never do leave no trace: what they have is what it would be without the window. One that is made inside belongs
    to the window at once.

    Attributes:
        closed: ids of the user's own parameters that no gradient reaches: online, those of optimizers that belong to
            the window.
    """

    def __init__(self, options: Options, recorder: CaptureMode, networks: Networks) -> None:
        self.options, self.recorder, self.networks = options, recorder, networks
        self.members: dict[int, Member] = {}
        self.closed: set[int] = set()
        self._grads: list[Tensor | None] = []

    def open(self) -> None:
        """Begin: from here on the calling thread's code is the window's."""

    def close(self, failed: bool) -> None:
        """End: networks, buffers and optimizers as the mode says, or as at entry if the block failed."""

    def _offer(self, ordinals: list[int]) -> None:
        """Show newly adopted parameters, of an optimizer that may step."""

    def _join(self, ordinals: list[int], late: list[int]) -> None:
        """An optimizer of these parameters steps from now on; of ``late`` its loss has read the user's own."""

    def _start(self, ordinals: list[int], values: list[Tensor]) -> None:
        """Show ``values``, with their history, as these parameters."""

    def _hold(self, places: Sequence[Place], linked: bool, copied: bool) -> Held:
        """What is in these places: with its history if ``linked``, in memory of its own if ``copied``."""
        raise NotImplementedError

    def _go_on(self, places: Sequence[Place], held: Held) -> None:
        """Let the loop go on from what was held of these places."""
        raise NotImplementedError

    def _check_value(self, member: Member, loss: Tensor) -> None:
        """Raise for a loss of a value that no step is to be taken by."""

    def _added(self, optimizer: InnerOptimizer, schedules: Scheduled, loss: Tensor, losses: Any) -> Any:
        """What a step needs of ``loss``, and of those before it, which ``losses`` (None at first) has.

        That is the sum of their gradients, or what stands for it, and nothing that holds their graphs.
        """
        raise NotImplementedError

    def _alone(self, optimizer: InnerOptimizer, schedules: Scheduled, loss: Tensor) -> Any:
        """The same of a step's only loss, which is there until the step is taken."""
        return self._added(optimizer, schedules, loss, None)

    def _step(
        self, optimizer: InnerOptimizer, schedules: Scheduled, losses: Any, loss: Tensor, allow_unused: bool
    ) -> None:
        """Take a step by what `_added` has returned. ``loss`` is the only loss, or the sum, without its history."""
        raise NotImplementedError

    def _moment(self) -> int:
        """How many calls have been recorded."""
        return 0

    def _check_inside(self, optimizer: InnerOptimizer, losses: Any, before: int) -> None:
        """Raise if the last of ``losses`` reads what was computed from the parameters ``before`` that moment."""

    def _own(self, value: Tensor) -> Tensor:
        """An optimizer state for the window to show; the user may write into it."""
        return value.clone()

    def steps_reading(self, t: Tensor) -> tuple[Engine, tuple[int, ...]] | None:
        """The tape and the positions of the steps that have read ``t``, which was computed inside."""

    def note_backward(self, outputs: Iterable[Tensor]) -> None:
        """A backward that fills ``.grad`` has begun from ``outputs``."""

    def adopt(self, optimizer: InnerOptimizer) -> list[int]:
        """Keep an optimizer and its networks as they are at entry; the ordinals of parameters not known before.

        Raises:
            WindowError: for networks that inner steps cannot train; nothing has changed then.
        """
        owner = optimizer._session
        if owner is not None and owner is not self:
            raise WindowError(
                f"this {type(optimizer).__name__} is in use by a window of another thread; give each thread "
                "an optimizer and a network of its own"
            )
        with self.recorder.paused():
            new = self.networks.adopt(optimizer.networks, set(map(id, parameters_of(optimizer))))
            if id(optimizer) not in self.members:
                self.members[id(optimizer)] = Member(optimizer)
                optimizer._session = self
            for i in new:
                grad = self.networks.originals[i].grad
                self._grads.append(None if grad is None else grad.detach().clone())
            if new:
                self._offer(new)
        return new

    def joined(self, optimizer: InnerOptimizer) -> bool:
        """Whether an optimizer belongs to the window."""
        member = self.members.get(id(optimizer))
        return member is not None and member.joined

    def join(self, optimizer: InnerOptimizer, late: bool = False) -> None:
        """Let an optimizer belong to the window; ``late``: the loss of its first step has been computed."""
        if id(optimizer) not in self.members:
            optimizer.refresh()
        new = self.adopt(optimizer)
        member, state = self.members[id(optimizer)], optimizer.state
        with self.recorder.paused():
            parameters = parameters_of(optimizer)
            ordinals = self.networks.join(optimizer.networks, parameters)
            if not self.options.offline:
                self.closed.update(map(id, parameters))
            for p in () if member.joined else list(state):
                state[p] = {
                    k: self._own(v) if isinstance(v, Tensor) and not v.requires_grad else v
                    for k, v in state[p].items()
                }
            member.joined = True
            self.networks.check()
            self.refuse_strangers()
            self._join(ordinals, new if late else [])

    def step(self, optimizer: InnerOptimizer, loss: Any, allow_unused: bool) -> None:
        """One inner step; nothing changes if it raises."""
        with part("step"):
            self._checked_step(optimizer, loss, allow_unused)

    def _checked_step(self, optimizer: InnerOptimizer, loss: Any, allow_unused: bool) -> None:
        _check_loss(optimizer, loss)
        if not self.joined(optimizer) or self._unfrozen(optimizer):
            self.join(optimizer, late=True)
        schedules = scheduled(optimizer)
        member = self.members[id(optimizer)]
        with self._stepping(optimizer):
            self._check_value(member, loss)
            losses = self._alone(optimizer, schedules, loss)
            self._take(member, schedules, losses, loss, allow_unused)

    def step_by_sum(
        self, optimizer: InnerOptimizer, losses: Iterator[tuple[Any, float]], allow_unused: bool
    ) -> Tensor:
        """One inner step by a sum of losses times factors; each is computed after the one before is gone.

        The sum has no history. Nothing changes if it raises, but for what computing the losses has changed.
        """
        if not self.joined(optimizer) or self._unfrozen(optimizer):
            self.join(optimizer)
        member = self.members[id(optimizer)]
        schedules, values, known = scheduled(optimizer), list[Tensor](), None
        before = self._moment()
        for loss, factor in losses:
            _check_loss(optimizer, loss)
            loss = loss if factor == 1 else loss * factor
            with self._stepping(optimizer):
                self._check_value(member, loss)
                known = self._added(optimizer, schedules, loss, known)
                self._check_inside(optimizer, known, before)
            values.append(loss.detach())
            del loss  # and with it the graph
            before = self._moment()
        total = functools.reduce(torch.add, values)
        with self._stepping(optimizer):
            self._take(member, schedules, known, total, allow_unused)
        return total

    @contextmanager
    def _stepping(self, optimizer: InnerOptimizer) -> Iterator[None]:
        """Inside the block the window is at work, out of sight of its recorder and of the user's autocast."""
        index_of = self.networks.index_of
        with self.recorder.paused(), DisableAutocast():
            self.networks.check()
            if all(index_of(p) is None for g in optimizer.param_groups for p in g["params"]):
                raise LossError(_ALL_FROZEN.format(type(optimizer).__name__))
            yield

    def _take(
        self, member: Member, schedules: Scheduled, losses: Any, loss: Tensor, allow_unused: bool
    ) -> None:
        """Let an optimizer take a step; see `_step`."""
        self._step(member.optimizer, schedules, losses, loss, allow_unused)
        if schedules.after is not None:
            member.optimizer.state[COUNT] = {"step": schedules.after}
        member.steps += 1

    def _unfrozen(self, optimizer: InnerOptimizer) -> bool:
        index_of = self.networks.index_of
        return any(
            p.requires_grad and index_of(p) is None for g in optimizer.param_groups for p in g["params"]
        )

    def refuse_strangers(self, among: Collection[int] | None = None) -> None:
        """Raise for a parameter (``among`` these ids) put into a network inside: its optimizer would not train it."""
        for member in (m for m in self.members.values() if m.joined):
            for network in member.optimizer.whole_networks:
                for name in self.networks.strange(network, among):
                    raise WindowError(
                        f"parameter {name!r} was put into the network of a {type(member.optimizer).__name__} inside "
                        "the window, where inner steps would not train it; put it in before the window, or build an "
                        "optimizer of its own for it inside"
                    )

    def start(self, optimizer: InnerOptimizer, parameters: list[Tensor], values: list[Tensor]) -> None:
        """Let an optimizer's parameters (the user's own) go on from ``values``."""
        if not self.joined(optimizer):
            self.join(optimizer)
        with self.recorder.paused():
            self.networks.check()
            known = [i for p in parameters if (i := self.networks.index_of(p)) is not None]
            if len(known) < len(values):
                raise WindowError("start: a frozen parameter was given a value; unfreeze it before")
            self._start(known, values)

    def tensor_at(self, place: Place) -> Tensor:
        """What is in a place now."""
        if place.optimizer is not None:
            return place.all[place.name]
        return self.networks.shown[self.ordinal(place)]

    def ordinal(self, place: Place) -> int:
        """The ordinal of a place's parameter, which inner steps train."""
        ordinal = self.networks.index_of(place.parameter)
        assert ordinal is not None
        return ordinal

    def ordinals(self, optimizer: InnerOptimizer) -> list[int]:
        """Ordinals of an optimizer's trainable parameters, in order of its groups."""
        return [i for i, _ in trained(optimizer, self.networks)]


def _check_loss(optimizer: InnerOptimizer, loss: Any) -> None:
    """Raise for what no step can be taken by."""
    name = type(optimizer).__name__
    if loss is None:
        raise LossError(
            f"{name}.step: got no loss, expected {name}.step(loss): the step takes the gradient of the inner loss "
            "itself. Take loss.backward() and zero_grad() out"
        )
    if not isinstance(loss, Tensor):
        raise LossError(
            f"{name}.step: got {type(loss).__name__}, expected the inner loss as a tensor"
            + ("; pass a function as closure=..." if callable(loss) else "")
        )
    if loss.numel() != 1:
        raise LossError(
            f"{name}.step: got a loss of shape {tuple(loss.shape)}, expected a scalar; reduce it, "
            "for example with .mean()"
        )
    if not loss.requires_grad:
        if not any(p.requires_grad for p in parameters_of(optimizer)):
            raise LossError(_ALL_FROZEN.format(name))
        raise LossError(
            f"{name}.step: the loss has no graph (it does not require grad); compute it from the network "
            "outside torch.no_grad() and without .detach() or .item()"
        )
