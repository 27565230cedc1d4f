"""Capture of a whole function over fake tensors: every operator it calls, in order, with its inputs.

Where the recorder of a window keeps what a loss depends on and lets the rest die, a tracer keeps all of it: the trace
is the program. Real tensors that the function reads - arguments, parameters, what it closes over - become `Input`s by
identity; nothing is computed and nothing outside changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.compat import (
    DataDependentOutputException,
    DDPSink,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from metaoptim.errors import CaptureError

from ...ir.operators import (
    BATCH_NORM,
    PARTING,
    RRELU,
    Function,
    flattened,
    op_info,
    parts,
    shape_depends_on_values,
)
from ...ir.step import again, gradient
from ...ir.tensors import tensor_spec
from ...ir.traces.slices import closed_over
from ...ir.traces.trace import Trace
from ...ir.values import Entry, Input, Spy, Value, is_removed
from ..modes import CaptureMode, Writer, check_forward_mode
from . import effects
from .fakes import Constants, FakeCalls, mapped

aten = torch.ops.aten
_DETACH = aten.detach.default
_ITEM = (aten._local_scalar_dense.default, aten.item.default, aten.equal.default, aten.is_nonzero.default)
_BY_PLACE = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_LIFTED = (aten.lift_fresh.default, aten.lift.default)
_NO_VALUE = (
    "a value is needed while the function is captured (.item(), bool(), a data-dependent `if`, tolist or numpy), but "
    "there are only symbolic tensors. Hoist it out of the compiled function, pass it as a Python argument, or use "
    "torch.where; to step an environment, compile the inner step and keep the loop in an ordinary window"
)
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_NO_COLLECTIVE = (
    "talks to other ranks, which a compiled function would do again in every replay. Give it the module inside "
    "DistributedDataParallel (ddp.module) and average gradients after backward(), or use an ordinary window"
)


class Tracer(CaptureMode, Writer):
    """The dispatch mode of a capture, whose `trace` it makes; `FakeTensorMode` must be active below it."""

    symbolic = True

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake, self.fakes = fake, FakeCalls(fake)
        self.trace = Trace()
        # called with a tensor whose memory is about to be changed, and whether by its own name; what it returns, if
        # anything, is called after the change
        self.on_write: Callable[[Tensor, bool], Callable[[], None] | None] = lambda t, directly: None
        self._refs: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        self._at: dict[int, list[weakref.ref[Tensor]]] = {}  # storage -> the tensors that lie in it
        # storage of the fake of a real tensor -> both; the fake is held, so that its storage remains its own
        self.given: dict[int, tuple[Tensor, Tensor]] = {}
        # id of a real tensor that has another value after the call -> the tensor, and its fake
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}
        self.constants = Constants()
        self.supposed: bool | None = None  # what a condition on inputs is taken to be; None to refuse it
        self.stepped: list[Any] = []  # optimizers from outside that have taken a step
        self._hooks: list[tuple[Value, Any, Spy]] = []  # registered, not known yet to meet a gradient

    # -- the mode ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.depth or func.namespace == "prim":
            return func(*args, **kwargs)
        if func in _ITEM:
            return self._item(func, args)
        if func.namespace in _COLLECTIVES:
            raise CaptureError(f"{func} {_NO_COLLECTIVE}")
        if func in _LIFTED:
            return self._constant(args[0])
        if func in RRELU:
            slope = effects.fixed_slope(args, kwargs)
            return self.__torch_dispatch__(RRELU[func][0], types, (args[0], slope))
        if func in _BY_PLACE:
            args = (args[0], self._places(args[1]), *args[2:])
        elif func is aten.masked_select.default and args[0].shape == args[1].shape:
            places = self._places([args[1]])
            if places[0] is not args[1]:
                func, args = aten.index.Tensor, (args[0], places)
        info = op_info(func)
        if info.random:
            return effects.draw(self, func, args, kwargs)
        check_forward_mode(func, args)
        if func in BATCH_NORM and args[BATCH_NORM[func][0]] is not None and args[BATCH_NORM[func][2]]:
            return effects.batch_norm(self, func, args)
        if info.writes:
            return effects.write(self, func, info, args, kwargs)
        if info.dynamic and shape_depends_on_values(func, args):
            found = self.constants.call(func, self.token(args), self.token(kwargs))
            if found is not None:
                return mapped(self._constant, found)
        return self.record(func, args, kwargs)

    def end(self) -> None:
        """The capture is over."""
        self.depth += 1
        self.close()

    def give(self, t: Tensor) -> Any:
        """What stands for a tensor that the function returns, as it is now."""
        self.settle_hooks()
        entry = self.add(aten.alias.default, (self.value_of(t),), grad=True)
        value = Value(entry, None)
        value.ref = tensor_spec(t)
        return value

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The fake result of a call."""
        try:
            return self.fakes(func, self.faked(args), self.faked(kwargs))
        except DataDependentOutputException as error:
            raise CaptureError(_NO_VALUE) from error
        except DynamicOutputShapeException as error:
            raise CaptureError(
                f"{func} gives a tensor whose shape depends on values, which a compiled function cannot hold. Use a "
                "mask and torch.where instead of selecting, or an ordinary window"
            ) from error

    def faked(self, a: Any) -> Any:
        """``a`` with every real tensor replaced by its fake."""
        return mapped(self._faked, a)

    def _faked(self, t: Tensor) -> Tensor:
        if isinstance(t, FakeTensor):
            return t
        fake = self.fake.from_tensor(t, static_shapes=True)
        if fake.layout is torch.strided and id(t) not in self.overwritten:
            self.given[fake.untyped_storage()._cdata] = fake, t
        return fake

    def _constant(self, t: Tensor) -> Tensor:
        """What `torch.tensor` has made, its maker's own."""
        shared = self.constants.shared(t)
        out = self.record(aten.clone.default, (shared,), {})
        if not isinstance(shared, FakeTensor):
            self.constants.add(self.value_of(out), shared)
        return out

    def _places(self, indices: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Indices, with the places where masks hold in place of masks whose values are known."""
        places: list[Tensor | None] = []
        for index in indices:
            known = None
            if index is not None and index.dtype is torch.bool:
                known = self.constants.places(self.token(index))
            places += [index] if known is None else map(self._constant, known)
        return places

    def _item(self, func: Any, args: tuple) -> Any:
        """A value, where it does not depend on what the function is given."""
        value = self.constants.call(func, self.token(args), {})
        if value is not None:
            return value
        if self.supposed is not None:
            return self.supposed
        raise CaptureError(_NO_VALUE)

    # -- looking up ----------------------------------------------------------------------------------------------

    def value_of(self, t: Tensor) -> Any:
        """What stands for ``t``: a `Value` of the trace, or an `Input`."""
        ref = self.known(t)
        if ref is None:
            if isinstance(t, FakeTensor):
                raise CaptureError(
                    f"a tensor of shape {tuple(t.shape)} comes from a call that cannot be captured (another thread, a "
                    "dispatch mode, or a C++ function); move it out of the compiled function"
                )
            if any(_same_memory(t, w) for w, _ in self.overwritten.values()):
                raise CaptureError(
                    f"a tensor of shape {tuple(t.shape)} is read that shares memory with one that the compiled "
                    "function was given and has changed in place; clone one of them before the call"
                )
            return self.bind_input(t)
        # autograd hands saved outputs back through a detach: an alias, not a cut
        while t.requires_grad and not t.is_leaf:
            made = ref
            # another part of its memory may have been written since
            while isinstance(made, Value) and made.entry.op is again:
                made = made.entry.args[0]
            if not (isinstance(made, Value) and made.entry.op is _DETACH):
                break
            ref = made.entry.args[0]
        return ref

    def known(self, t: Tensor) -> Any:
        """What stands for the very tensor ``t``, if it was made or read by what is traced."""
        t = self._taken_over(t)
        found = self._refs.get(id(t))
        return found[1] if found is not None and found[0]() is t else None

    def bind(self, t: Tensor, ref: Any) -> Any:
        """Let ``ref`` stand for ``t``."""
        t = self._taken_over(t)
        weak = weakref.ref(t)
        if self.known(t) is None and t.layout is torch.strided:
            self._at.setdefault(t.untyped_storage()._cdata, []).append(weak)
        if isinstance(ref, Value):
            ref.ref = tensor_spec(t)
        self._refs[id(t)] = (weak, ref)
        return ref

    def bind_input(self, t: Tensor) -> Input:
        """Let ``t`` be an input of the trace, one more, whatever stood for it before."""
        self.trace.inputs.append(Input(t))
        return self.bind(t, self.trace.inputs[-1])

    def sharing(self, t: Tensor) -> list[Tensor]:
        """Tensors of the trace that are alive and share memory with ``t``, itself included."""
        if t.layout is not torch.strided:
            return [t]
        storage = t.untyped_storage()._cdata
        alive = [w for w in self._at.get(storage, ()) if w() is not None]
        self._at[storage] = alive
        return [u for w in alive if (u := w()) is not None]

    # -- tensors that the function was given and changes -----------------------------------------------------------

    def is_given(self, t: Tensor) -> bool:
        """Whether ``t`` is a real tensor, or a view of one, that nothing stands for yet."""
        if not isinstance(t, FakeTensor):
            return id(t) not in self.overwritten
        return t.layout is torch.strided and t.untyped_storage()._cdata in self.given

    def take_over(self, t: Tensor, op: Any, reads: Iterable[Tensor]) -> None:
        """Let a copy stand for the given tensor ``t``, which ``op`` is to change; it is left with what that becomes."""
        real = t if not isinstance(t, FakeTensor) else self.given[t.untyped_storage()._cdata][1]
        if (
            real.layout is not torch.strided
            or real.requires_grad
            or isinstance(real, torch.nn.Parameter)
            or real.nbytes != real.untyped_storage().nbytes()
            or any(other is not real for other in self.sharing(real))
            or (torch.is_grad_enabled() and any(a.requires_grad for a in reads))
        ):
            raise CaptureError(
                f"a tensor of shape {tuple(t.shape)} that the compiled function was given is changed in place by {op}, "
                "and requires grad, would get a history, or shares memory with others. Return the new value instead "
                "and copy it outside, or clone the tensor first; an outer optimizer's step() belongs after the call"
            )
        source, fake = self.value_of(real), self.faked(real)
        views = self.sharing(fake)
        copy = Value(self.add(aten.clone.default, (source,), grad=True), None)
        del self.given[fake.untyped_storage()._cdata]
        self.overwritten[id(real)] = real, fake
        self.bind(fake, copy)
        for view in views:
            args = (copy, view.shape, view.stride(), view.storage_offset())
            self.bind(view, Value(self.add(aten.as_strided.default, args, grad=True), None))

    def taken_over(self, a: Any) -> Any:
        """``a`` with what stands for the given tensors that have been changed."""
        return mapped(self._taken_over, a)

    def _taken_over(self, t: Tensor) -> Tensor:
        found = self.overwritten.get(id(t))
        return t if found is None else found[1]

    def starts_elsewhere(self, t: Tensor, offset: int) -> bool:
        return self.is_given(t)  # another call may bring one that lies elsewhere

    # -- writing down --------------------------------------------------------------------------------------------

    def add(self, op: Any, args: tuple, kwargs: dict | None = None, grad: bool | None = None) -> Entry:
        """Append a call whose arguments are tokens."""
        grad = torch.is_grad_enabled() if grad is None else grad
        entry = Entry(op, args, kwargs or {}, None, len(self.trace.entries), (), grad)  # type: ignore[arg-type]
        self.trace.entries.append(entry)
        return entry

    def written(self, op: Any, tokens: tuple, reads: Iterable[Tensor] = ()) -> Entry:
        """Append a call on these tokens."""
        return self.add(op, tokens)

    def record(self, op: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call and append it."""
        out = self.run(op, args, kwargs)
        if op in PARTING and isinstance(
            self.value_of(args[0]), Input
        ):  # data: each part as an index gives it
            for t, (one, given) in zip(out, parts(op, args), strict=True):
                self.bind(t, Value(self.add(one, self.tokens(one, given)), None))
            return out
        entry = self.add(op, self.tokens(op, args), self.token(kwargs))
        self.bind_outputs(entry, out)
        return out

    # -- Python-level calls --------------------------------------------------------------------------------------

    def apply_function(self, cls: Any, apply: Callable, args: tuple, kwargs: dict) -> Any:
        """Record a custom `autograd.Function` as one call: its backward is the user's."""
        if cls is DDPSink:
            options = "static_graph=True or find_unused_parameters=True"
            raise CaptureError(f"DistributedDataParallel with {options} {_NO_COLLECTIVE}")
        leaves, spec = flattened(args, kwargs)
        function = Function(cls, leaves, spec)
        tensors = [a for a in leaves if isinstance(a, Tensor)]
        tokens = tuple(map(self.value_of, tensors))
        with self.paused():
            given = function.arguments(map(self._faked_leaf, tensors))
            before, _ = flattened(*given)
            out = apply(*given[0], **given[1])
        after, changed = flattened(*given)
        if changed != spec or any(a is not b for a, b in zip(before, after, strict=True)):
            raise CaptureError(
                f"{cls.__name__}.forward changes a list or dict that it is given, which the compiled function would do "
                "once and never again; let it return what is new, or use an ordinary window"
            )
        self.bind_outputs(self.add(function, tokens), out)
        return out

    def _faked_leaf(self, t: Tensor) -> Tensor:
        """An argument of a Function, whose forward would compute on the real values of a real leaf."""
        return t if isinstance(t, FakeTensor) else self.faked(t).detach().requires_grad_(t.requires_grad)

    def watch(self, t: Tensor, what: str) -> bool:
        """``t`` is about to get a hook, which acts inside the program, or to retain a gradient, which none is given."""
        if what == "retain_grad":
            raise CaptureError(
                "retain_grad() inside a compiled function, whose tensors are symbolic; return what you want the "
                "gradient of, or compute it before the call"
            )
        return False

    def detach_in_place(self, t: Tensor, detach: Callable[[Tensor], Tensor]) -> Tensor:
        """Record ``t.detach_()``, which happens above the operators."""
        found = self.known(t)
        if found is None:
            raise CaptureError("detach_() on a tensor that the compiled function was given; use t.detach()")
        out = detach(t)
        self.bind(t, Value(self.add(_DETACH, (found,), grad=True), None))
        return out

    def add_hook(self, t: Tensor, spy: Spy, handle: Any) -> None:
        """Note that the gradient of ``t`` passes through a hook."""
        value = self.known(t)
        if not isinstance(value, Value):
            raise CaptureError(
                "a hook is registered on a tensor that the compiled function was given; register it outside, or on a "
                "tensor made inside"
            )
        if any(isinstance(a, Tensor) for a in closed_over(spy.hook)):
            raise CaptureError(
                "a hook closes over a tensor, whose values it would keep from the capture on; let it depend on its "
                "argument and on Python numbers only, or use an ordinary window"
            )
        if any(e.op is gradient for e in self.trace.entries[value.entry.seq + 1 :]):
            raise CaptureError(
                "a hook is registered on a tensor after an inner step that may have used it; register it where the "
                "tensor is made, or on a view of it (t.view_as(t)) that is used from here on"
            )
        self._hooks.append((value, handle, spy))

    def settle_hooks(self) -> None:
        """A gradient is taken now: hooks that are still registered are part of the program."""
        for value, handle, spy in self._hooks:
            if not is_removed(handle):
                self.trace.hooks.setdefault(id(value.entry), {}).setdefault(value.index, []).append(spy)
        self._hooks.clear()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.layout is torch.strided and a.untyped_storage()._cdata == b.untyped_storage()._cdata
