"""Random operators in a captured function: what they draw is noise, an input that is drawn anew in every run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaoptim.errors import CaptureError

from .entries import Value
from .ops import op_info, written
from .slicing import tensor_spec
from .trace import Noise

aten = torch.ops.aten
# Random operators that look at nothing of their tensor arguments but shape, dtype and device.
_SHAPES_ONLY = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "native_dropout", "uniform_",
    "normal_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_",
}  # fmt: skip
_ALSO_SHAPES_ONLY = (aten.bernoulli_.float, aten.normal.float_float)
_NORMAL = (aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor)


def draw(tracer: Any, op: Any, args: tuple, kwargs: dict) -> Any:
    """Let what a random operator gives be noise of the trace, or refuse it."""
    name = op._schema.name.split("::")[1]
    own = kwargs.get("generator") is not None
    if op in _NORMAL and not own:  # mean + std z, as torch computes it; no gradient passes
        mean, std = args[:2]
        with tracer, torch.no_grad():
            like = torch.as_tensor(mean) + torch.as_tensor(std)
            return torch.empty_like(like).normal_() * std + mean
    if own or not (name in _SHAPES_ONLY or op in _ALSO_SHAPES_ONLY):
        why = "from a generator of its own" if own else "whose distribution depends on a tensor"
        raise CaptureError(
            f"{op} draws random numbers {why}, which a compiled function cannot repeat; draw them outside and pass "
            "them in, or use an ordinary window"
        )
    recipe = tuple(_spec_of(a) for a in args)
    kw = {k: v for k, v in kwargs.items() if v is not None}
    if op is aten.native_dropout.default:
        if not args[2]:
            return tracer.record(op, args, kwargs)
        out = tracer.run(op, args, kwargs)
        drawn = _drawn(tracer, out[1], Noise(op, recipe, kw, tensor_spec(out[1]), 1))
        kept = tracer.add(aten.mul.Tensor, (tracer.value_of(args[0]), drawn))
        p = args[1]
        scaled = tracer.add(aten.mul.Tensor, (Value(kept, None), 0.0 if p == 1 else 1.0 / (1.0 - p)))
        tracer.bind(out[0], Value(scaled, None))
        return out
    if op_info(op).writes:
        (target,) = written(op_info(op), args, kwargs)
        with tracer.paused():
            fresh = tracer.faked(target).detach().clone(memory_format=torch.preserve_format)
        _drawn(tracer, fresh, Noise(op, recipe, kw, tensor_spec(target), None))
        with tracer, torch.no_grad():
            target.copy_(fresh)
        return target
    out = tracer.run(op, args, kwargs)
    _drawn(tracer, out, Noise(op, recipe, kw, tensor_spec(out), None))
    return out


def _drawn(tracer: Any, t: Tensor, noise: Noise) -> Any:
    """Let ``t`` be what ``noise`` gives at this place of the program, once, whoever reads it later."""
    return tracer.bind(t, Value(tracer.add(aten.alias.default, (noise,), grad=True), None))


def _spec_of(a: Any) -> Any:
    if isinstance(a, Tensor):
        return ("spec", *tensor_spec(a))
    return tuple(map(_spec_of, a)) if isinstance(a, (list, tuple)) else a
