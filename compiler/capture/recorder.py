"""Recording of the user's eager code, below autograd, as a DAG of operator calls that dies with her tensors.

Only calls that could carry a gradient are kept. An `Entry` refers to the entries it depends on; tensors refer to
entries through a table of weak references. So whatever the user drops, the recording drops, and a step costs a walk
over the ancestors of its loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from metaoptim.errors import CaptureError

from . import memory
from .entries import (
    Carried,
    Entry,
    Epoch,
    External,
    Function,
    Number,
    Spy,
    Theta,
    Value,
    reaches_theta,
    version_of,
)
from .modes import leave, paused
from .ops import BATCH_NORM, LIFTS, MASKED, OpInfo, op_info, without_running_stats, written

aten = torch.ops.aten
_DETACH = aten.detach.default
_ITEM = aten._local_scalar_dense.default


def _written_by_view(t: Tensor) -> bool:
    return t.grad_fn is not None and t.grad_fn.name().endswith("CopySlices")


def _tensors(args: Iterable) -> Iterable[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            for b in a:
                if isinstance(b, Tensor):
                    yield b


def _chosen(args: tuple) -> tuple[int, ...]:
    """How many elements the boolean masks among the indices choose: the derivative's shapes depend on it."""
    return tuple(int(i.sum()) for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8))


class Recorder(TorchDispatchMode):
    """The dispatch mode of a window.

    Args:
        guard: told of writes into theta (``before_write``, ``after_write``) and asked to ``settle`` them before theta
            is read again; to ``hold`` a tensor read from outside, and ``preserve`` what is held of memory that is about
            to be overwritten; and for ``statistics`` that batch norm may overwrite.
        record: whether to record; otherwise only the guard is served.
    """

    symbolic = False  # real tensors, whose values may be looked at

    def __init__(self, guard: Any, record: bool = True) -> None:
        super().__init__()
        self.guard, self.record = guard, record
        self.epoch = Epoch(0, 0, {})
        self.values: dict[int, Value] = {}
        self.depth = 0  # > 0: let everything through unrecorded
        self._seq = 0
        self._sweep_at = 4096
        # storage -> (the storage's weak reference, leaf tensors read into it where no gradient flows)
        self.tainted: dict[int, tuple[Any, dict[int, Any]]] = {}
        self.loose: dict[int, weakref.ref[Tensor]] = {}  # tensors without a version counter of their memory
        self._histories: list[weakref.ref[External]] = []  # of differentiable tensors that are no leaves

    # -- the mode ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        if func in BATCH_NORM:
            args = self._fresh_statistics(func, args)
        info = op_info(func)
        if info.writes:
            return self._write(func, info, args, kwargs)
        if not self.record:
            return func(*args, **kwargs)
        if info.random and func is not aten.native_dropout.default:
            return func(*args, **kwargs)  # its result is an input of the step
        if not torch.is_grad_enabled():
            out = func(*args, **kwargs)
            self._note_taint(args, out)
            return out
        if not self._touches(args):
            out = func(*args, **kwargs)
            if self.tainted:
                self._note_taint(args, out)
            return out
        if func is _ITEM:
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func is _DETACH and args[0].is_leaf:
            self._note_taint(args, out)
        self._record(func, info, args, kwargs, out)
        return out

    def paused(self) -> Any:
        """Run a block of our own unrecorded."""
        return paused(self)

    def leave(self) -> None:
        """Take this mode off the stack."""
        leave(self)

    def keep_only(self, epoch: Epoch) -> None:
        """A super-step has begun that reads ``epoch``: nothing older will be part of a step."""
        self.forget([v for v in self.values.values() if v.entry.epoch is not epoch])
        self.values = {k: v for k, v in self.values.items() if v.entry.epoch is epoch and v.ref() is not None}
        self._histories = [ref for ref in self._histories if ref() is not None]

    def forget(self, values: Iterable[Value]) -> None:
        """``values`` leave the recording: the guard is told of tensors that live on and that steps have read."""
        for value in values:
            t = value.ref() if value.steps else None
            if t is not None and t.requires_grad:
                self.guard.outlived(t, value.steps)

    # -- looking up ----------------------------------------------------------------------------------------------

    def known(self, t: Tensor) -> Theta | Value | None:
        """What the recording has for the very tensor ``t``."""
        theta = self.epoch.theta.get(id(t))
        if theta is not None:
            return theta
        value = self.values.get(id(t))
        return value if value is not None and value.ref() is t else None

    def _current(self, t: Tensor) -> Theta | Value | None:
        found = self.known(t)
        return None if isinstance(found, Value) and found.entry.epoch is not self.epoch else found

    def _touches(self, args: Iterable) -> bool:
        for t in _tensors(args):  # a plain loop: this runs for every operator
            if t.requires_grad:
                return True
            if id(t) in self.values and self._current(t) is not None:
                return True
        return False

    def value_of(self, t: Tensor) -> Theta | Value | Carried | External:
        """What stands for ``t`` in the recording."""
        found = self.known(t)
        if isinstance(found, Theta):
            self.epoch.read = True
            return found
        if found is not None:
            if t.requires_grad:
                if t.is_leaf and found.entry.grad:
                    return self._external(t)  # `requires_grad_()` made it the user's own leaf
                # autograd hands saved outputs back through a detach: an alias, not a cut; unlike one that requires grad
                # since a view of it was written into
                resolved: Any = found
                while (
                    isinstance(resolved, Value) and resolved.entry.op is _DETACH and not _written_by_view(t)
                ):
                    resolved = resolved.entry.args[0]
                if not isinstance(resolved, Value):
                    return resolved
                found = resolved
            epoch = found.entry.epoch
            if epoch is self.epoch and found.apart is None:
                return found
            external = self._external(t)
            if (
                found.apart is not None
                or epoch.superstep != self.epoch.superstep
                or not self._reads_current_theta(found)
            ):
                return external
            if t.untyped_storage()._cdata in epoch.writes:
                raise CaptureError(
                    f"a tensor of shape {tuple(t.shape)} was changed in place before another optimizer's step and is "
                    "used again after it; clone it after the change"
                )
            return Carried(found, external)
        if t._is_view() and t._base is not None and not (t.requires_grad and t.is_leaf):
            if self._is_recorded(t._base) and not isinstance(self.known(t._base), Theta):
                return self._alias_of(t, t._base)
        if isinstance(t, torch.nn.Parameter) and (theta := self.guard.still_shown(t)) is not None:
            return theta
        return self._external(t)

    def root_of(self, loss: Tensor) -> Any:
        """What stands for the loss of a step, which may have been computed before another step."""
        found = self.known(loss)
        mine = isinstance(found, Value) and found.entry.epoch.superstep == self.epoch.superstep
        return found if mine else self.value_of(loss)

    def _reads_current_theta(self, value: Value) -> bool:
        """Whether an older value depends on parameters that no step has changed since (the same super-step's)."""
        current = {c.index: c.tensor.untyped_storage()._cdata for c in self.epoch.theta.values()}
        stack: list[Any] = [value]
        seen: set[int] = set()
        while stack:
            a = stack.pop()
            if isinstance(a, Theta):
                if current.get(a.index) == a.tensor.untyped_storage()._cdata:
                    return True
            elif isinstance(a, tuple):
                stack.extend(a)
            elif isinstance(a, Carried):
                stack.append(a.value)
            elif isinstance(a, (Value, Entry)):
                entry = a.entry if isinstance(a, Value) else a
                if id(entry) not in seen and not (isinstance(a, Value) and a.apart is not None):
                    seen.add(id(entry))
                    stack += [*entry.args, *entry.deps, *entry.kwargs.values()]
        return False

    def _external(self, t: Tensor) -> External:
        known = self._external_of(t)
        if known is not None:
            same = known.version == version_of(t) and known.grad == t.requires_grad
            if known.written or (same and known.held.is_current(t)):
                return known
        if t.requires_grad and not t.is_leaf and t.untyped_storage()._cdata in self.epoch.writes:
            raise CaptureError(
                f"a tensor of shape {tuple(t.shape)} is read that shares memory with one changed in place in this "
                "step, in a way that cannot be followed; clone one of them"
            )
        new = External(t, self.guard.hold(t))
        self.epoch.externals[id(t)] = ref = weakref.ref(new)
        if not t.is_leaf:
            self._histories.append(ref)
        return new

    def _external_of(self, t: Tensor) -> External | None:
        ref = self.epoch.externals.get(id(t))
        found = None if ref is None else ref()
        return found if found is not None and found.source is t else None

    def _alias_of(self, t: Tensor, base: Tensor) -> Value:
        """``t``, which shares the memory of ``base``, as a view of it."""
        shift = t.storage_offset() - base.storage_offset()
        args = (self.value_of(base), t.shape, t.stride(), shift)
        # a view made under no_grad is a leaf; an alias that requires no grad is detached
        grad = not t.is_leaf if t.requires_grad else not base.requires_grad
        return self._bind(t, Value(self._entry(aten.as_strided.default, args, {}, (base,), grad), None))

    # -- writing down --------------------------------------------------------------------------------------------

    def _token(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.value_of(a)
        if isinstance(a, (list, tuple)):
            return tuple(self._token(b) for b in a)
        return a

    def _bind(self, t: Tensor, value: Value) -> Value:
        value.ref = weakref.ref(t)
        self.values[id(t)] = value
        return value

    def _entry(self, op: Any, tokens: tuple, kwargs: dict, reads: Iterable, grad: bool) -> Entry:
        writes = self.epoch.writes
        deps: tuple = ()
        if writes:
            found: dict[int, Entry] = {}
            for t in reads:
                for entry in writes.get(t.untyped_storage()._cdata, ()):
                    found[entry.seq] = entry
            deps = tuple(found.values())
        self._seq += 1
        return Entry(op, tokens, kwargs, self.epoch, self._seq, deps, grad)

    def _bind_outputs(self, entry: Entry, out: Any) -> None:
        if isinstance(out, Tensor):
            self._bind(out, Value(entry, None))
        elif isinstance(out, (list, tuple)):
            for i, o in enumerate(out):
                if isinstance(o, Tensor):
                    self._bind(o, Value(entry, i))
        if len(self.values) > self._sweep_at:
            self.values = {k: v for k, v in self.values.items() if v.ref() is not None}
            self._sweep_at = max(4096, 2 * len(self.values))
            externals = self.epoch.externals
            self.epoch.externals = {k: ref for k, ref in externals.items() if ref() is not None}

    def _record(self, op: Any, info: OpInfo, args: tuple, kwargs: dict, out: Any) -> Entry:
        self.guard.settle()
        if op is aten.native_dropout.default:
            return self._record_dropout(args, out)
        tokens = tuple(self._token(a) for a in without_running_stats(op, args))
        if info.lifts_number and type(args[1]) in (int, float) and args[0].dtype in LIFTS:
            tokens = (tokens[0], Number(float(args[1])), *tokens[2:])
        kw = {k: self._token(v) for k, v in kwargs.items()} if kwargs else kwargs
        entry = self._entry(op, tokens, kw, _tensors(args), True)
        if info.dynamic:
            entry.shape = tuple(tuple(o.shape) for o in _tensors(out if isinstance(out, tuple) else (out,)))
        elif op in MASKED:
            entry.shape = _chosen(args) or None
        self._bind_outputs(entry, out)
        return entry

    def _record_dropout(self, args: tuple, out: tuple[Tensor, Tensor]) -> Entry:
        result, mask = out
        p = args[1]
        drawn = External(mask, self.guard.hold(mask))
        kept = self._entry(aten.mul.Tensor, (self.value_of(args[0]), drawn), {}, (args[0],), True)
        scaled = self._entry(
            aten.mul.Tensor, (Value(kept, None), 0.0 if p == 1 else 1.0 / (1.0 - p)), {}, (), True
        )
        self._bind(result, Value(scaled, None))
        return scaled

    # -- in-place ------------------------------------------------------------------------------------------------

    def _write(self, op: Any, info: OpInfo, args: tuple, kwargs: dict) -> Any:
        targets = written(info, args, kwargs)
        grad, guard = torch.is_grad_enabled(), self.guard
        if self.epoch.apart and any(t.untyped_storage()._cdata in self.epoch.apart for t in targets):
            raise CaptureError(
                "a tensor with a hook or retain_grad() was changed in place; clone it before the change"
            )
        memory.before_write(self, targets)
        hit = guard.before_write(targets, op)
        if hit:
            guard.preserve(targets)
            out = op(*args, **kwargs)
            guard.after_write(hit)
            return out
        if not self.record:
            guard.preserve(targets)
            return op(*args, **kwargs)
        reads = (*args, *kwargs.values())
        live = grad and not info.random and self._touches(reads)
        recorded = any(self._is_recorded(t) for t in targets)
        older = []
        for key, value, t in self._sharing(targets):
            if value.entry.epoch is not self.epoch:
                older.append(key)
            elif not self._is_recorded(t):
                recorded = True
                other: Any = value.ref()
                if other._base is None or (t if t._base is None else t._base) is not other._base:
                    self._alias_of(t, other)
        if not live and not recorded:
            for key in older:
                del self.values[key]
            guard.preserve(targets)
            out = op(*args, **kwargs)
            if not grad or self.tainted:
                self._note_taint(reads, targets)
            return out
        for t in targets:
            self._adopt_target(t)
        tokens = tuple(self._token(a) for a in args)
        kw = {k: self._token(v) for k, v in kwargs.items()}
        entry = self._entry(op, tokens, kw, _tensors(reads), grad)
        if grad:
            self._keep_histories(targets)
        if op in MASKED:
            entry.shape = _chosen(args) or None
        guard.preserve(targets)
        out = op(*args, **kwargs)
        if info.random:
            # Its effect, not the drawing, is what the step repeats.
            (target,) = targets
            effect = target.detach().clone()
            entry.op, entry.args, entry.kwargs = (
                aten.copy_.default,
                (tokens[0], External(effect, self.guard.hold(effect))),
                {},
            )
        for t in targets:
            self.epoch.writes.setdefault(t.untyped_storage()._cdata, []).append(entry)
        self._bind_outputs(entry, out)
        return out

    def _is_recorded(self, t: Tensor) -> bool:
        """Whether what ``t`` holds is part of the recording of this epoch, so that a write into it must be too."""
        base = t._base if t._is_view() else None
        for x in (t,) if base is None else (t, base):
            external = self._external_of(x)
            if self._current(x) is not None or (external is not None and external.written):
                return True
        return False

    def _sharing(self, targets: list[Tensor]) -> list[tuple[int, Value, Tensor]]:
        """What the recording knows of the memory of ``targets`` without autograd knowing it (``.data``, detach)."""
        at = {t.untyped_storage()._cdata: t for t in targets if not self._is_recorded(t)}
        found = []
        for key, value in self.values.items() if at else ():
            other = value.ref()
            target = None if other is None else at.get(other.untyped_storage()._cdata)
            if target is not None:
                found.append((key, value, target))
        return found

    def _adopt_target(self, t: Tensor) -> None:
        """From now on what ``t`` holds is what the recording says: it is about to be written by a recorded call."""
        base = t._base if t._is_view() and t._base is not None else t
        if self._is_recorded(t):
            if self.known(t) is None and base is not t:
                self._alias_of(t, base)
            storage = t.untyped_storage()._cdata
            read = [ref() for ref in self.epoch.externals.values()]  # of which ``t`` may be a recorded view
            touched = [x for x in read if x is not None and x.source.untyped_storage()._cdata == storage]
        else:
            found = self.value_of(base)
            external = found.external if isinstance(found, Carried) else found
            if not isinstance(external, External):
                raise CaptureError("a tensor that autograd has saved was changed in place; clone it first")
            touched = [external]
        for x in touched:
            if not x.written:
                x.written = True
                self.epoch.written.append(x)

    def _keep_histories(self, targets: list[Tensor], dispatching: bool = True) -> None:
        """An in-place call gives its target a new history: what was read of it keeps the old one."""
        storages = {t.untyped_storage()._cdata for t in targets}
        self._histories = [ref for ref in self._histories if ref() is not None]
        for ref in self._histories:
            x = ref()
            if x is not None and x.tensor is x.source and x.source.untyped_storage()._cdata in storages:
                # within an operator's dispatch autograd is off until it is asked back
                again = enable_reentrant_dispatch() if dispatching else nullcontext()
                with self.paused(), again, torch.enable_grad():
                    x.tensor = x.source.clone()

    def _fresh_statistics(self, op: Any, args: tuple) -> tuple:
        """Training-mode batch norm overwrites its running statistics without a trace: let the guard protect them."""
        mean, _, training = BATCH_NORM[op]
        if args[mean] is None:
            return args
        fresh = self.guard.statistics(args[mean : mean + 2], training=args[training])
        return (*args[:mean], *fresh, *args[mean + 2 :])

    # -- Python-level calls --------------------------------------------------------------------------------------

    def apply_function(self, cls: Any, apply: Callable, args: tuple, kwargs: dict) -> Any:
        """Record a custom `autograd.Function` as one call: its backward is the user's, not that of its inner ops."""
        live = self.record and torch.is_grad_enabled() and self._touches((*args, *kwargs.values()))
        tokens = tuple(self._token(a) for a in args) if live else ()
        kw = {k: self._token(v) for k, v in kwargs.items()} if live else {}
        if live and cls is CheckpointFunction:
            raise CaptureError(
                "reentrant activation checkpointing cannot be differentiated twice; call checkpoint(..., "
                "use_reentrant=False)"
            )
        with self.paused():
            out = apply(*args, **kwargs)
        if live:
            entry = self._entry(Function(cls), tokens, kw, _tensors(args), True)
            self._bind_outputs(entry, out)
        return out

    def watch(self, t: Tensor, what: str) -> bool:
        """``t`` is about to get a hook, or to retain its gradient: autograd must see all of that gradient.

        Where ``t`` does not depend on theta, steps read it as a tensor from outside from now on, so that autograd
        carries what they give it.

        Returns:
            Whether that is so; otherwise the gradient inside steps is theirs.
        """
        if not self.record:
            return False
        found = self.known(t)
        if (isinstance(found, Value) and found.steps) or self.guard.was_read(t):
            raise CaptureError(
                f"{what} on a tensor of shape {tuple(t.shape)} that an inner step has already read: the gradient from "
                f"that step would not pass through it; call {what} right after computing the tensor"
            )
        if not isinstance(found, Value) or not t.requires_grad or t.is_leaf or reaches_theta(found):
            return False
        if found.apart is None:
            storage = t.untyped_storage()._cdata
            if storage in found.entry.epoch.writes:
                raise CaptureError(
                    f"{what} on a tensor of shape {tuple(t.shape)} that was changed in place; call it on a clone of "
                    "it and use that"
                )
            found.apart = self._external(t)
            self.epoch.apart.add(storage)
        return True

    def add_hook(self, t: Tensor, spy: Spy, handle: Any) -> None:
        """Note that the gradient of ``t`` passes through a hook, which steps must apply themselves."""
        value = self.known(t)
        if value is not None:
            value.hooks = [*(value.hooks or ()), (handle, spy)]

    def detach_in_place(self, t: Tensor, detach: Callable[[Tensor], Tensor]) -> Tensor:
        """Record ``t.detach_()``, which happens above the operators."""
        if not self.record:
            return detach(t)
        self.guard.settle()
        found = self.known(t)
        if found is None:
            self._keep_histories([t], dispatching=False)
        out = detach(t)
        if isinstance(found, Value):
            if found.entry.epoch is self.epoch:
                self._bind(t, Value(self._entry(_DETACH, (found,), {}, (t,), True), None))
            else:
                del self.values[id(t)]  # what is read of it from now on is a constant
        return out

    # -- what no gradient reaches --------------------------------------------------------------------------------

    def _note_taint(self, args: Iterable, out: Any) -> None:
        leaves: dict[int, Any] = {}
        for t in _tensors(args):
            if t.requires_grad and t.is_leaf and id(t) not in self.epoch.theta:
                leaves[id(t)] = weakref.ref(t)
            elif self.tainted:
                leaves.update(self.taint_of(t))
        if leaves:
            for t in _tensors(out if isinstance(out, (list, tuple)) else (out,)):
                storage = t.untyped_storage()
                known = self.taint_of(t)
                known.update(leaves)
                self.tainted[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    known,
                )

    def taint_of(self, t: Tensor) -> dict[int, Any]:
        """Leaves that were read into ``t`` where no gradient flows."""
        found = self.tainted.get(t.untyped_storage()._cdata)
        if found is None or found[0].expired():
            return {}
        return dict(found[1])
