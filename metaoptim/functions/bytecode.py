"""What the bytecode of a function tells of what it reads."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterator
from importlib.util import resolve_name
from typing import Any

_globals: dict[int, tuple[types.CodeType, tuple[str, ...]]] = {}


def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals that a function, and those made in it, refer to, each once."""
    known = _globals.get(id(code))
    if known is None:
        names = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                names += global_names(inner)
        known = _globals[id(code)] = code, tuple(dict.fromkeys(names))
    return known[1]


@functools.lru_cache(maxsize=4096)
def only_counts(code: types.CodeType, at: int, name: str) -> bool:
    """Whether what is read there goes back to where it came from, and nowhere else: ``self.runs += 1``."""
    steps = [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
    k = next((k for k, i in enumerate(steps) if i.offset == at), 0)
    if not k or not steps[k - 1].opname.startswith(("COPY", "DUP_TOP")):
        return False
    return any(
        i.opname == "STORE_ATTR"
        and i.argval == name
        and swap.opname.startswith(("SWAP", "ROT_TWO"))
        and add.opname.startswith(("BINARY", "INPLACE"))
        for add, swap, i in zip(steps[k:], steps[k + 1 :], steps[k + 2 :])
    )


def texts(code: types.CodeType, by: str) -> list[str]:
    """Texts in code that are names for a function called ``by``."""
    return [c for c in code.co_consts if isinstance(c, str)] if by in code.co_names else []


def imports(code: types.CodeType, names: dict[str, Any]) -> Iterator[types.ModuleType]:
    """The modules that a function imports from, where they have been imported before."""
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    for level, _, step in zip(steps, steps[1:], steps[2:]):
        if step.opname == "IMPORT_NAME":
            name = resolve_name("." * level.argval + step.argval, names.get("__package__"))
            if name in sys.modules:
                yield sys.modules[name]
