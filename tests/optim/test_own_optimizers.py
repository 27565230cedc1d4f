"""Inner optimizers of the user's own, and learnt hyper-parameters: right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metaoptim
from edges import STEPS, STRATEGIES, XS, YS, leaf, loss_of, network
from metaoptim.optim.optimizer import MetaOptimizer
from oracle import Problem, agree, run_oracle, run_window

# -- optimizers of the user's own -------------------------------------------------------------------------------------


class SignDescent(MetaOptimizer):
    """Its update has a no_grad part and a straight-through Function."""

    def __init__(self, networks: Any, lr: Any = 0.1) -> None:
        super().__init__(networks, {"lr": lr})

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    @staticmethod
    def update(param: Tensor, grad: Tensor, state: dict, hyper: dict) -> tuple[Tensor, dict]:
        with torch.no_grad():
            scale = grad.abs().mean()
        return param - hyper["lr"] * _SoftSign.apply(grad) * scale - 0.1 * grad, {}


class _SoftSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Lookahead(MetaOptimizer):
    """Its initial state is the parameter itself."""

    def __init__(self, networks: Any, lr: Any = 0.1, alpha: Any = 0.4) -> None:
        super().__init__(networks, {"lr": lr, "alpha": alpha})

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        return {"slow": param.clone()}

    @staticmethod
    def update(param: Tensor, grad: Tensor, state: dict, hyper: dict) -> tuple[Tensor, dict]:
        fast = param - hyper["lr"] * grad
        slow = state["slow"] + hyper["alpha"] * (fast - state["slow"])
        return slow, {"slow": slow}


class Langevin(SignDescent):
    """Draws noise in its update."""

    @staticmethod
    def update(param: Tensor, grad: Tensor, state: dict, hyper: dict) -> tuple[Tensor, dict]:
        return param - hyper["lr"] * grad + 0.01 * torch.randn_like(param), {}


class Forgetful(SignDescent):
    """Keeps a count where no step graph can see it."""

    count = 0

    @staticmethod
    def update(param: Tensor, grad: Tensor, state: dict, hyper: dict) -> tuple[Tensor, dict]:
        Forgetful.count += 1
        return param - hyper["lr"] * grad / Forgetful.count, {}


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
@pytest.mark.parametrize("optimizer", [SignDescent, Lookahead])
def test_custom_optimizer(optimizer: type, offline: bool) -> None:
    case = Problem(
        build=network,
        optimizer=optimizer,
        steps=STEPS,
        offline=offline,
        loss=lambda net, t, metas, carried: loss_of(net, t),
        outer=lambda net, metas: loss_of(net, STEPS),
        hyper=lambda metas: {"lr": metas["lr"] * 0.5},
        metas={"lr": torch.tensor(0.3)},
    )
    expected = run_oracle(case)
    for options in STRATEGIES:
        agree(run_window(case, **options), expected)


class Inplace(SignDescent):
    """Writes into the parameter it is given."""

    @staticmethod
    def update(param: Tensor, grad: Tensor, state: dict, hyper: dict) -> tuple[Tensor, dict]:
        return param.sub_(hyper["lr"] * grad), {}


def own(
    update: Any = lambda p, g, s, h: (p - h["lr"] * g, s),
    init: Any = lambda p, h: {"sum": torch.zeros_like(p)},
) -> Any:
    return type("Own", (SignDescent,), {"update": staticmethod(update), "init_state": staticmethod(init)})


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "random numbers": (Langevin, metaoptim.CaptureError, "random numbers"),
    "a count outside": (Forgetful, metaoptim.CaptureError, "pure function"),
    "parameter in place": (Inplace, metaoptim.CaptureError, "Inplace.update changes its parameter in place"),
    "state in place": (
        own(lambda p, g, s, h: (p - h["lr"] * s["sum"].add_(g), s)),
        metaoptim.CaptureError,
        "changes its state in place",
    ),
    "no result": (
        own(lambda p, g, s, h: None),
        TypeError,
        "got None, expected two results: the new parameter",
    ),
    "no state": (
        own(lambda p, g, s, h: p - h["lr"] * g),
        TypeError,
        r"got a tensor of shape \(4, 3\), expected two results",
    ),
    "state forgotten": (
        own(lambda p, g, s, h: (p - h["lr"] * g, {})),
        metaoptim.WindowError,
        "the new state has no 'sum', as the state before",
    ),
    "state is a number": (
        own(lambda p, g, s, h: (p - g, {"sum": 1})),
        TypeError,
        r"\{'sum': 1\}\), expected two results",
    ),
    "state is a list": (own(lambda p, g, s, h: (p - g, [g])), TypeError, "expected two results"),
    "first state is a number": (
        own(init=lambda p, h: {"sum": 0.0}),
        TypeError,
        r"got \{'sum': 0.0\}, expected a dictionary of tensors.*torch.zeros\(\(\)\) for a count",
    ),
    "first state is a list": (
        own(init=lambda p, h: [p]),
        TypeError,
        "expected a dictionary of tensors by name",
    ),
    "shape": (
        own(lambda p, g, s, h: ((p - h["lr"] * g).sum(), s)),
        metaoptim.WindowError,
        r"parameter of shape \(4, 3\) would become one of shape \(\)",
    ),
}


# a full tape differentiates what has run, whatever that was
SEEN_BY_ALL = [n for n in WRONG if n not in ("random numbers", "a count outside")]


@pytest.mark.parametrize(
    ("name", "strategy"), [*((n, "auto") for n in WRONG), *((n, "full_tape") for n in SEEN_BY_ALL)]
)
def test_wrong_updates_are_refused(name: str, strategy: str) -> None:
    optimizer, error, match = WRONG[name]
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    inner = optimizer([net])
    with pytest.raises(error, match=match), metaoptim.SlidingWindow(strategy=strategy):
        inner.step(loss_of(net, 0))
    assert all(map(torch.equal, net.parameters(), before))
    assert not inner.state_dict()["state"]


def test_missing_methods() -> None:
    with pytest.raises(TypeError, match="Without states no update; write it"):
        type("Without", (MetaOptimizer,), {"init_state": staticmethod(lambda p, h: {})})([network()], {})
    with pytest.raises(TypeError, match=r"WithSelf.update: got a method.*staticmethod"):
        type("WithSelf", (MetaOptimizer,), {"update": lambda self, p, g, s, h: (p, s)})


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_function_that_writes_into_its_argument() -> None:
    """Exact on what the loss has computed itself; refused on what the tape holds."""
    results = []
    for options in STRATEGIES:
        net, lr = network(), leaf(0.1)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                inner.step((_Doubled.apply(net(XS[t])) - YS[t]).square().mean())
            loss_of(net, STEPS).backward()
        results.append(lr.grad)
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])
    carried = leaf([[0.5, 0.2]]) * 1.0
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with pytest.raises(metaoptim.CaptureError, match="in place"), metaoptim.SlidingWindow():
        inner.step((net(XS[0]) * _Doubled.apply(carried)).square().mean())


# -- hyper-parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", STRATEGIES, ids=["all", "slots", "full_tape"])
def test_scheduler_on_a_tensor_learning_rate(options: dict) -> None:
    """The scheduler writes into the tensor; every step keeps the value it used."""
    results = []
    for lr in (0.2, torch.tensor(0.2)):
        net = network()
        inner = metaoptim.MetaSGD([net], lr=lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(STEPS):
                inner.step(loss_of(net, t))
                schedule.step()
            loss_of(net, STEPS).backward()
        results.append([p.grad for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_tensor_refilled_for_every_step() -> None:
    lr, batch, net = leaf(0.1), torch.empty(5, 3), network()
    inner = metaoptim.MetaSGD([net], lr=lr)
    with metaoptim.SlidingWindow(slots=1):
        for t in range(STEPS):
            batch.copy_(XS[t])
            inner.step(F.mse_loss(net(batch), YS[t]))
        loss_of(net, STEPS).backward()
    again, net = leaf(0.1), network()
    inner = metaoptim.MetaSGD([net], lr=again)
    with metaoptim.SlidingWindow():
        for t in range(STEPS):
            inner.step(loss_of(net, t))
        loss_of(net, STEPS).backward()
    torch.testing.assert_close(lr.grad, again.grad)


@pytest.mark.parametrize("window", [None, 1, 2])
def test_differentiable_tensor_changed_in_place_between_steps(window: int | None) -> None:
    """Each step differentiates by the history that the tensor had when the step read it."""
    net, w = network(), leaf([0.9, 1.1, 0.7])
    inner = metaoptim.MetaSGD([net], lr=0.3)
    shift = w * 1.0
    with metaoptim.SlidingWindow(window=window):
        for t in range(STEPS):
            inner.step(F.mse_loss(net(XS[t] + shift), YS[t]))
            shift *= 0.5
        (got,) = torch.autograd.grad(loss_of(net, STEPS), w)
    twin, v = network(), leaf([0.9, 1.1, 0.7])
    theta = {n: p.detach() for n, p in twin.named_parameters()}
    for t in range(STEPS):
        cut = window is not None and t <= STEPS - window
        theta = {n: p.detach().requires_grad_() if cut or t == 0 else p for n, p in theta.items()}
        loss = F.mse_loss(torch.func.functional_call(twin, theta, (XS[t] + v * 0.5**t,)), YS[t])
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {n: p - 0.3 * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    outer = F.mse_loss(torch.func.functional_call(twin, theta, (XS[STEPS],)), YS[STEPS])
    torch.testing.assert_close(got, torch.autograd.grad(outer, v)[0])


@pytest.mark.parametrize("window", [None, 2])
def test_hooks_of_tensors_that_no_gradient_reaches_get_zeros(window: int | None) -> None:
    net, other, seen = network(), network(), []
    other[0].weight.register_hook(lambda g: seen.append(float(g.abs().sum())))
    inner = metaoptim.MetaSGD([net, other])
    with metaoptim.SlidingWindow(offline=True, window=window):
        inner.step(loss_of(net, 0), allow_unused=True)
        loss_of(net, 1).backward()
    assert seen == [0.0]
