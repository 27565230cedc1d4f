"""The block in which a function is captured: a tracer over fake tensors, and what the function may not do meanwhile.

What would go wrong quietly is caught where Python enters it. Generators of random numbers are everybody's: that one has
moved does not say who has moved it.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from metaoptim.compiler.compat import IS_CAUSAL, FakeTensorMode
from metaoptim.errors import CaptureError

from .. import intercept
from .tracer import Tracer


@contextmanager
def capturing() -> Iterator[Tracer]:
    """Everything the calling thread does inside the block is traced, over fake tensors."""
    import torch._dynamo  # in its first import it wraps `torch.manual_seed`, which must not be ours then

    tracer = Tracer(FakeTensorMode(allow_non_fake_inputs=True))
    with ExitStack() as stack:
        intercept.patches.install()
        stack.callback(intercept.patches.uninstall)
        stack.enter_context(_refusing())
        stack.enter_context(warnings.catch_warnings())
        # by copy.deepcopy, and by faking a tensor that is no leaf
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        # autocast remembers the casts of leaves: fake ones would outlive the capture, real ones enter it as constants
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        stack.enter_context(tracer.fake)
        tracer.__enter__()
        stack.callback(tracer.end)
        stack.callback(intercept.recording.reset, intercept.recording.set(tracer))
        with torch.inference_mode(False), torch.enable_grad():
            yield tracer


def _capturing() -> Tracer | None:
    mode = intercept.recording.get()
    return mode if isinstance(mode, Tracer) and not mode.depth else None


# -- refused ----------------------------------------------------------------------------------------------------------

_NO_BACKWARD = (
    "backward() inside a compiled function: return the loss, and call backward() on what the function returns (for a "
    "gradient inside, use torch.autograd.grad(..., create_graph=True))"
)
_NO_ZERO_GRAD = (
    "zero_grad() inside a compiled function, which would act once and never again; call it outside (inner steps never "
    "fill .grad)"
)
_NO_SEED = (
    "a random generator is seeded or set inside a compiled function, which would happen once and never again; do it "
    "before the call"
)
_REFUSED: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (
        torch.Tensor,
        ("numpy", "tolist", "__array__"),
        "a tensor is turned into Python or numpy values while the function is captured, where it has none. Do it "
        "outside the compiled function, or leave the loop in an ordinary window and compile the inner step only",
    ),
    (torch.Tensor, ("backward",), _NO_BACKWARD),
    (torch.autograd, ("backward",), _NO_BACKWARD),
    (torch.nn.Module, ("zero_grad",), _NO_ZERO_GRAD),
    (torch.optim.Optimizer, ("zero_grad",), _NO_ZERO_GRAD),
    (
        torch.utils.data.DataLoader,
        ("__iter__",),
        "a DataLoader is read inside a compiled function, which is captured once for all batches; stack the batches "
        "into tensors and pass these (window.scan(xs, ys)), or compile the inner step and keep the loop over the "
        "DataLoader in an ordinary window",
    ),
    (torch, ("manual_seed", "seed", "set_rng_state"), _NO_SEED),
    (torch.random, ("manual_seed", "seed", "set_rng_state"), _NO_SEED),
    (
        torch.autograd.Function,
        ("_register_hook",),  # torch's nodes register theirs by it
        "a hook on an autograd node (a module's register_full_backward_hook, or grad_fn.register_hook) while the "
        "function is captured, which its program cannot follow; put the hook on a tensor (h.register_hook, in a "
        "module's forward hook for instance), or use a window with strategy='full_tape'",
    ),
)
_DRAWN = (
    "random numbers of {} were drawn or seeded while the function was captured; they would be the same in every call. "
    "Draw them outside and pass them in (torch.rand and the like inside are fine)"
)


def _refused(original: Callable, message: str, generator: str = "") -> Callable:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        mode = intercept.recording.get()
        if isinstance(mode, Tracer) and (generator or not mode.depth):
            raise CaptureError(message)
        _elsewhere[generator] += 1
        try:
            return original(*args, **kwargs)
        finally:
            _elsewhere[generator] += 1  # a capture may have begun since

    return call


def _no_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if _capturing():
        raise CaptureError(
            "an outer optimizer's step() inside a compiled function, which would be taken once and never again; call "
            "it after the function, when backward() has filled the gradients"
        )


# -- replaced ---------------------------------------------------------------------------------------------------------

_REPR, _FORMAT, _NARROW = torch.Tensor.__repr__, torch.Tensor.__format__, torch.Tensor.narrow
_DATA: Any = torch.Tensor.data


def _symbolic(t: Tensor, **options: Any) -> str:
    if not _capturing():
        return _REPR(t, **options)
    return f"<symbolic {str(t.dtype).removeprefix('torch.')}{list(t.shape)}>"


def _format(t: Tensor, spec: str) -> str:
    return _symbolic(t) if _capturing() else _FORMAT(t, spec)


def _set_data(t: Tensor, value: Tensor) -> None:
    if _capturing():
        raise CaptureError(
            "tensor.data = ... while the function is captured cannot be followed; use tensor.copy_(...) under "
            "torch.no_grad(), or compute a new tensor"
        )
    _DATA.__set__(t, value)


def _narrow(input: Tensor, dim: int, start: Any, length: int) -> Tensor:
    """``narrow``, which looks at the value of a ``start`` that is a tensor although no shape depends on it."""
    if not isinstance(start, Tensor) or not _capturing():
        return _NARROW(input, dim, start, length)
    start = torch.where(start < 0, start + input.shape[dim], start)
    return input.index_select(dim, start + torch.arange(length, device=start.device))


def _passing(original: Callable) -> Callable:
    """A function that looks at values of its arguments: whether they are wrong, or allow for a shorter way."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        tracer = _capturing()
        if tracer is None:
            return original(*args, **kwargs)
        tracer.supposed = False
        try:
            return original(*args, **kwargs)
        finally:
            tracer.supposed = None

    return call


_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (torch.Tensor, "__repr__", _symbolic),
    (torch.Tensor, "__format__", _format),
    (torch.Tensor, "data", property(_DATA.__get__, _set_data)),
    (torch.Tensor, "narrow", _narrow),
    (torch, "narrow", _narrow),
    # they look at values of their arguments
    (torch.nn.functional, "gaussian_nll_loss", _passing(torch.nn.functional.gaussian_nll_loss)),
    (torch, "istft", _passing(torch.istft)),
    (*IS_CAUSAL, _passing(getattr(*IS_CAUSAL))),
    (torch.distributions.Distribution, "_validate_args", False),
)

# -- in all threads ---------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_captures = 0  # under way, in all threads: the first of them installs, the last takes away
_installed = ExitStack()
_elsewhere: Counter[str] = Counter()  # calls of other threads, by whose generator they move


@contextmanager
def _refusing() -> Iterator[None]:
    """Refuse all of this to threads that capture; and to this one, that the block moves a generator."""
    global _captures
    with _lock:
        _captures += 1
        if _captures == 1:
            _install(_installed)
    try:
        elsewhere, before = _elsewhere.copy(), _states()
        yield
        now = _states()
        for owner, state in before.items():
            if now[owner] != state and _elsewhere[owner] == elsewhere[owner]:
                _refuse_moved(owner)
    finally:
        with _lock:
            _captures -= 1
            if not _captures:
                _installed.close()


def _install(stack: ExitStack) -> None:
    replaced = [*_REPLACED]
    replaced += [(o, name, _refused(getattr(o, name), text)) for o, names, text in _REFUSED for name in names]
    for owner, (module, generator) in _generators().items():
        for name, function in vars(module).items():
            moves = getattr(function, "__self__", None) is generator and name not in ("getstate", "get_state")
            if moves or name == "seed":
                replaced.append((module, name, _refused(function, _DRAWN.format(owner), owner)))
    for owner, name, instead in replaced:
        stack.enter_context(patch.object(owner, name, instead))
    stack.callback(register_optimizer_step_pre_hook(_no_step).remove)


def _generators() -> dict[str, tuple[Any, Any]]:
    """Whose it is -> the module with its functions, and the generator."""
    found: dict[str, tuple[Any, Any]] = {"Python": (random, random.getrandbits.__self__)}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found["numpy"] = numpy.random, numpy.random.get_state.__self__
    return found


def _states() -> dict[str, Any]:
    # what the function draws from torch's is part of the trace; others may draw from it meanwhile
    states: dict[str, Any] = {"Python": random.getstate(), "numpy": None, "torch": torch.initial_seed()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        _, keys, position, *_ = numpy.random.get_state()
        states["numpy"] = keys.tobytes(), position
    return states


def _refuse_moved(owner: str) -> None:
    others = threading.active_count() - 1
    if not others:
        raise CaptureError(_DRAWN.format(owner))
    raise CaptureError(
        f"the random generator of {owner} has {'been seeded' if owner == 'torch' else 'moved'} while the function was "
        f"captured, by the function or by another thread ({others} more are alive). If the function draws from it or "
        "seeds it, do that outside and pass the numbers in (torch.rand and the like inside are fine). If not, call the "
        "function a first time, which captures it, while no other thread does"
    )
