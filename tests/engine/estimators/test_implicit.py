"""Implicit gradients, against the closed form of a quadratic inner problem and the exact gradient of a long loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim import Implicit

generator = torch.Generator().manual_seed(5)
X, Y = torch.randn(12, 4, generator=generator), torch.randn(12, 2, generator=generator)
XQ, YQ = torch.randn(7, 4, generator=generator), torch.randn(7, 2, generator=generator)


Make = Callable[[nn.Module], metaoptim.MetaOptimizer]


def ridge(net: nn.Module, decay: Tensor, weights: Tensor) -> Tensor:
    """Weighted least squares with a penalty."""
    penalty = sum((p.square().sum() for p in net.parameters()), torch.zeros(()))
    return (weights * (net(X) - Y).square().sum(1)).mean() + decay * penalty


def leaves() -> tuple[Tensor, Tensor]:
    return torch.tensor(0.3, requires_grad=True), torch.linspace(0.5, 1.5, 12).requires_grad_()


def closed_form() -> tuple[Tensor, Tensor]:
    """The gradient of the outer loss at the exact solution, by autograd through `torch.linalg.solve`."""
    decay, weights = leaves()
    system = X.T @ (weights[:, None] * X) / 12 + decay * torch.eye(4)
    theta = torch.linalg.solve(system, X.T @ (weights[:, None] * Y) / 12)
    F.mse_loss(XQ @ theta, YQ).backward()
    assert decay.grad is not None and weights.grad is not None
    return decay.grad, weights.grad


def implicit(
    gradient: Implicit, make: Make, steps: int, offline: bool
) -> tuple[Tensor | None, Tensor | None]:
    torch.manual_seed(1)
    net, (decay, weights) = nn.Linear(4, 2, bias=False), leaves()
    inner, before = make(net), net.weight.detach().clone()
    with metaoptim.SlidingWindow(offline=offline, gradient=gradient) as window:
        for _ in range(steps):
            inner.step(ridge(net, decay, weights))
        F.mse_loss(net(XQ), YQ).backward()
        assert window.program.end - window.program.start <= 2, "only the last step is kept"
    assert net.weight.grad is None and torch.equal(net.weight, before) == offline
    return decay.grad, weights.grad


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize(
    "solver, make",
    [
        ("neumann", lambda net: metaoptim.MetaSGD([net], lr=0.2)),
        ("neumann", lambda net: metaoptim.MetaSGD([net], lr=0.1, momentum=0.6)),
        ("neumann", lambda net: metaoptim.MetaRMSprop([net], lr=0.2, eps=1.0)),
        ("cg", lambda net: metaoptim.MetaSGD([net], lr=0.2)),
        ("nystrom", lambda net: metaoptim.MetaSGD([net], lr=0.2)),
    ],
)
def test_equals_the_closed_form_of_a_quadratic(solver: str, make: Make, offline: bool) -> None:
    given = Implicit(solver, iterations=1000, tolerance=1e-11, converged=1e-9, rank=8, rho=1e-12)  # type: ignore[arg-type]
    for ours, theirs in zip(implicit(given, make, 200, offline), closed_form(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert given.residual is not None and given.residual <= 1e-11


def test_cg_needs_as_many_iterations_as_there_are_distinct_curvatures() -> None:
    given = Implicit("cg", iterations=8, tolerance=1e-9, converged=1e-9)
    found = implicit(given, lambda net: metaoptim.MetaSGD([net], lr=0.2), 200, True)
    torch.testing.assert_close(found[0], closed_form()[0], rtol=1e-7, atol=1e-10)


def test_nystrom_damps_what_its_columns_do_not_span() -> None:
    """The Hessian is one block for each output: of 8 columns, 4 may lie in one, and the other's part is divided."""
    make = lambda net: metaoptim.MetaSGD([net], lr=0.2)
    residuals, errors = [], []
    for rank in (2, 5, 8, 99):
        given = Implicit(
            "nystrom",
            converged=1e-9,
            rank=rank,
            rho=0.1,
            tolerance=10.0,
            generator=torch.Generator().manual_seed(3),
        )
        found = implicit(given, make, 150, True)[0]
        residuals.append(given.residual)
        assert found is not None
        errors.append(float((found - closed_form()[0]).abs() / closed_form()[0].abs()))
    assert residuals == sorted(residuals, reverse=True) and residuals[-1] > 1e-3, "rho is not in the residual"
    assert errors[2] == errors[3] < errors[0]

    x, decay = (
        X[:, :1],
        torch.tensor(0.3, requires_grad=True),
    )  # one parameter of two: (A + ρ)⁻¹ or ρ⁻¹ by hand
    net = nn.Linear(1, 2, bias=False)
    given = Implicit("nystrom", rank=1, rho=0.05, tolerance=10.0, generator=torch.Generator().manual_seed(3))
    with metaoptim.SlidingWindow(gradient=given):
        inner = metaoptim.MetaSGD([net], lr=0.2)
        for _ in range(200):
            inner.step((net(x) - Y).square().mean() + decay * net.weight.square().sum())
        theta, cotangent = net.weight.detach().flatten(), torch.tensor([1.0, 3.0])
        (net.weight.flatten() * cotangent).sum().backward()
    system = 0.2 * (x.square().mean() + 2 * 0.3)
    by_hand = [
        -0.2 * 2 * theta @ (cotangent / torch.where(torch.arange(2) == k, system + 0.05, torch.tensor(0.05)))
        for k in range(2)
    ]
    assert any(torch.allclose(decay.grad, one, rtol=1e-6) for one in by_hand if decay.grad is not None)


@pytest.mark.parametrize("solver", ["neumann", "cg", "nystrom"])
def test_an_outer_loss_of_some_of_the_parameters(solver: str) -> None:
    """The system couples the others all the same."""
    grads = []
    for gradient in ("exact", Implicit(solver, iterations=1000, tolerance=1e-9, rho=1e-12)):  # type: ignore[arg-type]
        torch.manual_seed(1)
        net, (decay, weights) = nn.Linear(4, 2), leaves()
        inner = metaoptim.MetaSGD([net], lr=0.2)
        with metaoptim.SlidingWindow(gradient=gradient):
            for _ in range(150):
                inner.step(ridge(net, decay, weights))
            net.weight.square().sum().backward()
        grads.append((decay.grad, weights.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("solver", ["neumann", "cg", "nystrom"])
def test_a_network_whose_optimizer_does_not_step_receives_its_gradient(solver: str) -> None:
    grads = []
    for gradient in ("exact", Implicit(solver, iterations=500, tolerance=1e-6, rho=1e-11, converged=1.0)):  # type: ignore[arg-type]
        torch.manual_seed(1)
        net, meta, decay = nn.Linear(4, 2), nn.Linear(2, 2), torch.tensor(0.3, requires_grad=True)
        with torch.no_grad():
            meta.weight.copy_(torch.tensor([[1.0, 0.2], [-0.3, 0.8]]))
        inner, other = metaoptim.MetaSGD([net], lr=0.2), metaoptim.MetaSGD([meta], lr=0.1)
        with metaoptim.SlidingWindow(gradient=gradient):
            for _ in range(150):
                penalty = sum((p.square().sum() for p in net.parameters()), torch.zeros(()))
                inner.step((meta(net(X)) - Y).square().mean() + decay * penalty)
            (net(XQ).square().mean() + meta(net(XQ)).square().mean()).backward()
        assert other.param_groups
        grads.append((decay.grad, meta.weight.grad, meta.bias.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)


def test_the_series_is_a_truncated_backward_at_the_solution() -> None:
    """k terms are the exact gradient of k steps that begin at the solution, with a warning for what is left."""
    make = lambda net: metaoptim.MetaSGD([net], lr=0.2)
    with pytest.warns(UserWarning, match=r"iterations=5 of 'neumann'.*residual"):
        found = implicit(Implicit(iterations=5, converged=1e-9), make, 200, True)
    torch.manual_seed(1)
    net, (decay, weights) = nn.Linear(4, 2, bias=False), leaves()
    with metaoptim.SlidingWindow(window=5):
        inner = make(net)
        for _ in range(200):
            inner.step(ridge(net, decay, weights))
        F.mse_loss(net(XQ), YQ).backward()
    torch.testing.assert_close(found, (decay.grad, weights.grad), rtol=1e-9, atol=1e-12)


def test_says_what_it_is_not() -> None:
    make = lambda net: metaoptim.MetaSGD([net], lr=0.2)
    with pytest.warns(UserWarning, match="has not converged: its last step moved"):
        implicit(Implicit("cg"), make, 3, True)
    for solver in ("cg", "nystrom"):  # at its first step
        with pytest.raises(metaoptim.WindowError, match="has a state"):
            implicit(Implicit(solver), lambda net: metaoptim.MetaSGD([net], lr=0.1, momentum=0.5), 1, True)
    ends_at_0 = lambda net: metaoptim.MetaSGD([net], lr=metaoptim.schedules.linear(0.2, 0.0, 19))
    for solver in ("neumann", "cg", "nystrom"):
        with pytest.raises(metaoptim.WindowError, match="its rate was 0"):
            implicit(Implicit(solver), ends_at_0, 20, True)
    unlike = (
        lambda net: metaoptim.MetaSGD([net], lr=0.2, transforms=[metaoptim.transforms.centralize()]),
        lambda net: metaoptim.MetaSGD([net], lr=torch.linspace(0.1, 0.3, 4).expand(2, 4)),
    )
    for solver in ("cg", "nystrom"):
        for other in unlike:
            with pytest.raises(metaoptim.WindowError, match="not symmetric"):
                implicit(Implicit(solver, converged=10.0), other, 40, True)
    for bad in (lambda: Implicit("gmres"), lambda: Implicit(iterations=0), lambda: Implicit(rho=0.0)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="got"):
            bad()
    for option in ({"window": 3}, {"slots": 3}, {"memory_budget": "1MiB"}, {"strategy": "full_tape"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.*an implicit gradient.*leave it out"):
            metaoptim.SlidingWindow(gradient=Implicit(), **option)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'exact', 'first_order'"):
        metaoptim.SlidingWindow(gradient="implicit")

    def compiled(net: nn.Module) -> Tensor:
        inner = make(net)
        with metaoptim.SlidingWindow(gradient=Implicit()):
            inner.step(net(X).square().mean())
            return net(X).square().mean()

    with pytest.raises(metaoptim.WindowError, match="take the decorator off"):
        metaoptim.compile(compiled, backend="eager")(nn.Linear(4, 2))


def test_no_minimum_and_two_problems() -> None:
    def saddle(net: nn.Module, decay: Tensor, weights: Tensor) -> Tensor:
        return -ridge(net, decay, weights)

    torch.manual_seed(1)
    net, (decay, weights) = nn.Linear(4, 2, bias=False), leaves()
    inner = metaoptim.MetaSGD([net], lr=1e-6)
    for solver in ("cg", "nystrom"):
        with metaoptim.SlidingWindow(gradient=Implicit(solver, rho=1e-9)):
            inner.step(saddle(net, decay, weights))
            with pytest.raises(metaoptim.WindowError, match="curvature"):
                F.mse_loss(net(XQ), YQ).backward()
    other = nn.Linear(2, 2)
    both = metaoptim.MetaSGD([net], lr=1e-6), metaoptim.MetaSGD([other], lr=1e-6)
    with metaoptim.SlidingWindow(gradient=Implicit()):
        losses = ridge(net, decay, weights), other(net(X)).square().mean()
        for optimizer, loss in zip(both, losses, strict=True):
            optimizer.step(loss)
        with pytest.raises(metaoptim.WindowError, match="several optimizers"):
            F.mse_loss(other(net(XQ)), YQ).backward()


@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_first_order_is_that_of_the_optimizers(strategy: str) -> None:
    grads = []
    for window, optimizer in (("first_order", False), ("exact", True), ("exact", False)):
        torch.manual_seed(1)
        net, (decay, weights) = nn.Linear(4, 2, bias=False), leaves()
        inner = metaoptim.MetaSGD([net], lr=0.2, first_order=optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", metaoptim.UnreachableWarning
            )  # nothing is learnt through constants
            with metaoptim.SlidingWindow(offline=True, gradient=window, strategy=strategy):
                for _ in range(3):
                    inner.step(ridge(net, decay, weights))
                F.mse_loss(net(XQ), YQ).backward()
        grads.append(net.weight.grad)
    assert torch.equal(grads[0], grads[1]) and not torch.allclose(grads[0], grads[2])


@pytest.mark.filterwarnings("ignore:the inner problem has not converged")
@pytest.mark.parametrize("offline", [True, False])
def test_one_step(offline: bool) -> None:
    torch.manual_seed(1)
    net, (decay, weights) = nn.Linear(4, 2, bias=False), leaves()
    inner = metaoptim.MetaAdam([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=offline, gradient=Implicit(iterations=1, tolerance=1e9)):
        inner.step(ridge(net, decay, weights))
        F.mse_loss(net(XQ), YQ).backward()
    ours, decay.grad = decay.grad, None
    torch.manual_seed(1)
    net = nn.Linear(4, 2, bias=False)
    with metaoptim.SlidingWindow(window=1):
        metaoptim.MetaAdam([net], lr=0.1).step(ridge(net, decay, weights))
        F.mse_loss(net(XQ), YQ).backward()
    torch.testing.assert_close(ours, decay.grad)


def test_a_series_that_diverges_is_an_error() -> None:
    net, (decay, weights) = nn.Linear(4, 2, bias=False), leaves()
    inner = metaoptim.MetaSGD([net], lr=40.0)
    with metaoptim.SlidingWindow(gradient=Implicit(iterations=8)):
        inner.step(ridge(net, decay, weights))
        loss = F.mse_loss(net(XQ), YQ)
        with (
            pytest.warns(UserWarning, match="has not converged"),
            pytest.raises(metaoptim.WindowError, match="series diverges"),
        ):
            loss.backward()
    assert decay.grad is None
