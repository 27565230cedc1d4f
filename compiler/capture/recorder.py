"""Recording of the user's eager code, below autograd, as a DAG of operator calls that dies with her tensors.

Only calls that could carry a gradient are kept. An `Entry` refers to the entries it depends on; tensors refer to
entries through a table of weak references. So whatever the user drops, the recording drops, and a step costs a walk
over the ancestors of its loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from .ops import OpInfo, op_info, without_running_stats, written

aten = torch.ops.aten
_DETACH = aten.detach.default
_ITEM = aten._local_scalar_dense.default


class Theta:
    """A version of one theta tensor: its state index, and the tensor the networks show for it."""

    __slots__ = ("index", "tensor", "hooks")

    def __init__(self, index: int, tensor: Tensor) -> None:
        self.index, self.tensor = index, tensor
        self.hooks: list[tuple[Any, Spy]] | None = None


class Epoch:
    """The stretch of user code between two changes of theta.

    Attributes:
        position: the tape position whose state the networks show.
        superstep: ordinal of the super-step it was opened in.
        theta: id of a tensor the networks show -> its `Theta`.
        writes: storage -> in-place entries on it, oldest first.
    """

    __slots__ = ("position", "superstep", "theta", "writes")

    def __init__(self, position: int, superstep: int, theta: dict[int, Theta]) -> None:
        self.position, self.superstep, self.theta = position, superstep, theta
        self.writes: dict[int, list[Entry]] = {}


class Entry:
    """One recorded call."""

    __slots__ = ("op", "args", "kwargs", "epoch", "seq", "deps", "grad", "shape")

    def __init__(
        self, op: Any, args: tuple, kwargs: dict, epoch: Epoch, seq: int, deps: tuple, grad: bool
    ) -> None:
        self.op, self.args, self.kwargs = op, args, kwargs
        self.epoch, self.seq, self.deps, self.grad = epoch, seq, deps, grad
        self.shape: tuple | None = None


class Value:
    """An output of an entry (the only one if ``index`` is None)."""

    __slots__ = ("entry", "index", "ref", "hooks")

    def __init__(self, entry: Entry, index: int | None) -> None:
        self.entry, self.index = entry, index
        self.ref: Any = None
        self.hooks: list[tuple[Any, Spy]] | None = None


class External:
    """A tensor that came from outside what is recorded, held as it was read."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = 0 if tensor.is_inference() else tensor._version


class Carried:
    """A value from before the last change of theta: part of the step if it is of the same super-step, else external."""

    __slots__ = ("value", "external")

    def __init__(self, value: Value, tensor: Tensor) -> None:
        self.value, self.external = value, External(tensor)


class Number:
    """A Python number that may differ between otherwise equal steps."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value


class Spy:
    """A tensor hook, with the note whether it changed its gradient when it ran."""

    __slots__ = ("hook", "returned", "mutated")

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        self.hook, self.returned, self.mutated = hook, False, False

    def __call__(self, grad: Tensor) -> Tensor | None:
        version = grad._version
        result = self.hook(grad)
        self.returned = result is not None
        self.mutated = grad._version != version
        return result


class Function:
    """A call of a user's `autograd.Function`, re-applied whenever the recording is run."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        self.__name__ = cls.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.cls.apply(*args, **kwargs)


def _tensors(args: Iterable) -> Iterable[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            for b in a:
                if isinstance(b, Tensor):
                    yield b


class Recorder(TorchDispatchMode):
    """The dispatch mode of a window.

    Args:
        guard: told of writes into theta (``before_write``, ``after_write``), and asked to ``settle`` them before theta
            is read again.
        record: whether to record; otherwise only the guard is served.
    """

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

    # -- the mode ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
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

    @contextmanager
    def paused(self):
        """Run a block of our own unrecorded; off the stack where possible, which costs nothing per operator."""
        top = torch._C._len_torch_dispatch_stack()
        popped = top > 0 and torch._C._get_dispatch_stack_at(top - 1) is self
        if popped:
            torch._C._pop_torch_dispatch_stack(None)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if popped:
                torch._C._push_on_torch_dispatch_stack(self)

    def leave(self) -> None:
        """Take this mode off the stack, also when a suspended generator left others above it."""
        above = []
        while self in _get_current_dispatch_mode_stack():
            top = torch._C._pop_torch_dispatch_stack(None)
            if top is self:
                break
            above.append(top)
        for mode in reversed(above):
            torch._C._push_on_torch_dispatch_stack(mode)

    def keep_only(self, epoch: Epoch) -> None:
        """A super-step has begun that reads ``epoch``: nothing older will be part of a step."""
        self.values = {k: v for k, v in self.values.items() if v.entry.epoch is epoch and v.ref() is not None}

    # -- looking up ----------------------------------------------------------------------------------------------

    def _known(self, t: Tensor) -> Theta | Value | None:
        theta = self.epoch.theta.get(id(t))
        if theta is not None:
            return theta
        value = self.values.get(id(t))
        return value if value is not None and value.ref() is t else None

    def _current(self, t: Tensor) -> Theta | Value | None:
        found = self._known(t)
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
        found = self._known(t)
        if isinstance(found, Theta):
            return found
        if found is not None:
            if t.requires_grad:
                if t.is_leaf:
                    return External(t)  # `requires_grad_()` made it the user's own leaf
                # autograd hands saved outputs back through a detach: an alias, not a cut
                resolved: Any = found
                while isinstance(resolved, Value) and resolved.entry.op is _DETACH:
                    resolved = resolved.entry.args[0]
                if not isinstance(resolved, Value):
                    return resolved
                found = resolved
            epoch = found.entry.epoch
            if epoch is self.epoch:
                return found
            return Carried(found, t) if epoch.superstep == self.epoch.superstep else External(t)
        if t._is_view() and t._base is not None and not (t.requires_grad and t.is_leaf):
            if isinstance(self._current(t._base), Value):
                return self._view_of(t)
        return External(t)

    def _view_of(self, t: Tensor) -> Value:
        base = t._base
        assert base is not None
        shift = t.storage_offset() - base.storage_offset()
        entry = self._entry(
            aten.as_strided.default, (self.value_of(base), t.shape, t.stride(), shift), {}, (base,), True
        )
        return self._bind(t, Value(entry, None))

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

    def _record(self, op: Any, info: OpInfo, args: tuple, kwargs: dict, out: Any) -> Entry:
        if self.guard is not None:
            self.guard.settle()
        if op is aten.native_dropout.default:
            return self._record_dropout(args, out)
        tokens = tuple(self._token(a) for a in without_running_stats(op, args))
        if info.lifts_number and type(args[1]) in (int, float) and args[0].is_floating_point():
            tokens = (tokens[0], Number(float(args[1])), *tokens[2:])
        kw = {k: self._token(v) for k, v in kwargs.items()} if kwargs else kwargs
        entry = self._entry(op, tokens, kw, _tensors(args), True)
        if info.dynamic and isinstance(out, Tensor):
            entry.shape = tuple(out.shape)
        self._bind_outputs(entry, out)
        return entry

    def _record_dropout(self, args: tuple, out: tuple[Tensor, Tensor]) -> Entry:
        result, mask = out
        p = args[1]
        kept = self._entry(aten.mul.Tensor, (self.value_of(args[0]), External(mask)), {}, (args[0],), True)
        scaled = self._entry(
            aten.mul.Tensor, (Value(kept, None), 0.0 if p == 1 else 1.0 / (1.0 - p)), {}, (), True
        )
        self._bind(result, Value(scaled, None))
        return scaled

    # -- in-place ------------------------------------------------------------------------------------------------

    def _write(self, op: Any, info: OpInfo, args: tuple, kwargs: dict) -> Any:
        targets = written(info, args, kwargs)
        grad = torch.is_grad_enabled()
        guard = self.guard
        hit = guard.before_write(targets, op) if guard is not None else None
        if guard is not None and hit:
            out = op(*args, **kwargs)
            guard.after_write(hit)
            return out
        if not self.record:
            return op(*args, **kwargs)
        reads = (*args, *kwargs.values())
        live = grad and not info.random and self._touches(reads)
        if not live and not any(self._is_recorded(t) for t in targets):
            out = op(*args, **kwargs)
            if not grad or self.tainted:
                self._note_taint(reads, targets)
            return out
        if any(t.requires_grad and isinstance(self.value_of(t), (External, Carried)) for t in targets):
            # A differentiable tensor of the user's own: autograd gives it a new history, which we will read later.
            out = op(*args, **kwargs)
            for t in targets:
                self.values.pop(id(t), None)
            return out
        for t in targets:
            self._adopt_target(t)
        tokens = tuple(self._token(a) for a in args)
        kw = {k: self._token(v) for k, v in kwargs.items()}
        entry = self._entry(op, tokens, kw, _tensors(reads), grad)
        out = op(*args, **kwargs)
        if info.random:
            # Its effect, not the drawing, is what the step repeats.
            (target,) = targets
            entry.op, entry.args, entry.kwargs = (
                aten.copy_.default,
                (tokens[0], External(target.detach().clone())),
                {},
            )
        for t in targets:
            self.epoch.writes.setdefault(t.untyped_storage()._cdata, []).append(entry)
        self._bind_outputs(entry, out)
        return out

    def _is_recorded(self, t: Tensor) -> bool:
        base = t._base if t._is_view() else None
        return self._current(t) is not None or (base is not None and self._current(base) is not None)

    def _adopt_target(self, t: Tensor) -> None:
        """Bring a tensor that is about to be written into the recording, by a copy of what it holds now."""
        if self._is_recorded(t):
            return
        base = t._base if t._is_view() and t._base is not None else t
        copy = base.detach().clone()
        entry = self._entry(aten.clone.default, (External(copy),), {}, (), False)
        self._bind(base, Value(entry, None))

    # -- Python-level calls --------------------------------------------------------------------------------------

    def apply_function(self, cls: Any, apply: Callable, args: tuple, kwargs: dict) -> Any:
        """Record a custom `autograd.Function` as one call: its backward is the user's, not that of its inner ops."""
        live = torch.is_grad_enabled() and self._touches((*args, *kwargs.values()))
        tokens = tuple(self._token(a) for a in args) if live else ()
        kw = {k: self._token(v) for k, v in kwargs.items()} if live else {}
        with self.paused():
            out = apply(*args, **kwargs)
        if live:
            entry = self._entry(Function(cls), tokens, kw, _tensors(args), True)
            self._bind_outputs(entry, out)
        return out

    def add_hook(self, t: Tensor, spy: Spy, handle: Any) -> None:
        """Note that the gradient of ``t`` passes through a hook."""
        value = self._known(t)
        if value is not None:
            value.hooks = [*(value.hooks or ()), (handle, spy)]

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
