"""Update rules for `MetaLearned`: a small network for every entry of a parameter, or for every parameter tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base.hyper import safe_sqrt

_TIMES = tuple(float(t) for k in range(5) for t in (10**k, 3 * 10**k))  # of the embedding of the step


class _Rule(nn.Module):
    """Adam's direction, and what it is made of at several time scales."""

    def __init__(
        self,
        hidden: int = 32,
        decays: Sequence[float] = (0.9, 0.5, 0.99, 0.999),
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        for name, values in (("decays", decays), ("beta2", [beta2])):
            if not values or not all(0 <= v < 1 for v in values):
                raise ValueError(f"{name}: got {values}, expected numbers in [0, 1)")
        self.decays, self.beta2, self.eps = tuple(decays), beta2, eps
        self._build(hidden)

    def _build(self, hidden: int) -> None:
        """Make the networks; what they give at first makes the rule as Adam."""

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Zero moments and step count."""
        zeros = torch.zeros_like(param, dtype=self._dtype(param))
        moments = {f"exp_avg_{k}": zeros.clone() for k in range(len(self.decays))}
        return {"step": torch.zeros((), dtype=torch.float32), "exp_avg_sq": zeros, **moments}

    def _dtype(self, param: Tensor) -> torch.dtype:
        return torch.promote_types(param.dtype, next(self.parameters()).dtype)

    def _moved(
        self, grad: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor], Tensor, dict[str, Tensor]]:
        """The step count, the means of the gradient and the mean square (neither biased), and the new state."""
        step = state["step"] + 1
        count = step.detach().to(torch.float64)  # nothing is learnt through it
        square = self.beta2 * state["exp_avg_sq"] + (1 - self.beta2) * grad * grad
        new = {"step": step, "exp_avg_sq": square}
        means: list[Tensor] = []
        for k, decay in enumerate(self.decays):
            mean = new[f"exp_avg_{k}"] = decay * state[f"exp_avg_{k}"] + (1 - decay) * grad
            means.append(mean / (1 - decay**count))
        return count, means, square / (1 - self.beta2**count), new


class PerParameterRule(_Rule):
    """An update rule for `MetaLearned`: one small network for every entry of every parameter.

    Its kind of network and features are those of Metz et al. 2020 (arXiv 2009.11243) and 2022 (arXiv 2203.11860).

    d = eˢ (m̂₀ / (√v̂ + eps) + a), where (a, s) = network(features) entry by entry, m̂ₖ are the means of the gradient with
    decays[k], and v̂ is the mean of its square. The last layer begins at zero, and the rule as Adam.

    The features of an entry are: the gradient over the root of its mean square in the tensor; each m̂ₖ over √v̂ + eps; v̂
    and the parameter, by their scale; the parameter over the root of its mean square; the scales of gradient and
    parameter in the tensor; tanh(t / τ) of the step t for ten τ from 1 to 30,000. Scales are logarithms.

    Args:
        hidden: width of the network's two hidden layers.
        decays: of the means of the gradient; the first is Adam's β₁.
        beta2: decay of the mean square.
        eps: added to the denominator.

    Attributes:
        network: maps ``[*shape, features]`` to ``[*shape, 2]``; a subclass may put in another.
        features: how many features an entry has.

    Raises:
        ValueError: for decays outside [0, 1).

    Example:
        >>> net, rule = torch.nn.Linear(2, 1), metaoptim.PerParameterRule(hidden=8)
        >>> inner = metaoptim.MetaLearned([net], rule, lr=0.1)
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> rule.network[-1].weight.grad.shape
        torch.Size([2, 8])
    """

    def _build(self, hidden: int) -> None:
        self.features = len(self.decays) + 6 + len(_TIMES)
        self.network = nn.Sequential(
            nn.Linear(self.features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2),
        )
        _begin_at_zero(self.network[-1])

    def forward(
        self, param: Tensor, grad: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(d, state') of one parameter tensor."""
        dtype, weight = self._dtype(param), next(self.parameters())
        param, grad = param.to(dtype), grad.to(dtype)
        count, means, square, new = self._moved(grad, state)
        root = safe_sqrt(square) + self.eps
        directions = [mean / root for mean in means]
        scale, scale_of_grad = _rms(param), _rms(grad)
        entries = [
            grad / scale_of_grad,
            *directions,
            _log(square) / 2,
            _log(param.square()) / 2,
            param / scale,
        ]
        tensor = torch.stack([scale.log() / 10, scale_of_grad.log() / 10]).to(weight.dtype)
        of_all = torch.cat([tensor, _embedded(count, weight)]).expand(*param.shape, -1)
        features = torch.cat([torch.stack(entries, -1).to(weight.dtype), of_all], -1)
        added, log_scale = self.network(features).unbind(-1)
        return log_scale.exp() * (directions[0] + added), new


class PerTensorRule(_Rule):
    """An update rule for `MetaLearned`: a recurrent network sets the step size and the momentum of each tensor.

    (The tensor level of Wichrowska et al. 2017, arXiv 1703.04813, section 3.)

    d = eˢ Σₖ wₖ m̂ₖ / (√v̂ + eps), where (s, w) = (0, 1, 0, ..) + output(h'), h' = cell(statistics, h) of the tensor, m̂ₖ
    are the means of the gradient with decays[k], and v̂ is the mean of its square. The output begins at zero, and the
    rule as Adam. It costs little, however large the tensor.

    The statistics are: the scales of gradient, parameter and each m̂ₖ; the cosines of the gradient and each m̂ₖ; the
    logarithm of the number of entries, and the number of dimensions; tanh(t / τ) of the step t for ten τ from 1 to
    30,000. Scales are logarithms of roots of mean squares.

    Args:
        hidden: size of the hidden state h, which begins at zero.
        decays: of the means of the gradient; the first is Adam's β₁.
        beta2: decay of the mean square.
        eps: added to the denominator.

    Raises:
        ValueError: for decays outside [0, 1).

    Example:
        >>> net, rule = torch.nn.Linear(2, 1), metaoptim.PerTensorRule(hidden=8)
        >>> inner = metaoptim.MetaLearned([net], rule, lr=0.1)
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> rule.output.weight.grad.shape
        torch.Size([5, 8])
    """

    def _build(self, hidden: int) -> None:
        self.cell = nn.GRUCell(2 * len(self.decays) + 4 + len(_TIMES), hidden)
        self.output = nn.Linear(hidden, len(self.decays) + 1)
        _begin_at_zero(self.output)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Zero moments, step count and hidden state."""
        hidden = self.output.weight.new_zeros(self.cell.hidden_size)
        return {**super().init_state(param), "hidden": hidden}

    def forward(
        self, param: Tensor, grad: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(d, state') of one parameter tensor."""
        dtype, weight = self._dtype(param), next(self.parameters())
        param, grad = param.to(dtype), grad.to(dtype)
        count, means, square, new = self._moved(grad, state)
        scales = [_rms(t) for t in (grad, param, *means)]
        cosines = [_mean(grad * m) / (scales[0] * s) for m, s in zip(means, scales[2:], strict=True)]
        size = grad.new_tensor([math.log(max(param.numel(), 1)) / 10, param.dim() / 4])
        statistics = [torch.stack(scales).log() / 10, torch.stack(cosines), size]
        x = torch.cat([*(s.to(weight.dtype) for s in statistics), _embedded(count, weight)])
        hidden = new["hidden"] = self.cell(x, state["hidden"].to(weight.dtype))
        log_scale, *mix = self.output(hidden).to(dtype).unbind()
        mean = sum((w * m for w, m in zip(mix, means, strict=True)), start=means[0])
        return log_scale.exp() * mean / (safe_sqrt(square) + self.eps), new


def _begin_at_zero(layer: nn.Module) -> None:
    for p in layer.parameters():
        nn.init.zeros_(p)


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)


def _rms(x: Tensor) -> Tensor:
    """The root of the mean square, with all its derivatives at 0."""
    return (_mean(x.square()) + 1e-16).sqrt()


def _log(square: Tensor) -> Tensor:
    """The logarithm of a square, in tens."""
    return (square + 1e-16).log() / 10


def _embedded(count: Tensor, like: Tensor) -> Tensor:
    """The step number's features, with the dtype and device of ``like``."""
    return torch.tanh(count / count.new_tensor(_TIMES)).to(like)
