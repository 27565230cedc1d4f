"""The dispatch mode of a window: every operator of the user's eager code, below autograd, passes through it.

Only calls that could carry a gradient are kept (`recording`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from metaoptim.errors import CaptureError

from ...ir.operators import BATCH_NORM, RRELU, Function, flattened, op_info, slopes_of
from ...ir.values import Spy, Value, reaches_theta
from ..modes import CaptureMode
from . import in_place
from .guard import Guard, WriteGuard
from .recording import Recording
from .taint import Taint

aten = torch.ops.aten
_DETACH = aten.detach.default
_ITEM = aten._local_scalar_dense.default


class Recorder(CaptureMode):
    """The dispatch mode of a window.

    Args:
        guard: of parameters and of what is held; a `Guard` where calls are recorded.
        record: whether to record; otherwise only the guard is served.
    """

    symbolic = False  # real tensors, whose values may be looked at

    def __init__(self, guard: WriteGuard, record: bool = True) -> None:
        super().__init__()
        self.guard: WriteGuard = guard
        self.record = record
        self.recording, self.taint = Recording(cast(Guard, guard)), Taint()
        self.clipped = ""  # where `.grad` of theta was clipped since the last step
        # tensors without a version counter of their memory, by id
        self.loose: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    # -- the mode ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        if func in BATCH_NORM:
            args = self._fresh_statistics(func, args)
        if func in RRELU:
            return self._leaky(func, types, args, kwargs)
        info = op_info(func)
        if info.writes:
            return in_place.write(self, func, info, args, kwargs)
        if not self.record:
            return func(*args, **kwargs)
        if info.random and func is not aten.native_dropout.default:
            return func(*args, **kwargs)  # its result is an input of the step
        recording = self.recording
        if not torch.is_grad_enabled():
            out = func(*args, **kwargs)
            self.taint.note(args, out, recording.epoch.theta)
            return out
        if not recording.touches(args):
            out = func(*args, **kwargs)
            if self.taint.of_storage:
                self.taint.note(args, out, recording.epoch.theta)
            return out
        if func is _ITEM:
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func is _DETACH and args[0].is_leaf:
            self.taint.note(args, out, recording.epoch.theta)
        recording.record(func, info, args, kwargs, out)
        return out

    def leave(self) -> None:
        """A window closes, and this mode with it."""
        self.close()

    def release(self) -> None:
        """The window has ended: what it held dies now, not when the collector comes by."""
        self.recording.close()
        self.taint = Taint()
        self.guard = None  # type: ignore[assignment]  # pyright: ignore

    def _fresh_statistics(self, op: Any, args: tuple) -> tuple:
        """Training-mode batch norm overwrites its running statistics without a trace: let the guard protect them."""
        mean, _, training = BATCH_NORM[op]
        if args[mean] is None:
            return args
        fresh = self.guard.statistics(args[mean : mean + 2], training=args[training])
        return (*args[:mean], *fresh, *args[mean + 2 :])

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

    # -- Python-level calls --------------------------------------------------------------------------------------

    def apply_function(self, cls: Any, apply: Callable, args: tuple, kwargs: dict) -> Any:
        """Record a custom `autograd.Function` as one call: its backward is the user's, not that of its inner ops."""
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
        carries what they give it.

        Returns:
            Whether that is so; otherwise the gradient inside steps is theirs.
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
        """Record ``t.detach_()``, which happens above the operators."""
        if not self.record:
            return detach(t)
        self.recording.guard.settle()
        recording = self.recording
        found = recording.known(t)
        if found is None:
            in_place.keep_histories(self, [t], dispatching=False)
        out = detach(t)
        if isinstance(found, Value):
            if found.entry.epoch is recording.epoch:
                recording.bind(t, Value(recording.entry(_DETACH, (found,), {}, (t,), True), None))
            else:
                del recording.values[id(t)]  # what is read of it from now on is a constant
        return out
