"""What a dispatch mode cannot see: custom autograd Functions, tensor hooks, activation checkpointing.

While at least one window is open these three entry points of torch are wrapped; each wrapper first asks whether the
calling thread has a recorder, so other threads are untouched.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from .entries import Spy
from .recorder import Recorder

recording: ContextVar[Recorder | None] = ContextVar("metaoptim_recorder", default=None)
# Called with the function handed to checkpoint; returns one that recomputes with the parameters of now.
binding: ContextVar[Any] = ContextVar("metaoptim_binding", default=None)

_lock = threading.Lock()
_open = 0
_saved: dict[str, Any] = {}


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    def apply(*a: Any, **k: Any) -> Any:
        return super(_SingleLevelFunction, cls).apply(*a, **k)  # type: ignore[misc]  # pyright: ignore

    recorder = recording.get()
    if recorder is None or recorder.depth:
        return apply(*args, **kwargs)
    return recorder.apply_function(cls, apply, args, kwargs)


def _register_hook(self: Tensor, hook: Any) -> Any:
    recorder = recording.get()
    if recorder is None or recorder.depth:
        return _saved["hook"](self, hook)
    spy = Spy(hook)
    handle = _saved["hook"](self, spy)
    recorder.add_hook(self, spy, handle)
    return handle


def _checkpoint(fn: Any, *args: Any, **kwargs: Any) -> Any:
    bind = binding.get()
    return _saved["checkpoint"](fn if bind is None else bind(fn), *args, **kwargs)


def install() -> None:
    """Wrap the entry points (counted: one call per open window)."""
    global _open
    with _lock:
        _open += 1
        if _open == 1:
            _saved["hook"] = torch.Tensor.register_hook
            _saved["checkpoint"] = checkpointing._checkpoint_without_reentrant_generator
            _SingleLevelFunction.apply = classmethod(_apply)  # type: ignore[attr-defined]
            torch.Tensor.register_hook = _register_hook  # type: ignore[method-assign]
            checkpointing._checkpoint_without_reentrant_generator = _checkpoint


def uninstall() -> None:
    """Undo one `install`."""
    global _open
    with _lock:
        _open -= 1
        if _open == 0:
            del _SingleLevelFunction.apply  # type: ignore[attr-defined]
            torch.Tensor.register_hook = _saved["hook"]  # type: ignore[method-assign]
            checkpointing._checkpoint_without_reentrant_generator = _saved["checkpoint"]


def is_removed(handle: Any) -> bool:
    """Whether a tensor hook's handle has been removed since."""
    hooks = handle.hooks_dict_ref()
    return hooks is None or handle.id not in hooks
