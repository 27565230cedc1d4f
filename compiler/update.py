"""Υ, the optimizer's pure update, as a plan that runs on real tensors and traces into a StepGraph alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """Place of a hyper-parameter in the flat list of those that are tensors or may change from step to step."""

    at: int


@dataclass(frozen=True)
class Clip:
    """Clipping of the inner gradient to a total norm (`reset_grad_normalizer`)."""

    max_norm: Any
    norm_type: float


def clip_gradients(grads: Sequence[Tensor], max_norm: Any, norm_type: float) -> list[Tensor]:
    """g · min(1, max_norm / (‖g‖ + 1e-6)), over all of ``grads`` together (Pascanu et al. 2013, Algorithm 1)."""
    norms = [torch.linalg.vector_norm(g, norm_type) for g in grads]
    total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), norm_type)
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    return [g * scale.to(g.device) for g in grads]


@dataclass(frozen=True)
class UpdatePlan:
    """What the update does, but for the values it does it to.

    Attributes:
        update: pure ``(param, grad, state, hyper) -> (param', state')``.
        groups: per parameter group, name -> constant, `Slot`, or a tuple of these.
        group_of: per updated parameter, its group.
        states: per updated parameter, the names of the optimizer state it has before the step.
        clip: clipping of the gradients, or None.
        init: pure ``(param, hyper) -> state``, if the initial state depends on the parameter: part of the step then.
    """

    update: Callable[..., tuple[Tensor, State]]
    groups: tuple[tuple[tuple[str, Any], ...], ...]
    group_of: tuple[int, ...]
    states: tuple[tuple[str, ...], ...]
    clip: Clip | None = None
    init: Callable[..., State] | None = None

    @property
    def __name__(self) -> str:
        return self.update.__qualname__

    def __call__(
        self, thetas: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], slots: Sequence[Any]
    ) -> tuple[list[Tensor], list[State]]:
        """New parameters and new states."""

        groups = [{name: _fill(value, slots) for name, value in group} for group in self.groups]
        if self.clip is not None:
            grads = clip_gradients(grads, _fill(self.clip.max_norm, slots), self.clip.norm_type)
        new_thetas, new_states = [], []
        for theta, grad, state, group in zip(thetas, grads, states, self.group_of, strict=True):
            hyper = _matching(groups[group], theta)
            if self.init is not None and not state:
                state = self.init(theta, hyper)
            new, new_state = self.update(theta, grad, state, hyper)
            new_thetas.append(new if new.dtype == theta.dtype else new.to(theta.dtype))
            new_states.append(new_state)
        return new_thetas, new_states


def _fill(value: Any, slots: Sequence[Any]) -> Any:
    if isinstance(value, Slot):
        return slots[value.at]
    return tuple([_fill(v, slots) for v in value]) if isinstance(value, tuple) else value


def _matching(group: dict[str, Any], theta: Tensor) -> dict[str, Any]:
    # a 0-dim tensor does not promote tensors that have dimensions, but it does promote a 0-dim parameter
    if theta.dim():
        return group
    return {k: _cast(v, theta) for k, v in group.items()}


def _cast(value: Any, theta: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(theta.dtype)
    return tuple([_cast(v, theta) for v in value]) if isinstance(value, tuple) else value
