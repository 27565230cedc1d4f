"""What lets tensors stand where a step of `torch.optim` expects numbers, while it is captured."""

from __future__ import annotations

import builtins
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metaoptim.compiler.capture.intercept import Patches


class Decides(Exception):
    """A step decides in Python by a value."""


class Numbers(TorchFunctionMode):
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
        if name in ("item", "__float__", "__index__", "tolist") and args:
            if name == "item":
                return args[0]
            raise Decides(f"{name} of a tensor")
        if name in _ANSWERS and args and id(args[0]) in self.given and all(map(_is_zero, args[1:])):
            return _ANSWERS[name]
        if name in _ALIASES:
            return args[0].copy_(getattr(torch.Tensor, name[:-1])(*args, **kwargs))
        if name == "bfloat16":
            return args[0].to(self.low)
        if name == "to" and kwargs.get("dtype") is torch.bfloat16:  # as from torch 2.15 on
            kwargs = {**kwargs, "dtype": self.low}
        if name == "__setitem__" and isinstance(args[1], Tensor) and args[1].dtype is torch.bool:
            raise Decides("entries chosen by a mask")
        return func(*args, **kwargs)


#: A hyper-parameter that is given switches its term on, whatever its value.
_ANSWERS = {"__ne__": True, "ne": True, "__gt__": True, "gt": True, "__eq__": False, "eq": False} | {
    "__le__": False,
    "__lt__": False,
    "__bool__": True,
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
    if x.dtype in (torch.bfloat16, torch.float16):  # torch rounds once, at the end
        return (_times(beta, x.float()) + _times(alpha, a.float() @ b.float())).to(x.dtype)
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
            return python(values if len(args) == 1 else args, **options)  # an iterator among args is used up
        like = next(v for v in values if isinstance(v, Tensor))
        tensors = [
            v if isinstance(v, Tensor) else torch.full_like(like, v, dtype=torch.result_type(like, v))
            for v in values
        ]
        return functools.reduce(of_two, tensors)

    return extreme


def _of_tensors(name: str) -> Callable[..., Any]:
    """A function of Python's `math`, for tensors as well."""
    of_numbers, of_tensors = getattr(math, name), getattr(torch, name)
    return lambda *args: (of_tensors if any(isinstance(a, Tensor) for a in args) else of_numbers)(*args)


def _with_tensors(owner: Any, name: str, rewrite: Callable[..., Tensor | None]) -> Callable[..., Any]:
    """An operator of torch, which may be given a tensor where it wants a number."""
    original, wanted = getattr(owner, name), inspect.signature(rewrite)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            wanted.bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)
        new = rewrite(*args, **kwargs)
        if new is None:
            return original(*args, **kwargs)
        return args[0].copy_(new) if name.endswith("_") else new

    return call


_MATH = ("ceil", "cos", "exp", "floor", "log", "pow", "sin", "sqrt", "tanh")
_SHIMS: list[tuple[Any, str, Any]] = [(builtins, name, _extreme(name)) for name in ("min", "max")]
_SHIMS += [(math, name, _of_tensors(name)) for name in _MATH]
_SHIMS += [
    (owner, name, _with_tensors(owner, name, rewrite))
    for known, rewrite in _REWRITES.items()
    for owner in (torch.Tensor, torch)
    for name in (known, f"{known}_")
    if hasattr(owner, name)
]
_patches = Patches(*_SHIMS)


@contextmanager
def shims() -> Iterator[None]:
    """While a step is captured, functions of Python and torch take tensors for numbers; numbers they take as before."""
    _patches.install()
    try:
        yield
    finally:
        _patches.uninstall()
