"""Norms that torch differentiates wrongly: what stands for their operators where a derivative is differentiated.

Torch's formula for the second derivative of layer norm and batch norm takes mean and variance for constants. So the
third is wrong: of layer norm silently (up to torch 2.15), of batch norm silently in torch 2.13, while 2.14 and later
raise. It matters to losses that hold a derivative themselves (gradient penalties, windows inside windows), where the
first derivative is a call of the loss. Of weight norm the second derivative is wrong already, which every meta-gradient
takes. In the formulas below all statistics are functions of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from metaoptim.errors import CaptureError

from ..ir.operators import BATCH_NORM, PLAIN_NORM, aten

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def layer_norm_gradients(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> Gradients:
    """What ``native_layer_norm_backward`` gives, as a function of ``x`` at every order."""
    dims = [*range(x.dim() - len(shape), x.dim())]
    wide = x.to(rstd.dtype)
    variance = wide.var(dims, correction=0, keepdim=True)
    eps = (rstd.pow(-2) - variance).detach()  # which the operator is not told
    inverse = (variance + eps).rsqrt()
    normed = (wide - wide.mean(dims, keepdim=True)) * inverse
    return _gradients(grad, x, weight, normed, inverse, dims, [*range(dims[0])], mask, True)


def batch_norm_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    training: bool,
    eps: float,
    mask: Sequence[bool],
) -> Gradients:
    """What ``native_batch_norm_backward`` gives, likewise."""
    dims, channels = [d for d in range(x.dim()) if d != 1], [1, -1, *[1] * (x.dim() - 2)]
    known = invstd if invstd is not None and invstd.numel() else running_var
    wide = x.to(x.dtype if known is None else known.dtype)
    if training:
        variance, middle = wide.var(dims, correction=0, keepdim=True), wide.mean(dims, keepdim=True)
    else:
        assert running_mean is not None and running_var is not None
        variance, middle = running_var.view(channels), running_mean.view(channels)
    inverse = (variance + eps).rsqrt()
    normed = (wide - middle) * inverse
    weight = None if weight is None else weight.view(channels)
    return _gradients(grad, x, weight, normed, inverse, dims, dims, mask, training)


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    normed: Tensor,
    inverse: Tensor,
    over: list[int],
    others: list[int],
    mask: Sequence[bool],
    training: bool,
) -> Gradients:
    """Gradients by the input (statistics are taken ``over`` its dimensions), weight and bias (sums over ``others``)."""
    wide = grad.to(normed.dtype)
    given = wide if weight is None else wide * weight.to(normed.dtype)
    by_input = given
    if training:
        by_input = given - given.mean(over, keepdim=True) - normed * (given * normed).mean(over, keepdim=True)
    of = grad.dtype if weight is None else weight.dtype
    return (
        (by_input * inverse).to(x.dtype) if mask[0] else None,
        _summed(wide * normed, others).to(of) if mask[1] else None,
        _summed(wide, others).to(of) if mask[2] else None,
    )


def _summed(t: Tensor, over: list[int]) -> Tensor:
    return t.sum(over) if over else t


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """What ``_weight_norm_interface`` gives, w = g v / ‖v‖ and the norms, over all dimensions but ``dim``."""
    norms = v.square().sum([d for d in range(v.dim()) if d != dim % v.dim()], keepdim=True).sqrt()
    return v * (g / norms), norms


def _of_training(x: Tensor, grad: Tensor, *rest: Any) -> Gradients:
    """Other libraries' ``batch_norm_backward``, in training mode alone."""
    weight, running_mean, running_var, mean, invstd, eps = rest[:6]
    all_three = (True, True, True)
    return batch_norm_gradients(
        grad, x, weight, running_mean, running_var, mean, invstd, True, eps, all_three
    )


#: What stands for an operator where a derivative of a step is differentiated.
FORMULAS: dict[Any, Callable[..., tuple[Tensor | None, ...]]] = {
    aten._weight_norm_interface.default: weight_norm,
    aten.native_layer_norm_backward.default: layer_norm_gradients,
    aten.native_batch_norm_backward.default: batch_norm_gradients,
    aten.cudnn_batch_norm_backward.default: _of_training,
    aten.miopen_batch_norm_backward.default: _of_training,
}
_NORMS = {aten.native_layer_norm.default, aten._weight_norm_interface.default, *BATCH_NORM}


def check_norms(graph: fx.Graph) -> None:
    """Raise for a loss that reads the statistics of a norm otherwise than for its first derivative.

    Autograd takes them for constants. So do a second derivative of the norm (of weight norm the first) and a derivative
    in forward mode, whose gradients are wrong for it, the inner one too.
    """
    for node in graph.nodes:
        if node.target in _NORMS:
            statistics = [part for part in node.users if part.args[1] != 0]
            if any(user.target not in FORMULAS for part in statistics for user in part.users):
                raise CaptureError(
                    f"the loss reads the statistics that {node.target} gives beside its result, which PyTorch takes "
                    "for constants. So it does within derivatives of the norm that the loss holds, whose gradients are "
                    f"wrong. Write the norm in plain operators: {PLAIN_NORM}"
                )
