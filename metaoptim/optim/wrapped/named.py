"""The optimizers of `torch.optim` by name, each with torch's arguments and defaults; see `wrap` for how they are made.

Their docstrings go on with the arguments and an example, which are those of all: `wrap._REST_OF_DOC`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .wrap import Wrapped


class MetaAdamW(Wrapped, of=torch.optim.AdamW):
    """AdamW inside a window, as `torch.optim.AdamW` (Loshchilov & Hutter 2019, arXiv 1711.05101, Algorithm 2).

    m' = β₁ m + (1-β₁) g;  v' = β₂ v + (1-β₂) g²;  θ' = (1 - η λ) θ - η (m'/(1-β₁ᵗ)) / (sqrt(v'/(1-β₂ᵗ)) + eps).
    """


class MetaNAdam(Wrapped, of=torch.optim.NAdam):
    """Adam with Nesterov momentum, as `torch.optim.NAdam` (Dozat 2016).

    θ' = θ - η (μ' m'/(1 - Π μ μ') + (1-μ) g/(1 - Π μ)) / (sqrt(v'/(1-β₂ᵗ)) + eps), μ = β₁ (1 - 0.96^(ψ t) / 2).
    """


class MetaRAdam(Wrapped, of=torch.optim.RAdam):
    """Adam with a rectified variance, as `torch.optim.RAdam` (Liu et al. 2020, arXiv 1908.03265, Algorithm 2).

    θ' = θ - η r m'/(1-β₁ᵗ) · sqrt(1-β₂ᵗ)/(sqrt(v') + eps) from the step on at which ρ > 5, θ - η m'/(1-β₁ᵗ) before.
    """


class MetaAdamax(Wrapped, of=torch.optim.Adamax):
    """Adam with the infinity norm, as `torch.optim.Adamax` (Kingma & Ba 2015, arXiv 1412.6980, Algorithm 2).

    u' = max(β₂ u, |g| + eps);  θ' = θ - η m'/((1-β₁ᵗ) u').
    """


class MetaAdagrad(Wrapped, of=torch.optim.Adagrad):
    """Adagrad, as `torch.optim.Adagrad` (Duchi et al. 2011).

    s' = s + g²;  θ' = θ - η/(1 + (t-1) η_decay) · g/(sqrt(s') + eps).
    """


class MetaAdadelta(Wrapped, of=torch.optim.Adadelta):
    """Adadelta, as `torch.optim.Adadelta` (Zeiler 2012, arXiv 1212.5701, Algorithm 1).

    v' = ρ v + (1-ρ) g²;  d = g sqrt(u + eps)/sqrt(v' + eps);  u' = ρ u + (1-ρ) d²;  θ' = θ - η d.
    """


class MetaASGD(Wrapped, of=torch.optim.ASGD):
    """Averaged stochastic gradient descent, as `torch.optim.ASGD` (Polyak & Juditsky 1992).

    θ' = (1 - λ η_t) θ - η_t g;  a' = a + μ_t (θ' - a);  η_t = η/(1 + λ η t)^α;  μ_t = 1/max(1, t - t₀).
    The average a is the state "ax". The first step's η_t is η.
    """


class MetaRprop(Wrapped, of=torch.optim.Rprop):
    """Resilient backpropagation, as `torch.optim.Rprop` (Riedmiller & Braun 1993).

    θ' = θ - Δ' sign(g), where Δ grows by η⁺ while the sign of g stays, and shrinks by η⁻ when it changes. The sign has
    the derivative 0: meta-gradients flow through Δ (by lr and etas) and not through g.
    """


class MetaAdafactor(Wrapped, of=torch.optim.Adafactor):
    """Adafactor, as `torch.optim.Adafactor` (Shazeer & Stern 2018, arXiv 1804.04235, Algorithm 4).

    The second moment of a matrix is the product of its rows' and columns' means; θ' = θ - α u/max(1, rms(u)/d).
    """


class MetaMuon(Wrapped, of=torch.optim.Muon):
    """Muon for matrices, as `torch.optim.Muon` (Jordan et al. 2024).

    b' = μ b + (1-μ) g;  θ' = (1 - η λ) θ - η' NS(g + μ (b' - g)), where NS is the Newton-Schulz iteration towards the
    U Vᵀ of U S Vᵀ. torch runs the iteration in bfloat16, which costs a meta-gradient two or three digits;
    ``ns_dtype=torch.float32`` runs it in float32.
    """

    extra: ClassVar[dict[str, Any]] = {"ns_dtype": torch.bfloat16}
