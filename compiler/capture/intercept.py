"""What a dispatch mode cannot see: custom autograd Functions, tensor hooks, checkpointing, memory given away.

While at least one window is open these entry points of torch are wrapped; each wrapper first asks whether the calling
thread has a recorder, so other threads are untouched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.utils import clip_grad
from torch.utils import dlpack
from torch.utils.hooks import RemovableHandle

from metaoptim.compiler.compat import CHECKPOINT, FUNCTIONS, SingleLevelFunction, transforms_active
from metaoptim.errors import CaptureError, WindowError

from ..ir.values import Spy, Theta
from .eager import writes
from .eager.recorder import Recorder
from .modes import CaptureMode

recording: ContextVar[CaptureMode | None] = ContextVar("metaoptim_recorder", default=None)


class Networks(Protocol):
    """What is asked of the networks of a window."""

    def bind(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function handed to checkpoint, made to recompute with the parameters of now."""
        ...

    def trains(self, t: Tensor) -> bool:
        """Whether ``t`` is a parameter that inner optimizers train: the user's own one, or what is shown for it."""
        ...


networks: ContextVar[Networks | None] = ContextVar("metaoptim_networks", default=None)

_MISSING = object()


class Patches:
    """Entry points of torch (owner, name, wrapper) that are wrapped while anybody has asked for it."""

    def __init__(self, *wrappers: tuple[Any, str, Any]) -> None:
        self.original: dict[str, Any] = {}
        self._wrappers, self._saved, self._count = wrappers, list[Any](), 0
        self._lock = threading.RLock()  # the collector may call `uninstall` within `install`

    def install(self) -> None:
        """Wrap the entry points (counted)."""
        with self._lock:
            self._count += 1
            for k, (owner, name, wrapper) in enumerate(self._wrappers) if self._count == 1 else ():
                now = vars(owner).get(name, _MISSING)
                if len(self._saved) == k:
                    self._saved.append(now)
                    if owner is not torch:
                        self.original[name] = getattr(owner, name)
                if now is self._saved[k]:  # otherwise ours is still there, below somebody else's
                    setattr(owner, name, wrapper)

    def uninstall(self) -> None:
        """Undo one `install`; where others have wrapped ours since, it stays, and does nothing."""
        with self._lock:
            self._count -= 1
            ours = all(vars(owner).get(name) is wrapper for owner, name, wrapper in self._wrappers)
            if self._count or not ours:
                return
            for (owner, name, _), before in zip(self._wrappers, self._saved, strict=True):
                if before is _MISSING:  # it was inherited
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)
            self._saved.clear()


def _mode() -> CaptureMode | None:
    mode = recording.get()
    return None if mode is None or mode.depth else mode


def _recorder() -> Recorder | None:
    mode = _mode()
    return mode if isinstance(mode, Recorder) else None


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    def apply(*a: Any, **k: Any) -> Any:
        return super(SingleLevelFunction, cls).apply(*a, **k)  # type: ignore[misc]  # pyright: ignore

    mode = _mode()
    if mode is None or (issubclass(cls, torch.autograd.Function) and transforms_active()):
        # a transform of torch.func makes another Function of it, and applies that
        return apply(*args, **kwargs)
    return mode.apply_function(cls, apply, args, kwargs)


def _no_other_way(self: Any) -> None:
    mode = _mode()
    if (
        mode is not None
        and getattr(mode, "record", True)
        and torch.is_grad_enabled()
        and not transforms_active()
    ):
        name = self._forward_cls.__qualname__
        raise CaptureError(
            f"{name}.apply was looked up before the window, and torch {torch.__version__} shows nobody such a call; "
            f"call {name}.apply(...) where it is used"
        )


def _checkpoint(fn: Any, *args: Any, **kwargs: Any) -> Any:
    of_window = networks.get()
    return _original[CHECKPOINT](fn if of_window is None else of_window.bind(fn), *args, **kwargs)


# -- gradients that pass through hooks --------------------------------------------------------------------------------


class _Handle(RemovableHandle):
    """A hook's handle that tells when the user removes it."""

    spy: Spy

    def remove(self) -> None:
        super().remove()
        self.spy.removed = True


def _register_hook(self: Tensor, hook: Any) -> Any:
    mode = _mode()
    register = _original["register_hook"]
    if mode is None or mode.watch(self, "register_hook"):
        return register(self, hook)
    spy = Spy(hook)
    handle = register(self, spy)
    handle.__class__, handle.spy = _Handle, spy
    mode.add_hook(self, spy, handle)
    return handle


def _retain_grad(self: Tensor) -> None:
    mode = _mode()
    if mode is not None:
        mode.watch(self, "retain_grad")
    _original["retain_grad"](self)


# -- histories and memory that change above the operators -------------------------------------------------------------


def _detach_in_place(input: Tensor) -> Tensor:
    mode, detach = _mode(), _original["detach_"]
    return detach(input) if mode is None else mode.detach_in_place(input, detach)


def _get_data(self: Tensor) -> Tensor:
    values = _original["data"].__get__(self)
    recorder = _recorder()
    if recorder is not None:
        recorder.loose[id(values)] = values  # it shares memory, and has no version counter
    return values


def _set_data(self: Tensor, value: Tensor) -> None:
    recorder = _recorder()
    if recorder is not None:
        writes.before_swap(recorder, self)
    _original["data"].__set__(self, value)


def _as_numpy(self: Tensor, *, force: bool = False) -> Any:
    array = _original["numpy"](self, force=force)
    recorder = _recorder()
    if recorder is not None and writes.relies_on(recorder, self):
        array.flags.writeable = False  # numpy itself refuses writes that no operator would show
    return array


def _as_dlpack(self: Tensor, **kwargs: Any) -> Any:
    if not kwargs.get("copy"):
        _refuse_dlpack(self)
    return _original["__dlpack__"](self, **kwargs)


def _to_dlpack(tensor: Tensor) -> Any:
    _refuse_dlpack(tensor)
    return _original["to_dlpack"](tensor)


def _refuse_dlpack(tensor: Tensor) -> None:
    recorder = _recorder()
    if recorder is not None and writes.relies_on(recorder, tensor):
        raise CaptureError(
            f"a tensor of shape {tuple(tensor.shape)} that inner steps rely on was handed out through DLPack, where "
            "writes cannot be seen; hand out a clone made under torch.no_grad()"
        )


# -- torch's optimizers and clipping, which do not act on inner steps --------------------------------------------------


def _add_param_group(self: Any, param_group: dict[str, Any]) -> None:
    recorder, given = _recorder(), param_group.get("params")
    if recorder is not None and given is not None:
        given = [given] if isinstance(given, Tensor) else list(given)
        if _has_theta(recorder, given):
            raise WindowError(
                f"{type(self).__name__} was built inside a window, where the networks show parameters of the step at "
                "hand; build it before the block, from the networks' own parameters"
            )
        param_group = {**param_group, "params": given}
    _original["add_param_group"](self, param_group)


def _has_theta(recorder: Recorder, tensors: list[Any]) -> bool:
    return any(isinstance(t, Tensor) and isinstance(recorder.recording.known(t), Theta) for t in tensors)


def _clip_norm(parameters: Any, *args: Any, **kwargs: Any) -> Any:
    given = _refuse_clipping(parameters, "clip_grad_norm_", "clip_global_norm(max_norm)")
    return _original["_clip_grads_with_norm_"](given, *args, **kwargs)


def _clip_value(parameters: Any, *args: Any, **kwargs: Any) -> Any:
    given = _refuse_clipping(parameters, "clip_grad_value_", "clip_value(value)")
    return _original["clip_grad_value_"](given, *args, **kwargs)


def _refuse_clipping(parameters: Any, name: str, transform: str) -> list[Tensor]:
    """The parameters whose ``.grad`` is to be clipped; raises where none has any and inner steps train one."""
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    of_window = networks.get()
    if _mode() is None or of_window is None or any(p.grad is not None for p in given):
        return given
    if any(map(of_window.trains, given)):
        raise WindowError(
            f"torch.nn.utils.{name} on parameters that an inner optimizer trains, none of which has a .grad: inner "
            "gradients are never there, since inner.step(loss) takes the gradient of the loss itself. Clip them with "
            f"inner.transforms = [metaoptim.transforms.{transform}], once before the loop"
        )
    return given


patches = Patches(
    *((owner, "apply", classmethod(_apply)) for owner in FUNCTIONS),
    # Costs every window more than all others together; with one class, there is no other way than its ``apply``.
    *([(BackwardCFunction, "__init__", _no_other_way)] if len(FUNCTIONS) > 1 else []),
    (checkpointing, CHECKPOINT, _checkpoint),
    (Tensor, "register_hook", _register_hook),
    (Tensor, "retain_grad", _retain_grad),
    (Tensor, "detach_", _detach_in_place),
    (torch, "detach_", _detach_in_place),
    (Tensor, "data", property(_get_data, _set_data)),
    (Tensor, "numpy", _as_numpy),
    (Tensor, "__dlpack__", _as_dlpack),
    (dlpack, "to_dlpack", _to_dlpack),
    (torch, "to_dlpack", _to_dlpack),
    (torch.optim.Optimizer, "add_param_group", _add_param_group),
    (clip_grad, "_clip_grads_with_norm_", _clip_norm),
    (clip_grad, "clip_grad_value_", _clip_value),
    (torch.nn.utils, "clip_grad_value_", _clip_value),
)
_original = patches.original
