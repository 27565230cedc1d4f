"""Graphs that are found by running a step: they are those that a trace over fake tensors gives, and hold for others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.derive import reverse
from metaoptim.compiler.derive.flat import Unfollowed, flat_graph, tracing
from metaoptim.compiler.ir.step import FlatGraph
from metaoptim.compiler.lower import derivatives
from metaoptim.compiler.lower.library import library
from oracle import agree, run_oracle, run_window
from problems import NETWORKS, problem


@pytest.fixture
def by_running(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The graphs that were found by running a step."""
    found: list[str] = []
    derive = derivatives.derived_by_running

    def noted(step: object, kind: str, inputs: object) -> object:
        made = derive(step, kind, inputs)  # type: ignore[arg-type]
        found.extend([] if made is None else [kind])
        return made

    monkeypatch.setattr(derivatives, "derived_by_running", noted)
    monkeypatch.setattr(reverse, "derived_by_running", noted)
    library.clear()
    yield found
    library.clear()


@pytest.mark.parametrize("network", NETWORKS)
def test_first_and_later_runs_give_the_tape(network: str, by_running: list[str]) -> None:
    case = problem(network, "adam", 4, True)
    agree(run_window(case), run_oracle(case))
    assert {"replay", "vjp"} <= set(by_running) or network == "dropout"


def test_a_second_backward_is_the_first_to_the_bit(by_running: list[str]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 2)
    )
    lr = torch.tensor(0.1, requires_grad=True)
    x = torch.randn(5, 2, 6, 6)
    inner = metaoptim.MetaAdam([net], lr=lr)
    with metaoptim.SlidingWindow(offline=True):
        inner.step(net(x).square().mean())
        loss = net(x).square().mean()
        first = torch.autograd.grad(loss, [lr, x] if x.requires_grad else [lr], retain_graph=True)
        assert "vjp" in by_running
        for _ in range(2):  # the graph as it is, then its code
            torch.testing.assert_close(
                torch.autograd.grad(loss, [lr], retain_graph=True), first, rtol=0, atol=0
            )


def test_rates_that_are_views_of_one_tensor(by_running: list[str]) -> None:
    """Like `log_lr.exp().unbind()`; and rows of one tensor, one of them laid out with gaps."""

    def gradients(strategy: str) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        log_lr = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
        x, inner = torch.randn(3, 5, 3).double(), metaoptim.MetaSGD([{"params": m} for m in (net[0], net[2])])
        with metaoptim.SlidingWindow(offline=True, strategy=strategy):
            for k in range(3):
                for group, lr in zip(inner.param_groups, log_lr.exp().unbind(), strict=True):
                    group["lr"] = lr
                inner.step((net(x[k]) - x[k - 1, :, :2]).square().mean())
            return list(torch.autograd.grad(net(x[0]).square().mean(), [log_lr, *net.parameters()]))

    for got, want in zip(gradients("auto"), gradients("full_tape"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert {"replay", "vjp"} <= set(by_running)


def test_branches_on_values_are_not_frozen(by_running: list[str]) -> None:
    """The derivative of a product has another formula where a factor is 0, which the first step has none of."""

    def gradients(strategy: str) -> list[Tensor | None]:
        torch.manual_seed(0)
        net, xs = nn.Linear(4, 3).double(), torch.rand(3, 5, 4).double() + 0.5
        xs[1:] = 0.0
        w = torch.tensor([1.0, 0.0, 0.0]).double().requires_grad_()
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True, strategy=strategy):
            for k in range(3):
                inner.step(
                    ((net(xs[k]) * w[k] + 0.1).cumprod(1) + (net(xs[k]) * w[k]).prod(1, keepdim=True)).mean()
                )
            net(xs[0]).square().mean().backward()
        return [w.grad, *(p.grad for p in net.parameters())]

    for a, b in zip(gradients("auto"), gradients("full_tape"), strict=True):
        torch.testing.assert_close(a, b)


def test_what_looks_at_values_is_left_to_a_trace() -> None:
    x, outside = torch.randn(3), torch.randn(3)
    for fn in (
        lambda t: (t * t.sum().item(),),
        lambda t: (t[t > 0],),
        lambda t: (t + outside,),
        torch.rand_like,
    ):
        with tracing(), pytest.raises(Unfollowed):
            flat_graph(fn, [x], real=True)  # type: ignore[arg-type]


class LookingAtValues(metaoptim.MetaOptimizer):
    """Its update reads values in a way that no operator shows."""

    def __init__(self, networks: list[nn.Module], lr: Tensor, as_tensor: bool) -> None:
        super().__init__(networks, dict(lr=lr, as_tensor=as_tensor))

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    @staticmethod
    def update(param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]) -> Any:
        values = grad.detach().flatten().tolist()
        factor = torch.tensor(values).view_as(grad) if hyper["as_tensor"] else values[0]
        return param - hyper["lr"] * grad * factor, state


@pytest.mark.parametrize("as_tensor", [True, False])
def test_values_that_a_users_update_looks_at_are_not_frozen(as_tensor: bool) -> None:
    net, lr = nn.Linear(3, 2), torch.tensor(0.1, requires_grad=True)
    inner = LookingAtValues([net], lr, as_tensor)
    with metaoptim.SlidingWindow(offline=True), pytest.raises(metaoptim.CaptureError):
        inner.step(net(torch.randn(5, 3)).square().mean())


def test_a_constant_is_held_as_it_was_made() -> None:
    def fn(t: Tensor) -> tuple[Tensor]:
        factor = torch.tensor([2.0, 3.0, 5.0])
        doubled = t * factor
        factor.add_(1.0)
        return (doubled + factor,)

    x, other = torch.randn(3), torch.randn(3)
    with tracing():
        traced = flat_graph(fn, [x], real=True)
    found = FlatGraph(traced.graph, traced.constants)
    torch.testing.assert_close(found(other), fn(other), rtol=0, atol=0)
    assert traced.results[0].equal(fn(x)[0])


def test_small_steps_of_a_function_are_run_to_be_derived(by_running: list[str]) -> None:
    """On values made up for them, by which nothing is decided; where memory is limited they are traced."""

    def gradients(**options: str) -> list[Tensor]:
        torch.manual_seed(0)
        net, xs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), torch.randn(3, 6, 3)
        log_lr = torch.tensor(-1.0, requires_grad=True)

        @metaoptim.compile(backend="eager", **options)
        def loss(xs: Tensor) -> Tensor:
            inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
            with metaoptim.SlidingWindow(offline=True):
                for x in xs:
                    inner.step(F.cross_entropy(net(x), x.argmax(1)) + net(x).clamp(0.1, 0.4).cumprod(1).sum())
                return net(xs).square().sum()

        return [*torch.autograd.grad(loss(xs), [log_lr, *net.parameters()])]

    found = gradients()
    assert "vjp" in by_running
    library.clear()
    by_running.clear()
    expected = gradients(memory_budget="1GiB")
    assert "vjp" not in by_running
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_budget_measures_the_graph_itself(by_running: list[str]) -> None:
    torch.manual_seed(0)
    net, xs = nn.Linear(64, 64), torch.randn(6, 8, 64)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, memory_budget="2MiB"):
        for x in xs:
            inner.step(F.mse_loss(net(x), x))
        net(xs[0]).square().mean().backward()
    assert "vjp" not in by_running
