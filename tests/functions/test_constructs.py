"""Ordinary constructs in form C: as the full tape differentiates them, call after call."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from constructs import CASES, construct
from forms import Made, compare, full_tape, leaf, mlp, run_compiled
from oracle import agree
from problems import data

XS, YS = data(8)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by torch.func.jvp
@pytest.mark.parametrize("name", CASES)
def test_construct(name: str) -> None:
    """The constructs of the other forms, offline and online by turns, with slots and without."""
    turn = list(CASES).index(name) % 4
    case, expected = construct(name, offline=turn < 2)
    agree(run_compiled(case, slots=2 if turn % 2 else None), expected, rtol=1e-9)


# -- whole functions -------------------------------------------------------------------------------------------------


FUNCTIONS: dict[str, Callable[[], Made]] = {}


def function(make: Callable[[], Made]) -> Callable[[], Made]:
    FUNCTIONS[make.__name__] = make
    return make


def query(net: Any) -> Tensor:
    return F.mse_loss(net(XS[6]), YS[6])


def support(net: Any, t: int) -> Tensor:
    return F.mse_loss(net(XS[t]), YS[t])


def states(*optimizers: Any) -> list[Tensor]:
    return [v for o in optimizers for s in o.state.values() for v in s.values()]


@function
def optimizer_from_outside_online() -> Made:
    net, w = mlp(), leaf()
    inner = metaoptim.MetaAdam([net], lr=0.05)

    def of(window: Any) -> Tensor:
        with window():
            for t in range(3):
                inner.step(support(net, t) * w.exp())
            return query(net)

    return Made(of, [w], lambda: [*net.parameters(), *states(inner)])


@function
def two_online_windows() -> Made:
    net, w = mlp(), leaf()
    inner = metaoptim.MetaAdam([net], lr=0.05)

    def of(window: Any) -> Tensor:
        with window():
            for t in range(2):
                inner.step(support(net, t) * w.exp())
            first = query(net)
        with window():
            for t in range(2):
                inner.step(support(net, t) * w.sigmoid())
            return 2 * first + query(net)

    return Made(of, [w], lambda: [*net.parameters(), *states(inner)])


@function
def online_then_offline() -> Made:
    net, w = mlp(), leaf()
    inner = metaoptim.MetaSGD([net], lr=0.05, momentum=0.9)

    def of(window: Any) -> Tensor:
        with window():
            for t in range(2):
                inner.step(support(net, t) * w.exp())
        with window(offline=True):
            for t in range(2):
                inner.step(support(net, t) * w.sigmoid())
            return query(net)

    return Made(of, [w], lambda: [*net.parameters(), *states(inner)])


@function
def tasks_of_maml() -> Made:
    net, w = mlp(), leaf()

    def of(window: Any) -> Tensor:
        total = torch.zeros(())
        for task in range(3):
            inner = metaoptim.MetaSGD([net], lr=0.1 * w, momentum=0.9)
            with window(offline=True):
                for t in range(2):
                    inner.step(support(net, t + task))
                total += query(net) * (task + 1)
        return total

    return Made(of, [w, *net.parameters()], lambda: list(net.parameters()))


@function
def hyper_parameters_set_inside() -> Made:
    net, w = mlp(), leaf(-2.0)
    inner = metaoptim.MetaSGD([net], lr=0.05, momentum=0.9)

    def of(window: Any) -> Tensor:
        inner.param_groups[0]["lr"] = w.exp()
        with window(offline=True):
            for t in range(3):
                inner.param_groups[0]["momentum"] = 0.9 - 0.1 * t
                inner.step(support(net, t))
            return query(net)

    return Made(of, [w, *net.parameters()], lambda: list(net.parameters()))


@function
def actor_and_critic() -> Made:
    actor, critic, gamma = mlp(1), mlp(2), leaf(0.9)
    actor_optim = metaoptim.MetaAdam([actor], lr=0.03)
    critic_optim = metaoptim.MetaSGD([critic], lr=0.05, momentum=0.5)

    def losses(t: int, discount: Any) -> tuple[Tensor, Tensor]:
        values = critic(XS[t])
        returns = YS[t] * discount + discount**2
        policy = -(actor(XS[t]).log_softmax(-1) * (returns - values).detach()).mean()
        return (returns - values).square().mean(), policy

    def of(window: Any) -> Tensor:
        with window():
            for t in range(3):
                critic_loss, actor_loss = losses(t, gamma)
                critic_optim.step(critic_loss)
                actor_optim.step(actor_loss)
            return sum(losses(5, 0.99))

    return Made(
        of,
        [gamma],
        lambda: [*actor.parameters(), *critic.parameters(), *states(actor_optim, critic_optim)],
    )


@function
def two_optimizers_share_a_trunk() -> Made:
    torch.manual_seed(0)
    trunk, a, c, w = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2), leaf()
    first = metaoptim.MetaAdam([trunk, a], lr=0.03)
    second = metaoptim.MetaSGD([trunk, c], lr=0.05, momentum=0.5)

    def of(window: Any) -> Tensor:
        with window():
            for t in range(3):
                h = trunk(XS[t]).tanh()
                loss_a, loss_c = F.mse_loss(a(h), YS[t]) * w.exp(), (c(h) * w).square().mean()
                first.step(loss_a)
                second.step(loss_c)
            h = trunk(XS[6]).tanh()
            return F.mse_loss(a(h), YS[6]) + c(h).square().mean()

    return Made(of, [w], lambda: [*trunk.parameters(), *a.parameters(), *c.parameters()])


@function
def one_network_inside_the_loss_of_another() -> Made:
    torch.manual_seed(0)
    actor, critic, w = nn.Linear(3, 3), mlp(2), leaf(0.9)
    actor_optim = metaoptim.MetaAdam([actor], lr=0.03)
    critic_optim = metaoptim.MetaSGD([critic], lr=0.05, momentum=0.5)

    def of(window: Any) -> Tensor:
        with window(offline=True):
            for t in range(3):
                critic_optim.step((critic(XS[t]) - w * YS[t]).square().mean())
                actor_optim.step(-critic(actor(XS[t]).tanh()).mean() * w)
            return F.mse_loss(critic(actor(XS[5])), YS[5])

    return Made(of, [w, *actor.parameters(), *critic.parameters()])


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
def network_loaded_inside() -> Made:
    net, other, w = mlp(), mlp(3).state_dict(), leaf()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaAdam([net], lr=0.05 * w.exp())
        with window(offline=True):
            for t in range(4):
                if t == 2:
                    net.load_state_dict(other)
                inner.step(support(net, t) * w)
            return query(net)

    return Made(of, [w, *net.parameters()])


@function
def optimizer_loaded_inside() -> Made:
    net, w = mlp(), leaf()
    source, inner = metaoptim.MetaAdam([net], lr=0.05), metaoptim.MetaAdam([net], lr=0.05)
    with metaoptim.SlidingWindow():
        source.step(support(net, 0))
    packed = source.state_dict()
    del source

    def of(window: Any) -> Tensor:
        with window():
            for t in range(3):
                if t == 1:
                    inner.load_state_dict(packed)
                inner.step(support(net, t) * w)
            return query(net)

    return Made(of, [w], lambda: [*net.parameters(), *states(inner)])


@function
def weights_clipped() -> Made:
    """Written whole, through views and aliases, and several at once: history cuts, as in an ordinary window."""
    net, w = mlp(), leaf()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp())
        with window(offline=True):
            for t in range(4):
                inner.step(support(net, t) * w)
                with torch.no_grad():
                    if t == 0:
                        torch._foreach_mul_(list(net.parameters()), 0.9)
                    if t == 1:
                        net[0].weight[1].mul_(0.5)
                        net[2].bias.data.clamp_(-0.1, 0.1)
                    if t == 2:
                        net[0].bias.clamp_(-0.2, 0.2)
            return query(net)

    return Made(of, [w, *net.parameters()])


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


@function
def hooks_on_own_parameters() -> Made:
    net, w = mlp(), leaf()
    net[0].weight.register_hook(lambda g: g * 0.5)

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp())
        with window():
            for t in range(3):
                inner.step(support(net, t) * w)
            return query(net)

    return Made(of, [w])


@function
def clipping_and_backward_hook() -> Made:
    net, w, norm = mlp(), leaf(), leaf(0.3)

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp())
        inner.reset_grad_normalizer(norm)
        with window(offline=True, backward_hook=lambda g: g * 1.5):
            for t in range(3):
                inner.step(support(net, t) * w)
            return query(net)

    return Made(of, [w, norm, *net.parameters()])


@function
def first_order() -> Made:
    net, w = mlp(), leaf()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaAdam([net], lr=0.05 * w.exp(), first_order=True)
        with window(offline=True):
            for t in range(3):
                inner.step(support(net, t) * w)
            return query(net)

    return Made(of, [w, *net.parameters()])


@function
def summed_over_steps() -> Made:
    net, w = mlp(), leaf()
    inner = metaoptim.MetaAdam([net], lr=0.05)

    def of(window: Any) -> Tensor:
        total, best = 0.0, []
        with window():
            for t in range(4):
                best.append(query(net) * 0.9**t)
                total = total + best[-1]
                inner.step(support(net, t) * w.exp())
            return total + torch.stack(best).logsumexp(0) + query(net)

    return Made(of, [w])


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


# in-place loads are a matter of recorded windows; those have tests of their own against the tape
RECORDED = ("network_loaded_inside", "optimizer_loaded_inside", "weights_clipped")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    compare(FUNCTIONS[name], metaoptim.SlidingWindow if name in RECORDED else full_tape)


# -- what is done with the results -----------------------------------------------------------------------------------


def _inner(window: Any, net: nn.Module, w: Tensor) -> None:
    inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp(), momentum=0.9)
    for t in range(3):
        inner.step(support(net, t) * w)


def _results(window: Any, net: nn.Module, w: Tensor) -> dict[str, Any]:
    with window(offline=True):
        _inner(window, net, w)
        out = net(XS[6])
        return {
            "losses": (F.mse_loss(out, YS[6]), out.abs().mean()),
            "aux": [out.detach(), out.argmax(1), "text", 3],
            "weights": net[2].weight,
        }


def test_outputs_of_all_kinds() -> None:
    """Several differentiable outputs in a pytree, auxiliary ones, each pulled back alone and together, repeatedly."""
    net, w = mlp(), leaf()
    leaves = [w, *net.parameters()]
    expected = _results(full_tape, net, w)
    got = metaoptim.compile(_results, backend="eager")(metaoptim.SlidingWindow, net, w)
    assert got["aux"][2:] == ["text", 3]
    assert torch.equal(got["aux"][1], expected["aux"][1]) and not got["aux"][1].requires_grad
    assert not got["aux"][0].requires_grad
    torch.testing.assert_close(got["aux"][0], expected["aux"][0], rtol=1e-12, atol=0)
    for combine in (
        lambda r: r["losses"][0],
        lambda r: r["losses"][1] * 3,
        lambda r: r["weights"].square().sum(),
        lambda r: (r["losses"][0] / r["losses"][1]).log() + r["weights"].mean(),
        lambda r: r["losses"][0],
    ):
        want = torch.autograd.grad(combine(expected), leaves, retain_graph=True)
        have = torch.autograd.grad(combine(got), leaves, retain_graph=True)
        agree(dict(enumerate(have)), dict(enumerate(want)))  # type: ignore[arg-type]


def test_scaled_and_accumulated() -> None:
    """`.backward()` of a scaled loss, twice, adds up in .grad; autograd.grad leaves .grad alone."""
    net, w = mlp(), leaf()
    leaves = [w, *net.parameters()]
    f = metaoptim.compile(_results, backend="eager")
    loss = f(metaoptim.SlidingWindow, net, w)["losses"][0]
    expected = torch.autograd.grad(_results(full_tape, net, w)["losses"][0], leaves)
    torch.autograd.grad(loss, leaves)
    assert all(t.grad is None for t in leaves)
    (loss * 0.5).backward()
    (loss * 0.25).backward()
    agree({str(i): t.grad for i, t in enumerate(leaves)}, {str(i): 0.75 * g for i, g in enumerate(expected)})


def test_meta_parameter_computed_outside() -> None:
    """Arguments need not be leaves: their own graph goes on."""
    net, raw = mlp(), leaf()
    f = metaoptim.compile(_results, backend="eager")
    (got,) = torch.autograd.grad(f(metaoptim.SlidingWindow, net, raw.sin() * 2)["losses"][0], raw)
    (want,) = torch.autograd.grad(_results(full_tape, net, raw.sin() * 2)["losses"][0], raw)
    agree({"raw": got}, {"raw": want})


def test_under_no_grad() -> None:
    net, w = mlp(), leaf()
    f = metaoptim.compile(_results, backend="eager")
    with torch.no_grad():
        got = f(metaoptim.SlidingWindow, net, w)
    expected = _results(full_tape, net, w)
    assert not got["losses"][0].requires_grad and not got["weights"].requires_grad
    for a, b in zip(got["losses"], expected["losses"], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=0)
    again = f(metaoptim.SlidingWindow, net, w)  # the same program, now with gradients
    assert len(f._specializations.known) == 1
    (want,) = torch.autograd.grad(expected["losses"][0], w)
    (have,) = torch.autograd.grad(again["losses"][0], w)
    agree({"w": have}, {"w": want})


def test_method() -> None:
    """A method sees its object's networks and tensors as they are at each call."""

    class Learner:
        def __init__(self) -> None:
            self.net, self.w = mlp(), leaf()

        @functools.partial(metaoptim.compile, backend="eager")
        def loss(self, window: Any, k: int) -> Tensor:
            with window(offline=True):
                _inner(window, self.net, self.w)
                return query(self.net) * k

    learner = Learner()
    for k in (1, 2):
        with torch.no_grad():
            learner.w += 0.1
        expected = torch.autograd.grad(Learner.loss.__wrapped__(learner, full_tape, k), learner.w)
        got = torch.autograd.grad(learner.loss(metaoptim.SlidingWindow, k), learner.w)
        agree({"w": got[0]}, {"w": expected[0]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "off"])
def test_autocast(dtype: Any) -> None:
    """Around the loss inside, and around the call; casts of weights are not remembered across the capture."""
    torch.manual_seed(0)
    net, teacher = mlp().float(), nn.Linear(3, 2).float()
    w = torch.tensor(0.5, dtype=torch.float32, requires_grad=True)
    xs = XS.float()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05)
        with window(offline=True):
            for t in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None or t == 0):
                    out, target = net(xs[t]), teacher(xs[t])
                inner.step((out.float() - target.float()).square().mean() * w)
            return net(xs[6]).float().square().mean()

    leaves = [w, *net.parameters(), *teacher.parameters()]
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            teacher(xs[0])  # the casts of these weights are remembered to the end of the block
            expected = torch.autograd.grad(of(full_tape), leaves)
            got = torch.autograd.grad(metaoptim.compile(of, backend="eager")(metaoptim.SlidingWindow), leaves)
            after = teacher(xs[0])
            assert type(after) is Tensor and after.dtype == (dtype or torch.float32)
        agree(dict(enumerate(got)), dict(enumerate(expected)), rtol=2e-2)  # type: ignore[arg-type]
