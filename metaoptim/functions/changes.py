"""Which guard failed: the first difference between two looks at what a compiled function depends on, by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .guards import Fact
from .reads import Reads

_WAS = "{path}: was {old}, is {new}"
_KIND = "{path}: its class, or its hooks, are others than before"
_OBJECTS = {"module": "a module", "optimizer": "an optimizer", "object": "an object"}
#: First entry of two facts -> for each other entry, what to say where it is the first that differs.
_SAID = {
    "tensor": [
        *(
            f"{{path}}: {field} was {{old}}, is {{new}}"
            for field in ("shape", "dtype", "strides", "device", "requires_grad")
        ),
        "{path}: has other hooks than before",
    ],
    "kind": [_KIND, _KIND, "{path}.training: was {old}, is {new}"],
    "is": ["{path}: {new}"],
    "mode": [_WAS],
    "name": [_WAS],
    "keys": ["{path}: others than before, or in another order"],
    **{kind: [f"{{path}}: another {kind} than before"] for kind in _OBJECTS},
}


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        text: what changed, by the name it has for the caller, and how.
        value: whether it is a plain Python value that another call may change again.
    """

    text: str
    value: bool = False

    @property
    def advice(self) -> str:
        """What to do about it, if it happens at every call."""
        if self.value:
            return (
                "Python values are part of what is compiled. Pass a number that changes as a tensor "
                "(torch.tensor(value)), or keep it out of the compiled function"
            )
        return "Every kind of arguments is compiled once: pass the same objects and shapes again, or pad to few shapes"


def first_change(old: Reads, new: Reads) -> Change | None:
    """The first fact of a capture that differs from that of an earlier one."""
    pairs = ((path, old.told.get(key), fact) for key, (path, fact) in new.told.items())
    return next((_change(path, was[1], fact) for path, was, fact in pairs if was and was[1] != fact), None)


def _change(path: str, a: Fact, b: Fact) -> Change:
    same = a[0] == b[0]
    if same and a[0] in _SAID:
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        said = _SAID[a[0]][at - 1]
        value = a[0] in ("is", "keys") or ".training" in said
        return Change(said.format(path=path, old=_plain(a[at]), new=_plain(b[at])), value)
    return Change(
        _WAS.format(path=path, old=_described(a, same), new=_described(b, same)), b[0] not in _OBJECTS
    )


def _described(fact: Fact, same: bool) -> str:
    """A fact in words, beside another one that is about the ``same`` kind of thing or not."""
    kind = fact[0]
    if kind is float:
        return repr(float.fromhex(fact[1]))
    if kind == "tensor":
        return f"a tensor of shape {tuple(fact[1])}"
    if isinstance(kind, type) and issubclass(kind, (list, tuple)):
        return str(fact[1]) if same else f"a {kind.__name__} of length {fact[1]}"
    words: dict[Any, str] = {
        "missing": "not there",
        "again": "an object met before",
        "keys": "a dict",
        **_OBJECTS,
    }
    return words.get(kind) or (repr(fact[1]) if len(fact) == 2 else "another one")


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, tuple) else str(value)
