"""Whether the step of another library's optimizer is of the kind that can be captured."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.compat import unset_fake_temporarily
from metaoptim.compiler.derive.flat import tracing
from metaoptim.compiler.ir.traces.slices import globals_read, is_of_torch
from metaoptim.errors import CaptureError

from .captured import INSTEAD, Given, Source, State, initial, outline, step, step_of

Options = tuple[tuple[str, Any], ...]


@functools.cache  # making an optimizer imports dynamo, which takes as long as all else here
def base() -> frozenset[str]:
    """The attributes that every optimizer has, and ``step``, which torch's schedulers wrap."""
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)], lr=1))) | {"step"}


_known: set[tuple[Source, torch.Size, Options]] = set()  # what has been examined: outlines, for shapes


def examine_options(source: Source, size: torch.Size, hyper: Mapping[str, Any]) -> None:
    """Examine a step anew where options are others than it has been examined for, and so may its terms be."""
    options = _outline(source, hyper)
    if (source, size, options) not in _known:
        some = tuple([(name, _some(value)) for name, value in options])
        cls, attributes, surroundings, *_ = source
        with unset_fake_temporarily():
            now = examined(Source(cls, attributes, surroundings), ((size, size),), (some,))
        if now.counted != source.counted:
            raise CaptureError(
                f"{cls.__name__} counts {[n for n, _ in now.counted]} in its groups with the options that it has now, "
                f"and {[n for n, _ in source.counted]} with those it was wrapped with; wrap one with these options"
            )
        _known.add((source, size, options))


def _outline(source: Source, hyper: Mapping[str, Any]) -> Options:
    counts = {name: n for name, n in source.counted if n is not None}
    return tuple(sorted([(k, outline(v, [])) for k, v in {**hyper, **counts}.items()]))


def _some(value: Any) -> Any:
    if value is Given:
        return 0.5
    return tuple(map(_some, value)) if type(value) is tuple else value


@functools.lru_cache(maxsize=256)
def examined(
    source: Source, sizes: tuple[tuple[torch.Size, ...], ...], options: tuple[Options, ...]
) -> Source:
    """Whose step it is, after some steps of its own beside captured ones, on random numbers in float64."""
    cls, attributes = source.cls, source.attributes
    with tracing(torch.float64):
        generator = torch.Generator().manual_seed(0)
        noise = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        params = [[noise(size).requires_grad_() for size in of] for of in sizes]
        groups = [{"params": of, **dict(given)} for of, given in zip(params, options, strict=True)]
        own = source.instance(groups, {})
        before = [dict(given) for given in options]
        mine = [[p.detach().clone() for p in of] for of in params]
        states: list[list[State]] = [[{} for _ in of] for of in params]
        hypers = before
        for turn in range(3):
            grads = [[noise(p.shape) for p in of] for of in params]
            for p, grad in zip(_each(params), _each(grads), strict=True):
                p.grad = grad.clone()
            try:
                with torch.no_grad():
                    step_of(cls)(own)
            except Exception as error:
                raise CaptureError(
                    f"{cls.__name__}.step() fails with random gradients: {type(error).__name__}: {error}. An inner "
                    f"optimizer steps by the gradient alone, without a closure; {INSTEAD}"
                ) from error
            if not turn:
                shared = [key for key in own.state if not isinstance(key, Tensor)]
                if shared:
                    raise CaptureError(
                        f"{cls.__name__} keeps state[{shared[0]!r}] for all parameters together; state must be that of "
                        f"one parameter; {INSTEAD}"
                    )
                kept = {k for of in own.state.values() for k, v in of.items() if isinstance(v, (int, float))}
                counted = _counts(cls, attributes, before, own)
                source = source._replace(counted=counted, numbers=tuple(sorted(kept)))
                hypers = [{k: v for k, v in of.items() if k not in dict(source.counted)} for of in before]
            for k, of in enumerate(mine):
                for n, p in enumerate(of):
                    state = states[k][n] or initial(source, p, hypers[k])
                    of[n], states[k][n] = step(source, p, grads[k][n], state, hypers[k])
            for p, q in zip(map(Tensor.detach, _each(params)), _each(mine), strict=True):
                if not torch.allclose(p, q, rtol=1e-6, atol=1e-9):
                    raise CaptureError(
                        f"{cls.__name__}: a step and the captured one differ by {float((p - q).abs().max())} for a "
                        f"parameter of shape {tuple(p.shape)}: it mixes parameters, draws random numbers, computes "
                        f"in low precision, or decides by a value in Python; {INSTEAD}"
                    )
    _known.update(
        (source, p.shape, _outline(source, h)) for of, h in zip(mine, hypers, strict=True) for p in of
    )
    return source


def _counts(
    cls: type,
    attributes: Sequence[tuple[str, Any]],
    before: Sequence[dict[str, Any]],
    after: torch.optim.Optimizer,
) -> tuple[tuple[str, int | None], ...]:
    """Numbers in the groups that a step has changed, and what they were; raises for attributes that it has."""
    known = dict(attributes)
    for name, value in vars(after).items():
        if name not in base() and (name not in known or not _same(known[name], value)):
            raise CaptureError(
                f"{cls.__name__} keeps state in its attribute {name!r}, which a step changes; state must be tensors in "
                f"optimizer.state; {INSTEAD}"
            )
    counted: dict[str, int | None] = {}
    for given, group in zip(before, after.param_groups, strict=True):
        for name, value in group.items():
            if name == "params" or (name in given and _same(given[name], value)):
                continue
            if type(value) is not int:
                raise CaptureError(
                    f"{cls.__name__} keeps state in param_groups[...][{name!r}], which a step changes to {value!r}; "
                    f"state must be tensors in optimizer.state; {INSTEAD}"
                )
            counted[name] = given.get(name)
    return tuple(counted.items())


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def _each(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [t for of in groups for t in of]


def surroundings(cls: type) -> tuple[Any, ...]:
    """What the functions of an optimizer's class read besides their arguments: a captured step holds for these values.

    Numbers, texts and tensors in the class, and in the modules of its functions; those of torch do not change.
    """
    found: list[Any] = []
    for owner in cls.__mro__:
        if owner is not object and not is_of_torch(owner.__module__):
            for name, value in vars(owner).items():
                read = getattr(value, "fget", getattr(value, "__func__", value))
                if callable(read):
                    while read is not None:  # decorators, and what they decorate
                        found += globals_read(read)
                        read = getattr(read, "__wrapped__", None)
                elif not name.startswith("__") and isinstance(value, (int, float, complex, str, bytes)):
                    found.append((owner, name, type(value), value))
                elif isinstance(value, Tensor):
                    found.append((owner, name, id(value), value._version))
    return tuple(found)
