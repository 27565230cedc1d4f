"""What a function refers to, as itself and its bytecode tell, and the names it has for that."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from importlib.util import resolve_name
from typing import Any

from torch import Tensor, nn

from ..optim.optimizer import MetaOptimizer

# tqdm: torch runs graphs under its bars, and each bar that a user shows changes what they read
_LIBRARIES = {*sys.stdlib_module_names, "typing_extensions", "torch", "numpy", "tqdm", "metaoptim"}
_LIBRARIES.discard("__main__")


def is_library(module: str | None) -> bool:
    """Whether a module is Python's, torch's or our own, where nothing changes that a function depends on."""
    return module is not None and (module.partition(".")[0] in _LIBRARIES or module.startswith("namedtuple_"))


def reference(o: Any) -> Callable[[], Any]:
    """What gives ``o``, without keeping it alive where that can be had."""
    try:
        return weakref.ref(o)
    except TypeError:
        return lambda: o


def is_python_class(kind: type) -> bool:
    """Whether a class is written in Python (and can be changed): its instances have attributes of their own."""
    return bool(kind.__flags__ & (1 << 9)) and not kind.__flags__ & (1 << 8)  # a heap type, not immutable


def contents(cell: types.CellType) -> Any:
    """What a closure's variable is bound to; None before it is."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def argument_names(fn: Callable, args: tuple) -> list[str]:
    """The names of positional arguments, in order."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return [plain[i] if i < len(plain) else f"{rest}[{i - len(plain)}]" for i in range(len(args))]


def surroundings(fn: Callable) -> Iterator[tuple[str, Any]]:
    """What a function refers to directly: its free variables, its globals and its defaults."""
    while isinstance(fn, functools.partial):
        yield "arguments", (fn.args, fn.keywords)
        fn = fn.func
    if isinstance(fn, types.MethodType):
        yield "self", fn.__self__
        fn = fn.__func__
    code = getattr(fn, "__code__", None)
    if code is None:  # an object that can be called
        yield type(fn).__name__, fn
        return
    yield "defaults", (getattr(fn, "__defaults__", None), getattr(fn, "__kwdefaults__", None))
    for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for name in global_names(code):
        value = fn.__globals__.get(name)
        if value is not None and not isinstance(value, (types.ModuleType, type)):
            yield name, value


def tensor_names(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[int, str]:
    """Id of every tensor that the arguments and surroundings of ``fn`` hold -> its name; the first, if several."""
    return names_in([*zip(argument_names(fn, args), args, strict=True), *kwargs.items(), *surroundings(fn)])


def names_in(named: Iterable[tuple[str, Any]]) -> dict[int, str]:
    """Id of every tensor that named values hold -> its name; the first, if several."""
    found: dict[int, str] = {}
    seen: set[int] = set()
    for name, value in sorted(named, key=lambda item: isinstance(item[1], MetaOptimizer)):
        for path, tensor in _tensors(name, value, seen):
            found.setdefault(id(tensor), path)
    return found


def _tensors(name: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    if id(value) in seen or not isinstance(value, (list, tuple, dict, nn.Module, MetaOptimizer)):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for of in (value.named_parameters, value.named_buffers):
            yield from ((f"{name}.{path}", t) for path, t in of(remove_duplicate=False))
    elif isinstance(value, MetaOptimizer):
        for i, net in enumerate(value.networks):
            yield from _tensors(f"{name}.networks[{i}]", net, seen)
        for i, group in enumerate(value.param_groups):
            for key, hyper in group.items():
                if key == "params":
                    continue
                yield from _tensors(f"{name}.param_groups[{i}][{key!r}]", hyper, seen)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(f"{name}[{key!r}]", inner, seen)
    else:
        for i, inner in enumerate(value):
            yield from _tensors(f"{name}[{i}]", inner, seen)


# -- bytecode ---------------------------------------------------------------------------------------------------------

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
