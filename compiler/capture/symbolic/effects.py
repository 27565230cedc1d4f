"""Operators with effects in a captured function: what writes is written down as what it gives, what draws is noise.

Noise is an input that is drawn anew in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaoptim.errors import CaptureError

from ...ir.operators import BATCH_NORM, OpInfo, functional, op_info, slopes_of, written
from ...ir.step import again
from ...ir.tensors import tensor_spec
from ...ir.values import Noise, Value
from ..eager.recording import tensors_in
from .fakes import mapped

if TYPE_CHECKING:
    from .tracer import Tracer

aten = torch.ops.aten
_DETACH = aten.detach.default

# -- what writes ------------------------------------------------------------------------------------------------------


def write(tracer: Tracer, op: Any, info: OpInfo, args: tuple, kwargs: dict) -> Any:
    """Make a call that writes into some of its arguments: from there on other values stand for them."""
    for t in written(op, args, kwargs, Tensor):
        if tracer.is_given(t):
            tracer.take_over(t, op, tensors_in((*args, *kwargs.values())))
    args, kwargs = tracer.taken_over(args), tracer.taken_over(kwargs)
    targets = written(op, args, kwargs, Tensor)
    touched = {id(u): (u, any(u is t for t in targets)) for t in targets for u in (t, *tracer.sharing(t))}
    then = [tracer.on_write(*t) for t in touched.values()]
    out = _written(tracer, op, args, kwargs, targets)
    for cut in then:
        if cut is not None:
            cut()
    return out


def _written(tracer: Tracer, op: Any, args: tuple, kwargs: dict, targets: list[Tensor]) -> Any:
    pure = functional(op)
    (target,) = targets if len(targets) == 1 else (None,)
    if pure is not None and target is not None and args and args[0] is target and not kwargs.get("out"):
        changes = torch.is_grad_enabled() or target.is_leaf  # otherwise its history stays, its values change
        if changes and not target._is_view() and len(tracer.sharing(target)) <= 1:
            with tracer.paused():
                detached = mapped(lambda t: tracer.fakes(_DETACH, (tracer.faked(t),), {}), (args, kwargs))
                new = tracer.run(pure, *detached)
            if isinstance(new, Tensor) and tensor_spec(new) == tensor_spec(target):
                entry = tracer.add(pure, tracer.tokens(pure, args), tracer.token(kwargs))
                tracer.bind(target, Value(entry, None))  # a fake of the same spec is as good as before
                return target
    if len(targets) > 1 and torch.is_grad_enabled() and any(t._is_view() for t in targets):
        raise CaptureError(
            f"{op} changes views of tensors in place, whose history torch loses while it traces; change them "
            "one by one"
        )
    tokens, kw = tracer.tokens(op, args), tracer.token(kwargs)
    out = tracer.run(op, args, kwargs)
    entry = tracer.add(op, tokens, kw)
    tracer.bind_outputs(entry, out)
    given = list(out) if isinstance(out, (list, tuple)) else [out]
    for t in targets:
        for other in tracer.sharing(t):
            if all(other is not w for w in given):  # its value is another from here on
                after = tracer.add(again, (tracer.known(other),), grad=True)
                after.deps = (entry,)
                tracer.bind(other, Value(after, None))
    return out


def batch_norm(tracer: Tracer, op: Any, args: tuple) -> Any:
    """Training-mode batch norm, with the update of its running statistics written out (a carry)."""
    at, _, training = BATCH_NORM[op]
    x, mean, var = args[0], args[at], args[at + 1]
    momentum = args[training + 1]
    with tracer.paused():
        copies = [tracer.fakes.empty(tensor_spec(mean)), tracer.fakes.empty(tensor_spec(var))]
        out = tracer.run(op, (*args[:at], *copies, *args[at + 2 :]), {})
    tracer.bind_outputs(tracer.add(op, tracer.token((*args[:at], None, None, *args[at + 2 :]))), out)
    dims = [d for d in range(x.dim()) if d != 1]
    # in a handler the mode is off
    with tracer, torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach()
        mean.copy_(torch.lerp(mean, x.mean(dims).to(mean.dtype), momentum))
        var.copy_(torch.lerp(var, x.var(dims, correction=1).to(var.dtype), momentum))
    return out


# -- what draws --------------------------------------------------------------------------------------------------------

# Random operators that look at nothing of their tensor arguments but shape, dtype and device.
_SHAPES_ONLY = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "native_dropout", "uniform_",
    "normal_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_",
}  # fmt: skip
# How torch makes what is like another tensor: room of the result's layout, filled.
_FILL = {
    "rand_like": aten.uniform_.default,
    "randn_like": aten.normal_.default,
    "randint_like": getattr(aten.random_, "from"),
    "bernoulli": aten.bernoulli_.float,
}
_ALSO_SHAPES_ONLY = (aten.bernoulli_.float, aten.bernoulli.p, aten.normal.float_float)


def _normal(mean: Any, std: Any) -> Tensor:
    like = torch.as_tensor(mean) + torch.as_tensor(std)
    return torch.empty_like(like).normal_() * std + mean


def _bernoulli(chances: Tensor) -> Tensor:
    coarse = chances.dtype in (torch.float16, torch.bfloat16)
    return (torch.rand_like(chances, dtype=torch.float32 if coarse else None) < chances).to(chances.dtype)


def _bernoulli_into(x: Tensor, chances: Tensor) -> Tensor:
    return x.copy_(_bernoulli(chances.expand(x.shape)))


def _multinomial(weights: Tensor, number: int, replacement: bool = False) -> Tensor:
    if number > 1 and replacement:
        reached = weights.cumsum(-1)
        drawn = torch.rand((*weights.shape[:-1], number), dtype=torch.float64, device=weights.device)
        return torch.searchsorted((reached / reached[..., -1:]).double(), drawn)
    raced = weights / torch.empty_like(weights).exponential_()
    return raced.argmax(-1, keepdim=True) if number == 1 else raced.topk(number).indices


# Whose distribution depends on tensors: as torch computes them from numbers of one that does not. No gradient passes.
_BY_NUMBERS: dict[Any, Callable[..., Tensor]] = {
    aten.normal.Tensor_Tensor: _normal,
    aten.normal.Tensor_float: _normal,
    aten.normal.float_Tensor: _normal,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli_.Tensor: _bernoulli_into,
    aten.multinomial.default: _multinomial,
}


def draw(tracer: Tracer, op: Any, args: tuple, kwargs: dict) -> Any:
    """Let what a random operator gives be noise of the trace, or refuse it."""
    name = op._schema.name.split("::")[1]
    own = kwargs.get("generator") is not None
    if op in _BY_NUMBERS and not own:
        with tracer, torch.no_grad():
            return _BY_NUMBERS[op](*args, **{k: v for k, v in kwargs.items() if k != "generator"})
    shapes_only = name in _SHAPES_ONLY or op in _ALSO_SHAPES_ONLY
    if own or not shapes_only or any(isinstance(a, Tensor) for a in args[1:]):
        why = "from a generator of its own" if own else "whose distribution depends on a tensor"
        raise CaptureError(
            f"{op} draws random numbers {why}, which a compiled function cannot repeat; draw them outside and pass "
            "them in, or use an ordinary window"
        )
    if "out" in kwargs:
        raise CaptureError(
            f"{op} draws random numbers into the tensor given as `out`, which a compiled function cannot follow; use "
            "what it returns without `out`, or an in-place operator (normal_, uniform_, random_)"
        )
    kw = {k: v for k, v in kwargs.items() if v is not None}
    if op is aten.native_dropout.default:
        if args[2] is not None and not args[2]:
            return tracer.record(op, args, kwargs)
        out = tracer.run(op, args, kwargs)
        # on the CPU its mask is what bernoulli_ draws, and that takes a generator
        mask = Noise(aten.bernoulli_.float, (1.0 - args[1],), {}, tensor_spec(out[1]))
        tracer.drop_out(args, out[0], _drawn(tracer, out[1], mask))
        return out
    if op_info(op).writes:
        (target,) = written(op, args, kwargs, Tensor)
        with tracer.paused():
            fresh = tracer.faked(target).detach().clone(memory_format=torch.preserve_format)
        _drawn(tracer, fresh, Noise(op, _numbers(args[1:]), kw, tensor_spec(target)))
        with tracer, torch.no_grad():
            target.copy_(fresh)
        return target
    out = tracer.run(op, args, kwargs)
    if name in _FILL:
        numbers = (0, *args[1:])[-2:] if name == "randint_like" else args[1:] if name == "bernoulli" else ()
        noise = Noise(_FILL[name], numbers, {}, tensor_spec(out))
    else:
        kw |= {"dtype": out.dtype, "device": out.device}  # whatever the defaults are when it is drawn
        noise = Noise(_with_generator(op), _numbers(args), kw, tensor_spec(out))
    _drawn(tracer, out, noise)
    return out


def fixed_slope(args: tuple, kwargs: dict) -> float:
    """The slope of a leaky ReLU that draws slopes in training mode; refused in that."""
    slope = slopes_of(*args, **kwargs)
    if slope is None:
        raise CaptureError(
            "rrelu in training mode draws a slope for every element that is negative, as many as the values decide, "
            "which a compiled function cannot repeat; use an ordinary window, or leaky_relu with slopes drawn by "
            "torch.rand_like"
        )
    return slope


@functools.cache
def _with_generator(op: Any) -> Any:
    """The overload that draws the same from a generator it is given."""
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments]
    if any(name == "generator" for name, _ in wanted):
        return op
    for overload in op.overloadpacket.overloads():
        found = getattr(op.overloadpacket, overload)
        arguments = [(a.name, str(a.type)) for a in found._schema.arguments]
        if len(arguments) > len(wanted) and [a for a in arguments if a[0] != "generator"] == wanted:
            return found
    raise CaptureError(
        f"{op} draws random numbers and takes no generator, so a compiled function cannot repeat them; draw them "
        "outside and pass them in, or use an ordinary window"
    )


def _drawn(tracer: Tracer, t: Tensor, noise: Noise) -> Any:
    """Let ``t`` be what ``noise`` gives at this place of the program, once, whoever reads it later."""
    device, before = noise.spec.device, tracer.trace.draws_on
    if before not in (None, device):
        raise CaptureError(
            f"a compiled function draws random numbers on {before} and on {device}, where only one generator's are "
            "drawn again; draw all of them on one device and move them, or draw outside and pass them in"
        )
    tracer.trace.draws_on = device
    return tracer.bind(t, Value(tracer.add(aten.alias.default, (noise,), grad=True), None))


def _numbers(args: Any) -> tuple:
    """Arguments as part of a key."""
    return tuple(_numbers(a) if isinstance(a, (list, tuple)) else a for a in args)
