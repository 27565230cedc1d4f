"""Classes that tell of the attributes of their instances that are read and written, while a function is captured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import nn

from .surroundings import is_python_class

_MISSING = object()
_lock = threading.RLock()
_captures = 0  # under way, in all threads: the last of them lets the classes be as they were
_changed: dict[type, dict[str, Any]] = {}


class Listener(Protocol):
    """Who is told, just before it happens."""

    def attribute(self, o: Any, name: str) -> None:
        """An attribute of ``o`` is read."""

    def wrote(self, o: Any, name: str) -> None:
        """An attribute of ``o`` is written."""


_listener: ContextVar[Listener | None] = ContextVar("metaoptim_listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have ``listener`` told of what the calling thread does inside the block."""
    global _captures
    with _lock:
        _captures += 1
        watch(nn.Module)
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
        with _lock:
            _captures -= 1
            if not _captures:
                _release()


def watch(cls: type) -> None:
    """Have a class tell, until the last capture is over."""
    with _lock:
        inherits = cls is not nn.Module and issubclass(cls, nn.Module)
        if inherits or cls in _changed or not is_python_class(cls):
            return
        own = {name: vars(cls).get(name, _MISSING) for name in ("__getattribute__", "__setattr__")}
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

        try:
            type.__setattr__(cls, "__getattribute__", get)  # whatever the metaclass thinks of it
        except TypeError:  # it is of an extension module (pybind11), whose classes cannot be changed
            return
        _changed[cls] = own
        type.__setattr__(cls, "__setattr__", put)


def _release() -> None:
    for cls, own in reversed(_changed.items()):
        for name, value in own.items():
            if value is _MISSING:
                type.__delattr__(cls, name)
            else:
                type.__setattr__(cls, name, value)
    _changed.clear()
