"""Which guard failed: the first difference between two looks at what a compiled function depends on, by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .compiler.ambient import AMBIENT
from .guards import Scene, surroundings
from .naming import argument_names, module_parts
from .optim.optimizer import MetaOptimizer

_TENSOR_FIELDS = ("shape", "dtype", "strides", "device", "requires_grad")


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


def first_change(fn: Callable, args: tuple, kwargs: dict[str, Any], old: Any, new: Scene) -> Change:
    """What differs between an earlier call and this one.

    Args:
        fn: the function.
        args: of this call.
        kwargs: of this call.
        old: the key of the scene of the earlier one.
        new: the scene of this one.
    """
    try:
        return _first_change(fn, args, kwargs, old, new)
    # a name is a courtesy, and no reason to fail
    except (ValueError, TypeError, LookupError, AttributeError):
        return Change("something that the function depends on", "is not what it was")


def _first_change(fn: Callable, args: tuple, kwargs: dict[str, Any], old: Any, new: Scene) -> Change:
    then: Any = old
    now: Any = new.key
    while then and now and then[0] == now[0] == "step":  # a compiled step: (step, hooked, key)
        if then[1] != now[1]:
            return Change("the window", "with a backward_hook" if now[1] else "without a backward_hook", True)
        then, now = then[2], now[2]
    if then[:1] == ("step",) or now[:1] == ("step",):
        return Change("the call", "inside a window" if now[:1] == ("step",) else "outside any window")
    for name, a, b in zip(AMBIENT, then[1], now[1], strict=True):
        if a != b:
            return Change(name, f"was {a}, is {b}")
    labels = argument_names(fn, args)
    parts: list[tuple[str, Any]] = [("", None), ("", None), *surroundings(fn)]
    for at, (a, b) in enumerate(zip(then[0], now[0], strict=False)):
        if a == b:
            continue
        if at == 0:
            found = _children(labels, args, a[1], b[1], "the number of positional arguments")
        elif at == 1:
            found = _dict(lambda k: str(k), kwargs, a, b, "the keyword arguments")
        else:
            name, value = parts[at]
            if a[0] != b[0]:
                return Change("what the function refers to", f"was {a[0]}, is {b[0]}")
            found = _compare(name, value, a[1], b[1])
        if found is not None:
            return found
    if len(then[0]) != len(now[0]):
        return Change("what the function refers to", "more or fewer names are bound than before")
    return Change(
        "an object", "is another one than before: it was made anew in the place of one that is gone"
    )


def _compare(name: str, value: Any, a: Any, b: Any) -> Change | None:
    """The first difference between two descriptions of what is called ``name``; ``value`` is what it is now."""
    if a == b:
        return None
    if a[0] != b[0]:
        return Change(
            name, f"was {_described(a)}, is {_described(b)}", b[0] not in ("module", "optimizer", "object")
        )
    if a[0] == "tensor":
        field = next(i for i, (x, y) in enumerate(zip(a[1:], b[1:], strict=True)) if x != y)
        if field >= len(_TENSOR_FIELDS):
            return Change(name, "has other hooks than before")
        return Change(name, f"{_TENSOR_FIELDS[field]} was {_plain(a[1 + field])}, is {_plain(b[1 + field])}")
    if a[0] in ("list", "tuple") or _is_sequence(value, b):
        names = [f"{name}[{i}]" for i in range(len(b[1]))]
        return _children(names, value, a[1], b[1], f"the length of {name}")
    if a[0] == "dict":
        return _dict(lambda k: f"{name}[{k!r}]", value, a, b, f"the keys of {name}")
    if a[0] in ("module", "optimizer", "object"):
        if a[1] != b[1]:
            return Change(name, f"another {'object' if a[0] == 'object' else a[0]} than before")
        if len(a[2]) != len(b[2]):
            return Change(name, "has more or fewer parameters, buffers or states than before")
        parts: Callable[[str, Any], Iterator] = module_parts if a[0] == "module" else _optimizer_parts
        for (label, inner), x, y in zip(parts(name, value), a[2], b[2], strict=False):
            found = _compare_part(label, inner, x, y)
            if found is not None:
                return found
        return Change(name, "its parameters, buffers or states are others than before")
    if a[0] == "again":
        return Change(name, "is the same object as another argument than before")
    return Change(name, f"was {_described(a)}, is {_described(b)}", True)


def _is_sequence(value: Any, described: Any) -> bool:
    """Whether it is a list or tuple of a class of its own, described by its items."""
    return isinstance(value, (list, tuple)) and len(described) == 2 and isinstance(described[1], tuple)


def _compare_part(label: str, inner: Any, x: Any, y: Any) -> Change | None:
    if x == y:
        return None
    if isinstance(x, bool) or isinstance(y, bool):
        return Change(label, f"was {x}, is {y}", True)
    if x[0] == y[0] == "kind":
        return Change(label, "its class, options or hooks are others than before")
    if isinstance(inner, tuple) and x[0] == y[0] == inner[0]:  # a state of a parameter, with its name
        return _compare(label, inner[1], x[1], y[1])
    if isinstance(inner, dict):  # a parameter group
        for (key, p), (other, q) in zip(x, y, strict=False):
            if key != other:
                break
            found = _compare(f"{label}[{key!r}]", inner.get(key), p, q)
            if found is not None:
                return found
        return Change(label, "has other hyper-parameters than before")
    return _compare(label, inner, x, y)


def _children(names: list[str], values: Any, a: Any, b: Any, size: str) -> Change | None:
    if len(a) != len(b):
        return Change(size, f"was {len(a)}, is {len(b)}", True)
    for name, value, x, y in zip(names, values, a, b, strict=True):
        found = _compare(name, value, x, y)
        if found is not None:
            return found
    return None


def _dict(name: Callable[[Any], str], values: dict, a: tuple, b: tuple, keys: str) -> Change | None:
    if a[0] != b[0] or [k for k, _ in a[1]] != [k for k, _ in b[1]]:
        return Change(keys, "others than before, or in another order", True)
    return _children(
        [name(k) for k in values], values.values(), [v for _, v in a[1]], [v for _, v in b[1]], keys
    )


def _optimizer_parts(name: str, optimizer: MetaOptimizer) -> Iterator[tuple[str, Any]]:
    """Likewise of an optimizer (`Scene._optimizer`)."""
    yield f"{name}'s first_order", optimizer.first_order
    yield f"{name}'s gradient normalizer", optimizer._normalizer
    names = {id(p): n for net in optimizer.networks for n, p in net.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        yield f"{name}.param_groups[{i}]", group
        for k, p in enumerate(group["params"]):
            label = names.get(id(p), f"param_groups[{i}]['params'][{k}]")
            yield f"{name}'s parameter {label}", p
            for key, value in optimizer.state.get(p, {}).items():
                yield f"{name}'s {key} of {label}", (key, value)


def _described(a: Any) -> str:
    if a[0] == "float":
        return repr(float.fromhex(a[1]))
    if a[0] == "tensor":
        return f"a tensor of shape {tuple(a[1])}"
    if a[0] in ("list", "tuple", "dict", "module", "optimizer", "object"):
        return f"{'an' if a[0][0] in 'ao' else 'a'} {a[0]}"
    return "an object met before" if a[0] == "again" else repr(a[1]) if len(a) > 1 else str(a)


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, tuple) else str(value)
