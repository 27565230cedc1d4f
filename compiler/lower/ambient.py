"""PyTorch's ambient modes: what a capture depends on, and how graphs run whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from metaoptim.compiler.compat import (
    DeviceContext,
    DisableAutocast,
    DisableTorchFunction,
    any_autocast_enabled,
    function_modes,
)

from ..derive.flat import default_dtype

_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")


def ambient() -> dict[str, Any]:
    """What decides, beside its arguments, which operators a function calls, by name."""
    casts = _AUTOCAST if any_autocast_enabled() else ()  # asking each device takes time
    devices = [m.device if isinstance(m, DeviceContext) else type(m) for m in function_modes()]
    return {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "autocast": tuple(
            torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in casts
        ),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "the default device, or another torch function mode": tuple(devices),
    }


@contextmanager
def unaffected() -> Iterator[None]:
    """Below autograd, with no autocast, inference mode or default device: what a graph calls was decided at capture."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if any_autocast_enabled():
            stack.enter_context(DisableAutocast())
        if function_modes():
            stack.enter_context(DisableTorchFunction())
        stack.enter_context(torch.no_grad())
        yield


def with_default_dtype(dtype: torch.dtype, program: Callable[..., Any]) -> Callable[..., Any]:
    """``program``, run with that default dtype whatever it is then."""

    def run(*inputs: Any) -> Any:
        if torch.get_default_dtype() is dtype:
            return program(*inputs)
        with default_dtype(dtype):
            return program(*inputs)

    return run
