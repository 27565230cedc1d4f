"""The dispatch mode of a window: every operator of the user's eager code, below autograd, passes through it.

Only calls that could carry a gradient are kept (`recording`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from metaoptim.compiler.compat import called
from metaoptim.errors import CaptureError

from ...ir.operators import BATCH_NORM, RRELU, Function, flattened, op_info, slopes_of, written
from ...ir.values import Spy, Value, reaches_theta
from ...ir.weak import ByStorage, WeakTable
from ..modes import CaptureMode, check_forward_mode
from . import writes
from .recording import Guard, Recording, WriteGuard, tensors_in

aten = torch.ops.aten
_DETACH = aten.detach.default
_ITEM = aten._local_scalar_dense.default


Leaves = dict[int, weakref.ref[Tensor]]


def _both(a: Leaves, b: Leaves) -> Leaves:
    if a is b or not b:
        return a
    return {k: ref for k, ref in (*a.items(), *b.items()) if ref() is not None} if a else b


class Taint:
    """Which leaves were read where no gradient flows (under no_grad, through detach), for the user to be told."""

    def __init__(self) -> None:
        self.of_storage: ByStorage[Leaves] = ByStorage()  # memory -> leaves; equal ones are one object

    def note(self, args: Iterable, out: Any, theta: Container[int]) -> None:
        """``out`` was computed from ``args`` where no gradient flows; ``theta``: ids of leaves that do not count."""
        leaves: Leaves = {}
        for t in tensors_in(args):
            if t.requires_grad and t._is_view() and t._base is not None:
                t = t._base  # under no_grad, views of parameters that are no leaves say that they are
            if t.requires_grad and t.is_leaf and id(t) not in theta:
                leaves = _both(leaves, {id(t): weakref.ref(t)})
            else:
                leaves = _both(leaves, self.of(t))
        if leaves:
            for t in tensors_in(out if isinstance(out, (list, tuple)) else (out,)):
                if t.layout is torch.strided:
                    self.of_storage[t] = _both(self.of(t), leaves)

    def of(self, t: Tensor) -> Leaves:
        """The leaves that were read into ``t``."""
        return (self.of_storage.get(t) if self.of_storage else None) or {}


class Recorder(CaptureMode):
    """The dispatch mode of a window; without ``record`` it only serves the guard."""

    symbolic = False  # real tensors, whose values may be looked at

    def __init__(self, guard: WriteGuard, record: bool = True) -> None:
        super().__init__()
        self.guard: WriteGuard = guard
        self.record = record
        self.recording, self.taint = Recording(cast(Guard, guard)), Taint()
        # tensors without a version counter of their memory, by id
        self.loose = WeakTable[Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        info = op_info(func)
        if info.particular:
            if func in BATCH_NORM and args[BATCH_NORM[func][0]] is not None:
                # in training mode it overwrites its running statistics without a trace: let the guard protect them
                mean, _, training = BATCH_NORM[func]
                fresh = self.guard.statistics(args[mean : mean + 2], training=args[training])
                args = (*args[:mean], *fresh, *args[mean + 2 :])
            if func in RRELU:
                return self._leaky(func, types, args, kwargs)
            check_forward_mode(func, args)
        if info.writes:
            out = writes.write(self, func, info, args, kwargs)
            if info.in_lists:
                increment_version([t for t in written(func, args, kwargs, Tensor) if not t.is_inference()])
            return out
        if not self.record:
            return called(func, args, kwargs)
        if info.random and func is not aten.native_dropout.default:
            return func(*args, **kwargs)  # its result is an input of the step
        recording = self.recording
        grad = torch.is_grad_enabled()
        if not grad or not recording.touches(args):
            out = called(func, args, kwargs)
            if not grad or self.taint.of_storage:
                self.taint.note(args, out, recording.epoch.theta)
            return out
        if func is _ITEM:
            return func(*args, **kwargs)
        out = called(func, args, kwargs)
        if func is _DETACH and args[0].is_leaf:
            self.taint.note(args, out, recording.epoch.theta)
        recording.record(func, info, args, kwargs, out)
        return out

    def release(self) -> None:
        """The window has ended: what it held dies now, not when the collector comes by."""
        self.recording.close()
        self.taint = Taint()
        self.guard = None  # type: ignore[assignment]  # pyright: ignore

    def _leaky(self, op: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        """A leaky ReLU with slopes that are drawn, or fixed, is a product with them."""
        leaky, times = RRELU[op]
        slope = slopes_of(*args, **kwargs)
        if slope is not None:
            return self.__torch_dispatch__(leaky, types, (args[0], slope))
        x, slopes = args[:2]  # which are 1 above zero
        with self.paused():
            aten.rrelu_with_noise(x.detach(), *args[1:], **kwargs)
        self.recording.values.pop(id(slopes), None)  # made in the loss, drawn out of its sight
        return self.__torch_dispatch__(times, types, (x, slopes))

    def apply_function(self, cls: Any, apply: Callable, args: tuple, kwargs: dict) -> Any:
        recording, entry = self.recording, None
        if self.record and torch.is_grad_enabled():
            leaves, spec = flattened(args, kwargs)
            tensors = [a for a in leaves if isinstance(a, Tensor)]
            if recording.touches(tensors):
                self.recording.guard.settle()
                tokens = tuple(map(recording.value_of, tensors))
                entry = recording.entry(Function(cls, leaves, spec), tokens, {}, tensors, True)
        with self.paused():
            out = apply(*args, **kwargs)
        if entry is not None:
            recording.bind_outputs(entry, out)
        return out

    def watch(self, t: Tensor, what: str) -> bool:
        """``t`` is about to get a hook, or to retain its gradient: autograd must see all of that gradient.

        Where ``t`` does not depend on theta, steps read it as a tensor from outside from now on, so that autograd
        carries what they give it; whether that is so. Otherwise the gradient inside steps is theirs.
        """
        if not self.record:
            return False
        found = self.recording.known(t)
        if (isinstance(found, Value) and found.steps) or self.recording.guard.was_read(t):
            raise CaptureError(
                f"{what} on a tensor of shape {tuple(t.shape)} that an inner step has already read: the gradient from "
                f"that step would not pass through it; call {what} right after computing the tensor"
            )
        if not isinstance(found, Value) or not t.requires_grad or t.is_leaf or reaches_theta(found):
            return False
        if found.apart is None:
            if t in found.entry.epoch.writes:
                raise CaptureError(
                    f"{what} on a tensor of shape {tuple(t.shape)} that was changed in place; call it on a clone of "
                    "it and use that"
                )
            found.apart = self.recording.external(t)
            self.recording.epoch.apart[t] = True
        return True

    def add_hook(self, t: Tensor, spy: Spy, handle: Any) -> None:
        """Note that the gradient of ``t`` passes through a hook, which steps must apply themselves."""
        value = self.recording.known(t)
        if value is not None:
            value.hooks = [*(value.hooks or ()), (handle, spy)]

    def detach_in_place(self, t: Tensor, detach: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.record:
            return detach(t)
        self.recording.guard.settle()
        recording = self.recording
        found = recording.known(t)
        if found is None:
            writes.keep_histories(self, [t], dispatching=False)
        out = detach(t)
        if isinstance(found, Value):
            if found.entry.epoch is recording.epoch:
                recording.bind(t, Value(recording.entry(_DETACH, (found,), {}, (t,), True), None))
            else:
                del recording.values[id(t)]  # what is read of it from now on is a constant
        return out
