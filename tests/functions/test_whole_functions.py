"""Whole functions in form C, of every shape that windows and optimizers take: as the full tape, call after call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import Made, compare, full_tape, leaf, mlp
from tables import into
from whole_functions import XS, YS, query, states, support

FUNCTIONS: dict[str, Callable[[], Made]] = {}
function = into(FUNCTIONS)


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


# in-place loads are a matter of recorded windows; those have tests of their own against the tape
RECORDED = ("network_loaded_inside", "optimizer_loaded_inside", "weights_clipped")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    compare(FUNCTIONS[name], metaoptim.SlidingWindow if name in RECORDED else full_tape)
