"""Transforms of inner gradients, in front of any inner optimizer: clipping, decay, masks, scale, and one's own.

``transforms=[...]`` of a `MetaOptimizer` is applied in order to the gradients of each inner step, before its update.
Each is a `Transform`: a pure function, which is part of the step and differentiated with it, numbers that may be
learnt, and the parameters that it acts on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaoptim.runtime.windows.updates.transform import Apply, Mask, Transform

from .base.hyper import Number, check_non_negative

__all__ = [
    "Mask",
    "Transform",
    "centralize",
    "clip_global_norm",
    "clip_norm",
    "clip_value",
    "only",
    "scale",
    "weight_decay",
    "zero",
]

Hyper = dict[str, Any]


def scale(factor: Number, *, mask: Mask | None = None) -> Transform:
    """Gradients times a number: g' = c g.

    Args:
        factor: c; a tensor of one number, or of the shape of every gradient that it acts on.
        mask: parameters that it acts on, as of `Transform`.

    Example:
        >>> net, factor = torch.nn.Linear(2, 1), torch.tensor(0.5, requires_grad=True)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1, transforms=[metaoptim.transforms.scale(factor, mask="bias")])
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> factor.grad.shape
        torch.Size([])
    """
    return Transform(_scale, mask=mask, factor=factor)


def _scale(grads: list[Tensor], params: list[Tensor], hyper: Hyper) -> list[Tensor]:
    return [hyper["factor"] * g for g in grads]


def weight_decay(weight_decay: Number, *, mask: Mask | None = None) -> Transform:
    """Parameters added to their gradients, as the option of that name does: g' = g + λ θ.

    Args:
        weight_decay: λ.
        mask: parameters that it acts on, as of `Transform`: ``"*weight"`` leaves biases alone.

    Raises:
        ValueError: for a negative number.

    Example:
        >>> metaoptim.transforms.weight_decay(0.01, mask="*weight")
        weight_decay(weight_decay=0.01, mask='*weight')
    """
    check_non_negative(weight_decay=weight_decay)
    return Transform(_weight_decay, mask=mask, weight_decay=weight_decay)


def _weight_decay(grads: list[Tensor], params: list[Tensor], hyper: Hyper) -> list[Tensor]:
    return [g + hyper["weight_decay"] * p for g, p in zip(grads, params, strict=True)]


def centralize(*, mask: Mask | None = None) -> Transform:
    """Gradient centralization (Yong et al. 2020, arXiv 2004.01461, equation 1): g' = g - mean of g.

    The mean is taken over all dimensions but the first, that of the outputs; gradients with fewer than two dimensions
    stay as they are.

    Args:
        mask: parameters that it acts on, as of `Transform`.

    Example:
        >>> metaoptim.transforms.centralize()
        centralize()
    """
    return Transform(_centralize, mask=mask)


def _centralize(grads: list[Tensor], params: list[Tensor], hyper: Hyper) -> list[Tensor]:
    return [g - g.mean(tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g for g in grads]


def zero(mask: Mask) -> Transform:
    """Gradients replaced by zeros, by name: g' = 0.

    The parameters still take part in the update: momentum and the optimizer's own weight decay act on them.

    Args:
        mask: parameters whose gradients become 0, as of `Transform`.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1, transforms=[metaoptim.transforms.zero("bias")])
        >>> before = net.bias.item()
        >>> with metaoptim.SlidingWindow():
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        >>> net.bias.item() == before
        True
    """
    return Transform(_zero, mask=mask)


def _zero(grads: list[Tensor], params: list[Tensor], hyper: Hyper) -> list[Tensor]:
    return list(map(torch.zeros_like, grads))


def only(mask: Mask) -> Transform:
    """Gradients of all other parameters replaced by zeros: what `zero` does to those that the mask does not match.

    Args:
        mask: parameters whose gradients stay, as of `Transform`.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1, transforms=[metaoptim.transforms.only("weight")])
    """
    transform = zero(mask)
    transform.inverted = True
    return transform


def clip_value(clip_value: Number, *, mask: Mask | None = None) -> Transform:
    """Clip every entry, as `torch.nn.utils.clip_grad_value_`: g' = min(max(g, -c), c).

    Args:
        clip_value: c; a tensor of one number, or of the shape of every gradient that it acts on.
        mask: parameters that it acts on, as of `Transform`.

    Raises:
        ValueError: for a negative number.

    Example:
        >>> metaoptim.transforms.clip_value(1.0)
        clip_value(clip_value=1.0)
    """
    check_non_negative(clip_value=clip_value)
    return Transform(_clip_value, mask=mask, clip_value=clip_value)


def _clip_value(grads: list[Tensor], params: list[Tensor], hyper: Hyper) -> list[Tensor]:
    largest = hyper["clip_value"]
    return [torch.where(g.abs() > largest, g.sign() * largest, g) for g in grads]


def clip_norm(max_norm: Number, norm_type: float = 2.0, *, mask: Mask | None = None) -> Transform:
    """Clip the norm of each parameter's gradient by itself: g' = g min(1, c / (‖g‖ + 1e-6)).

    Args:
        max_norm: c, one number.
        norm_type: p of the p-norm.
        mask: parameters that it acts on, as of `Transform`.

    Raises:
        ValueError: for a negative number, or a tensor of several.

    Example:
        >>> metaoptim.transforms.clip_norm(1.0)
        clip_norm(max_norm=1.0)
    """
    _check_norm(max_norm, "of each parameter")
    return Transform(_clip_norm(float(norm_type)), mask=mask, max_norm=max_norm)


def clip_global_norm(
    max_norm: Number, norm_type: float = 2.0, error_if_nonfinite: bool = False, *, mask: Mask | None = None
) -> Transform:
    """Clip the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_`: g' = g min(1, c / (‖g‖ + 1e-6)).

    (Pascanu et al. 2013, arXiv 1211.5063, Algorithm 1.)

    Args:
        max_norm: c, one number.
        norm_type: p of the p-norm.
        error_if_nonfinite: raise `LossError` when the norm is not finite; ordinary windows only.
        mask: parameters that it acts on, as of `Transform`; the norm is that of their gradients.

    Raises:
        ValueError: for a negative number, or a tensor of several.

    Example:
        >>> net, max_norm = torch.nn.Linear(2, 1), torch.tensor(0.1, requires_grad=True)
        >>> clip = metaoptim.transforms.clip_global_norm(max_norm)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1, transforms=[clip])
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> max_norm.grad.shape
        torch.Size([])
    """
    _check_norm(max_norm, "of all parameters together")
    order = float(norm_type)
    transform = Transform(_clip_global_norm(order), mask=mask, max_norm=max_norm)
    if error_if_nonfinite:
        transform.check = _finite_norm(order)
    return transform


def _check_norm(max_norm: Number, of: str) -> None:
    check_non_negative(max_norm=max_norm)
    if isinstance(max_norm, Tensor) and max_norm.numel() != 1:
        raise ValueError(
            f"max_norm: got a tensor of shape {tuple(max_norm.shape)}, expected one number: the norm is that {of}"
        )


def _total(grads: Sequence[Tensor], order: float) -> Tensor:
    norms = [_norm(g, order) for g in grads]
    return _norm(torch.stack([n.to(norms[0].device) for n in norms]), order)


def _norm(of: Tensor, order: float) -> Tensor:
    return torch.linalg.vector_norm(of, order)  # pyright: ignore


def _clipped(g: Tensor, norm: Tensor, max_norm: Any) -> Tensor:
    return g * torch.clamp(max_norm / (norm + 1e-6), max=1.0).to(g.device)


# A norm's order is no tensor: one function for each, so that equal steps stay equal.


@functools.cache
def _clip_norm(order: float) -> Apply:
    def clip_norm(grads: list[Tensor], params: list[Tensor], hyper: Hyper) -> list[Tensor]:
        return [_clipped(g, _norm(g, order), hyper["max_norm"]) for g in grads]

    return clip_norm


@functools.cache
def _clip_global_norm(order: float) -> Apply:
    def clip_global_norm(grads: list[Tensor], params: list[Tensor], hyper: Hyper) -> list[Tensor]:
        total = _total(grads, order)
        return [_clipped(g, total, hyper["max_norm"]) for g in grads]

    return clip_global_norm


@functools.cache
def _finite_norm(order: float) -> Callable[[list[Tensor], Hyper], str | None]:
    def check(grads: list[Tensor], hyper: Hyper) -> str | None:
        norm = float(_total(grads, order))
        if math.isfinite(norm):
            return None
        return (
            f"the norm of the inner gradient is {norm} and error_if_nonfinite is set; fix the loss or clip without "
            "it"
        )

    return check
