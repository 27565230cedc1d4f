"""Reptile's outer gradient: the way back from where inner steps have come."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim

generator = torch.Generator().manual_seed(4)
XS, YS = torch.randn(3, 5, 6, 2, generator=generator), torch.randn(3, 5, 6, 1, generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


@pytest.mark.parametrize("window", [{"window": 1}, {}, {"slots": 2}, {"strategy": "full_tape"}], ids=str)
def test_the_mean_way_back_of_all_tasks(window: dict[str, Any]) -> None:
    net = network()
    inner = metaoptim.MetaAdam([net], lr=0.05)
    first = [p.detach().clone() for p in net.parameters()]
    for xs, ys in zip(XS, YS, strict=True):
        with metaoptim.SlidingWindow(offline=True, **window):
            for x, y in zip(xs, ys, strict=True):
                inner.step(F.mse_loss(net(x), y))
            metaoptim.reptile(net[0], net[2], scale=1 / len(XS))
    expected = [torch.zeros_like(p) for p in first]
    for xs, ys in zip(XS, YS, strict=True):
        own = network()
        plain = torch.optim.Adam(own.parameters(), lr=0.05)
        for x, y in zip(xs, ys, strict=True):
            plain.zero_grad()
            F.mse_loss(own(x), y).backward()
            plain.step()
        for total, before, after in zip(expected, first, own.parameters(), strict=True):
            total += (before - after.detach()) / len(XS)
    for p, before, way in zip(net.parameters(), first, expected, strict=True):
        assert torch.equal(p, before) and p.grad is not None and float(way.abs().max()) > 0.01
        torch.testing.assert_close(p.grad, way)


def test_where_it_has_no_meaning_it_is_refused_and_leaves_grad_as_it_is() -> None:
    net, other = network(), network()
    inner = metaoptim.MetaSGD([net], lr=0.1)

    def step() -> None:
        inner.step(F.mse_loss(net(XS[0, 0]), YS[0, 0]))

    with pytest.raises(metaoptim.WindowError, match="outside a window; call it at the end of a block"):
        metaoptim.reptile(net)
    with pytest.raises(TypeError, match="got Parameter, expected networks"):
        metaoptim.reptile(net[0].weight)  # type: ignore[arg-type, index]
    with metaoptim.SlidingWindow(offline=True):
        step()
        with pytest.raises(metaoptim.WindowError, match="reptile: no inner optimizer of this window trains"):
            metaoptim.reptile(other)
    with metaoptim.SlidingWindow():
        step()
        with pytest.raises(metaoptim.WindowError, match="online window"):
            metaoptim.reptile(net)

    @metaoptim.compile(backend="eager")
    def compiled(x: Tensor) -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            inner.step(net(x).square().mean())
            metaoptim.reptile(net)
            return net(x).square().mean()

    inner = metaoptim.MetaSGD([net], lr=0.1)
    with pytest.raises(metaoptim.WindowError, match=r"fills no \.grad"):
        compiled(XS[0, 0])
    assert all(p.grad is None for p in (*net.parameters(), *other.parameters()))


def test_a_step_towards_the_mean() -> None:
    net = network()
    start = copy.deepcopy(net.state_dict())
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, window=1):
        inner.step(F.mse_loss(net(XS[0, 0]), YS[0, 0]))
        there = {name: p.detach().clone() for name, p in net.named_parameters()}
        metaoptim.reptile(net)
    torch.optim.SGD(net.parameters(), lr=0.25).step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), 0.75 * start[name] + 0.25 * there[name])
