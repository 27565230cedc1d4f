"""Parameters and buffers of unusual kinds in a window: right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from edges import STEPS, STRATEGIES, XS, YS, leaf, loss_of, network

# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", STRATEGIES, ids=["all", "slots", "full_tape"])
def test_assigning_data_is_a_history_cut(options: dict) -> None:
    net, lr = network(), leaf(0.1)
    inner = metaoptim.MetaSGD([net], lr=lr)
    values = torch.randn(sum(p.numel() for p in net.parameters()), generator=torch.Generator().manual_seed(4))
    with metaoptim.SlidingWindow(**options):
        inner.step(loss_of(net, 0))
        nn.utils.vector_to_parameters(values, net.parameters())
        inner.step(loss_of(net, 1))
        loss_of(net, 2).backward()
    start = network()
    nn.utils.vector_to_parameters(values.clone(), start.parameters())
    own = leaf(0.1)
    theta = dict(start.named_parameters())
    grads = torch.autograd.grad(loss_of(start, 1), list(theta.values()))
    theta = {n: p - own * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    F.mse_loss(torch.func.functional_call(start, theta, (XS[2],)), YS[2]).backward()
    torch.testing.assert_close(lr.grad, own.grad)
    for p, q in zip(net.parameters(), theta.values(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("options", STRATEGIES, ids=["all", "slots", "full_tape"])
@pytest.mark.parametrize("act", ["half", "freeze", "flag"])
def test_converting_or_freezing_parameters_inside_is_refused(act: str, options: dict) -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    with pytest.raises(metaoptim.WindowError, match=r"outside the window|before the window"):
        with metaoptim.SlidingWindow(**options):
            inner.step(loss_of(net, 0))
            if act == "half":
                net.half()
            elif act == "freeze":
                net[0].requires_grad_(False)
            else:
                net[0].weight.requires_grad = False
    assert net[0].weight.dtype == torch.float64 and net[0].weight.requires_grad


@pytest.mark.parametrize("options", STRATEGIES, ids=["all", "slots", "full_tape"])
def test_parameters_unfrozen_in_the_window_train(options: dict) -> None:
    results = []
    for early in (True, False):
        net, lr = network(), leaf(0.1)
        net[0].requires_grad_(early)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(STEPS):
                net[0].requires_grad_()
                inner.step(loss_of(net, t))
            loss_of(net, STEPS).backward()
        results.append([p.grad for p in net.parameters()] + [lr.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_groups_take_networks() -> None:
    net, other = network(), network()
    inner = metaoptim.MetaSGD([net])
    with pytest.raises(ValueError, match="in none of the networks; give the network"):
        inner.add_param_group({"params": list(other.parameters())})
    with metaoptim.SlidingWindow(offline=True):
        inner.step(loss_of(net, 0))
        inner.add_param_group({"params": other, "lr": 0.2})
        inner.step(loss_of(net, 1) + loss_of(other, 1))
        (loss_of(net, 2) + loss_of(other, 2)).backward()
    assert len(inner.param_groups) == 2 and all(p.grad is not None for p in other.parameters())


# -- buffers ----------------------------------------------------------------------------------------------------------


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


def _norm_loss(net: nn.Module, t: int, order: str) -> Tensor:
    total: Any = 0.0
    for i, mode in enumerate(order):
        net.train(mode == "t")
        total = total + (1 + 0.5 * i) * F.mse_loss(net(XS[t] * (1 + 0.1 * i)), YS[t])
    return total


def _norm_oracle(net: Any, lr: Tensor, order: str) -> Tensor:
    """The statistics as values: every use has its own."""
    theta = {n: p * 1.0 for n, p in net.named_parameters()}
    mean, var = net.norm.running_mean.clone(), net.norm.running_var.clone()

    def forward(x: Tensor, mode: str) -> Tensor:
        nonlocal mean, var
        h = F.linear(x, theta["first.weight"], theta["first.bias"])
        if mode == "t":
            m, v = h.mean(0), h.var(0, unbiased=False)
            mean = 0.7 * mean + 0.3 * m.detach()
            var = 0.7 * var + 0.3 * h.detach().var(0)
        else:
            m, v = mean, var
        h = (h - m) / (v + 1e-5).sqrt() * theta["norm.weight"] + theta["norm.bias"]
        return F.linear(h.tanh(), theta["last.weight"], theta["last.bias"])

    for t in range(STEPS):
        total: Any = 0.0
        for i, mode in enumerate(order):
            total = total + (1 + 0.5 * i) * F.mse_loss(forward(XS[t] * (1 + 0.1 * i), mode), YS[t])
        grads = torch.autograd.grad(total, list(theta.values()), create_graph=True)
        theta = {n: p - lr * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    return F.mse_loss(forward(XS[STEPS], "e"), YS[STEPS])


@pytest.mark.parametrize("options", STRATEGIES, ids=["all", "slots", "full_tape"])
@pytest.mark.parametrize("order", ["et", "te", "etet"])
def test_batch_norm_in_both_modes_within_one_loss(order: str, options: dict) -> None:
    torch.manual_seed(1)
    net, lr = _Norm(), leaf(0.1)
    own = list(net.parameters())
    expected = torch.autograd.grad(_norm_oracle(net, lr, order), [*own, lr])
    inner = metaoptim.MetaSGD([net], lr=lr)
    before = net.norm.running_mean.clone()
    with metaoptim.SlidingWindow(offline=True, **options):
        for t in range(STEPS):
            inner.step(_norm_loss(net, t, order))
        net.eval()
        outer = loss_of(net, STEPS)
        net.train()
        net(XS[0])  # overwrites the statistics that autograd has saved for the outer loss
    for g, e in zip(torch.autograd.grad(outer, [*own, lr]), expected, strict=True):
        torch.testing.assert_close(g, e)
    assert torch.equal(net.norm.running_mean, before)


def test_online_batch_norm_statistics_that_were_renewed_are_kept() -> None:
    torch.manual_seed(1)
    net = _Norm()
    own = net.norm.running_mean
    plain = _Norm()
    plain.load_state_dict(net.state_dict())
    inner = metaoptim.MetaSGD([net], lr=0.1)
    outer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with metaoptim.SlidingWindow():
        for t in range(STEPS):
            inner.step(_norm_loss(net, t, "te"))
    for t in range(STEPS):
        outer.zero_grad()
        _norm_loss(plain, t, "te").backward()
        outer.step()
    assert net.norm.running_mean is own
    for (name, a), b in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


class _Views(nn.Module):
    """Two buffers in one piece of memory, changed through either."""

    whole: Tensor
    part: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.register_buffer("whole", torch.tensor([0.5, 1.0, 2.0]))
        self.register_buffer("part", self.whole[:2])

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x) + self.part + self.whole.sum()
        with torch.no_grad():
            self.whole.mul_(0.9)
            self.part.add_(0.1)
        return out


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
def test_buffers_that_share_memory_keep_sharing_it(offline: bool) -> None:
    net, plain = _Views(), _Views()
    before = net.whole.clone()
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=offline):
        for t in range(STEPS):
            inner.step(loss_of(net, t))
        seen = net.whole.clone()
    for t in range(STEPS):
        plain(XS[t])
    torch.testing.assert_close(seen, plain.whole)
    torch.testing.assert_close(net.whole, before if offline else plain.whole)
    assert torch.equal(net.part, net.whole[:2])


def test_buffer_that_shares_memory_with_a_parameter_is_refused() -> None:
    net = nn.Linear(3, 2)
    net.register_buffer("reference", net.weight.detach())
    inner = metaoptim.MetaSGD([net])
    with pytest.raises(metaoptim.WindowError, match="'reference' shares memory with parameter 'weight'"):
        with metaoptim.SlidingWindow():
            inner.step(net(XS[0]).sum())


class _Growing(nn.Module):
    history: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.register_buffer("history", torch.zeros(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        self.history = torch.cat([self.history, out.detach().mean(0, keepdim=True)])
        return out + self.history.mean(0)


def test_online_exit_with_a_buffer_that_grew() -> None:
    net, lr = _Growing(), leaf(0.1)
    inner = metaoptim.MetaSGD([net], lr=lr)
    with metaoptim.SlidingWindow():
        for t in range(STEPS):
            inner.step(loss_of(net, t))
        loss_of(net, STEPS).backward()
    assert net.history.shape == (STEPS + 2, 2) and lr.grad is not None


@pytest.mark.parametrize("options", STRATEGIES, ids=["all", "slots", "full_tape"])
def test_pickup_step_takes_buffers_along_and_aliases_nothing(options: dict) -> None:
    torch.manual_seed(1)
    net = _Norm()
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.9)
    with metaoptim.SlidingWindow(pickup_step=1, **options):
        inner.step(loss_of(net, 0))
        inner.step(loss_of(net, 1))
        mean, weight = net.norm.running_mean.clone(), net.last.weight.detach().clone()
        with torch.no_grad():
            net.last.weight.mul_(3)
        inner.step(loss_of(net, 2))
    assert torch.equal(net.norm.running_mean, mean) and torch.equal(net.last.weight, weight)
