"""The rules that come with metaoptim: how they begin, and what is finite about them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from edges import STEPS, XS, leaf, loss_of, network
from metaoptim.optim.rules import PerParameterRule, PerTensorRule

RULES = [PerParameterRule, PerTensorRule]


def trained(inner: Any, net: nn.Module) -> list[Tensor]:
    with metaoptim.SlidingWindow():
        for t in range(STEPS):
            inner.step(loss_of(net, t))
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("rule", RULES)
def test_it_begins_as_adam(rule: type) -> None:
    net, twin = network(), network()
    got = trained(metaoptim.MetaLearned([net], rule(8), lr=0.05), net)
    for a, b in zip(got, trained(metaoptim.MetaAdam([twin], lr=0.05), twin), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_its_weights_move_from_there(rule: type) -> None:
    made = rule(8)
    for _ in range(2):  # the last layer begins at zero, so that at first no gradient goes below it
        net = network()
        inner, outer = metaoptim.MetaLearned([net], made, lr=0.05), torch.optim.Adam(made.parameters())
        outer.zero_grad()
        with metaoptim.SlidingWindow(offline=True):
            for t in range(STEPS):
                inner.step(loss_of(net, t))
            loss_of(net, STEPS).backward()
        outer.step()
    for name, p in made.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_finite_twice_where_gradients_are_zero(rule: type, dtype: torch.dtype) -> None:
    made = _restless(rule(6)).to(dtype)
    param = torch.tensor([0.0, 0.3, -2.0], dtype=dtype, requires_grad=True)
    state = {k: v.requires_grad_(v.dim() > 0) for k, v in made.init_state(param).items()}
    for values in ([0.0, 0.0, 0.0], [0.0, 1e-3, 1.0]):
        grad = torch.tensor(values, dtype=dtype, requires_grad=True)
        step, new = made(param, grad, state)
        inputs = [param, grad, *(v for v in state.values() if v.requires_grad), *made.parameters()]
        results = [step, *(v for v in new.values() if v.requires_grad)]
        first = torch.autograd.grad([r.sum() for r in results], inputs, create_graph=True, allow_unused=True)
        known = [g for g in first if g is not None and g.requires_grad]
        second = torch.autograd.grad([g.sum() for g in known], inputs, allow_unused=True)
        for value in (*results, *known, *(g for g in second if g is not None)):
            assert bool(value.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_the_meta_gradient_is_finite_where_gradients_have_always_been_zero(
    rule: type, dtype: torch.dtype
) -> None:
    net, made, lr = network().to(dtype), _restless(rule(6)).to(dtype), torch.tensor(0.1, requires_grad=True)
    inner = metaoptim.MetaLearned([net], made, lr=lr)
    with metaoptim.SlidingWindow(offline=True):
        for t in range(STEPS):
            inner.step((net(XS[t].to(dtype)) * (t == 2)).square().mean())
        net(XS[STEPS].to(dtype)).square().mean().backward()
    for p in (*made.parameters(), *net.parameters(), lr):
        assert p.grad is not None and bool(p.grad.isfinite().all())
    assert float(lr.grad.abs()) > 0  # pyright: ignore[reportOptionalMemberAccess]


def _restless(rule: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return rule


@pytest.mark.filterwarnings("ignore:.*Keep parameters and optimizer state in float32")
@pytest.mark.parametrize("net_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_in_float32_trains_networks_of_other_types(rule: type, net_dtype: torch.dtype) -> None:
    net, made = network().to(net_dtype), _restless(rule(4)).float()
    inner = metaoptim.MetaLearned([net], made, lr=leaf(0.1))
    with metaoptim.SlidingWindow(offline=True):
        for t in range(STEPS):
            inner.step(F.mse_loss(net(XS[t].to(net_dtype)), torch.ones(5, 2, dtype=net_dtype)))
        net(XS[STEPS].to(net_dtype)).square().mean().backward()
    for p in made.parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 1, 2, 2)])
def test_parameters_of_any_shape(rule: type, shape: tuple[int, ...]) -> None:
    made = _restless(rule(4))
    param = torch.full(shape, 0.3)
    step, state = made(param, torch.full(shape, -0.2), made.init_state(param))
    assert step.shape == param.shape and state.keys() == made.init_state(param).keys()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("options", "match"),
    [({"decays": [0.9, 1.0]}, "decays"), ({"decays": []}, "decays"), ({"beta2": 1}, "beta2")],
)
def test_wrong_decays(rule: type, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rule(4, **options)
