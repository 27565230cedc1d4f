"""Υ, the optimizer's pure update, as a plan that runs on real tensors and traces into a StepGraph alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.errors import CaptureError, WindowError

from .modules import Form
from .operators import is_named, is_several

State = dict[str, Tensor]

_MOST = 1024
_looked_at: set[Any] = set()  # updates, with the forms of modules, that have been seen to be as they should


@dataclass(frozen=True, eq=False)  # equal ones are one object: steps are looked up by them
class HyperRef:
    """Place of a hyper-parameter in the flat list of those that are tensors or may change from step to step."""

    at: int

    @staticmethod
    @functools.cache
    def of(at: int) -> HyperRef:
        """The one for a place."""
        return HyperRef(at)


def name_of(fn: Any) -> str:
    """What texts call a function of a transform or a schedule."""
    return getattr(fn, "__name__", type(fn).__name__).lstrip("_")


def is_ours(function: Any) -> bool:
    """Whether a function's code is in this package; what it says of itself, others may say too (functools.wraps)."""
    package = __name__.partition(".")[0] + "."
    return isinstance(function, FunctionType) and function.__globals__.get("__name__", "").startswith(package)


@dataclass(frozen=True)
class ModuleRef:
    """A hyper-parameter that is a module: what it does, and the places of its tensors in the flat list."""

    form: Form
    tensors: tuple[HyperRef, ...]


@dataclass(frozen=True)
class TransformPlan:
    """What is done to the inner gradients before the update, but for the values it is done with."""

    apply: Callable[..., Sequence[Tensor]] = field(compare=False)  # pure: (grads, params, hyper) -> grads'
    key: Hashable  # equal for functions that do the same
    hyper: tuple[tuple[str, Any], ...]  # names and constants, `HyperRef`s or tuples of these
    places: tuple[int, ...] | None  # which of the updated parameters it acts on; None for all

    @property
    def __name__(self) -> str:
        return name_of(self.apply)

    def __call__(
        self, grads: Sequence[Tensor], thetas: Sequence[Tensor], hyper_values: Sequence[Any]
    ) -> list[Tensor]:
        """The new gradients, of the same shapes and dtypes."""
        at = range(len(grads)) if self.places is None else self.places
        given = [grads[i] for i in at]
        found = self.apply(list(given), [thetas[i] for i in at], self.filled(hyper_values))
        if not (is_several(found) and len(found) == len(given) and all(map(_alike, found, given))):
            raise WindowError(
                f"the transform {self.__name__}: got {_outline(found)}, expected a list of one tensor for each "
                f"gradient, of its shape: {_outline(given)}; a number in it that is a tensor must broadcast to them"
            )
        after = list(grads)
        for i, g in zip(at, found, strict=True):
            after[i] = g if g.dtype == grads[i].dtype else g.to(grads[i].dtype)
        return after

    def filled(self, hyper_values: Sequence[Any]) -> dict[str, Any]:
        """Its hyper-parameters, by name."""
        return {name: _fill(value, hyper_values, []) for name, value in self.hyper}


@dataclass(frozen=True)
class UpdatePlan:
    """What the update does, but for the values it does it to."""

    update: Callable[..., tuple[Tensor, State]]  # pure: (param, grad, state, hyper) -> (param', state')
    # per group, names and constants, `HyperRef`s or tuples of these
    groups: tuple[tuple[tuple[str, Any], ...], ...]
    group_of: tuple[int, ...]  # per updated parameter, its group
    states: tuple[tuple[str, ...], ...]  # per updated parameter, names of the state it has before the step
    transforms: tuple[TransformPlan, ...] = ()  # of the gradients, in order, before the update
    # Pure: (param, hyper) -> state, if the initial state depends on the parameter: it is part of the step then.
    init: Callable[..., State] | None = None
    reads: Hashable = ()  # what the update finds in its module

    @property
    def __name__(self) -> str:
        return self.update.__qualname__

    @cached_property
    def is_users(self) -> bool:
        """Whether Python of the user's own is part of it, which may look at values in sight of nobody (``tolist``)."""
        functions = (self.update, *((self.init,) if self.init else ()), *(t.apply for t in self.transforms))
        named = (*self.groups, *(transform.hyper for transform in self.transforms))
        return not all(map(is_ours, functions)) or any(
            _modules(value) for group in named for _, value in group
        )

    def __call__(
        self,
        thetas: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        hyper_values: Sequence[Any],
    ) -> tuple[list[Tensor], list[State]]:
        """New parameters and new states."""
        named = (*self.groups, *(transform.hyper for transform in self.transforms))
        forms = [ref.form for group in named for _, value in group for ref in _modules(value)]
        use = (self.update, self.states, *(transform.key for transform in self.transforms), *forms)
        first, given = use not in _looked_at, _Given()
        if first:  # it may write into what it is given
            thetas, grads, hyper_values = _copies(thetas), _copies(grads), _copies(hyper_values)
            states = [dict(zip(state, _copies(list(state.values())), strict=True)) for state in states]
            given.add("its parameter", thetas)
            given.add("its gradient", grads)
            given.add("its state", [v for state in states for v in state.values()])
            given.add(
                "a hyper-parameter, or a buffer of a module (batch norm must be in evaluation mode),",
                hyper_values,
            )
        modules: list[tuple[ModuleRef, nn.Module]] = []
        groups = [
            {name: _fill(value, hyper_values, modules) for name, value in group} for group in self.groups
        ]
        for transform in self.transforms:
            grads = transform(grads, thetas, hyper_values)
        new_thetas: list[Tensor] = []
        new_states: list[State] = []
        for theta, grad, state, group in zip(thetas, grads, states, self.group_of, strict=True):
            hyper = groups[group]
            if not theta.dim():  # a 0-dim tensor would promote it, as it does no tensor that has dimensions
                hyper = {k: _cast(v, theta.dtype.to_real()) for k, v in hyper.items()}
            if self.init is not None and not state:
                state = initial_state(self.init, theta, hyper)
                if first:
                    given.add("its state", list(state.values()))
            new, new_state = checked_result(
                self.__name__, "the new parameter", state, self.update(theta, grad, state, hyper)
            )
            if new.shape != theta.shape:
                raise _grown(self.__name__, new, theta, hyper)
            new_thetas.append(new if new.dtype == theta.dtype else new.to(theta.dtype))
            new_states.append(new_state)
        if first:
            given.check_kept(" or ".join([*(t.__name__ for t in self.transforms), self.__name__]))
            for ref, module in modules:
                ref.form.check_kept(module, [hyper_values[at.at] for at in ref.tensors])
            if len(_looked_at) >= _MOST:
                _looked_at.clear()
            _looked_at.add(use)
        return new_thetas, new_states


class _Given:
    """The tensors that an update is given, by what they are to it, and whether they have been written into."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, Tensor, int]] = []

    def add(self, what: str, values: Sequence[Any]) -> None:
        self.noted += [(what, v, v._version) for v in values if isinstance(v, Tensor)]

    def check_kept(self, name: str) -> None:
        for what, t, version in self.noted:
            if t._version != version:
                raise CaptureError(f"{name} changes {what} in place; it must return new tensors")


def _copies(values: Sequence[Any]) -> list[Any]:
    return [v.clone() if isinstance(v, Tensor) else v for v in values]


def initial_state(init: Callable[..., State], param: Tensor, hyper: dict[str, Any]) -> State:
    """What ``init`` gives, which must be tensors by name."""
    return checked_state(init.__qualname__, init(param, hyper))


def checked_state(name: str, state: Any) -> State:
    """What ``name`` has returned, which must be tensors by name."""
    if not _is_state(state):
        raise TypeError(
            f"{name}: got {_outline(state)}, expected a dictionary of tensors by name, such as "
            "{'sum': torch.zeros_like(param)}; {} for no state, torch.zeros(()) for a count"
        )
    return state


def checked_result(name: str, first: str, state: State, result: Any) -> tuple[Tensor, State]:
    """What ``name`` has returned: a tensor (``first``: which), and a new state with every name of ``state``."""
    fits = is_several(result) and len(result) == 2 and isinstance(result[0], Tensor) and _is_state(result[1])
    if not fits:
        raise TypeError(
            f"{name}: got {_outline(result)}, expected two results: {first}, and its new state as a dictionary of "
            "tensors by name ({} for none; torch.zeros(()) for a count)"
        )
    new, new_state = result
    if missing := state.keys() - new_state.keys():
        raise WindowError(
            f"{name}: the new state has no {', '.join(map(repr, sorted(missing)))}, as the state before the step has; "
            "return every name, also of what stays as it is"
        )
    return new, new_state


def _alike(got: Any, expected: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == expected.shape


def _grown(name: str, new: Tensor, theta: Tensor, hyper: dict[str, Any]) -> WindowError:
    shapes = [f"{k} {tuple(v.shape)}" for k, v in hyper.items() if isinstance(v, Tensor)]
    return WindowError(
        f"{name}: a parameter of shape {tuple(theta.shape)} would become one of shape {tuple(new.shape)}; the new one "
        "must have its shape. A hyper-parameter that is a tensor must be a scalar, or broadcast to the shape of every "
        f"parameter of its group (tensors among them: {', '.join(shapes) or 'none'})"
    )


def _is_state(state: Any) -> bool:
    return is_named(state) and all(isinstance(v, Tensor) for v in state.values())


def _outline(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if is_several(value):
        return f"({', '.join(map(_outline, value))})"
    if is_named(value):
        return f"{{{', '.join(f'{k!r}: {_outline(v)}' for k, v in value.items())}}}"
    return repr(value)


def _modules(value: Any) -> list[ModuleRef]:
    if isinstance(value, ModuleRef):
        return [value]
    return [ref for v in value for ref in _modules(v)] if is_several(value) else []


def _fill(value: Any, hyper_values: Sequence[Any], modules: list[tuple[ModuleRef, nn.Module]]) -> Any:
    """A hyper-parameter with values in the place of references; ``modules`` are extended by those that are made."""
    if isinstance(value, HyperRef):
        return hyper_values[value.at]
    if isinstance(value, ModuleRef):
        made = value.form.module([hyper_values[ref.at] for ref in value.tensors])
        modules.append((value, made))
        return made
    return tuple([_fill(v, hyper_values, modules) for v in value]) if is_several(value) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return tuple([_cast(v, dtype) for v in value]) if is_several(value) else value
