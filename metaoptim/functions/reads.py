"""What a captured function has read by way of objects: attributes, globals of functions it calls, their closures.

While it is captured, the classes of the objects it is given tell of every attribute that is read, and Python of every
function that is entered. Each place is looked at before the function can have changed it, and again in later calls.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.compiler.compat import FakeTensor

from ..optim.optimizer import MetaOptimizer
from .guards import MISSING, Dependencies, Fact, ReadAt, dict_of, look
from .surroundings import (
    argument_names,
    contents,
    global_names,
    imports,
    is_library,
    is_python_class,
    only_counts,
    surroundings,
    texts,
)

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_METHODS = (types.FunctionType, staticmethod, classmethod)
_FIELDS = (types.MemberDescriptorType, types.GetSetDescriptorType)  # of slots, of classes in C
# Described with the module; of an RNN's lists of its parameters, the parameters are.
_OF_MODULES = {*vars(nn.Module()), "_compiled_call_impl", "_flat_weights", "_flat_weight_refs"}
_LRU: type = type(functools.lru_cache(lambda: None))
_WHOLE = ("__dict__", "__reduce_ex__", "__getstate__")  # by them, all attributes are read


class _Glance(Dependencies):
    """What a place held when it was read, but for what is inside modules, optimizers and tensors: they change."""

    def __init__(self, reads: Reads) -> None:
        super().__init__(named=True)
        self.reads, self.symbolic = reads, False

    def _again(self, value: Any, path: str) -> bool:
        self.reads.know(value, path)
        return super()._again(value, path)

    def _tensor(self, t: Any, path: str) -> None:
        self.symbolic = self.symbolic or isinstance(t, FakeTensor)
        self.object(t, "tensor", path)

    def module(self, module: nn.Module, path: str) -> None:
        self.object(module, "module", path)

    def optimizer(self, optimizer: Any, path: str) -> None:
        self.object(optimizer, "optimizer", path)
        for i, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if isinstance(value, nn.Module):
                    self.reads.know(value, f"{path}.param_groups[{i}][{key!r}]")


@dataclass
class _Noted:
    """A place that was read: what holds it, what was there, and whether what was read has only been counted up."""

    place: ReadAt
    holder: Any
    facts: tuple[Fact, ...]
    counts: bool


class Reads:
    """Watches one capture of ``fn`` on these arguments, as a step of ``window`` if there is one."""

    def __init__(self, fn: Callable, args: tuple, kwargs: dict[str, Any], window: Any = None) -> None:
        self.dependencies = Dependencies.of_call(fn, args, kwargs, window, named=True)  # until `settle`
        self.key = self.dependencies.key  # what the call depends on by itself
        # facts, each by a key of its own, and what they are about
        self.told: dict[Any, tuple[str, Fact]] = {}
        self.places: list[ReadAt] = []  # where the capture has read, once that is settled
        self.found: list[tuple[Fact, ...]] = []  # the facts that were there
        self._noted: dict[tuple[int, str], _Noted] = {}
        self._written: set[tuple[int, str]] = set()
        self._known: dict[int, tuple[Any, str]] = {}
        self._entered: dict[int, types.CodeType] = {}
        self._inner: set[int] = set()  # code of functions that are made while the function runs
        self._closed: set[int] = set()  # code of functions whose closures are described
        self._watches = self._busy = False
        glance = _Glance(self)
        named = zip(argument_names(fn, args), args, strict=True)
        for path, value in (*named, *kwargs.items(), *surroundings(fn)):
            glance.describe(value, path)
        while isinstance(fn, functools.partial):
            fn = fn.func
        fn = getattr(fn, "__func__", fn)
        self._own, code = getattr(fn, "__globals__", None), getattr(fn, "__code__", None)
        self._given = () if code is None else global_names(code)

    # -- what is known before ------------------------------------------------------------------------------------

    def know(self, value: Any, path: str) -> None:
        """``value`` was there before the capture: what is read of it counts."""
        if id(value) in self._known or isinstance(value, (Tensor, MetaOptimizer, logging.Logger)):
            return
        self._known[id(value)] = value, path
        if isinstance(value, nn.Module):
            for name, inner in value.named_modules():
                self._known.setdefault(id(inner), (inner, f"{path}.{name}" if name else path))
        elif isinstance(value, types.FunctionType):
            self._closed.add(id(value.__code__))
        elif isinstance(value, _LRU):
            inner = getattr(value, "__wrapped__", None)  # what it has found before does not run it
            if isinstance(inner, types.FunctionType):
                self._globals(inner.__code__, inner.__globals__)
                self._note("object", inner, "", path)
        elif self._watches and not isinstance(value, type):
            _watch(type(value))

    def meet(self, value: Any, path: str) -> None:
        """An object that the function depends on, however it came by it."""
        self._note("object", value, "", path)

    # -- what is read --------------------------------------------------------------------------------------------

    def _note(self, kind: str, holder: Any, name: str, path: str, counts: bool = False) -> None:
        key = (id(holder), name)
        if key in self._noted:
            self._noted[key].counts &= counts
        elif key not in self._written:
            place, glance = ReadAt(kind, holder, name, path), _Glance(self)
            busy, self._busy = self._busy, True
            try:
                place.describe(glance)
            finally:
                self._busy = busy
            if not glance.symbolic:
                self._noted[key] = _Noted(place, holder, glance.key, counts)

    def attribute(self, o: Any, name: str) -> None:
        """An attribute of ``o`` is about to be read."""
        noted = self._noted.get((id(o), name))
        if self._busy or (noted is not None and not noted.counts) or id(o) not in self._known:
            return
        frame = sys._getframe(2)
        if name[:2] == "__":
            if name in _WHOLE and frame.f_globals.get("__name__") != "torch.nn.modules.module":
                self._note("names", o, "", f"the attributes of {self._known[id(o)][1]}")
                for each in list(dict_of(o)):
                    self.attribute(o, each)
            return
        of_module = isinstance(o, nn.Module)
        if of_module and name in _OF_MODULES:
            return
        path = f"{self._known[id(o)][1]}.{name}"
        own = dict_of(o)
        if name not in own:
            for cls in type(o).__mro__:
                if name in vars(cls):
                    self._of_class(cls, vars(cls)[name], o, name, path)
                    return
            if of_module and any(name in own[kind] for kind in ("_parameters", "_buffers", "_modules")):
                return
        self._note("attribute", o, name, path, only_counts(frame.f_code, frame.f_lasti, name))

    def _of_class(self, cls: type, value: Any, o: Any, name: str, path: str) -> None:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, (types.FunctionType, property)):
            if not is_library(cls.__module__):
                self._note("class", cls, name, path)
                if isinstance(value, types.FunctionType):
                    self._note("own", o, name, path)  # one object may get a method of its own
        elif isinstance(value, _FIELDS) or not hasattr(type(value), "__get__"):
            self._note("attribute", o, name, path)

    def wrote(self, o: Any, name: str) -> None:
        """An attribute of ``o`` is about to be written."""
        if not self._busy and (id(o), name) not in self._noted and id(o) in self._known:
            self._written.add((id(o), name))

    # -- what is entered -----------------------------------------------------------------------------------------

    def _trace(self, previous: Any) -> Callable:
        def trace(frame: types.FrameType, event: str, arg: Any) -> Any:
            code = frame.f_code
            if id(code) not in self._entered:
                self._entered[id(code)] = code
                if not is_library(frame.f_globals.get("__name__")):
                    self._enter(frame)
            return None if previous is None else previous(frame, event, arg)

        return trace

    def _enter(self, frame: types.FrameType) -> None:
        code, stack = frame.f_code, [frame.f_code]
        while stack:
            for constant in stack.pop().co_consts:
                if isinstance(constant, types.CodeType):
                    self._inner.add(id(constant))
                    stack.append(constant)
        self._globals(code, frame.f_globals)
        if code.co_varnames and ("__class__" in code.co_names or "type" in code.co_names):
            self._class(type(frame.f_locals.get(code.co_varnames[0])), code)
        for value in list(frame.f_locals.values()):
            if isinstance(value, type):
                self._class(value, code)
        if code.co_freevars and id(code) not in self._inner and id(code) not in self._closed:
            for fn in gc.get_referrers(code):
                if isinstance(fn, types.FunctionType) and fn.__code__ is code:
                    for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
                        if name != "__class__" and contents(cell) is frame.f_locals.get(name):
                            self._note("cell", cell, "", name)

    def _globals(self, code: types.CodeType, names: dict[str, Any]) -> None:
        met: set[int] = set()
        for name in (*global_names(code), *texts(code, "globals")):
            value = names.get(name, MISSING)
            if isinstance(value, (types.ModuleType, type)):
                self._whole(value, code, name, met)
            elif value is MISSING or (names is self._own and name in self._given):
                continue  # told by itself
            elif not isinstance(value, _FUNCTIONS) or not is_library(value.__module__):
                self._note("global", names, name, name)
        for module in imports(code, names):
            self._whole(module, code, module.__name__, met)

    def _whole(self, value: types.ModuleType | type, code: types.CodeType, path: str, met: set[int]) -> None:
        """Code refers to a module or a class: of it, it may read what it has names for. Modules refer in circles."""
        if isinstance(value, type):
            self._class(value, code)
        elif id(value) not in met and not is_library(value.__name__):
            met.add(id(value))
            for name in (*code.co_names, *texts(code, "getattr")):
                inner = vars(value).get(name, MISSING)
                if not isinstance(inner, (types.ModuleType, type)):
                    if inner is not MISSING:
                        self._note("global", vars(value), name, f"{path}.{name}")
                else:
                    self._whole(inner, code, f"{path}.{name}", met)

    def _class(self, cls: type, code: types.CodeType) -> None:
        if is_library(cls.__module__):
            return
        for owner in (type(cls), *cls.__mro__):  # super() finds what cls hides
            if is_library(owner.__module__):
                continue
            for name in code.co_names:
                value = vars(owner).get(name, MISSING)
                if value is MISSING or name[:2] == "__":
                    continue
                if isinstance(value, _METHODS) or not hasattr(type(value), "__get__"):
                    self._note("class", owner, name, f"{owner.__qualname__}.{name}")

    # -- at work -------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what the calling thread reads inside the block."""
        global _captures
        previous, token = sys.gettrace(), _listener.set(self)
        with _lock:
            if not _captures:  # of any thread: torch has one stance for all
                # modules under torch.compile run eagerly here; dynamo must not look into what reports their reads
                _as_before.enter_context(torch.compiler.set_stance("force_eager"))
            _captures += 1
        try:
            self._watches = True
            _watch(nn.Module)
            for value, _ in list(self._known.values()):
                if not isinstance(value, type):
                    _watch(type(value))
            sys.settrace(self._trace(previous))
            try:
                yield
            finally:
                sys.settrace(previous)
        finally:
            self._watches = False
            _listener.reset(token)
            with _lock:
                _captures -= 1
                if not _captures:
                    _as_before.close()
                    _watched.clear()

    def settle(self, dependencies: Dependencies) -> None:
        """The capture is over: fill `places`, `found` and `told`, and extend ``dependencies`` by what is there now."""
        named = self.dependencies
        assert named.paths is not None
        self.told.update(enumerate(zip(named.paths, named.facts, strict=True)))
        for noted in self._noted.values():
            if noted.counts:
                continue
            place, before, glance, mark = noted.place, noted.facts, _Glance(self), len(named.paths)
            place.describe(glance)
            place.describe(named)
            # what the function has changed itself counts as it was before; it will be captured anew
            facts = next(look(dependencies, [place])) if glance.key == before else before
            self.places.append(place)
            self.found.append(facts)
            told = zip(named.paths[mark:], facts, strict=False)
            self.told.update(((place.identity, k), fact) for k, fact in enumerate(told))
        del self.dependencies  # from here on it keeps nothing alive
        self._noted.clear()
        self._known.clear()


# -- classes that tell of the attributes of their instances -----------------------------------------------------------

_listener: ContextVar[Reads | None] = ContextVar("metaoptim_listener", default=None)
_lock = threading.RLock()
_captures = 0  # under way, in all threads: the last of them lets the classes be as they were
_watched: set[type] = set()
_as_before = ExitStack()


def _watch(cls: type) -> None:
    """Have a class tell what is read and written, just before, until the last capture is over."""
    with _lock:
        inherits = cls is not nn.Module and issubclass(cls, nn.Module)
        if inherits or cls in _watched or not is_python_class(cls):
            return
        read: Any = cls.__getattribute__
        write: Any = cls.__setattr__

        def get(self: Any, name: str) -> Any:
            listener = _listener.get()
            if listener is not None:
                listener.attribute(self, name)
            return read(self, name)

        def put(self: Any, name: str, value: Any) -> None:
            listener = _listener.get()
            if listener is not None:
                listener.wrote(self, name)
            write(self, name, value)

        for name, method in (("__getattribute__", get), ("__setattr__", put)):
            own = vars(cls).get(name, MISSING)
            try:
                type.__setattr__(cls, name, method)  # whatever the metaclass thinks of it
            except TypeError:  # it is of an extension module (pybind11), whose classes cannot be changed
                return
            if own is MISSING:
                _as_before.callback(type.__delattr__, cls, name)
            else:
                _as_before.callback(type.__setattr__, cls, name, own)
        _watched.add(cls)
