"""Which guard failed: the first difference between two looks at what a compiled function depends on, by its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .guards import Fact

_TENSOR_FIELDS = ("shape", "dtype", "strides", "device", "requires_grad")
_OBJECTS = ("module", "optimizer", "object")


class Change:
    """One difference.

    Attributes:
        where: what changed, by the name it has for the caller.
        what: from what to what.
        value: whether it is a plain Python value that another call may change again.
    """

    def __init__(self, where: str, what: str, value: bool = False) -> None:
        self.where, self.what, self.value = where, what, value

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"

    @property
    def advice(self) -> str:
        """What to do about it, if it happens at every call."""
        if self.value:
            return (
                "Python values are part of what is compiled. Pass a number that changes as a tensor "
                "(torch.tensor(value)), or keep it out of the compiled function"
            )
        return "Every kind of arguments is compiled once: pass the same objects and shapes again, or pad to few shapes"


def first_change(old: Sequence[Fact], new: Sequence[Fact], paths: Iterable[str]) -> Change | None:
    """The first of the facts that differs; ``paths`` says what the new ones are about."""
    for a, b, path in zip(old, new, paths, strict=False):
        if a != b:
            return _change(path, a, b)
    return None


def _change(path: str, a: Fact, b: Fact) -> Change:
    if a[0] == b[0] == "tensor":
        field = next(i for i, (x, y) in enumerate(zip(a[1:], b[1:], strict=True)) if x != y)
        if field >= len(_TENSOR_FIELDS):
            return Change(path, "has other hooks than before")
        return Change(path, f"{_TENSOR_FIELDS[field]} was {_plain(a[1 + field])}, is {_plain(b[1 + field])}")
    if a[0] == b[0] == "kind":
        if a[1] == b[1] and a[3] == b[3]:
            return Change(f"{path}.training", f"was {a[2]}, is {b[2]}", True)
        return Change(path, "its class, or its hooks, are others than before")
    if a[0] == b[0] == "is":
        return Change(path, b[1], True)
    if a[0] == b[0] == "mode":
        return Change(path, f"was {a[1]}, is {b[1]}")
    if a[0] == b[0] == "keys":
        return Change(path, "others than before, or in another order", True)
    if a[0] == b[0] == "name":
        return Change(path, f"was {a[1]}, is {b[1]}")
    if a[0] == b[0] and a[0] in _OBJECTS:
        return Change(path, f"another {a[0]} than before")
    if a[0] is b[0] and path.startswith("the length of "):
        return Change(path, f"was {a[1]}, is {b[1]}", True)
    return Change(path, f"was {_described(a)}, is {_described(b)}", b[0] not in _OBJECTS)


def _described(a: Fact) -> str:
    if a[0] is float:
        return repr(float.fromhex(a[1]))
    if a[0] == "tensor":
        return f"a tensor of shape {tuple(a[1])}"
    if a[0] == "missing":
        return "not there"
    if a[0] in ("again", "keys", *_OBJECTS):
        return {"again": "an object met before", "keys": "a dict", "object": "an object"}.get(
            a[0], f"a {a[0]}"
        )
    if isinstance(a[0], type) and issubclass(a[0], (list, tuple)):
        return f"a {a[0].__name__} of length {a[1]}"
    return repr(a[1]) if len(a) == 2 else "another one"


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, tuple) else str(value)
