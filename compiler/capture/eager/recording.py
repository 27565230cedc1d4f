"""What a window has recorded: the call behind each live tensor, and what stands for tensors from outside.

An `Entry` refers to the entries it depends on; tensors refer to entries through a table of weak references. So whatever
the user drops, the recording drops, and a step costs a walk over the ancestors of its loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from metaoptim.errors import CaptureError

from ...ir.operators import EMPTY, MASKED, PACK, PARTING, OpInfo, op_info, parts, shape_depends_on_values
from ...ir.values import Carried, Entry, Epoch, External, Hold, Theta, Value, parents, reached, version_of
from ...ir.weak import WeakTable
from ..modes import Writer

aten = torch.ops.aten
_DETACH = aten.detach.default
# Calls, at least, after which the dead are looked for: what they hold on to may be large. It is as many as had lived.
_FEW = 16


def _written_by_view(t: Tensor) -> bool:
    return t.grad_fn is not None and t.grad_fn.name().endswith("CopySlices")


def tensors_in(args: Iterable) -> Iterable[Tensor]:
    """The tensors among an operator's arguments."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            for b in a:
                if isinstance(b, Tensor):
                    yield b


def mask_counts(args: tuple) -> tuple[int, ...]:
    """How many elements the boolean masks among the indices choose: the derivative's shapes depend on it."""
    return tuple(int(i.sum()) for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8))


class WriteGuard(Protocol):
    """Protects parameters of a window, and what it holds, from being overwritten."""

    def before_write(self, targets: list[Tensor], op: Any) -> list[int]:
        """``op`` is about to write into ``targets``; the ordinals of the parameters among them."""
        ...

    def after_write(self, hit: list[int]) -> None:
        """Parameters have been written into."""

    def preserve(self, targets: list[Tensor]) -> None:
        """Copy what is held of memory that is about to be overwritten."""

    def statistics(self, stats: Sequence[Tensor], training: bool) -> list[Tensor]:
        """What batch norm may overwrite in the place of its running statistics."""
        ...


class Guard(WriteGuard, Protocol):
    """Answers for the tape of a window."""

    @property
    def epochs(self) -> list[Epoch]:
        """The epochs of the super-step at hand, oldest first."""
        ...

    def settle(self) -> None:
        """Put writes into parameters on the tape, before they are read again."""

    def enter(self, theta: Theta) -> None:
        """``theta`` is read for the first time."""

    def hold(self, tensor: Tensor) -> Hold:
        """The hold on a tensor that is read from outside."""
        ...

    def still_shown(self, tensor: Tensor) -> Theta | None:
        """The theta behind a tensor shown earlier, if its value is still that of now."""

    def was_read(self, tensor: Tensor) -> bool:
        """Whether a step has read ``tensor``."""
        ...

    def outlived(self, tensor: Tensor, steps: tuple[int, ...]) -> None:
        """``tensor``, which ``steps`` have read, outlives its recording."""

    def on_tape(self, storage: int) -> bool:
        """Whether the tape holds a piece of memory."""
        ...


class Recording(Writer):
    """The calls that tensors still alive have come from.

    Attributes:
        guard: answers for what the window holds.
        epoch: the stretch of user code at hand.
        values: id of a tensor -> what it is; its weak reference tells whether it is that tensor still.
        histories: what was read of differentiable tensors that are no leaves.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard: Guard = guard
        self.epoch = Epoch(0, 0, {})
        self.values: dict[int, Value] = {}
        self.histories = WeakTable[External]()
        self._seq = 0
        self._until_sweep = _FEW  # calls

    def keep_only(self, epoch: Epoch) -> None:
        """A super-step has begun that reads ``epoch``: nothing older will be part of a step."""
        kept: dict[int, Value] = {}
        for k, v in self.values.items():
            if v.entry.epoch is not epoch:
                if v.steps:
                    self._forget(v)
            elif v.ref() is not None:
                kept[k] = v
        self.values = kept

    def _forget(self, value: Value) -> None:
        """``value``, which steps have read, leaves the recording: the guard is told if its tensor lives on."""
        t = value.ref()
        if t is not None and t.requires_grad:
            self.guard.outlived(t, value.steps)

    def close(self) -> None:
        """The window has ended: forget everything, in no cycle that would wait for the collector."""
        for value in self.values.values():
            if value.steps:
                self._forget(value)
        self.epoch = Epoch(0, 0, {})
        self.guard = None  # type: ignore[assignment]  # pyright: ignore
        self.values.clear()

    @property
    def calls(self) -> int:
        """How many calls there have been so far."""
        return self._seq

    # -- looking up ----------------------------------------------------------------------------------------------

    def known(self, t: Tensor) -> Theta | Value | None:
        """What the recording has for the very tensor ``t``."""
        theta = self.epoch.theta.get(id(t))
        if theta is not None:
            return theta
        value = self.values.get(id(t))
        return value if value is not None and value.ref() is t else None

    def current(self, t: Tensor) -> Theta | Value | None:
        """The same, of the epoch at hand only."""
        found = self.known(t)
        return None if isinstance(found, Value) and found.entry.epoch is not self.epoch else found

    def touches(self, args: Iterable) -> bool:
        """Whether a gradient may flow through a call with these arguments."""
        for t in tensors_in(args):  # a plain loop: this runs for every operator
            if t.requires_grad:
                return True
            if id(t) in self.values and self.current(t) is not None:
                return True
        return False

    def value_of(self, t: Tensor) -> Theta | Value | Carried | External:
        found = self.known(t)
        if isinstance(found, Theta):
            if found.index < 0:
                self.guard.enter(found)
            self.epoch.read = True
            return found
        if found is not None:
            if t.requires_grad:
                if t.is_leaf and found.entry.grad:
                    return self.external(t)  # `requires_grad_()` made it the user's own leaf
                # autograd hands saved outputs back through a detach: an alias, not a cut; unlike one that requires grad
                # since a view of it was written into
                origin: Any = found
                while isinstance(origin, Value) and origin.entry.op is _DETACH and not _written_by_view(t):
                    origin = origin.entry.args[0]
                if not isinstance(origin, Value):
                    return origin
                found = origin
            epoch = found.entry.epoch
            if epoch is self.epoch and found.apart is None:
                return found
            external = self.external(t)
            if (
                found.apart is not None
                or epoch.superstep != self.epoch.superstep
                or not self._reads_current_theta(found)
            ):
                return external
            if t in epoch.writes:
                raise CaptureError(
                    f"a tensor of shape {tuple(t.shape)} was changed in place before another optimizer's step and is "
                    "used again after it; clone it after the change"
                )
            return Carried(found, external)
        if t._is_view() and t._base is not None and not (t.requires_grad and t.is_leaf):
            if self.is_recorded(t._base) and not isinstance(self.known(t._base), Theta):
                return self.alias_of(t, t._base)
        if isinstance(t, torch.nn.Parameter) and (theta := self.guard.still_shown(t)) is not None:
            return theta
        return self.external(t)

    def is_recorded(self, t: Tensor) -> bool:
        """Whether what ``t`` holds is part of the recording of this epoch, so that a write into it must be too."""
        base = t._base if t._is_view() else None
        for x in (t,) if base is None else (t, base):
            external = self.external_of(x)
            if self.current(x) is not None or (external is not None and external.written):
                return True
        return False

    def root_of(self, loss: Tensor) -> Any:
        """What stands for the loss of a step, which may have been computed before another step."""
        found = self.known(loss)
        mine = isinstance(found, Value) and found.entry.epoch.superstep == self.epoch.superstep
        return found if mine else self.value_of(loss)

    def _reads_current_theta(self, value: Value) -> bool:
        """Whether an older value depends on parameters that no step has changed since (the same super-step's)."""
        current = {c.index: c.tensor.untyped_storage()._cdata for c in self.epoch.theta.values()}
        start: list[Any] = [value]
        thetas = (a for a in reached(start, parents) if isinstance(a, Theta))
        return any(current.get(a.index) == a.tensor.untyped_storage()._cdata for a in thetas)

    def external(self, t: Tensor) -> External:
        """``t``, read from outside as it is now."""
        known = self.external_of(t)
        if known is not None:
            same = known.version == version_of(t) and known.grad == t.requires_grad
            if known.written or (same and known.held.is_current(t)):
                return known
        if t.requires_grad and not t.is_leaf and t in self.epoch.writes:
            raise CaptureError(
                f"a tensor of shape {tuple(t.shape)} is read that shares memory with one changed in place in this "
                "step, in a way that cannot be followed; clone one of them"
            )
        new = External(t, self.guard.hold(t))
        self.epoch.externals[id(t)] = new
        if not t.is_leaf:
            self.histories.add(new)
        return new

    def external_of(self, t: Tensor) -> External | None:
        """``t`` as this epoch has read it last, if it has."""
        found = self.epoch.externals.get(id(t))
        return found if found is not None and found.source is t else None

    def alias_of(self, t: Tensor, base: Tensor) -> Value:
        """``t``, which shares the memory of ``base``, as a view of it."""
        shift = t.storage_offset() - base.storage_offset()
        args = (self.value_of(base), t.shape, t.stride(), shift)
        # a view made under no_grad is a leaf; an alias that requires no grad is detached
        grad = not t.is_leaf if t.requires_grad else not base.requires_grad
        return self.bind(t, Value(self.entry(aten.as_strided.default, args, {}, (base,), grad), None))

    def starts_elsewhere(self, t: Tensor, offset: int) -> bool:
        return t.storage_offset() not in (0, offset)  # copies of what was read from outside have offset 0

    # -- writing down --------------------------------------------------------------------------------------------

    def bind(self, t: Tensor, ref: Value) -> Value:
        ref.ref = weakref.ref(t)
        self.values[id(t)] = ref
        return ref

    def _sweep(self) -> None:
        """Forget what stood for tensors that have died, and with it what only their history holds."""
        self.values = {k: v for k, v in self.values.items() if v.ref() is not None}
        self._until_sweep = max(_FEW, len(self.values))

    def entry(self, op: Any, tokens: tuple, kwargs: dict, reads: Iterable, grad: bool) -> Entry:
        """A call of which ``reads`` are the tensors: it depends on what was written into their memory."""
        writes = self.epoch.writes
        deps: tuple = ()
        if writes:
            found: dict[int, Entry] = {}
            for t in reads:
                for entry in writes.get(t) or ():
                    found[entry.seq] = entry
            deps = tuple(found.values())
        self._seq += 1
        return Entry(op, tokens, kwargs, self.epoch, self._seq, deps, grad)

    def written(self, op: Any, tokens: tuple, reads: Iterable[Tensor] = ()) -> Entry:
        """A call on these tokens, whose results carry a gradient."""
        return self.entry(op, tokens, {}, reads, True)

    def bind_outputs(self, entry: Entry, out: Any) -> None:
        super().bind_outputs(entry, out)
        self._until_sweep -= 1
        if not self._until_sweep:
            self._sweep()

    def record(self, op: Any, info: OpInfo, args: tuple, kwargs: dict, out: Any) -> None:
        """Write down a call that has been made."""
        self.guard.settle()
        if op is aten.native_dropout.default:
            self.drop_out(args, out[0], External(out[1], self.guard.hold(out[1])))
            return
        if info.particular:
            if op in EMPTY:
                return
            if op in PARTING and isinstance(
                self.value_of(args[0]), External
            ):  # each part as an index gives it
                for t, (one, given) in zip(out, parts(op, args), strict=True):
                    self.record(one, op_info(one), given, {}, t)
                return
        tokens = self.tokens(op, args)
        kw = {k: self.token(v) for k, v in kwargs.items()} if kwargs else kwargs
        entry = self.entry(op, tokens, kw, tensors_in(args), True)
        if info.dynamic and shape_depends_on_values(op, args):
            entry.shape = tuple(tuple(o.shape) for o in tensors_in(out if isinstance(out, tuple) else (out,)))
            if op is PACK:
                entry.shape += tuple(args[1].tolist())
        elif info.particular and op in MASKED:
            entry.shape = mask_counts(args) or None
        self.bind_outputs(entry, out)
