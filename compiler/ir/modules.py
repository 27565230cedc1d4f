"""A module among the hyper-parameters: what it does, as data, and the tensors that it does it with.

The update of a step must not read the module itself, which the user changes: it runs again in the backward, in another
thread maybe. So a module is taken apart. Its tensors become hyper-references, read anew at every step. All else is a
`Form`, of which a module is made that holds the tensors of a step.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import types
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from metaoptim.errors import CaptureError

from .operators import is_named, is_several

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_HOLDERS = ("_parameters", "_buffers")
#: What every module has, and what makes it for a new one.
_BASE: dict[str, Any] = {name: type(value) for name, value in vars(nn.Module()).items() if name != "training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OF_HOOKS = tuple(name for name in _BASE if name.startswith("_forward"))  # and which of them are given what
_SCRIPTED: Any = torch.jit.ScriptModule
#: Of torch's RNNs, which look whether these are their weights.
_CACHES = ("_flat_weights", "_flat_weight_refs")


class _Same:
    """An object that is equal to itself alone; it is held, so that no other gets its id."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.of is other.of

    def __hash__(self) -> int:
        return id(self.of)


class _Part(NamedTuple):
    """One of a module's modules, itself included."""

    kind: type[nn.Module]
    hooks: dict[str, Any]  # on its forward
    own: dict[str, Any]  # its other attributes, but for tensors and modules
    tensors: dict[str, dict[str, int | None]]  # its parameters and buffers: places among the form's tensors
    modules: dict[str, int | None]  # places among the form's parts


class Form:
    """All there is to a module besides its tensors. Forms are equal that do the same to the same tensors."""

    __slots__ = ("parts", "key", "_hash")

    def __init__(self, parts: list[_Part], key: Hashable) -> None:
        self.parts, self.key, self._hash = parts, key, hash(key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self._hash == other._hash and self.key == other.key

    def __hash__(self) -> int:
        return self._hash

    def module(self, tensors: Sequence[Tensor]) -> nn.Module:
        """A module of this form that holds these tensors."""
        made: list[nn.Module] = [object.__new__(part.kind) for part in self.parts]
        for m, part in zip(made, self.parts, strict=True):
            held = vars(m)
            held.update((name, new()) for name, new in _BASE.items())
            held.update((name, copy.copy(value)) for name, value in part.hooks.items())
            held.update((name, _copied(value)) for name, value in part.own.items())
            for kind, places in part.tensors.items():
                held[kind] = {name: None if at is None else tensors[at] for name, at in places.items()}
            held["_modules"] = {name: None if at is None else made[at] for name, at in part.modules.items()}
        return made[0]

    def check_kept(self, module: nn.Module, tensors: Sequence[Tensor]) -> None:
        """Raise if what `module` has made of ``tensors`` has been given other attributes since."""
        for (path, m), part in zip(_named(module), self.parts, strict=True):
            held = vars(m)
            changed = [
                name
                for name, at in part.tensors["_buffers"].items()
                if held["_buffers"].get(name) is not (None if at is None else tensors[at])
            ]
            if not part.kind.__module__.startswith("torch."):  # whose modules cache
                own = held.keys() - _BASE.keys()
                changed += [
                    name
                    for name in sorted(own)
                    if name not in part.own or not _alike(held[name], part.own[name])
                ]
            if changed:
                raise CaptureError(
                    f"{type(module).__name__} sets its attribute {_joined(path, changed[0])!r} while it runs, which "
                    "the next step would not see: let it return what that one needs as state"
                )


def take_apart(module: nn.Module) -> tuple[Form, list[Tensor]]:
    """The form of a module, and its tensors in order.

    Raises:
        CaptureError: for a module whose tensors cannot be told from what else it is.
    """
    name = type(module).__name__
    named = _named(module)
    place = {id(m): i for i, (_, m) in enumerate(named)}
    tensors: list[Tensor] = []
    known: dict[int, int] = {}  # id of a tensor -> its place
    parts: list[_Part] = []
    keys: list[Hashable] = []

    def at(t: Tensor | None) -> int | None:
        if t is None:
            return None
        if id(t) not in known:
            known[id(t)] = len(tensors)
            tensors.append(t)
        return known[id(t)]

    for path, m in named:
        held = vars(m)
        if isinstance(m, _SCRIPTED) or "forward" in held:
            raise CaptureError(
                f"{name}: {repr(path) if path else 'it'} was made by torch.compile or torch.jit, or has a forward of "
                "its own, with which its weights cannot be replaced; give the module that it was made from"
            )
        if held["_backward_hooks"] or held["_backward_pre_hooks"]:
            raise CaptureError(f"{name}: {repr(path) if path else 'it'} has backward hooks; take them off")
        own: dict[str, Any] = {}
        key: list[Hashable] = []
        for k, value in held.items():
            if k not in _BASE and k not in _CACHES:
                try:
                    key += k, _key(value)
                except _Unregistered as error:
                    raise CaptureError(
                        f"{name}: the attribute {_joined(path, k)!r} holds {error}, which is none of its parameters, "
                        "buffers and modules; use nn.Parameter or register_buffer for tensors, nn.ModuleList or "
                        "nn.ModuleDict for modules, and methods by their name"
                    ) from None
                own[k] = _copied(value)
        if "_flat_weights" in held:
            own |= {"_flat_weights": [], "_flat_weight_refs": [lambda: None] * len(held["_flat_weight_refs"])}
        hooks = {k: copy.copy(held[k]) for k in _OF_HOOKS if held[k]}
        of = {kind: {n: at(t) for n, t in held[kind].items()} for kind in _HOLDERS}
        inner = {n: None if k is None else place[id(k)] for n, k in held["_modules"].items()}
        parts.append(_Part(type(m), hooks, own, of, inner))
        acting = [
            (kind, _Same(hook), *(i in held[name] for name in _OF_HOOKS))
            for kind in _HOOKS
            for i, hook in held[kind].items()
        ]
        code = getattr(m.forward, "__code__", None)  # reloading puts another one into the same class
        keys.append((type(m), code, *acting, *key, *(tuple(d.items()) for d in (*of.values(), inner))))
    return Form(parts, tuple(keys)), tensors


def _named(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Itself and the modules in it, with their paths; in one order for modules of one form."""
    of: Any = module
    return list(of.named_modules())


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _Unregistered(Exception):
    """A tensor or a module that nn.Module does not know of."""


def _key(value: Any) -> Hashable:
    """Equal for values that are alike."""
    if isinstance(value, _ATOMS):
        return type(value), value.hex() if isinstance(value, float) else value
    if is_several(value):
        return type(value), *map(_key, value)
    if is_named(value):
        return type(value), *((_key(k), _key(v)) for k, v in value.items())
    if _is_set(value):
        return type(value), frozenset(map(_key, value))
    if _is_record(value):
        return type(value), _key(vars(value))  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, Tensor):
        raise _Unregistered(f"a tensor of shape {tuple(value.shape)}")
    if isinstance(value, nn.Module):
        raise _Unregistered(f"a module ({type(value).__name__})")
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        raise _Unregistered(f"a method of a module ({value.__qualname__})")
    return _Same(value)


def _alike(a: Any, b: Any) -> bool:
    try:
        return _key(a) == _key(b)
    except _Unregistered:
        return False


def _copied(value: Any) -> Any:
    """``value``, with lists and dictionaries of its own: whoever has it may go on changing them."""
    if isinstance(value, _ATOMS):
        return value
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if is_named(value):
        made = copy.copy(value)
        made.update((k, _copied(v)) for k, v in value.items())
        return made
    if _is_record(value):
        record: Any = copy.copy(value)
        record.__dict__.update(_copied(vars(value)))
        return record
    return copy.copy(value) if _is_set(value) else value


def _is_set(value: object) -> TypeGuard[set[Any]]:
    return isinstance(value, (set, frozenset))


def _is_record(value: Any) -> bool:
    """Whether an object is no more than its attributes: settings, as a rule."""
    plain = isinstance(value, (types.SimpleNamespace, argparse.Namespace))
    return plain or (
        dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")
    )
