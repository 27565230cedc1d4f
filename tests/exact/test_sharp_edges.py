"""What lies just off the beaten track: right, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.optim.optimizer import MetaOptimizer
from oracle import Problem, agree, run_oracle, run_window
from problems import data

STEPS = 3
XS, YS = data(STEPS)
STRATEGIES = ({}, {"slots": 1}, {"strategy": "full_tape"})


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def leaf(value: Any) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def loss_of(net: Any, t: int) -> Tensor:
    return F.mse_loss(net(XS[t]), YS[t])


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


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [(Langevin, "random numbers"), (Forgetful, "pure function"), (Inplace, "in place")],
)
def test_impure_updates_are_refused(optimizer: Any, match: str) -> None:
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    inner = optimizer([net])
    with pytest.raises(metaoptim.CaptureError, match=match), metaoptim.SlidingWindow():
        inner.step(loss_of(net, 0))
    assert all(map(torch.equal, net.parameters(), before))


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


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_hook_with_a_tensor_of_its_own_that_requires_grad_is_refused() -> None:
    net, scale = network(), leaf(2.0)
    inner = metaoptim.MetaSGD([net])
    with pytest.raises(metaoptim.CaptureError, match="requires grad but is none of its arguments"):
        with metaoptim.SlidingWindow():
            h = net(XS[0])
            h.register_hook(lambda g: g * scale)
            inner.step(h.square().mean())


def test_hook_with_a_mask_that_changes_behind_its_back() -> None:
    net, mask, lr = network(), torch.tensor([1.0, 0.5]), leaf(0.1)
    inner = metaoptim.MetaSGD([net], lr=lr)

    def step() -> None:
        h = net(XS[0])
        h.register_hook(lambda g: g * mask)
        inner.step(h.square().mean())

    with metaoptim.SlidingWindow():
        step()
        outer = loss_of(net, 1)
        expected = torch.autograd.grad(outer, lr, retain_graph=True)
        mask.numpy()[...] = 7.0
        torch.testing.assert_close(torch.autograd.grad(outer, lr), expected)
        with pytest.raises(metaoptim.CaptureError, match="does not reproduce"):
            step()


@pytest.mark.parametrize("options", STRATEGIES, ids=["all", "slots", "full_tape"])
def test_hooks_on_the_users_own_parameters_act_on_inner_gradients(options: dict) -> None:
    """A pruning mask: what it masks does not move, as in a training loop."""
    net, lr, seen = network(), leaf(0.1), []
    mask = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.0, 1.0, 1.0, 3.0]])
    handles = [
        net[2].weight.register_hook(lambda g: g * mask),
        net[0].weight.register_hook(lambda g: seen.append(1)),
    ]
    inner = metaoptim.MetaSGD([net], lr=lr)
    own = dict(net.named_parameters())
    with metaoptim.SlidingWindow(offline=True, **options):
        for t in range(STEPS):
            inner.step(loss_of(net, t))
        outer = loss_of(net, STEPS)
    assert len(seen) >= STEPS
    for handle in handles:  # what they do to the gradient of theta_0 itself is torch's own affair
        handle.remove()
    got = torch.autograd.grad(outer, [*own.values(), lr])
    theta = {n: p * 1.0 for n, p in own.items()}
    for t in range(STEPS):
        grads = torch.autograd.grad(
            F.mse_loss(torch.func.functional_call(net, theta, (XS[t],)), YS[t]),
            list(theta.values()),
            create_graph=True,
        )
        theta = {
            n: p - lr * (g * mask if n == "2.weight" else g)
            for (n, p), g in zip(theta.items(), grads, strict=True)
        }
    outer = F.mse_loss(torch.func.functional_call(net, theta, (XS[STEPS],)), YS[STEPS])
    for g, e in zip(got, torch.autograd.grad(outer, [*own.values(), lr]), strict=True):
        torch.testing.assert_close(g, e)


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


# -- found by trying to break it --------------------------------------------------------------------------------------


def _against_tape(run: Any) -> None:
    """The same gradients and the same end under every strategy."""
    results = [run(options) for options in STRATEGIES]
    for other in results[:2]:
        for a, b in zip(other, results[2], strict=True):
            torch.testing.assert_close(a, b)


def test_detach_in_place() -> None:
    def run(options: dict) -> list[Any]:
        net, w = network(), leaf(0.8)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                target = w * YS[t]
                target.detach_()
                guess = net(XS[t] + 1)
                guess.detach_()
                inner.step((net(XS[t]) * w - target - 0.1 * guess).square().mean())
            loss_of(net, STEPS).backward()
        return [w.grad]

    _against_tape(run)


def test_hook_where_only_the_meta_gradient_passes() -> None:
    def run(options: dict) -> list[Any]:
        net, w = network(), leaf(0.8)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                weight = w * 1.0
                weight.register_hook(lambda g: 0.5 * g)
                inner.step(F.mse_loss(net(XS[t]) * weight, YS[t]))
            loss_of(net, STEPS).backward()
        return [w.grad]

    _against_tape(run)


def test_target_network_from_aliases_of_shown_parameters() -> None:
    def run(options: dict) -> list[Any]:
        net, lr = network(), leaf(0.1)
        inner = metaoptim.MetaSGD([net], lr=lr)
        own = list(net.parameters())
        with metaoptim.SlidingWindow(offline=True, **options):
            inner.step(loss_of(net, 0))
            names = [n for n, _ in net.named_parameters()]
            target = [p.detach() for p in net.parameters()]
            for t in range(STEPS):
                aim = torch.func.functional_call(
                    net, dict(zip(names, target, strict=True)), (XS[t],)
                ).detach()
                inner.step(F.mse_loss(net(XS[t]), aim + YS[t]))
                for old, new in zip(target, net.parameters(), strict=True):
                    old.copy_(0.5 * old + 0.5 * new.detach())
            loss_of(net, STEPS).backward()
        return [lr.grad, *(p.grad for p in own)]

    results = [run(options) for options in STRATEGIES[:2]]
    net, lr = network(), leaf(0.1)
    theta = {n: p * 1.0 for n, p in net.named_parameters()}

    def step(theta: dict, loss: Tensor) -> dict:
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        return {n: p - lr * g for (n, p), g in zip(theta.items(), grads, strict=True)}

    def call(theta: dict, t: int) -> Tensor:
        return torch.func.functional_call(net, theta, (XS[t],))

    theta = step(theta, F.mse_loss(call(theta, 0), YS[0]))
    target = {n: p.detach() for n, p in theta.items()}
    for t in range(STEPS):
        theta = step(theta, F.mse_loss(call(theta, t), call(target, t).detach() + YS[t]))
        target = {n: 0.5 * target[n] + 0.5 * p.detach() for n, p in theta.items()}
    outer = F.mse_loss(call(theta, STEPS), YS[STEPS])
    expected = torch.autograd.grad(outer, [lr, *net.parameters()])
    for got in results:
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("slots", [None, 1])
def test_optimizer_state_changed_in_place_is_a_history_cut(slots: int | None) -> None:
    net, lr = network(), leaf(0.1)
    inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.9)
    with metaoptim.SlidingWindow():
        inner.step(loss_of(net, 0))
    before = {p: s["momentum_buffer"].clone() for p, s in inner.state.items()}
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    own = list(net.parameters())
    with metaoptim.SlidingWindow(offline=True, slots=slots):
        inner.step(loss_of(net, 0))
        for state in inner.state.values():
            state["momentum_buffer"].mul_(0.5)
        inner.step(loss_of(net, 1))
        for state in inner.state.values():
            state["momentum_buffer"].zero_()
        inner.step(loss_of(net, 2))
        loss_of(net, STEPS).backward()
    assert all(torch.equal(inner.state[p]["momentum_buffer"], b) for p, b in before.items())
    again = leaf(0.1)
    theta = {n: v.clone().requires_grad_() for n, v in start.items()}
    first = list(theta.values())
    moments = dict(zip(theta, before.values(), strict=True))
    for t, factor in enumerate((1.0, 0.5, 0.0)):
        loss = F.mse_loss(torch.func.functional_call(net, theta, (XS[t],)), YS[t])
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        moments = {
            n: (m.detach() if t else m) * factor * 0.9 + g
            for (n, m), g in zip(moments.items(), grads, strict=True)
        }
        theta = {n: p - again * moments[n] for n, p in theta.items()}
    outer = F.mse_loss(torch.func.functional_call(net, theta, (XS[STEPS],)), YS[STEPS])
    for got, e in zip(
        [lr.grad, *(p.grad for p in own)], torch.autograd.grad(outer, [again, *first]), strict=True
    ):
        torch.testing.assert_close(got, e)


def test_parameters_that_overlap_are_refused_and_flat_ones_are_not() -> None:
    flat = torch.randn(12, generator=torch.Generator().manual_seed(1))
    net = nn.Linear(3, 2)
    net.weight, net.bias = nn.Parameter(flat[:6].view(2, 3)), nn.Parameter(flat[6:8])
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow():
        inner.step(net(XS[0]).square().mean())
    net.bias = nn.Parameter(flat[5:7])
    with pytest.raises(metaoptim.WindowError, match="'weight' and 'bias' share memory"):
        with metaoptim.SlidingWindow():
            inner.step(net(XS[0]).square().mean())


@pytest.mark.parametrize("options", STRATEGIES, ids=["all", "slots", "full_tape"])
@pytest.mark.parametrize("offline", [True, False])
def test_frozen_parameters_written_into(offline: bool, options: dict) -> None:
    net = network()
    net[0].requires_grad_(False)
    before = net[0].weight.detach().clone()
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=offline, **options):
        inner.step(loss_of(net, 0))
        net[0].weight.mul_(0.5)
        inner.step(loss_of(net, 1))
    torch.testing.assert_close(net[0].weight.detach(), before if offline else 0.5 * before)


def test_masks_with_a_differentiable_value() -> None:
    def run(options: dict) -> list[Any]:
        net, w = network(), leaf(0.8)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                out = net(XS[t]) * 1.0
                out[out > 0.1 * t] = w * 0.3
                count = torch.unique((net(XS[t]) > 0).sum(1)).numel()
                inner.step(F.mse_loss(out, YS[t]) * count)
            loss_of(net, STEPS).backward()
        return [w.grad]

    _against_tape(run)


@pytest.mark.parametrize("view", [False, True])
def test_view_that_is_alive_while_its_base_is_rewritten(view: bool) -> None:
    def run(in_place: bool, options: dict) -> list[Any]:
        net, w, lr = network(), leaf(0.7), leaf(0.2)
        inner = metaoptim.MetaSGD([net], lr=lr)
        d, kept = torch.full((3, 2), 0.4), []
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                b = d * 0.97 + w
                if view:
                    kept = [d[0], d[1:]]
                if in_place:
                    d.copy_(b.clone() * 0.83)
                else:
                    d = b.clone() * 0.83
                inner.step(loss_of(net, t) + (net(XS[t])[:3] * (b + d)).sum())
            loss_of(net, STEPS).backward()
        assert len(kept) == 2 * view
        return [w.grad, lr.grad]

    expected = run(False, {"strategy": "full_tape"})
    for options in STRATEGIES[:2]:
        for a, b in zip(run(True, options), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_memory_that_is_a_view_from_before_the_window() -> None:
    def run(in_place: bool, options: dict) -> list[Any]:
        net, lr = network(), leaf(0.2)
        inner = metaoptim.MetaSGD([net], lr=lr)
        memory = torch.full((6, 2), 0.3)[1:4]
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                if not in_place:
                    memory = memory.clone()
                memory[t % 3] = net(XS[t])[0].tanh()
                inner.step(loss_of(net, t) + (memory.sum(0) + net(XS[t]).mean(0)).square().sum())
            loss_of(net, STEPS).backward()
        return [lr.grad]

    expected = run(False, {"strategy": "full_tape"})
    for options in STRATEGIES[:2]:
        for a, b in zip(run(True, options), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("after", [True, False])
def test_requires_grad_changed_between_loss_and_step_is_refused(after: bool) -> None:
    net, w = network(), leaf(0.7)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with pytest.raises(metaoptim.CaptureError, match="requires_grad of a tensor"), metaoptim.SlidingWindow():
        first = net(XS[0]) * w
        w.requires_grad_(False)
        second = net(XS[0]).tanh() * w
        w.requires_grad_(after)
        inner.step(F.mse_loss(first + second, YS[0]))


def test_memory_cloned_and_written_at_every_step() -> None:
    """Also where the first window gave it no weight, so that its check could see nothing."""

    def run(options: dict, weights: tuple[float, ...]) -> Any:
        for weight in weights:
            net, lr = network(), leaf(0.2)
            inner = metaoptim.MetaSGD([net], lr=lr)
            memory, scale = torch.full((3, 5, 2), 0.3), torch.tensor(weight)
            with metaoptim.SlidingWindow(**options):
                for t in range(5):
                    memory = memory.clone()
                    memory[t % 3] = net(XS[t % 3]).tanh()
                    inner.step(loss_of(net, t % 3) + scale * (memory.sum(0) + net(XS[0])).square().sum())
                loss_of(net, STEPS).backward()
        return lr.grad

    expected = run({"strategy": "full_tape"}, (1.0,))
    for options in STRATEGIES[:2]:
        torch.testing.assert_close(run(options, (0.0, 1.0)), expected)


def test_carried_product_shares_its_programs() -> None:
    net, w = network(), leaf(0.9)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    product: Any = 1.0
    with metaoptim.SlidingWindow() as window:
        for t in range(12):
            product = product * w
            inner.step(loss_of(net, t % 3) * product)
        loss_of(net, STEPS).backward()
    assert len(window.program.step_graphs) <= 3 and w.grad is not None


def test_learnt_buffer_and_learnt_optimizer_state() -> None:
    net = network()
    net.register_buffer("temperature", leaf(0.8))
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.9)
    with metaoptim.SlidingWindow():
        for t in range(STEPS):
            inner.step(F.mse_loss(net(XS[t]) * net.temperature, YS[t]))
        loss_of(net, STEPS).backward()
    assert net.temperature.grad is not None and net.temperature.grad.abs() > 1e-6
    inner.state[net[0].weight]["momentum_buffer"].requires_grad_()
    with pytest.raises(metaoptim.WindowError, match=r"'momentum_buffer' of '0\.weight' requires grad"):
        with metaoptim.SlidingWindow():
            inner.step(loss_of(net, 0))


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


def test_inner_optimizers_are_not_copied() -> None:
    with pytest.raises(TypeError, match="build one for the copy"):
        copy.deepcopy(metaoptim.MetaSGD([network()]))


class _Named(torch.autograd.Function):
    """x² k, with arguments that look like what the recorder has of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: tuple, k: float) -> Tensor:  # type: ignore[override]
        assert isinstance(spec, tuple)
        ctx.save_for_backward(x)
        ctx.k = k * len(spec)
        return x * x * ctx.k

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * grad * ctx.k, None, None


@pytest.mark.parametrize(
    "spec",
    [("x", "y"), ("n", 0), ("v", 0, 1), ("c", "0x1.8p+0"), ("d", ()), ("o", 3), ("()",), ((1.5, "t"), 2)],
)
def test_tuples_of_text_for_a_function(spec: tuple) -> None:
    found = []
    for strategy in ("auto", "full_tape"):
        torch.manual_seed(0)
        net, lr = nn.Linear(3, 2), torch.tensor(0.1, requires_grad=True)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True, strategy=strategy):
            for t in range(3):
                inner.step(_Named.apply(net(torch.full((2, 3), 0.3 + t)), spec, 0.5).sum())
            _Named.apply(net(torch.ones(2, 3)), spec, 0.5).sum().backward()
        found.append([lr.grad, *(p.grad for p in net.parameters())])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_memory_that_was_given_back() -> None:
    net, xs = nn.Linear(3, 2), torch.linspace(-1, 1, 24).view(4, 2, 3)
    lr = torch.tensor(0.1, requires_grad=True)
    inner = metaoptim.MetaSGD([net], lr=lr)
    with metaoptim.SlidingWindow():
        for x in xs:
            inner.step(net(x).square().mean())
        outer = net(torch.ones(2, 3)).square().mean()
    xs.untyped_storage().resize_(0)
    with pytest.raises(metaoptim.StaleInputError, match=r"test_sharp_edges.py:\d+: .*given back"):
        outer.backward()
