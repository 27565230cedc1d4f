"""plan: what a compiled function would cost at another horizon, batch size or budget; nothing is run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.compiler.compat import tree_flatten, tree_leaves, tree_unflatten

from .compile import compiled_of
from .compiler.capture import intercept
from .compiler.capture.symbolic.tracer import Tracer
from .compiler.ir.retention import Retention
from .compiler.ir.tensors import TensorSpec
from .compiler.passes.options import retention_of
from .compiler.passes.pipeline import compile_trace
from .errors import ProgramError, WindowError
from .functions.specialization import trace_of
from .report.cost import Cost, Setting
from .runtime.budget.amounts import budget_bytes
from .runtime.budget.planner import device_of
from .runtime.windows.session import current_session


def plan(
    fn: Callable,
    *,
    horizon: int | None = None,
    memory_budget: int | float | str | None = None,
    offload: str | os.PathLike[str] | None = None,
    batch: Mapping[str, int] | None = None,
    batch_size: int | None = None,
) -> Callable[..., Cost]:
    """Say what a compiled function would cost at some horizon, in some memory, without running it.

    Args:
        fn: compiled, or a plain function that holds a window. Its loop is a ``window.scan`` or ``window.range``.
        horizon: T, in place of the length of its loop (the longest, if it has several); None for the length it has.
        memory_budget: the budget of `compile`; None for what the function itself says.
        offload: the ``offload`` of `compile`, with ``memory_budget``; None for what the function itself says.
        batch: name of a parameter of the function -> which dimension of it, or of every tensor in it, is the batch.
        batch_size: with ``batch``, the size to plan for. The function is captured with arguments of this size, made of
            shapes alone.

    Returns:
        A function of the same arguments that returns a `Cost`.

    Raises:
        BudgetError: from that function, for a budget too small for the horizon.
        CaptureError: from that function, for what cannot be captured.
        ValueError: for ``batch`` without ``batch_size`` or the reverse; from that function, for a ``batch`` that names
            no parameter, no dimension, or dimensions of several sizes.
        WindowError: from that function, if it has no loop, or if its gradients are truncated by ``window=W`` at
            losses between its inner steps; with ``batch``, if it cannot be captured with a batch of this size.

    Example:
        >>> net = torch.nn.Linear(3, 1)
        >>> @metaoptim.compile(backend="eager")
        ... def meta_loss(net, xs):
        ...     inner = metaoptim.MetaAdam([net])
        ...     with metaoptim.SlidingWindow(offline=True) as window:
        ...         for x in window.scan(xs):
        ...             inner.step(net(x).square().mean())
        ...         return net(xs[0]).square().mean()
        >>> cost = metaoptim.plan(meta_loss, horizon=50_000, memory_budget="64KiB")(net, torch.ones(20, 2, 3))
        >>> cost.horizon, cost.peak_bytes <= 64 * 1024
        (50000, True)
        >>> larger = metaoptim.plan(meta_loss, batch={"xs": 1}, batch_size=64)(net, torch.ones(20, 2, 3))
        >>> larger.batch, larger.peak_bytes == metaoptim.plan(meta_loss)(net, torch.ones(20, 64, 3)).peak_bytes
        (64, True)

    References:
        Griewank & Walther 2000, "Algorithm 799: Revolve", ACM TOMS 26.
    """
    asked = Retention(None, memory_budget, offload)
    if (batch is None) != (batch_size is None):
        raise ValueError(
            f"plan: got batch={batch!r} and batch_size={batch_size!r}, expected both or neither, as in "
            'batch={"xs": 1}, batch_size=64'
        )
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size: got {batch_size!r}, expected a whole number, at least 1")
    if current_session() is not None:
        raise WindowError(
            "plan was called inside a window: it takes a function that holds its window itself. For a compiled step "
            "use explain(step); to plan, put the loop into a function"
        )
    compiled = compiled_of(fn)

    def cost(*args: Any, **kwargs: Any) -> Cost:
        options, args = compiled._options, (*compiled._instance, *args)
        call = partial(compiled._fn, *args, **kwargs)
        if batch is not None and batch_size is not None:
            call = _with_batch(compiled._fn, args, kwargs, batch, batch_size)
        program, _ = compile_trace(trace_of(call, (), {})[0], options)
        said = retention_of(program, options)
        tiered = offload is not None or said.offload is not None
        slots, budget = said.slots, said.memory_budget
        if asked.given:
            slots, budget = None, memory_budget
        name = getattr(compiled, "__qualname__", "the function")
        setting = Setting(program, options.lowering, name, horizon, tiered, batch_size)
        if budget is None:
            return setting.with_nothing_said() if slots is None else setting.with_slots(slots, tiered)
        return setting.within(budget_bytes(budget, device_of(program)), tiered)

    return cost


# -- batches of another size -------------------------------------------------------------------------------------------


def _with_batch(
    fn: Callable, args: tuple, kwargs: dict, dims: Mapping[str, int], size: int
) -> Callable[[], Any]:
    """The call with a batch of another size, to be captured: its tensors are symbolic, and take no memory.

    ``dims``: name of a parameter -> the batch dimension, of every tensor in it.
    """
    batched: dict[int, tuple[Tensor, int]] = {}
    sizes: dict[str, int] = {}
    for name, t, dim in _named(inspect.signature(fn).bind(*args, **kwargs).arguments, dims):
        _, known = batched.setdefault(id(t), (t, dim))
        if known != dim:
            raise ValueError(
                f"batch: got dimensions {known} and {dim} of one tensor of shape {tuple(t.shape)} (the latter for "
                f"{name!r}), expected one; pass a clone"
            )
        sizes[f"{name}: {tuple(t.shape)}[{dim}]"] = t.shape[dim]
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"batch: got {', '.join(sizes)}, expected dimensions of one size, at least 1")

    def call() -> Any:
        tracer = intercept.recording.get()
        assert isinstance(tracer, Tracer)
        with tracer.paused():
            others = {key: _resized(tracer, t, dim, size) for key, (t, dim) in batched.items()}
        resized = [_replaced(a, others) for a in args]
        named = {name: _replaced(a, others) for name, a in kwargs.items()}
        try:
            return fn(*resized, **named)
        except ProgramError:
            raise
        except Exception as error:  # of the user's code, or of torch
            raise WindowError(
                f"plan: with a batch of {size} in {' and '.join(dims)}, in place of {next(iter(sizes.values()))}, "
                f"the function cannot be captured: {type(error).__name__}: {error}. Name every argument that has the "
                f"batch, as in batch={{{', '.join(f'{name!r}: ...' for name in dims)}, 'labels': 0}}, and give as "
                "arguments what it reads from elsewhere"
            ) from error

    return call


def _named(arguments: Mapping[str, Any], dims: Mapping[str, int]) -> Iterator[tuple[str, Tensor, int]]:
    named = ", ".join(arguments)
    if not dims:
        raise ValueError(f"batch: got no names, expected some of those of the arguments: {named}")
    for name, dim in dims.items():
        if name not in arguments:
            raise ValueError(f"batch: got {name!r}, expected names of arguments given: {named}")
        tensors = [t for t in tree_leaves(arguments[name]) if isinstance(t, Tensor)]
        if not tensors:
            raise ValueError(
                f"batch: {name!r} got a {type(arguments[name]).__name__}, expected a tensor, or lists, tuples or dicts "
                "of them; give what has the batch as an argument of its own"
            )
        for t in tensors:
            if type(dim) is not int or not -t.dim() <= dim < t.dim():
                raise ValueError(
                    f"batch: {name!r} got {dim!r}, expected a dimension of its tensor of shape {tuple(t.shape)}"
                )
            if t.layout is not torch.strided:
                raise ValueError(f"batch: {name!r} got a tensor of layout {t.layout}, expected a strided one")
            yield name, t, dim % t.dim()


def _replaced(value: Any, others: Mapping[int, Tensor]) -> Any:
    leaves, spec = tree_flatten(value)
    if not any(id(x) in others for x in leaves):
        return value  # the same object: the function may tell by it
    return tree_unflatten([others.get(id(x), x) for x in leaves], spec)


def _resized(tracer: Tracer, t: Tensor, dim: int, size: int) -> Tensor:
    """What stands for ``t`` with ``size`` entries along ``dim``, its dimensions laid out in the same order."""
    step, n = t.stride(dim), t.shape[dim]
    outer = [d for d, s in enumerate(t.stride()) if step and (s, -d) > (step, -dim)]
    exact = all(t.stride(d) % n == 0 for d in outer)
    stride = list(t.stride())
    for d in outer:
        stride[d] = stride[d] // n * size if exact else stride[d] * -(-size // n)
    shape = (*t.shape[:dim], size, *t.shape[dim + 1 :])
    fake = tracer.fakes.empty(TensorSpec(shape, t.dtype, tuple(stride), t.device))
    fake.requires_grad_(t.requires_grad)
    if isinstance(t, nn.Parameter):
        fake._is_param = True  # type: ignore[attr-defined]
    tracer.bind_input(fake)
    return fake
