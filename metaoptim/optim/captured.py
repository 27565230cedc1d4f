"""The step of a `torch.optim.Optimizer`, captured as a pure graph for one parameter.

The optimizer's own ``step`` runs once over fake tensors, on an instance that has this parameter alone. What it calls is
written down: (parameter, gradient, state, hyper-parameters) -> (parameter, state). Nothing is written again by hand.
"""

from __future__ import annotations

import builtins
import copy
import functools
import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from metaoptim.compiler.compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    compiling_flag,
    init_group,
    unset_fake_temporarily,
)
from metaoptim.compiler.derive.flat import flat_graph, tracing
from metaoptim.compiler.ir.tensors import TensorSpec, tensor_spec
from metaoptim.errors import CaptureError, MetaOptimError

from .hyper import safe_sqrt

State = dict[str, Tensor]

#: Options that say how torch runs a step, not what it computes.
HOW = {"foreach": False, "fused": False, "differentiable": False, "capturable": False}
_aten = torch.ops.aten


class Source(NamedTuple):
    """Whose step it is: a class, and what its instances have beside parameters, groups and state."""

    cls: type[torch.optim.Optimizer]
    attributes: tuple[tuple[str, Any], ...] = ()
    counted: tuple[str, ...] = ()  # numbers in the groups that a step changes: they are state here

    def instance(self, groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> Any:
        """An optimizer of this class with given groups and state; no constructor runs."""
        made = object.__new__(self.cls)
        made.__dict__.update(
            _optimizer_step_pre_hooks=OrderedDict(),
            _optimizer_step_post_hooks=OrderedDict(),
            defaults={k: v for k, v in groups[0].items() if k != "params"},
            param_groups=groups,
            state=defaultdict(dict, state),
        )
        made.__dict__.update(copy.deepcopy(dict(self.attributes)))
        return made


class Captured(NamedTuple):
    """A captured step, or the making of an initial state."""

    run: Callable[..., tuple[Tensor, ...]]
    names: tuple[str, ...]  # of the states it returns, after the parameter


def initial(source: Source, param: Tensor, hyper: Mapping[str, Any]) -> State:
    """The state before the first step; {} for an optimizer that makes it in the step."""
    return _call(source, param, None, {}, hyper)[1]


def step(
    source: Source, param: Tensor, grad: Tensor, state: State, hyper: Mapping[str, Any]
) -> tuple[Tensor, State]:
    """One step of one parameter: new tensors, differentiable by all that is given."""
    return _call(source, param, grad, state, hyper)


def _call(
    source: Source, param: Tensor, grad: Tensor | None, state: State, hyper: Mapping[str, Any]
) -> tuple[Tensor, State]:
    numbers, constants = _sorted(hyper)
    scalars = {k: v for k, v in state.items() if not v.dim() and param.dim() and v.is_floating_point()}
    # Nothing is learnt through a count; and float32 loses digits of what is computed from it.
    wide = {k: (v.detach() if k == "step" else v).double() for k, v in scalars.items()}
    given = {k: wide.get(k, v) for k, v in state.items()}
    values = [v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in numbers.values()]
    tensors = [param, *(() if grad is None else (grad,)), *given.values(), *values]
    captured = _captured(
        source,
        grad is not None,
        tuple(given),
        tuple(numbers),
        constants,
        tuple(map(tensor_spec, tensors)),
    )
    new, *after = captured.run(*tensors)
    states = dict(zip(captured.names, after, strict=True))
    for name, value in scalars.items():
        states[name] = states[name].to(value.dtype)
    return new, states


Path = tuple[str, ...]


def _sorted(hyper: Mapping[str, Any]) -> tuple[dict[Path, Any], tuple[tuple[str, Any], ...]]:
    """Hyper-parameters that a graph is given, by where they are, and all of them with None in the place of those.

    A float other than 0 is given, too, so that a new learning rate needs no new graph; 0 switches a term off.
    """
    numbers: dict[Path, Any] = {}

    def outline(path: Path, value: Any) -> Any:
        if isinstance(value, Tensor) or (type(value) is float and value != 0 and math.isfinite(value)):
            numbers[path] = value
            return Given
        if isinstance(value, (tuple, list)):
            return tuple(outline((*path, str(i)), v) for i, v in enumerate(value))
        return value

    constants = tuple((name, HOW[name] if name in HOW else outline((name,), v)) for name, v in hyper.items())
    return numbers, constants


class Given:
    """Stands for a hyper-parameter that a graph is given."""


@functools.lru_cache(maxsize=1024)
def _captured(
    source: Source,
    steps: bool,
    states: tuple[str, ...],
    numbers: tuple[Path, ...],
    constants: tuple[tuple[str, Any], ...],
    specs: tuple[TensorSpec, ...],
) -> Captured:
    """The graph of a step (or of an initial state) for tensors like these."""
    names: list[str] = []

    def run(capturable: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        param = next(rest).clone()
        param.grad = next(rest).clone() if steps else torch.zeros_like(param)
        state = {name: next(rest).clone() for name in states}
        given = dict(zip(numbers, rest, strict=True))

        def fill(path: Path, value: Any) -> Any:
            if value is Given:
                return given[path]
            return (
                tuple(fill((*path, str(i)), v) for i, v in enumerate(value))
                if type(value) is tuple
                else value
            )

        group = {name: fill((name,), value) for name, value in constants}
        if capturable:
            group["capturable"] = True
        for name in source.counted:
            if name in state:
                group[name] = state.pop(name)
        low = group.pop("ns_dtype", torch.bfloat16)
        optimizer = source.instance([{"params": [param], **group}], {param: state} if state else {})
        with torch.no_grad(), compiling_flag(), _Numbers(given.values(), low), _shims():
            if steps:
                inspect.unwrap(source.cls.step)(optimizer)
            else:
                init_group(optimizer)
        after = dict(optimizer.state.get(param, {}))
        now = optimizer.param_groups[0]
        after |= {name: now[name] for name in source.counted if name in now}
        kept = {k: _tensor(source, k, v) for k, v in after.items() if v is not None}
        names[:] = kept
        return (param, *kept.values())

    def write(capturable: bool) -> Callable[..., tuple[Tensor, ...]]:
        with tracing(), FakeTensorMode(allow_non_fake_inputs=True):
            fakes = [torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device) for s in specs]
            traced = flat_graph(torch.func.functionalize(functools.partial(run, capturable)), fakes)
        for node in traced.graph.nodes:
            if node.target is _aten.copy.default:
                node.target = _copied
            root = node.target is _aten.sqrt.default
            if root or (node.target is _aten.pow.Tensor_Scalar and node.args[1] == 0.5):
                node.target, node.args = _root_or_0 if capturable else safe_sqrt, node.args[:1]
        traced.graph.eliminate_dead_code()
        return fx.GraphModule(traced.constants, traced.graph).forward

    with unset_fake_temporarily():
        try:
            found = write(False)
        except (DataDependentOutputException, DynamicOutputShapeException, _Decides) as error:
            if "capturable" not in dict(constants):
                raise _refused(source, error) from error
            # There torch decides by `torch.where`, and not in Python.
            try:
                found = write(True)
            except (DataDependentOutputException, DynamicOutputShapeException, _Decides) as again:
                raise _refused(source, again) from again
        except MetaOptimError:
            raise
        except Exception as error:
            raise _refused(source, error) from error
    return Captured(found, tuple(names))


def _root_or_0(x: Tensor) -> Tensor:
    """The square root for what a `torch.where` chooses: where it does not, 0 · NaN would make NaN of a derivative."""
    return safe_sqrt(x.clamp(min=0))


def _copied(into: Tensor, value: Tensor) -> Tensor:
    """What ``into.copy_(value)`` makes of it; `aten.copy` has no derivative."""
    return value.to(into.dtype).broadcast_to(into.shape).clone()


def _refused(source: Source, error: Exception) -> CaptureError:
    file = inspect.getsourcefile(inspect.unwrap(source.cls.step))
    frames = (
        [f for f in inspect.getinnerframes(error.__traceback__) if f.filename == file]
        if error.__traceback__
        else []
    )
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return CaptureError(
        f"{source.cls.__name__}.step cannot be captured{where}: {error}. A step must compute with tensors, and decide "
        "by torch.where; write it as init_state and update of a metaoptim.MetaOptimizer (docs/optimizers.md)"
    )


def _tensor(source: Source, name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64)
    raise CaptureError(
        f"{source.cls.__name__} keeps {type(value).__name__} as state {name!r}, expected tensors and numbers; write it "
        "as init_state and update of a metaoptim.MetaOptimizer (docs/optimizers.md)"
    )


# -- what stands between an optimizer's Python and tensors in the place of its numbers --------------------------------


class _Decides(Exception):
    """A step decides in Python by a value."""


class _Numbers(TorchFunctionMode):
    """Lets tensors stand where a step expects numbers."""

    def __init__(self, given: Iterable[Tensor], low: torch.dtype) -> None:
        super().__init__()
        self.given = {id(t) for t in given}
        self.low = low  # what bfloat16 is replaced by

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(out := kwargs.get("out"), Tensor):
            return out.copy_(func(*args, **{k: v for k, v in kwargs.items() if k != "out"}))
        name = getattr(func, "__name__", "")
        rewrite = _REWRITES.get(name.strip("_"))
        if name in ("item", "__float__", "__index__", "tolist") and args:
            if name == "item":
                return args[0]
            raise _Decides(f"{name} of a tensor")
        if name in _ANSWERS and args and id(args[0]) in self.given and _is_zero(args[1]):
            return _ANSWERS[name]
        if name in _ALIASES:
            return args[0].copy_(getattr(torch.Tensor, name[:-1])(*args, **kwargs))
        if name == "bfloat16":
            return args[0].to(self.low)
        if name == "__setitem__" and isinstance(args[1], Tensor) and args[1].dtype is torch.bool:
            raise _Decides("entries chosen by a mask")
        if rewrite is not None and (new := rewrite(*args, **kwargs)) is not None:
            return args[0].copy_(new) if name.endswith("_") and not name.startswith("__") else new
        return func(*args, **kwargs)


#: A hyper-parameter that is given switches its term on, whatever its value.
_ANSWERS = {"__ne__": True, "ne": True, "__gt__": True, "gt": True, "__eq__": False, "eq": False} | {
    "__le__": False,
    "__lt__": False,
}


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _times(factor: Any, value: Any) -> Any:
    return value if not isinstance(factor, Tensor) and factor == 1 else factor * value


def _add(x: Tensor, y: Any, *, alpha: Any = 1, **rest: Any) -> Tensor | None:
    return x + alpha * y if isinstance(alpha, Tensor) and not rest else None


def _sub(x: Tensor, y: Any, *, alpha: Any = 1, **rest: Any) -> Tensor | None:
    return x - alpha * y if isinstance(alpha, Tensor) and not rest else None


def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1, **rest: Any) -> Tensor | None:
    return x + value * (a * b) if isinstance(value, Tensor) and not rest else None


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1, **rest: Any) -> Tensor | None:
    return x + value * (a / b) if isinstance(value, Tensor) and not rest else None


def _lerp(x: Tensor, end: Tensor, weight: Any, **rest: Any) -> Tensor | None:
    return x + weight * (end - x) if isinstance(weight, Tensor) and not rest else None


def _full_like(x: Tensor, fill_value: Any, **rest: Any) -> Tensor | None:
    return torch.zeros_like(x, **rest) + fill_value if isinstance(fill_value, Tensor) else None


def _addmm(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1, **rest: Any) -> Tensor | None:
    if rest or not (isinstance(beta, Tensor) or isinstance(alpha, Tensor)):
        return None
    return _times(beta, x) + _times(alpha, a @ b)


def _clamp(x: Tensor, min: Any = None, max: Any = None, **rest: Any) -> Tensor | None:
    if rest or not (isinstance(min, Tensor) or isinstance(max, Tensor)):
        return None
    low = x if min is None else torch.maximum(x, _like(min, x))
    return low if max is None else torch.minimum(low, _like(max, x))


def _like(value: Any, x: Tensor) -> Tensor:
    return torch.zeros_like(x) + value


#: Torch has no others that make new tensors of these, by their in-place names.
_ALIASES = {"absolute_", "clip_", "divide_", "multiply_", "negative_", "square_", "subtract_", "true_divide_"}
_REWRITES: dict[str, Callable[..., Tensor | None]] = {
    "add": _add,
    "sub": _sub,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "full_like": _full_like,
    "addmm": _addmm,
    "clamp": _clamp,
    "clip": _clamp,
}


def _extreme(name: str) -> Callable[..., Any]:
    """Python's `min` or `max`, for tensors as well."""
    python, of_two = getattr(builtins, name), getattr(torch, f"{name}imum")

    def extreme(*args: Any, **options: Any) -> Any:
        values = list(args[0]) if len(args) == 1 else list(args)
        if options or not any(isinstance(v, Tensor) for v in values):
            return python(*args, **options)
        like = next(v for v in values if isinstance(v, Tensor))
        tensors = [v if isinstance(v, Tensor) else torch.full_like(like, v) for v in values]
        return functools.reduce(of_two, tensors)

    return extreme


def _of_tensors(name: str) -> Callable[..., Any]:
    """A function of Python's `math`, for tensors as well."""
    of_numbers, of_tensors = getattr(math, name), getattr(torch, name)
    return lambda *args: (of_tensors if any(isinstance(a, Tensor) for a in args) else of_numbers)(*args)


_MATH = ("ceil", "cos", "exp", "floor", "log", "pow", "sin", "sqrt", "tanh")
_SHIMS = [(builtins, name, _extreme(name)) for name in ("min", "max")]
_SHIMS += [(math, name, _of_tensors(name)) for name in _MATH]


@contextmanager
def _shims() -> Iterator[None]:
    """While a step is captured, some functions of Python take tensors; numbers they take as before."""
    before = [(module, name, getattr(module, name)) for module, name, _ in _SHIMS]
    try:
        for module, name, function in _SHIMS:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
