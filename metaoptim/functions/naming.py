"""Names that the caller of a compiled function has for what it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..optim.optimizer import MetaOptimizer
from .guards import argument_names, surroundings


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


def module_parts(name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What `Dependencies` describe of a module, in their order: training flags and tensors, with names."""
    for path, m in module.named_modules():
        whole = f"{name}.{path}" if path else name
        yield f"{whole}.training", m.training
        yield whole, None
        for tensors in (m._parameters, m._buffers):
            for key, t in tensors.items():
                if t is not None:
                    yield f"{whole}.{key}", t


def _tensors(name: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    if id(value) in seen or not isinstance(value, (list, tuple, dict, nn.Module, MetaOptimizer)):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield from ((path, t) for path, t in module_parts(name, value) if isinstance(t, Tensor))
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
