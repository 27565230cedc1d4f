"""What a compiled function depends on: its arguments and what it closes over, as a key and a list of tensors."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from .compiler.ambient import ambient
from .errors import CaptureError
from .optim.optimizer import MetaOptimizer

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice)
_OPTIONS = {int, float, bool, str, tuple, torch.dtype}


def _exact(value: Any) -> tuple:
    """Equal for plain values alike to the last bit: 1 is not True, -0.0 is not 0.0."""
    return type(value), repr(value) if isinstance(value, (float, tuple)) else value


class Scene:
    """One look at everything a call depends on.

    Attributes:
        key: equal for two calls that one program serves.
        tensors: those found, in the order they are met; the same order for equal keys.
        objects: what the key knows by identity.

    Args:
        fn: the function.
        args: of the call.
        kwargs: of the call.
        own: (id of a module, name) of attributes that the function itself writes, such as a counter: they count not.
    """

    def __init__(
        self, fn: Callable, args: tuple, kwargs: dict[str, Any], own: Collection[tuple[int, str]] = ()
    ) -> None:
        self._own = own
        self._attributes: list[tuple[nn.Module, tuple]] = []  # plain values that modules hold
        self.tensors: list[Tensor] = []
        self.objects: list[Any] = []
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []
        described = [self._describe(args), self._describe(kwargs)]
        described += [(name, self._describe(value)) for name, value in surroundings(fn)]
        self.key: Any = (tuple(described), ambient())

    def place_of(self) -> dict[int, int]:
        """Id of a tensor -> its place in `tensors`."""
        return {id(t): i for i, t in reversed(list(enumerate(self.tensors)))}

    def remembered(self) -> list[Any]:
        """References to `objects` that do not keep them alive where that can be had."""
        found = []
        for o in self.objects:
            try:
                found.append(weakref.ref(o))
            except TypeError:
                found.append(lambda o=o: o)
        return found

    def _describe(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, float):
            return ("float", value.hex())  # -0.0 is not 0.0, and nan is nan
        if isinstance(value, _PLAIN):
            return (type(value).__name__, str(value) if isinstance(value, slice) else value)
        if isinstance(value, (list, tuple, dict)):
            at = self._seen.get(id(value))
            if at is not None:
                return ("again", at)
            self._mark(value)
            if isinstance(value, dict):
                return ("dict", tuple((self._describe(k), self._describe(v)) for k, v in value.items()))
            return (type(value).__name__, tuple(self._describe(v) for v in value))
        at = self._seen.get(id(value))
        if at is not None:
            return ("again", at)
        self._mark(value)
        self.objects.append(value)
        if isinstance(value, nn.Module):
            return ("module", id(value), tuple(self._module(value)))
        if isinstance(value, MetaOptimizer):
            return ("optimizer", id(value), tuple(self._optimizer(value)))
        return ("object", id(value))

    def _mark(self, value: Any) -> None:
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)  # or another might get its id

    def _tensor(self, t: Tensor) -> tuple:
        if isinstance(t, FakeTensor):
            raise CaptureError(
                f"a symbolic tensor of shape {tuple(t.shape)} is among what the compiled function depends on: an "
                "earlier capture has stored it in a list, a dict or an attribute. Return it from the function instead"
            )
        if is_lazy(t):
            raise CaptureError(
                "a parameter or buffer of a lazy module has no shape yet, which a compiled function must know; run the "
                "network once before, under torch.no_grad()"
            )
        at = self._seen.get(id(t))
        if at is not None:
            return ("again", at)
        self._mark(t)
        self.tensors.append(t)
        stride = t.stride() if t.layout is torch.strided else ()
        hooks = list((t._backward_hooks or {}).values()) if isinstance(t, nn.Parameter) else []
        self.objects += hooks  # they act on inner gradients
        return ("tensor", t.shape, t.dtype, stride, t.device, t.requires_grad, tuple(map(id, hooks)))

    def _module(self, module: nn.Module) -> Iterator[Any]:
        for m in module.modules():
            yield m.training
            yield self._kind(m)
            for tensors in (m._parameters, m._buffers):
                for t in tensors.values():
                    if t is not None:
                        yield self._tensor(t)

    def _kind(self, m: nn.Module) -> tuple:
        """What a module runs: its class, its hooks, and its attributes that are plain values."""
        own = vars(m)
        acting: list[Any] = []
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or "forward" in own:
            acting += [
                *m._forward_pre_hooks.values(),
                *m._forward_hooks.values(),
                *m._backward_hooks.values(),
            ]
            acting.append(own.get("forward"))
            self.objects += acting
        plain = tuple([(k, _exact(v)) for k, v in own.items() if type(v) in _OPTIONS and k[0] != "_"])
        self._attributes.append((m, plain))
        if self._own:
            plain = tuple([p for p in plain if (id(m), p[0]) not in self._own])
        return ("kind", type(m), tuple(map(id, acting)), plain)

    def written(self) -> set[tuple[int, str]]:
        """Attributes of modules that have changed since: `own` ones of the function, if it has just run."""
        return {(id(m), k) for m, plain in self._attributes for k, v in plain if _exact(vars(m).get(k)) != v}

    def _optimizer(self, optimizer: MetaOptimizer) -> Iterator[Any]:
        yield optimizer.first_order
        yield self._describe(optimizer._normalizer)
        for group in optimizer.param_groups:
            yield tuple((k, self._describe(v)) for k, v in group.items() if k != "params")
            for p in group["params"]:
                yield self._tensor(p)
                for name, value in optimizer.state.get(p, {}).items():
                    yield name, self._describe(value)


def surroundings(fn: Callable) -> Iterator[tuple[str, Any]]:
    """What a function refers to directly: its free variables, its globals and its defaults."""
    while isinstance(fn, functools.partial):
        yield "arguments", (fn.args, fn.keywords)
        fn = fn.func
    if isinstance(fn, types.MethodType):
        yield "self", fn.__self__
        fn = fn.__func__
    code = getattr(fn, "__code__", None)
    if code is None:
        return
    yield "defaults", (getattr(fn, "__defaults__", None), getattr(fn, "__kwdefaults__", None))
    for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for name in _names(code):
        value = fn.__globals__.get(name)
        if value is not None and not isinstance(value, (types.ModuleType, type)):
            yield name, value


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
