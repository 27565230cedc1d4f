"""Updates, transforms and hooks that read a global: a step is that of its value then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim

FACTOR = 1.0
XS = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(3))


def factor() -> float:
    return FACTOR


class Scaled(metaoptim.MetaOptimizer):
    """Its update reads a global by way of another function."""

    def __init__(self, networks: Any) -> None:
        super().__init__(networks, {"lr": 0.3})

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    @staticmethod
    def update(param: Tensor, grad: Tensor, state: dict, hyper: dict) -> tuple[Tensor, dict]:
        return param - hyper["lr"] * factor() * grad, {}


def scaled(grads: list[Tensor], params: list[Tensor], hyper: dict[str, Any]) -> list[Tensor]:
    return [FACTOR * g for g in grads]


def hook(grad: Tensor) -> Tensor:
    return grad * FACTOR


def optimizer_of(kind: str, net: nn.Module) -> metaoptim.MetaOptimizer:
    if kind == "update":
        return Scaled([net])
    if kind == "hook":
        net[2].weight.register_hook(hook)  # type: ignore[index, union-attr, operator]
    return metaoptim.MetaSGD([net], lr=0.3, transforms=[scaled] if kind == "transform" else [])


@pytest.mark.parametrize("middle", [False, True], ids=["between windows", "between steps"])
@pytest.mark.parametrize("kind", ["update", "transform", "hook"])
def test_a_global_that_changes(kind: str, middle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[Tensor]] = []
    for strategy in ("auto", "full_tape"):
        monkeypatch.setitem(globals(), "FACTOR", 1.0)
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        inner, by = optimizer_of(kind, net), next(iter(net.parameters()))
        results: list[Tensor] = []
        for turn in range(2):
            with metaoptim.SlidingWindow(offline=True, strategy=strategy):
                for i, x in enumerate(XS):
                    if turn and i == (3 if middle else 0):
                        monkeypatch.setitem(globals(), "FACTOR", 3.0)
                    inner.step(net(x).square().mean() + net(x).sin().mean())
                loss = net(XS[0]).square().mean()
                results += [loss.detach(), *torch.autograd.grad(loss, by)]
        found.append(results)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert not torch.allclose(found[0][1], found[0][3], rtol=1e-3)
