"""vmap: a function that holds a window, for many tasks at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .compile import CompiledFunction, Method, compiled_of
from .compiler.capture import intercept
from .compiler.compat import tree_flatten, tree_unflatten
from .compiler.ir.programs.calls import StepCall
from .compiler.ir.retention import check_count
from .compiler.ir.values import Input
from .compiler.lower.ambient import unaffected
from .compiler.passes.batch import Batched, batch, wrong
from .compiler.passes.options import Options
from .compiler.passes.pipeline import compile_trace, lower
from .errors import CaptureError, WindowError
from .functions.guards import Dependencies
from .functions.reads import Reads
from .functions.specialization import Specialization, trace_of, warn_unreached
from .functions.specializations import Specializations
from .runtime.engine.noise import generator_of
from .runtime.windows.session import current_session

_RANDOMNESS = ("error", "different", "same")
#: What holds no tensors of tasks.
_SHARED = (
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    Enum,
    nn.Module,
    torch.optim.Optimizer,
)
Wholes = Mapping[
    int, Tensor
]  # id of the first task's tensor -> that of all tasks, along the leading dimension


class _Tasks(Dependencies):
    """What a call depends on, as its first task shows it; and the tensors of all tasks."""

    wholes: Wholes

    def whole(self, source: int | Tensor) -> Tensor | None:
        """The tensor of all tasks behind a source; None where there is one for all."""
        return self.wholes.get(id(self.tensor(source)))


class _Batched(Specialization):
    """A function captured for one task, whose program does all tasks at once."""

    def __init__(self, *given: Any, made: Batched, size: int) -> None:
        self.arranged, self.held, self.size = made.arranged, made.outputs, size
        self._unchecked = {id(batched.step): batched for batched in made.steps}
        super().__init__(*given)
        self.check = self._check if self._unchecked and self._options.lowering.check else None

    def _check(self, call: StepCall, kind: str, operands: Sequence[Tensor]) -> None:
        """Compare what torch has batched with one task's step, before it runs for the first time."""
        batched = self._unchecked.get(id(call.step)) if kind in ("replay", "forward") else None
        if batched is None:
            return
        complaint = wrong(batched, operands, self._options.lowering.hvp)
        if complaint is not None:
            raise CaptureError(
                f"vmap({self._name}): for all tasks at once torch computes something else than for the first one: "
                f"{complaint}. Call the function for each task in a loop, and please report it"
            )
        del self._unchecked[id(call.step)]
        if not self._unchecked:
            self.check = None

    def given(self, dependencies: Dependencies, x: Input) -> Tensor:
        """What a call is given for an input of the program: the tensors of all tasks, laid out as it reads them."""
        assert isinstance(dependencies, _Tasks)
        how, one = self.arranged.get(x), super().given(dependencies, x)
        if how is None:
            return one
        whole = dependencies.whole(self.sources[x])
        assert (whole is not None) is how.mapped
        if whole is None:
            whole = one.expand(self.size, *one.shape)
        return whole.movedim(0, how.dim).contiguous()

    def results(self, found: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the function returns: tensors of all tasks."""
        pairs = zip(found, self.held, strict=True)
        return [t if held else t.expand(self.size, *t.shape) for t, held in pairs]


class BatchedFunction(Method):
    """What `vmap` returns: called like the function itself, with tensors of all tasks."""

    def __init__(
        self, compiled: CompiledFunction, in_dims: Any, chunk_size: int | None, randomness: str
    ) -> None:
        functools.update_wrapper(self, compiled._fn)
        self._instance = compiled._instance
        self._fn, self._options, self._name = compiled._fn, compiled._options, compiled._name
        self._in_dims, self._chunk_size, self._randomness = in_dims, chunk_size, randomness
        self._specializations: dict[Any, Specializations] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function for all tasks; it is captured once, for tasks like these."""
        recorder = intercept.recording.get()
        if current_session() is not None or (recorder is not None and recorder.symbolic):
            raise WindowError(
                f"vmap({self._name}) was called inside a window or a compiled function; call it outside: the windows "
                "of its tasks are inside of it"
            )
        dims = _dims_of("", None, self._instance) + self._dims(args, kwargs)
        given, spec = tree_flatten(((*self._instance, *args), kwargs))
        size = self._size(given, dims)
        chunk = self._chunk_size or size
        devices = {t.device for t in given if isinstance(t, Tensor)} if self._randomness == "same" else ()
        generators = [generator_of(device) for device in devices]
        states = [generator.get_state() for generator in generators]
        parts = []
        for at in range(0, size, chunk):
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            parts.append(self._part(given, spec, dims, slice(at, at + chunk)))
        if len(parts) == 1:
            return parts[0]
        flat = [tree_flatten(part) for part in parts]
        leaves = zip(*(leaves for leaves, _ in flat), strict=True)
        joined = [torch.cat(of) if isinstance(of[0], Tensor) else of[0] for of in leaves]
        return tree_unflatten(joined, flat[0][1])

    def _dims(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | None]:
        """The dimension of tasks of each leaf of the arguments; None for those that all tasks share."""
        in_dims = self._in_dims
        if isinstance(in_dims, (tuple, list)) and len(in_dims) != len(args):
            raise ValueError(
                f"vmap({self._name}): in_dims has {len(in_dims)} entries, expected one for each of the {len(args)} "
                "positional arguments: a dimension, or None for what all tasks share"
            )
        each = in_dims if isinstance(in_dims, (tuple, list)) else [in_dims] * len(args)
        found: list[int | None] = []
        for k, (dim, value) in enumerate(zip(each, args, strict=True)):
            found += _dims_of(f"{self._name}, argument {k}", dim, value)
        for name, value in kwargs.items():
            found += _dims_of(f"{self._name}, {name}", 0, value)
        return found

    def _size(self, given: list[Any], dims: list[int | None]) -> int:
        sizes = {t.shape[d]: None for t, d in zip(given, dims, strict=True) if d is not None}
        if len(sizes) != 1 or 0 in sizes:
            told = ", ".join(map(str, sizes)) or "no tensor with a dimension of tasks"
            raise ValueError(f"vmap({self._name}): got {told}, expected one number of tasks in all arguments")
        return next(iter(sizes))

    def _part(self, given: list[Any], spec: Any, dims: list[int | None], rows: slice) -> Any:
        """A call for some of the tasks."""
        wholes: dict[int, Tensor] = {}
        leaves: list[Any] = []
        size = 0
        for t, d in zip(given, dims, strict=True):
            if d is not None:
                whole = t.movedim(d, 0)[rows]
                t = whole[0]
                wholes[id(t)], size = whole, len(whole)
            leaves.append(t)
        args, kwargs = tree_unflatten(leaves, spec)
        mapped = tuple(id(leaf) in wholes for leaf in leaves)
        known = self._specializations.setdefault((size, mapped), Specializations(self._fn))
        specialize = functools.partial(self._specialize, size)
        found, tasks, _ = known.serve(args, kwargs, specialize, of_call=functools.partial(_tasks, wholes))
        return found.run(tasks)

    def _specialize(self, size: int, tasks: _Tasks, args: Any, kwargs: Any, reads: Reads) -> _Batched:
        trace, traced, _ = trace_of(self._fn, args, kwargs, reads=reads)
        reads.settle(tasks)
        options: Options = self._options
        with unaffected():
            program, records = compile_trace(trace, options)
            warn_unreached(trace, program, self._fn)
            mapped = {x: id(x.tensor) in tasks.wholes for x in program.inputs}
            made = batch(program, mapped, size, options.lowering.hvp, self._randomness)
            lower(made.program, options)
        return _Batched(self._name, options, tasks, made.program, records, traced, made=made, size=size)


def _tasks(wholes: Wholes, *call: Any) -> _Tasks:
    tasks = _Tasks.of_call(*call)
    assert isinstance(tasks, _Tasks)
    tasks.wholes = wholes
    return tasks


def _dims_of(what: str, dim: Any, value: Any) -> list[int | None]:
    """The dimension of tasks of each leaf of an argument."""
    if isinstance(dim, dict) and isinstance(value, dict) and dim.keys() == value.keys():
        return [d for k in value for d in _dims_of(f"{what}[{k!r}]", dim[k], value[k])]
    if isinstance(dim, (tuple, list)) and isinstance(value, (tuple, list)) and len(dim) == len(value):
        return [
            d
            for k, (one, v) in enumerate(zip(dim, value, strict=True))
            for d in _dims_of(f"{what}[{k}]", one, v)
        ]
    leaves = tree_flatten(value)[0]
    if dim is None:
        return [None] * len(leaves)
    if type(dim) is not int:
        raise ValueError(
            f"vmap({what}): in_dims has {dim!r}, expected a dimension, None, or the argument's structure"
        )
    found: list[int | None] = []
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_SHARED)) and not callable(leaf):
            raise ValueError(
                f"vmap({what}): got {type(leaf).__name__}, expected tensors in dictionaries, lists and tuples, or "
                "networks, optimizers and numbers, which all tasks share; say None in in_dims if they share this too"
            )
        if isinstance(leaf, Tensor) and not -leaf.dim() <= dim < leaf.dim():
            raise ValueError(
                f"vmap({what}): got a tensor of shape {tuple(leaf.shape)}, which has no dimension {dim}"
            )
        found.append(dim if isinstance(leaf, Tensor) else None)
    return found


def vmap(
    fn: Callable[..., Any],
    in_dims: Any = 0,
    *,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """A function that holds a window, for many tasks at once.

    The function is captured for one task. Its step graphs are batched once, and the T inner steps of all tasks run as
    one loop, under the options of `compile` (``slots``, ``memory_budget``), whose states are those of all tasks. Each
    task begins at the network's parameters, θ₀; or at values of its own, by `MetaOptimizer.start`. The gradient of what
    tasks share is summed over them.

    Args:
        fn: a function or method, plain or of `metaoptim.compile`, whose options hold then. A method shares its object.
        in_dims: for each positional argument the dimension of its tensors along which the tasks are, None for what they
            share, or a structure of these. Networks, optimizers and numbers are always shared. Keyword arguments have
            the tasks first.
        chunk_size: most tasks at a time; None for all.
        randomness: ``"different"`` random numbers for each task, the ``"same"`` for all, or ``"error"`` where any are
            drawn.

    Returns:
        A function of the same arguments, whose tensors have the results of all tasks along their first dimension.

    Raises:
        ValueError: for tensors that do not have the dimension, or numbers of tasks that differ.
        WindowError: inside a window; where the function leaves another value for each task in one tensor; where random
            numbers are drawn and ``randomness`` does not say how.
        CaptureError: for what cannot be captured, or not be batched.

    Example:
        >>> net, log_lr = torch.nn.Linear(3, 1), torch.tensor(-2.0, requires_grad=True)
        >>> def adapted_loss(x, y):
        ...     inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
        ...     with metaoptim.SlidingWindow(offline=True):
        ...         for _ in range(3):
        ...             inner.step((net(x) - y).square().mean())
        ...         return (net(x) - y).square().mean()
        >>> losses = metaoptim.vmap(adapted_loss)(torch.randn(16, 5, 3), torch.randn(16, 5, 1))
        >>> losses.sum().backward()
        >>> losses.shape, net.weight.grad.shape
        (torch.Size([16]), torch.Size([1, 3]))
    """
    if randomness not in _RANDOMNESS:
        raise ValueError(
            f"randomness: got {randomness!r}, expected one of {', '.join(map(repr, _RANDOMNESS))}"
        )
    check_count("chunk_size", chunk_size)
    if not callable(fn):
        raise TypeError(f"vmap: got {type(fn).__name__}, expected a function")
    return BatchedFunction(compiled_of(fn), in_dims, chunk_size, randomness)
