"""What metaoptim uses of torch that torch calls private, so that a new release of torch breaks in one place.

`tests/lower/test_compat.py` has a canary for each. Two kinds are left where they are used: attributes of tensors
(``_version``, ``_base``, ``_is_view``, a storage's ``_cdata``), which half the ecosystem reads; and inductor's and
dynamo's own, which take a second to import (`lower.backends`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.utils._python_dispatch as dispatching
import torch.utils.checkpoint
from torch._C import DisableTorchFunction, _autograd
from torch._C import _DisableAutocast as DisableAutocast
from torch._C import _DisableTorchDispatch as DisableTorchDispatch
from torch._C._aoti import AOTIModelContainerRunnerCpu
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as outside_transforms
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    disable_fake_tensor_cache,
    unset_fake_temporarily,
)
from torch.autograd.function import Function
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.nn.modules import transformer
from torch.nn.parallel.distributed import _DDPSink as DDPSink
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

#: The classes whose ``apply`` a custom `torch.autograd.Function` goes through. From torch 2.14 on `Function` has one of
#: its own, in C++, which does not call its base's.
FUNCTIONS = (
    (SingleLevelFunction,)
    if isinstance(vars(Function)["apply"], classmethod)
    else (SingleLevelFunction, Function)
)
_NOTES = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)
transforms_active = torch._C._are_functorch_transforms_active
#: What `torch.utils.checkpoint` without reentrance is made of; from torch 2.14 on, its ``_impl``.
CHECKPOINT = "_checkpoint_without_reentrant_generator"
if hasattr(torch.utils.checkpoint, f"{CHECKPOINT}_impl"):
    CHECKPOINT += "_impl"

#: What asks for an attention mask's values; where the answer is no, the mask is used as it is.
IS_CAUSAL = (transformer, "_detect_is_causal_mask")
#: Functions of torch, by name, whose gradient torch differentiates wrongly: it computes it apart from autograd.
ONCE = tuple(
    f"GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked{which}_default"
    for which in ("", "_no_reduction")
)


any_autocast_enabled = torch._C._is_any_autocast_enabled
swap_tensors = torch._C._swap_tensor_impl
current_autograd_node = torch._C._current_autograd_node
#: An id of the backward that is running, for its nodes.
graph_task = torch._C._current_graph_task_id
#: Whether the backward that is running was told to ``retain_graph``; outside of one, yes.
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph  # pyright: ignore[reportAttributeAccessIssue]

#: Where the memory of a tensor is known to torch: ``t.untyped_storage()._cdata``, which leaves an object in Python for
#: as long as the memory lives.
storage_address: Callable[[torch.Tensor], int] = torch._C._storage_address  # pyright: ignore[reportAttributeAccessIssue]

#: Whether a tensor is one of forward mode's zeros, which have no memory.
is_zero_tensor = torch.Tensor._is_zerotensor


def forward_mode_level() -> int:
    """How many levels of forward-mode differentiation are open, less one."""
    return torch.autograd.forward_ad._current_level


_CONJUGATING = (torch.ops.aten.linalg_pinv.atol_rtol_tensor, torch.ops.aten.linalg_lstsq.default)


def called(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an operator gives, called by a dispatch mode's handler.

    There torch forgets what is to be conjugated, as some operators do within their kernels.
    """
    if op not in _CONJUGATING:
        return op(*args, **kwargs)
    there, without = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(there, without.remove(torch._C.DispatchKey.Conjugate)):
        return op(*args, **kwargs)


def keep_from_dynamo(function: Any) -> None:
    """Have dynamo compile neither a Python function nor what it calls, at no cost in each call."""
    frames: Any = torch._C._dynamo.eval_frame  # type: ignore[attr-defined]  # pyright: ignore
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    frames.set_code_exec_strategy(function.__code__, skip)


@contextmanager
def compiling_flag() -> Iterator[None]:
    """Inside the block torch takes itself for compiling: optimizers do not turn tensors into numbers then."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def init_group(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer make the state of its first group's parameters, where it does so before its steps."""
    make = getattr(type(optimizer), "_init_group", None)
    if make is not None:
        wanted = list(inspect.signature(make).parameters)[2:]
        make(optimizer, optimizer.param_groups[0], *([] for _ in wanted))


def queue_callback(done: Any) -> None:
    """Have ``done`` called at the end of the backward that is running."""
    torch.autograd.Variable._execution_engine.queue_callback(done)


def storage_users(storage: int) -> int:
    """How many tensors and storages refer to the memory with that ``_cdata``."""
    return torch._C._storage_Use_Count(storage)


def has_meta_kernel(op: OpOverload) -> bool:
    """Whether an operator computes shapes without values."""
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.name(), "Meta")


_fakes = threading.Lock()


class FakeTensorMode(fake_tensor.FakeTensorMode):
    """Torch's, for several threads at a time.

    Torch notes for the process that a mode is on, and each mode puts back what it found. When two threads cross, the
    note stays for ever, and dynamo leaves all functions alone from then on. The last one out puts it back here.
    """

    _on: ClassVar[int] = 0
    _before: ClassVar[tuple[bool, ...]] = ()

    def __enter__(self) -> FakeTensorMode:
        with _fakes:
            if not FakeTensorMode._on:
                FakeTensorMode._before = tuple(getattr(dispatching, note) for note in _NOTES)
            FakeTensorMode._on += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with _fakes:
            FakeTensorMode._on -= 1
            if not FakeTensorMode._on:
                # what was found may have been of a mode of torch's own in another thread, which is off by now
                before = [value and bool(dispatch_modes()) for value in FakeTensorMode._before]
                for note, value in zip(_NOTES, before, strict=True):
                    setattr(dispatching, note, value)
                tell_dynamo = dispatching.set_is_in_mode_without_ignore_compile_internals  # pyright: ignore
                tell_dynamo(before[-1])


# -- stacks of modes --------------------------------------------------------------------------------------------------

push_dispatch_mode = torch._C._push_on_torch_dispatch_stack


def tops_dispatch(mode: TorchDispatchMode) -> bool:
    """Whether ``mode`` is the innermost dispatch mode."""
    top = torch._C._len_torch_dispatch_stack()
    return top > 0 and torch._C._get_dispatch_stack_at(top - 1) is mode


def pop_dispatch_mode() -> Any:
    """Take the innermost dispatch mode off the stack."""
    return torch._C._pop_torch_dispatch_stack(None)


def function_modes() -> tuple[Any, ...]:
    """The torch function modes that are active."""
    return tuple(_get_current_function_mode_stack()) if torch._C._len_torch_function_stack() else ()


# -- the profiler before kineto: it starts in no time, says nothing on stderr, and keeps events in order ---------------

profiling = _autograd._profiler_enabled
ProfilerEvent = _autograd.ProfilerEvent


def begin_profile() -> None:
    """Note allocations of this thread; operators, which would take ten times as long, are not noted."""
    _autograd._enable_profiler_legacy(
        ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    )
    _autograd._enable_record_function(False)


def end_profile() -> list[list[Any]]:
    """Events since `begin_profile`, by thread."""
    threads = _autograd._disable_profiler_legacy()
    _autograd._enable_record_function(True)
    return threads
