"""What the functions of an optimizer's class read besides their arguments: a captured step holds for these values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaoptim.compiler.ir.traces.slices import globals_read, is_of_torch


def surroundings(cls: type) -> tuple[Any, ...]:
    """Numbers, texts and tensors in a class, and in the modules of its functions; those of torch do not change."""
    found: list[Any] = []
    for base in cls.__mro__:
        if base is not object and not is_of_torch(base.__module__):
            for name, value in vars(base).items():
                read = getattr(value, "fget", getattr(value, "__func__", value))
                if callable(read):
                    while read is not None:  # decorators, and what they decorate
                        found += globals_read(read)
                        read = getattr(read, "__wrapped__", None)
                elif not name.startswith("__") and isinstance(value, (int, float, complex, str, bytes)):
                    found.append((base, name, type(value), value))
                elif isinstance(value, Tensor):
                    found.append((base, name, id(value), value._version))
    return tuple(found)
