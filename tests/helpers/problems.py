"""Networks and inner loops for the grids: values neither zero nor symmetric, every parameter its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracle import Problem


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        # one time step from a hidden state that is not zero: the grids run it tens of thousands of times
        x, h = x.flatten().split((6, 9))
        state = h[:8].view(1, 2, 4)
        states, _ = self.lstm(x.view(1, 2, 3), (state.tanh(), 0.5 * state))
        return self.head(states[-1]).mean(0).expand(5, 2)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


NETWORKS: dict[str, Any] = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
    "conv_bn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)),
        nn.Conv1d(1, 2, 2),
        nn.BatchNorm1d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 2),
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 2)),
    "lstm": _Lstm,
    "tied": _Tied,
    "unused": _Unused,
}

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("MetaSGD", {}),
    "momentum": ("MetaSGD", {"momentum": 0.8, "dampening": 0.1, "weight_decay": 0.02}),
    "adam": ("MetaAdam", {"betas": (0.8, 0.95)}),
    "amsgrad": ("MetaAdam", {"amsgrad": True, "weight_decay": 0.03, "betas": (0.8, 0.95)}),
    "rmsprop": ("MetaRMSprop", {"alpha": 0.9, "momentum": 0.5, "centered": True, "eps": 1e-3}),
}


def data(steps: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Batches for every step and the outer loss."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(steps + 1, 5, 3, generator=g), torch.randn(steps + 1, 5, 2, generator=g)


def problem(
    network: str,
    optimizer: str,
    steps: int,
    offline: bool,
    window: int | None = None,
    *,
    per_step: bool = False,
    carry: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Problem:
    """A regression inner loop with a learnt learning rate, a learnt loss weight and learnt, step-indexed targets."""
    xs, ys = (t.to(device, dtype) for t in data(steps))
    name, options = OPTIMIZERS[optimizer]

    def loss(net: Any, t: int, metas: dict[str, Tensor], carried: dict) -> Tensor:
        out = net(xs[t])
        value = F.mse_loss(out, ys[t] + metas["shift"][t % 3]) * (1 + 0.1 * t) * metas["weight"].sigmoid()
        if carry:
            if "h" in carried:
                value = value + 0.05 * (carried["h"] * out).sum()
            if t % 3 == 0:
                carried["h"] = out.tanh()
        return value

    def outer(net: Any, metas: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(net(xs[steps]), ys[steps]) + 0.1 * metas["weight"].square()

    def term(net: Any, t: int, metas: dict[str, Tensor]) -> Tensor:
        return (0.3 + 0.1 * t) * F.mse_loss(net(xs[steps]), ys[t])

    return Problem(
        build=lambda: NETWORKS[network]().to(device, dtype),
        optimizer=name,
        steps=steps,
        offline=offline,
        loss=loss,
        outer=outer,
        per_step=term if per_step else None,
        hyper=lambda metas: {"lr": metas["log_lr"].exp()},
        metas={
            "log_lr": torch.tensor(-2.6, dtype=dtype, device=device),
            "weight": torch.tensor(0.3, dtype=dtype, device=device),
            "shift": torch.tensor([[0.2, -0.1], [0.05, 0.3], [-0.2, 0.1]], dtype=dtype, device=device),
        },
        window=window,
        allow_unused=network == "unused",
        options=options,
    )
