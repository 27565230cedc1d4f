"""What a compiled function depends on: flat facts, equal for calls that one program serves, and a list of tensors.

The facts are about the arguments and surroundings of the function, and about places that its capture has read.
"""

from __future__ import annotations

import array
import enum
import functools
import io
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metaoptim.compiler.compat import FakeTensor

from ..compiler.lower.ambient import ambient
from ..errors import CaptureError
from ..optim.optimizer import MetaOptimizer
from ..runtime.engine.nodes import InnerParameter
from ..runtime.windows.updates.hyper import COUNT
from ..runtime.windows.updates.schedule import Schedule
from ..runtime.windows.updates.transform import Transform
from .surroundings import argument_names, contents, is_library, is_python_class, reference, surroundings

Fact = tuple[Any, ...]
Source = int | Tensor  # the place of a tensor among `Dependencies.tensors`, or the very tensor

_OF_TORCH = {torch.dtype, torch.device, torch.Size, torch.layout}
_ATOMS = {int, bool, str, bytes, type(None), range, type(...)} | _OF_TORCH
MISSING = object()
_USUAL = {Tensor, nn.Parameter, InnerParameter}


class Dependencies:
    """One look at everything a call depends on; ``named``: with `paths`, which take time."""

    def __init__(self, named: bool = False) -> None:
        self.facts: list[Fact] = []  # equal for two calls that one program serves
        self.paths: list[str] | None = [] if named else None  # what each is about, as the caller calls it
        self.tensors: list[Tensor] = []  # in the order they are met; the same order for equal facts
        self.objects: list[Any] = []  # what the facts know by identity
        self._seen: dict[int, tuple[int, Any]] = {}  # held, or another might get its id
        # networks of optimizers, which may have better names
        self._late: list[tuple[nn.Module, str]] | None = None

    @classmethod
    def of_call(
        cls, fn: Callable, args: tuple, kwargs: dict[str, Any], window: Any = None, named: bool = False
    ) -> Dependencies:
        """What a call of ``fn`` depends on, inside an ordinary window or outside of one."""
        dependencies = cls(named)
        try:
            dependencies._describe_call(fn, args, kwargs, window)
        except CaptureError:
            if not named:
                cls.of_call(fn, args, kwargs, window, named=True)  # raises it with the place of what is wrong
            raise
        return dependencies

    def _describe_call(self, fn: Callable, args: tuple, kwargs: dict[str, Any], window: Any) -> None:
        self._late, named = [], self.paths is not None
        self.fact("the call", ("is", "outside any window" if window is None else "inside a window"))
        if window is not None:
            hooked = "without" if window.options.backward_hook is None else "with"
            order = ", gradient='first_order'" if window.options.first_order else ""
            self.fact("the window", ("is", f"{hooked} a backward_hook{order}"))
        for path, mode in ambient().items():
            self.fact(path, ("mode", mode))
        labels = argument_names(fn, args) if named else ()
        self.fact("the number of positional arguments", (int, len(args)))
        for i, value in enumerate(args):
            self.describe(value, labels[i] if labels else "")
        self.fact("the keyword arguments", ("keys", tuple(kwargs)))
        for name, value in kwargs.items():
            self.describe(value, name if named else "")
        for name, value in surroundings(fn):
            self.fact("what the function refers to", ("name", name))
            self.describe(value, name if named else "")
        late, self._late = self._late, None
        for network, path in late:
            self.describe(network, path)

    @property
    def key(self) -> tuple[Fact, ...]:
        """The facts."""
        return tuple(self.facts)

    def sources(self) -> Callable[[Tensor], Source]:
        """What tells the source of a tensor."""
        at = {id(t): i for i, t in reversed(list(enumerate(self.tensors)))}
        return lambda t: at.get(id(t), t)

    def tensor(self, source: Source) -> Tensor:
        """The tensor of this call behind a source."""
        return self.tensors[source] if isinstance(source, int) else source

    def remembered(self) -> list[Any]:
        """References to `objects`."""
        return list(map(reference, self.objects))

    def mark(self) -> tuple[int, ...]:
        """How far it has come, for `back_to`."""
        return len(self.facts), len(self.tensors), len(self.objects), len(self._seen)

    def back_to(self, mark: tuple[int, ...]) -> None:
        """Forget what was described since."""
        facts, tensors, objects, seen = mark
        del self.facts[facts:], self.tensors[tensors:], self.objects[objects:]
        if self.paths is not None:
            del self.paths[facts:]
        while len(self._seen) > seen:
            self._seen.popitem()

    def fact(self, path: str, fact: Fact) -> None:
        """Note one."""
        self.facts.append(fact)
        if self.paths is not None:
            self.paths.append(path)

    def describe(self, value: Any, path: str = "") -> None:
        """Note all that ``value`` is."""
        kind = type(value)
        if kind in _USUAL:
            if not self._again(value, path):
                self._tensor(value, path)
        elif kind in _ATOMS:
            self.fact(path, (kind, value))
        elif kind is float:
            self.fact(path, (kind, value.hex()))  # -0.0 is not 0.0, and nan is nan
        elif kind is slice or kind is complex:
            self.fact(path, (kind, repr(value)))
        elif isinstance(value, enum.Enum):
            self.fact(path, (kind, value.name))
        elif not self._again(value, path):
            if isinstance(value, Tensor):
                self._tensor(value, path)
            else:
                self._compound(value, kind, path)

    def _again(self, value: Any, path: str) -> bool:
        known = self._seen.get(id(value))
        if known is not None:
            self.fact(path, ("again", known[0]))
            return True
        self._seen[id(value)] = len(self._seen), value
        return False

    def _compound(self, value: Any, kind: type, path: str) -> None:
        if isinstance(value, (dict, types.MappingProxyType)):
            self._dict(value, path)
        elif isinstance(value, (list, tuple, deque)):
            self.fact(f"the length of {path}" if path else "", (kind, len(value)))
            for i, v in enumerate(value):
                self.describe(v, path and f"{path}[{i}]")
        elif isinstance(value, (set, bytearray)):
            self.fact(path, (kind, frozenset(value) if isinstance(value, set) else bytes(value)))
        elif isinstance(value, nn.Module):
            self.module(value, path)
        elif isinstance(value, MetaOptimizer):
            self.optimizer(value, path)
        elif isinstance(value, (Transform, Schedule)):
            self.fact(path, (kind,))
            self._dict(vars(value), path, "{}.{}")
        elif isinstance(value, types.FunctionType):
            self._function(value, path)
        elif isinstance(value, types.MethodType):
            self.describe(value.__func__, path)
            self.describe(value.__self__, path and f"{path}.__self__")
        elif isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                self.describe(getattr(value, name), path and f"{path}.{name}")
        elif isinstance(value, weakref.ref):
            self.describe(value(), path and f"{path}()")
        elif isinstance(value, (type, types.ModuleType)):
            self.object(value, "object", path)
        else:
            self._other(value, kind, path)

    def _other(self, value: Any, kind: type, path: str) -> None:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray):
            self.fact(path, (kind, value.dtype.str, value.shape, hash(value.tobytes())))
        elif isinstance(value, random.Random) or (
            numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))
        ):
            raise CaptureError(
                f"{path or 'what a compiled function depends on'} is a random generator ({kind.__name__}), whose "
                "numbers would be the same in every call. Draw them outside and pass them in (torch.rand and the like "
                "inside are fine)"
            )
        elif is_python_class(kind):
            self.object(value, "object", path)
        elif hasattr(kind, "__next__") and not isinstance(value, io.IOBase):
            raise CaptureError(
                f"{path or 'what a compiled function depends on'} is an iterator ({kind.__name__}), which would move "
                "on when the function is captured and never again. Call next() outside and pass what it gives"
            )
        elif isinstance(getattr(value, "__dict__", None), dict):  # a SimpleNamespace
            self._dict(vars(value), path, "{}.{}")
        elif isinstance(value, (memoryview, array.array)):
            self.fact(path, (kind, value.tobytes()))
        elif kind.__eq__ is not object.__eq__ and _is_hashable(value):  # of numpy, a date, a pattern
            self.fact(path, (kind, value))
        else:
            self.object(value, "object", path)

    def object(self, value: Any, kind: str, path: str) -> None:
        """Note which object it is."""
        self.objects.append(value)
        self.fact(path, (kind, id(value)))

    def _dict(self, value: Mapping[Any, Any], path: str, form: str = "{}[{!r}]") -> None:
        keys = tuple([(type(k), k if type(k) in _ATOMS else id(k)) for k in value])
        self.objects += [k for k in value if type(k) not in _ATOMS]
        self.fact(f"the keys of {path}" if path else "", ("keys", keys))
        for k, v in value.items():
            self.describe(v, path and form.format(path, k))

    def _function(self, fn: types.FunctionType, path: str) -> None:
        self.object(fn, "object", path)
        if is_library(fn.__module__):
            return
        self.object(fn.__code__, "object", path)  # reloading puts another one into the same function
        for name in ("__defaults__", "__kwdefaults__", "__dict__"):
            held = getattr(fn, name)
            if held:
                self.describe(held, path and f"{path}.{name}")
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            if name != "__class__":
                self.describe(contents(cell), name)

    def _tensor(self, t: Tensor, path: str) -> None:
        if type(t) not in _USUAL:
            _check_known(t, path)
        self.tensors.append(t)
        stride = t.stride() if t.layout is torch.strided else ()
        hooks: Any = ()
        if (own := t._backward_hooks) and isinstance(t, nn.Parameter):  # they act on inner gradients
            self.objects += own.values()
            hooks = tuple(map(id, own.values()))
        self.fact(path, ("tensor", t.shape, t.dtype, stride, t.device, t.requires_grad, hooks))

    def module(self, module: nn.Module, path: str) -> None:
        """Note which module it is, and of it and each module inside what runs, and its tensors."""
        self.object(module, "module", path)
        self._inside(module, path)

    def _inside(self, m: nn.Module, path: str) -> None:
        acting: tuple = ()
        forward = m.__dict__.get("forward")
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or forward is not None:
            hooks = (m._forward_pre_hooks, m._forward_hooks, m._backward_hooks)
            held = [*(hook for of in hooks for hook in of.values()), forward]
            self.objects += held
            acting = tuple(map(id, held))
        self.fact(path, ("kind", type(m), acting, m.training))
        for tensors in (m._parameters, m._buffers):
            for name, t in tensors.items():
                self.describe(t, path and f"{path}.{name}")
        for name, inner in m._modules.items():
            if inner is not None and not self._again(inner, path and f"{path}.{name}"):
                self._inside(inner, path and f"{path}.{name}")

    def optimizer(self, optimizer: MetaOptimizer, path: str) -> None:
        """Note which optimizer it is, its hyper-parameters, the state it has, and its networks."""
        self.object(optimizer, "optimizer", path)
        self.describe(optimizer.first_order, path and f"{path}.first_order")
        self.describe(optimizer.transforms, path and f"{path}.transforms")
        self.fact(path and f"what {path}'s update reads", ("reads", optimizer.reads()))
        self.describe(dict(optimizer.state.get(COUNT, {})), path and f"{path}'s count of steps")
        names: dict[int, str] = {}
        if path:
            names = {id(p): n for net in optimizer.networks for n, p in net.named_parameters()}
        for i, group in enumerate(optimizer.param_groups):
            whole = path and f"{path}.param_groups[{i}]"
            self.fact(whole and f"the keys of {whole}", ("keys", tuple(group)))
            for key, value in group.items():
                if key != "params":
                    self.describe(value, whole and f"{whole}[{key!r}]")
            for k, p in enumerate(group["params"]):
                label = path and names.get(id(p), f"param_groups[{i}]['params'][{k}]")
                self.describe(p, path and f"{path}'s parameter {label}")
                state = optimizer.state.get(p, {})
                self.fact(f"{path}'s state of {label}" if path else "", ("keys", tuple(state)))
                for name, value in state.items():
                    self.describe(value, path and f"{path}'s {name} of {label}")
        for k, network in enumerate(optimizer.networks):
            label = path and f"{path}.networks[{k}]"
            if self._late is None:
                self.describe(network, label)
            else:
                self._late.append((network, label))


def _check_known(t: Tensor, path: str) -> None:
    """Raise for a tensor that says nothing of the calls to come."""
    if isinstance(t, FakeTensor):
        raise CaptureError(
            f"{path + ': ' if path else ''}a symbolic tensor of shape {tuple(t.shape)} is among what the compiled "
            "function depends on: an earlier capture has stored it in a list, a dict or an attribute. Return it from "
            "the function instead"
        )
    if is_lazy(t):
        raise CaptureError(
            "a parameter or buffer of a lazy module has no shape yet, which a compiled function must know; run the "
            "network once before, under torch.no_grad()"
        )


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


# -- places -----------------------------------------------------------------------------------------------------------


class ReadAt:
    """Where something was read: an attribute, a name in a dict of globals, a closure's variable; or an object."""

    __slots__ = ("kind", "holder", "name", "path")

    def __init__(self, kind: str, holder: Any, name: str, path: str) -> None:
        self.kind, self.name, self.path = kind, name, path
        self.holder: Any = holder if kind in ("global", "cell") else reference(holder)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two places that are one."""
        return self.kind, id(self.holder) if self.kind in ("global", "cell") else id(self.holder()), self.name

    def value(self) -> Any:
        """What is there now."""
        if self.kind == "global":
            return self.holder.get(self.name, MISSING)
        if self.kind == "cell":
            return contents(self.holder)
        holder = self.holder()
        if self.kind == "own":
            return dict_of(holder).get(self.name, MISSING)
        if self.kind == "names":
            return tuple(dict_of(holder))
        if self.kind == "attribute":
            try:
                return object.__getattribute__(holder, self.name)
            except AttributeError:
                return MISSING
        return getattr(holder, self.name, MISSING) if self.kind == "class" else holder

    def describe(self, dependencies: Dependencies) -> None:
        """Extend ``dependencies`` by what is there now."""
        value = self.value()
        if value is MISSING:
            dependencies.fact(self.path, ("missing",))
        else:
            dependencies.describe(value, self.path)


def look(dependencies: Dependencies, places: Sequence[ReadAt]) -> Iterator[tuple[Fact, ...]]:
    """What is at each of the places now, as facts; ``dependencies`` is extended by them."""
    for place in places:
        before = len(dependencies.facts)
        place.describe(dependencies)
        yield tuple(dependencies.facts[before:])


def dict_of(o: Any) -> dict[str, Any]:
    """The attributes that an object has by itself."""
    try:
        return object.__getattribute__(o, "__dict__")
    except AttributeError:  # it has slots
        return {}
