"""What whole functions in form C compute beside their steps: random numbers, buffers, copies, running means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import Made, compare, leaf, mlp
from tables import into
from whole_functions import XS, YS, query, support

FUNCTIONS: dict[str, Callable[[], Made]] = {}
function = into(FUNCTIONS)


@function
def random_numbers() -> Made:
    """Drawn before the loop and used in it, in another order than drawn, and never."""
    net, w = mlp(), leaf()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp())
        shift = torch.randn(5, 3)
        with window(offline=True):
            for t in range(3):
                a, b = torch.randn(5, 3), torch.rand(5, 3)
                torch.randn(2)
                inner.step(F.mse_loss(net(XS[t] + shift * w + b), YS[t]) + net(a).mean())
            z = torch.empty(5, 3).uniform_() + torch.normal(torch.ones(5, 3), 0.5)
            return F.mse_loss(net(z), YS[5])

    return Made(of, [w, *net.parameters()])


@function
def minibatches_drawn_inside() -> Made:
    net, w = mlp(), leaf()
    weights = torch.linspace(-1, 1, 5).requires_grad_()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaAdam([net], lr=0.05)
        with window(offline=True):
            for _ in range(4):
                at = torch.randperm(5)[:3]
                row = (net(XS[0][at]) - YS[0][at]).square().mean(1)
                inner.step((row * weights[at].sigmoid()).sum() * w)
            return query(net)

    return Made(of, [w, weights, *net.parameters()])


@function
def ema_teacher() -> Made:
    """The teacher's weights in a dict, moved in place under no_grad."""
    net, w, decay = mlp(), leaf(), leaf(0.9)

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp())
        with window(offline=True):
            teacher = {n: p.detach().clone() for n, p in net.named_parameters()}
            for t in range(3):
                with torch.no_grad():
                    target = torch.func.functional_call(net, teacher, (XS[t],))
                inner.step(F.mse_loss(net(XS[t]), target) + support(net, t) * w)
                with torch.no_grad():
                    for n, p in net.named_parameters():
                        teacher[n].mul_(0.9).add_(p, alpha=0.1)
            return query(net) + 0.1 * decay * sum(v.sum() for v in teacher.values())

    return Made(of, [w, decay, *net.parameters()])


@function
def target_network_copied() -> Made:
    net, w = mlp(), leaf()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp())
        target = copy.deepcopy(net)
        with window(offline=True):
            for t in range(4):
                with torch.no_grad():
                    wanted = target(XS[t])
                inner.step(F.mse_loss(net(XS[t]), wanted) + support(net, t) * w)
                with torch.no_grad():
                    for p, q in zip(target.parameters(), net.parameters(), strict=True):
                        p.lerp_(q, 0.1)
                if t == 2:
                    target = copy.deepcopy(net)
            return query(net)

    return Made(of, [w, *net.parameters()])


@function
def ema_meta_parameter() -> Made:
    """A differentiable running mean of the weights."""
    net, w, decay = mlp(), leaf(), leaf(0.8)

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp())
        with window(offline=True):
            mean = [p * 1.0 for p in net.parameters()]
            for t in range(3):
                inner.step(support(net, t))
                mean = [decay * m + (1 - decay) * p for m, p in zip(mean, net.parameters(), strict=True)]
            names = [n for n, _ in net.named_parameters()]
            out = torch.func.functional_call(net, dict(zip(names, mean, strict=True)), (XS[6],))
            return F.mse_loss(out, YS[6])

    return Made(of, [w, decay, *net.parameters()])


@function
def several_changed_in_place_at_once() -> Made:
    net, w = mlp(), leaf()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp())
        with window(offline=True):
            for t in range(3):
                hs = [net(XS[t]), net(XS[t + 1])]
                torch._foreach_mul_(hs, 0.5)
                torch._foreach_add_(hs, [w * torch.ones(5, 2), w * YS[0]])
                inner.step((hs[0] * hs[1]).square().mean())
            return query(net)

    return Made(of, [w, *net.parameters()])


class _Memory(nn.Module):
    """A buffer that is written through a view only."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("memory", torch.full((4, 2), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x) + self.memory.mean(0)
        with torch.no_grad():
            self.memory[1] += 0.1 * out.mean(0)
        return out


@function
def buffer_written_through_a_view() -> Made:
    torch.manual_seed(0)
    net, w = _Memory(), leaf()
    inner = metaoptim.MetaSGD([net], lr=0.05)

    def of(window: Any) -> Tensor:
        with window():
            for t in range(3):
                inner.step(support(net, t) * w)
            return query(net)

    return Made(of, [w], lambda: [*net.parameters(), net.memory])


@function
def batch_norm_online() -> Made:
    torch.manual_seed(0)
    net, w = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), leaf()
    inner = metaoptim.MetaSGD([net], lr=0.1)

    def of(window: Any) -> Tensor:
        with window():
            for t in range(3):
                inner.step(support(net, t) * w)
            return query(net)

    return Made(of, [w], lambda: [*net.parameters(), *net.buffers()])


@function
def hook_on_a_carried_tensor() -> Made:
    net, w = mlp(), leaf()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp())
        with window(offline=True):
            h = torch.ones(5, 2)
            for t in range(3):
                out = net(XS[t])
                loss = F.mse_loss(out, YS[t]) * w + (out * h).mean()
                h = out.tanh()
                h.register_hook(lambda g: g * 3)
                inner.step(loss + h.square().mean())
            return query(net) + h.sum()

    return Made(of, [w, *net.parameters()])


WEIGHTS = torch.linspace(-1, 1, 5).requires_grad_()


@function
def dicts_closures_and_globals() -> Made:
    net = mlp()
    etas = {"lr": leaf(-2.0), "nested": [leaf(0.3), {"scale": leaf(1.1)}]}

    def loss(t: int) -> Tensor:
        row = (net(XS[t]) - YS[t] * etas["nested"][1]["scale"]).square().mean(1)
        return (row * WEIGHTS.sigmoid()).sum() * etas["nested"][0].exp()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=etas["lr"].exp())
        with window(offline=True):
            for t in range(3):
                inner.step(loss(t))
            return query(net)

    return Made(of, [etas["lr"], etas["nested"][0], etas["nested"][1]["scale"], WEIGHTS, *net.parameters()])


@function
def distributions() -> Made:
    """Their checks of arguments would look at values."""
    policy, beta = mlp(), leaf(0.1)
    actions = torch.tensor([0, 1, 1, 0, 1])

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([policy], lr=0.1)
        with window(offline=True):
            for t in range(3):
                d = torch.distributions.Categorical(logits=policy(XS[t]))
                inner.step(-(d.log_prob(actions) * YS[t, :, 0]).mean() - beta * d.entropy().mean())
            return query(policy)

    return Made(of, [beta, *policy.parameters()])


@function
def encoder_with_a_mask() -> Made:
    """It would look whether the mask is the causal one."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    net, w = nn.TransformerEncoder(layer, 2), leaf()
    mask, x = nn.Transformer.generate_square_subsequent_mask(5), torch.randn(2, 5, 4)

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with window(offline=True):
            for t in range(2):
                inner.step((net(x + t, mask) * w).sin().square().mean())
            return net(x, mask).square().mean()

    return Made(of, [w, *net.parameters()])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    compare(FUNCTIONS[name])
