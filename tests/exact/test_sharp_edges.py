"""What lies just off the beaten track: right, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from edges import STEPS, STRATEGIES, XS, YS, leaf, loss_of, network

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


# -- found by trying to break it --------------------------------------------------------------------------------------


def _against_tape(run: Any) -> None:
    """The same gradients and the same end under every strategy."""
    results = [run(options) for options in STRATEGIES]
    assert any(v is not None and bool(v.any()) for v in results[2]), "nothing has a gradient, by the tape too"
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
                inner.step(F.mse_loss(out.cumsum(0), YS[t]) * count)
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
