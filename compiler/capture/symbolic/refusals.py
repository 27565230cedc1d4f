"""What a function may not do while it is captured, and would go wrong quietly: caught where Python enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from metaoptim.errors import CaptureError

from ..intercept import recording
from . import random_numbers
from .tracer import Tracer


def _capturing() -> Tracer | None:
    mode = recording.get()
    return mode if isinstance(mode, Tracer) and not mode.depth else None


def _refused(original: Callable, message: str) -> Callable:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if _capturing():
            raise CaptureError(message)
        return original(*args, **kwargs)

    return refuse


def _symbolic(t: Tensor, **options: Any) -> str:
    if not _capturing():
        return _REPR(t, **options)
    return f"<symbolic {str(t.dtype).removeprefix('torch.')}{list(t.shape)}>"


_REPR = torch.Tensor.__repr__
_NO_VALUES = (
    "a tensor is turned into Python or numpy values while the function is captured, where it has none. Do it outside "
    "the compiled function, or leave the loop in an ordinary window and compile the inner step only"
)
_NO_BACKWARD = (
    "backward() inside a compiled function: return the loss, and call backward() on what the function returns (for a "
    "gradient inside, use torch.autograd.grad(..., create_graph=True))"
)
_NO_STEP = (
    "an outer optimizer's step() inside a compiled function, which would be taken once and never again; call it after "
    "the function, when backward() has filled the gradients"
)


_NO_ZERO_GRAD = (
    "zero_grad() inside a compiled function, which would act once and never again; call it outside (inner steps never "
    "fill .grad)"
)
_NO_SEED = (
    "a random generator is seeded or set inside a compiled function, which would happen once and never again; do it "
    "before the call"
)
_NO_LOADER = (
    "a DataLoader is read inside a compiled function, which is captured once for all batches; stack the batches into "
    "tensors and pass these (window.scan(xs, ys)), or compile the inner step and keep the loop over the DataLoader in "
    "an ordinary window"
)
_NO_DATA = (
    "tensor.data = ... while the function is captured cannot be followed; use tensor.copy_(...) under torch.no_grad(), "
    "or compute a new tensor"
)
_NO_NODE_HOOK = (
    "a hook on an autograd node (a module's register_full_backward_hook, or grad_fn.register_hook) while the function "
    "is captured, which its program cannot follow; put the hook on a tensor (h.register_hook, in a module's forward "
    "hook for instance), or use a window with strategy='full_tape'"
)


def _set_data(t: Tensor, value: Tensor) -> None:
    if _capturing():
        raise CaptureError(_NO_DATA)
    _DATA.__set__(t, value)


def _format(t: Tensor, spec: str) -> str:
    return _symbolic(t) if _capturing() else _FORMAT(t, spec)


_DATA: Any = torch.Tensor.data
_FORMAT = torch.Tensor.__format__
_GAUSSIAN = torch.nn.functional.gaussian_nll_loss
_NARROW = torch.Tensor.narrow


def _narrow(input: Tensor, dim: int, start: Any, length: int) -> Tensor:
    """``narrow``, which looks at the value of a ``start`` that is a tensor although no shape depends on it."""
    if not isinstance(start, Tensor) or not _capturing():
        return _NARROW(input, dim, start, length)
    start = torch.where(start < 0, start + input.shape[dim], start)
    return input.index_select(dim, start + torch.arange(length, device=start.device))


def _no_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if _capturing():
        raise CaptureError(_NO_STEP)


def _gaussian_nll_loss(*args: Any, **kwargs: Any) -> Tensor:
    """The loss, whose check that no variance is negative looks at values."""
    tracer = _capturing()
    if tracer is None:
        return _GAUSSIAN(*args, **kwargs)
    tracer.supposed = False
    try:
        return _GAUSSIAN(*args, **kwargs)
    finally:
        tracer.supposed = None


_REFUSED: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (torch.Tensor, ("numpy", "tolist", "__array__"), _NO_VALUES),
    (torch.Tensor, ("backward",), _NO_BACKWARD),
    (torch.autograd, ("backward",), _NO_BACKWARD),
    (torch.nn.Module, ("zero_grad",), _NO_ZERO_GRAD),
    (torch.optim.Optimizer, ("zero_grad",), _NO_ZERO_GRAD),
    (torch.utils.data.DataLoader, ("__iter__",), _NO_LOADER),
    (torch, ("manual_seed", "seed", "set_rng_state"), _NO_SEED),
    (torch.random, ("manual_seed", "seed", "set_rng_state"), _NO_SEED),
    (torch.autograd.Function, ("_register_hook",), _NO_NODE_HOOK),  # torch's nodes register theirs by it
)
_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (torch.Tensor, "__repr__", _symbolic),
    (torch.Tensor, "__format__", _format),
    (torch.Tensor, "data", property(_DATA.__get__, _set_data)),
    (torch.Tensor, "narrow", _narrow),
    (torch, "narrow", _narrow),
    # their checks of arguments look at values
    (torch.nn.functional, "gaussian_nll_loss", _gaussian_nll_loss),
    (torch.distributions.Distribution, "_validate_args", False),
)


def _install(stack: ExitStack) -> None:
    for owner, names, message in _REFUSED:
        for name in names:
            stack.enter_context(patch.object(owner, name, _refused(getattr(owner, name), message)))
    for owner, name, instead in _REPLACED:
        stack.enter_context(patch.object(owner, name, instead))
    handle = register_optimizer_step_pre_hook(_no_step)
    stack.callback(handle.remove)
    random_numbers.install(stack)


_lock = Lock()
_captures = 0  # under way, in all threads: the first of them installs, the last takes away
_installed = ExitStack()


@contextmanager
def refusing() -> Iterator[None]:
    """Refuse these inside the block, in the thread that captures."""
    global _captures
    with _lock:
        _captures += 1
        if _captures == 1:
            _install(_installed)
    try:
        with random_numbers.untouched():
            yield
    finally:
        with _lock:
            _captures -= 1
            if not _captures:
                _installed.close()
