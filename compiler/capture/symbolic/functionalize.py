"""In-place operators in a captured function, written down as what they give to the tensors that share the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaoptim.errors import CaptureError

from ...ir.operators import BATCH_NORM, OpInfo, functional, written
from ...ir.step import again
from ...ir.tensors import tensor_spec
from ...ir.values import Value
from ..eager.recording import tensors_in

if TYPE_CHECKING:
    from .tracer import Tracer

aten = torch.ops.aten
_DETACH = aten.detach.default


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
    if (
        pure is not None
        and target is not None
        and args
        and args[0] is target
        and not kwargs.get("out")
        and (torch.is_grad_enabled() or target.is_leaf)  # otherwise its history stays, its values change
    ):
        if not target._is_view() and len(tracer.sharing(target)) <= 1:
            with tracer.paused():
                new = tracer.run(pure, _detached(tracer, args), _detached(tracer, kwargs))
            if isinstance(new, Tensor) and tensor_spec(new) == tensor_spec(target):
                # a fake of the same spec is as good after the write as before
                tracer.bind(
                    target, Value(tracer.add(pure, tracer.tokens(pure, args), tracer.token(kwargs)), None)
                )
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


def _detached(tracer: Tracer, a: Any) -> Any:
    if isinstance(a, Tensor):
        return tracer.fakes(_DETACH, (tracer.faked(a),), {})
    if isinstance(a, (list, tuple)):
        return type(a)(_detached(tracer, b) for b in a)
    return {k: _detached(tracer, v) for k, v in a.items()} if isinstance(a, dict) else a


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
    with (
        tracer,
        torch.no_grad(),
        torch.autocast(x.device.type, enabled=False),
    ):  # in a handler the mode is off
        x = x.detach()
        mean.copy_(torch.lerp(mean, x.mean(dims).to(mean.dtype), momentum))
        var.copy_(torch.lerp(var, x.var(dims, correction=1).to(var.dtype), momentum))
    return out
