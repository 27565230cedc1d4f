"""Groups by parameter: options for each, and inner and meta-parameters in one module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import leaf, mlp

torch.manual_seed(5)
X, Y = torch.randn(6, 3), torch.randn(6, 2)


def by_hand(
    net: nn.Module, trained: dict[str, Any], offline: bool, steps: int, decay: dict[str, float]
) -> Tensor:
    """The outer loss after steps of SGD with a learning rate per parameter, on the tape."""
    theta = dict(net.named_parameters())
    for name in trained:
        theta[name] = theta[name] * 1.0 if offline else theta[name].detach().requires_grad_()

    def loss() -> Tensor:
        return F.mse_loss(torch.func.functional_call(net, theta, (X,)), Y)

    for _ in range(steps):
        grads = torch.autograd.grad(loss(), [theta[n] for n in trained], create_graph=True)
        for (name, rate), g in zip(trained.items(), grads, strict=True):
            theta[name] = theta[name] - rate * (g + decay.get(name, 0.0) * theta[name])
    return loss()


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
@pytest.mark.parametrize("form", ["A", "B", "C", "tape"])
@pytest.mark.parametrize("which", ["meta-sgd", "bias only", "no decay on biases"])
def test_some_parameters_each_with_its_own_options(offline: bool, form: str, which: str) -> None:
    def made() -> tuple:
        net = mlp()
        names = [n for n, _ in net.named_parameters() if which != "bias only" or "bias" in n]
        rates = {n: torch.full_like(net.get_parameter(n), 0.1 + 0.02 * k) for k, n in enumerate(names)}
        return net, {n: r.requires_grad_() for n, r in rates.items()}

    net, rates = made()
    decay = {n: 0.3 for n in rates if "weight" in n} if which == "no decay on biases" else {}
    expected_net, expected_rates = made()
    by_hand(expected_net, expected_rates, offline, 3, decay).backward()
    groups = [
        {"params": [net.get_parameter(n)], "lr": r, "weight_decay": decay.get(n, 0)} for n, r in rates.items()
    ]
    inner = metaoptim.MetaSGD(groups, networks=[net])

    def step() -> None:
        inner.step(F.mse_loss(net(X), Y))

    def whole(net: nn.Module) -> Tensor:
        with metaoptim.SlidingWindow(offline=offline, strategy="full_tape" if form == "tape" else "auto"):
            for _ in range(3):
                step()
            return F.mse_loss(net(X), Y)

    if form == "B":
        step = metaoptim.compile(step, backend="eager")
    if form == "C":
        whole = metaoptim.compile(whole, backend="eager")
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    whole(net).backward()
    assert any(r.grad.abs().max() > 1e-3 for r in rates.values())
    for name, p in net.named_parameters():
        e = expected_net.get_parameter(name).grad
        assert (p.grad is None) == (e is None) == (not offline and name in rates)
        if e is not None:
            torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-12)
        assert torch.equal(p, before[name]) == (offline or name not in rates)
    for name, rate in rates.items():
        torch.testing.assert_close(rate.grad, expected_rates[name].grad, rtol=1e-9, atol=1e-12)


def test_adapters_beside_a_trunk_that_other_optimizers_train() -> None:
    """Two optimizers share a module, each with parameters of its own."""

    def run(strategy: str) -> list[Tensor]:
        net, lr = mlp(), leaf(0.1)
        named = dict(net.named_parameters())
        biases = metaoptim.MetaAdam(
            [{"params": [p for n, p in named.items() if "bias" in n]}], lr=lr, networks=[net]
        )
        head = metaoptim.MetaSGD([named["2.weight"]], lr=lr, networks=[net])
        with metaoptim.SlidingWindow(offline=True, strategy=strategy):
            for _ in range(2):
                first, second = F.mse_loss(net(X), Y), net(X).square().mean()
                biases.step(first)
                head.step(second)
            F.mse_loss(net(X), Y).backward()
        return [*(p.grad for p in net.parameters()), lr.grad]

    for got, expected in zip(run("auto"), run("full_tape"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "RMSprop"])
def test_states_go_to_torch_and_back(kind: str, named: bool) -> None:
    ours, theirs = mlp(), mlp()

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        found = dict(net.named_parameters())
        parts = [{n: p for n, p in found.items() if ("bias" in n) is bias} for bias in (True, False)]
        return [
            {"params": list(part.items()) if named else list(part.values()), "weight_decay": 0.1 * k}
            for k, part in enumerate(parts)
        ]

    options: dict[str, Any] = {"momentum": 0.9} if kind != "Adam" else {}
    inner = getattr(metaoptim, f"Meta{kind}")(groups(ours), lr=0.05, networks=[ours], **options)
    reference = getattr(torch.optim, kind)(groups(theirs), lr=0.05, **options)

    def both(ours: Any, inner: Any, theirs: Any, reference: Any) -> None:
        with metaoptim.SlidingWindow():
            for _ in range(2):
                inner.step(F.mse_loss(ours(X), Y))
        for _ in range(2):
            reference.zero_grad()
            F.mse_loss(theirs(X), Y).backward()
            reference.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q)

    both(ours, inner, theirs, reference)
    state, other = copy.deepcopy(inner.state_dict()), copy.deepcopy(reference.state_dict())
    inner.load_state_dict(other)
    reference.load_state_dict(state)
    both(ours, inner, theirs, reference)
    assert ("param_names" in inner.param_groups[0]) is named


def test_networks_alone_and_groups_put_in_later() -> None:
    net, other = mlp(), mlp(1)
    assert len(metaoptim.MetaSGD(networks=[net, other]).param_groups) == 2
    inner = metaoptim.MetaSGD(dict(list(net.named_parameters())[:2]), networks=[net])
    assert inner.param_groups[0]["param_names"] == ["0.weight", "0.bias"]
    inner = metaoptim.MetaSGD({"params": net.named_parameters()}, networks=[net])
    inner = metaoptim.MetaSGD([net[0].weight], networks=[net], lr=0.1)
    inner.add_param_group({"params": net[0].bias, "lr": 0.2})
    inner.add_param_group(other)
    with metaoptim.SlidingWindow(offline=True):
        inner.step(F.mse_loss(net(X), other(X)))
        inner.add_param_group({"params": [net[2].bias]})
        inner.step(F.mse_loss(net(X), other(X)))
        assert len(inner.state_dict()["param_groups"]) == 4
        F.mse_loss(net(X), Y).backward()
    assert net[2].weight.grad is not None and other[0].weight.grad is not None


def test_bad_groups() -> None:
    net, other = mlp(), mlp(1)
    point_there = r"got parameters, expected networks: write MetaSGD\(\[net\]\).*networks=\[net\]\)"
    for params in (net.parameters(), [{"params": list(net.parameters())}], net.named_parameters()):
        with pytest.raises(TypeError, match=point_there):
            metaoptim.MetaSGD(params)
    with pytest.raises(ValueError, match=r"of shape .* is in none of the networks"):
        metaoptim.MetaSGD([{"params": [other[0].weight]}], networks=[net])
    for groups in (
        [{"params": [net[0].weight]}, {"params": [net[0].bias, net[0].weight]}],
        [{"params": [net[0].weight, net[0].weight]}],
        [net, {"params": [net[0].weight]}],
    ):
        with pytest.raises(ValueError, match=r"'0\.weight' is in more than one place"):
            metaoptim.MetaSGD(groups, networks=[net])
    with pytest.raises(TypeError, match="got str, expected networks"):
        metaoptim.MetaSGD([{"params": ["0.weight"]}], networks=[net])
    with pytest.raises(TypeError, match=r"got Tensor among the networks|got Parameter among"):
        metaoptim.MetaSGD([net], networks=list(net.parameters()))
