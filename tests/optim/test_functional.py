"""Inner optimizers as functions: under autograd and torch.func, against windows and torch.optim."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import metaoptim
from forms import leaf, mlp

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own jvp
torch.manual_seed(5)
X, Y = torch.randn(6, 3), torch.randn(6, 2)


class Adagrad(metaoptim.MetaOptimizer):
    """s' = s + g², θ' = θ - η g / (√s' + ε)."""

    def __init__(self, networks: Any, lr: Any = 0.1, eps: float = 1e-10) -> None:
        super().__init__(networks, dict(lr=lr, eps=eps))

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        return {"sum": 0.1 * param.square()}

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = state["sum"] + grad.square()
        return param - hyper["lr"] * grad / (metaoptim.safe_sqrt(total) + hyper["eps"]), {"sum": total}


RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (metaoptim.MetaSGD, {"momentum": 0.6, "nesterov": True, "weight_decay": 0.1}),
    "adam": (metaoptim.MetaAdam, {"betas": (0.5, 0.9), "amsgrad": True, "weight_decay": 0.1}),
    "rmsprop": (metaoptim.MetaRMSprop, {"centered": True, "momentum": 0.4}),
    "own": (Adagrad, {}),
    "wrapped": (metaoptim.MetaAdamW, {"weight_decay": 0.1}),
}


def outer(rule: str, lr: Tensor, theta: dict[str, Tensor], shift: Tensor, net: nn.Module) -> Tensor:
    """Three steps by `torch.func.grad`, and the loss after them."""
    cls, options = RULES[rule]
    opt = metaoptim.functional(cls, lr=lr, **options)
    state = opt.init(theta)
    for _ in range(3):
        grads = grad(lambda t: (functional_call(net, t, (X,)) - Y - shift).square().mean())(theta)
        theta, state = opt.update(grads, state, theta)
    return (functional_call(net, theta, (X,)) - Y).square().mean()


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_that_of_a_window(rule: str) -> None:
    cls, options = RULES[rule]
    net, lr, shift = mlp(), leaf(0.1), leaf([0.3, -0.4])
    inner = cls([net], lr=lr, **options)
    with metaoptim.SlidingWindow(offline=True):
        for _ in range(3):
            inner.step(F.mse_loss(net(X), Y + shift))
        F.mse_loss(net(X), Y).backward()
    expected = [lr.grad, shift.grad, *(p.grad for p in net.parameters())]
    theta = dict(net.named_parameters())
    values = {k: p.detach() for k, p in theta.items()}
    by_func = grad(outer, argnums=(1, 3, 2))(rule, lr.detach(), values, shift.detach(), net)
    found = [by_func[0], by_func[1], *by_func[2].values()]
    eager = torch.autograd.grad(outer(rule, lr, theta, shift, net), [lr, shift, *theta.values()])
    _, tangent = jvp(lambda t: outer(rule, t, values, shift.detach(), net), (lr.detach(),), (torch.ones(()),))
    for got, same, want in zip(found, eager, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(same, want, rtol=1e-10, atol=1e-13)
    assert lr.grad.abs() > 1e-4  # type: ignore[union-attr]
    torch.testing.assert_close(tangent, lr.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_over_many_tasks_and_rates_at_once(rule: str) -> None:
    net, shifts, rates = mlp(), torch.randn(4, 2), torch.rand(4) * 0.1 + 0.01
    theta = {k: p.detach() for k, p in net.named_parameters()}
    slope = grad(lambda lr, shift: outer(rule, lr, theta, shift, net), argnums=(0, 1))
    together = vmap(slope)(rates, shifts)
    inside = grad(lambda r: vmap(lambda lr, s: outer(rule, lr, theta, s, net))(r, shifts).sum())(rates)
    for k in range(4):
        one = slope(rates[k], shifts[k])
        for got, want in zip((together[0][k], together[1][k], inside[k]), (*one, one[0]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    second = [j(grad(lambda lr: outer(rule, lr, theta, shifts[0], net)))(rates[0]) for j in (jacfwd, jacrev)]
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("rule", ["adam", "rmsprop"])
def test_a_gradient_that_is_always_zero_makes_no_nan(rule: str) -> None:
    cls, options = RULES[rule]
    del options

    def after(theta: Tensor, lr: Tensor) -> Tensor:
        opt = metaoptim.functional(cls, lr=lr)
        state = opt.init([theta])
        params = [theta]
        for _ in range(2):
            grads = grad(lambda p: (p[0][0] - 1) ** 2)(params)
            params, state = opt.update(grads, state, params)
        return params[0].square().sum()

    theta, lr = torch.tensor([0.3, 0.7]), torch.tensor(0.1)
    expected = grad(after, argnums=(0, 1))(theta, lr)
    rows = (
        vmap(grad(after))(theta.expand(2, 2), lr.expand(2)),
        grad(lambda t: vmap(after)(t, lr.expand(2)).sum())(theta.expand(2, 2)),
    )
    _, tangent = jvp(lambda t: after(t, lr), (theta,), (torch.ones(2),))
    for t in (*expected, *rows, tangent):
        assert t.isfinite().all() and t.any()
    torch.testing.assert_close(tangent, expected[0].sum())
    torch.testing.assert_close(rows[1][1], expected[0])


def test_trees_of_every_kind_and_parameters_without_a_gradient() -> None:
    pair = namedtuple("pair", "a b")
    w, b, c = torch.randn(2), torch.randn(3), torch.tensor(0.5)
    params = {"x": [w, (b,)], "y": pair(c, {"z": w + 1})}
    grads = {
        "y": pair(torch.tensor(2.0), {"z": w}),
        "x": ((w), [None]),
    }  # as autograd gives them: a tuple for a list
    opt = metaoptim.functional(metaoptim.MetaAdam, lr=0.1)
    state = opt.init(params)
    assert set(state["y"].b["z"]) == {"step", "exp_avg", "exp_avg_sq"}
    new, after = opt.update(grads, state, params)
    assert list(new) == ["x", "y"] and isinstance(new["y"], pair) and isinstance(new["x"][1], tuple)
    assert new["x"][1][0] is b and after["x"][1][0] is state["x"][1][0]
    own = [t.clone().requires_grad_() for t in (w, c, w + 1)]
    torch_opt = torch.optim.Adam(own, lr=0.1)
    for p, g in zip(own, (w, torch.tensor(2.0), w), strict=True):
        p.grad = g
    torch_opt.step()
    for got, want in zip((new["x"][0], new["y"].a, new["y"].b["z"]), own, strict=True):
        torch.testing.assert_close(got, want.detach())
    assert "functional(MetaAdam, lr=0.1" in repr(opt)


def test_it_leaves_windows_alone_and_works_inside_them() -> None:
    net, lr = mlp(), leaf(0.1)

    def inner_loop() -> Tensor:
        opt = metaoptim.functional(metaoptim.MetaSGD, lr=lr)
        p = {"p": torch.ones(2)}
        state = opt.init(p)
        for _ in range(2):
            p, state = opt.update({"p": 2 * p["p"]}, state, p)
        return p["p"].sum()

    def whole() -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            inner.step(F.mse_loss(net(X), Y) * inner_loop())
            return F.mse_loss(net(X), Y)

    found = []
    for function in (whole, metaoptim.compile(whole, backend="eager")):
        lr.grad = None
        function().backward()
        found.append(lr.grad)
    torch.testing.assert_close(*found)
    assert found[0].abs() > 1e-4


def test_what_is_refused() -> None:
    adam = metaoptim.MetaAdam
    for make, error, match in (
        (lambda: metaoptim.functional(adam, lr=-1.0), ValueError, "lr: got -1.0"),
        (lambda: metaoptim.functional(adam, rate=1.0), TypeError, "rate"),
        (
            lambda: metaoptim.functional(adam, networks=[mlp()]),
            TypeError,
            r"got networks=, but parameters are given to init",
        ),
        (
            lambda: metaoptim.functional(adam, transforms=[torch.sign]),
            TypeError,
            "got transforms, which act in windows",
        ),
        (
            lambda: metaoptim.functional(adam, lr=metaoptim.schedules.Schedule(abs)),
            TypeError,
            "got a schedule, which",
        ),
        (lambda: metaoptim.functional(adam, first_order=True), TypeError, "detach the gradients"),
        (
            lambda: metaoptim.functional(lambda nets: torch.optim.SGD(nets[0].parameters())),
            TypeError,
            "makes SGD",
        ),
    ):
        with pytest.raises(error, match=match):
            make()
    opt = metaoptim.functional(adam)
    params = {"w": X, "b": [Y]}
    state = opt.init(params)
    for function, error, match in (
        (lambda: opt.init(mlp()), TypeError, r"got Sequential.*write dict\(net.named_parameters\(\)\)"),
        (lambda: opt.init(mlp().parameters()), TypeError, "got generator.*make a list"),
        (lambda: opt.init({"w": [1.0]}), TypeError, r"params\['w'\]\[0\]: got float"),
        (
            lambda: opt.update({"w": X}, state, params),
            TypeError,
            "grads at params: got a dictionary of 'w', expected",
        ),
        (
            lambda: opt.update({"w": X, "b": Y}, state, params),
            TypeError,
            r"grads at params\['b'\]: got Tensor",
        ),
        (
            lambda: opt.update({"w": Y, "b": [Y]}, state, params),
            ValueError,
            r"got shape \(6, 2\), expected \(6, 3\)",
        ),
        (
            lambda: opt.update(params, params, params),
            TypeError,
            "state at params.*got Tensor, expected a dictionary",
        ),
        (lambda: opt.update(state, params, params), TypeError, "got dict, expected a tensor or None"),
    ):
        with pytest.raises(error, match=match):
            function()


@pytest.mark.parametrize("cls", [metaoptim.MetaAdamax, metaoptim.MetaAdafactor])
def test_is_captured_first_under_a_transform(cls: type[metaoptim.MetaOptimizer]) -> None:
    """Shapes that no test has met before: nothing is found that was captured outside."""
    params = {"w": torch.linspace(0.5, 1.5, 11).reshape(1, 11)}

    def f(lr: Tensor) -> Tensor:
        optimizer = metaoptim.functional(cls, lr=lr)
        return optimizer.update(params, optimizer.init(params), params)[0]["w"].square().sum()

    lr = torch.tensor(0.1)
    found = torch.func.grad(f)(lr)
    torch.testing.assert_close(found, (f(lr + 1e-6) - f(lr - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("given", [torch.optim.AdamW, metaoptim.MetaSGD([torch.nn.Linear(1, 1)])])
def test_takes_a_class_of_inner_optimizers(given: Any) -> None:
    with pytest.raises(TypeError, match="expected a class of inner optimizers"):
        metaoptim.functional(given)
