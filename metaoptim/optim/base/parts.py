"""Complex parameters: an update acts on their real and imaginary parts, as those of torch.optim do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def by_parts(
    update: Callable[..., tuple[Tensor, State]],
    param: Tensor,
    grad: Tensor,
    state: State,
    hyper: dict[str, Any],
) -> tuple[Tensor, State]:
    """``update`` of a complex parameter, as one of real tensors with a last dimension of two."""
    real = {name: parts(v) for name, v in state.items()}
    new, after = update(parts(param), parts(grad), real, {k: _spread(v) for k, v in hyper.items()})
    states = {k: torch.view_as_complex(v) if real.get(k) is not state.get(k) else v for k, v in after.items()}
    return torch.view_as_complex(new), states


def parts(t: Tensor) -> Tensor:
    """A complex tensor as a real one with a last dimension of two; others as they are."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _spread(hyper: Any) -> Any:
    """A hyper-parameter that is a tensor of the parameter's shape holds for both parts."""
    if isinstance(hyper, tuple):
        return tuple(map(_spread, hyper))
    return hyper.unsqueeze(-1) if isinstance(hyper, Tensor) and hyper.dim() else hyper
