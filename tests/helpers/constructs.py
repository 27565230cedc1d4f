"""More constructs inside an inner loss than docs/constructs.md lists, for tests of every form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from oracle import Problem, run_oracle
from problems import data

STEPS = 4
XS, YS = data(STEPS)


class OldCube(torch.autograd.Function):
    """Old style (ctx in forward), two inputs and a constant, a backward that is not the true one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, power: int) -> Tensor:
        y = x**power
        ctx.save_for_backward(x, w, y)
        ctx.power = power
        return y * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, w, y = ctx.saved_tensors
        return grad * w * ctx.power * x.sin(), grad * y.cos(), None


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


Loss = Callable[[Any, int, dict, dict], Tensor]
CASES: dict[str, tuple[Callable[[], nn.Module], Loss, Loss | None]] = {}


def case(build: Callable[[], nn.Module] = _mlp, out_of_place: Loss | None = None) -> Callable[[Loss], Loss]:
    """``out_of_place``: the same loss for the oracle, whose tape does not survive in-place changes."""

    def add(loss: Loss) -> Loss:
        CASES[loss.__name__] = (build, loss, out_of_place)
        return loss

    return add


@case()
def hook_that_differs_per_step(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = net(XS[t]).tanh()
    scale = 1.0 + 0.2 * t
    h.register_hook(functools.partial(lambda s, g: g * s, scale))
    h.register_hook(lambda g: None)
    return (h * metas["w"] - YS[t]).square().sum()


@case()
def hook_removed(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = net(XS[t])
    h.register_hook(lambda g: g * 100).remove()
    return F.mse_loss(h * metas["w"], YS[t])


@case()
def hook_on_parameter(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    for p in net.parameters():
        p.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return F.mse_loss(net(XS[t]) * metas["w"], YS[t])


@case()
def penalty_on_parameters(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    loss = F.mse_loss(net(XS[t]).sigmoid(), YS[t])
    grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    return loss + metas["w"] * sum(g.square().sum() for g in grads)


@case()
def inplace_views(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = net(XS[t])
    buffer = torch.zeros(6, 2)
    buffer[1:] = h
    buffer[0].add_(metas["w"])
    buffer.mul_(1.5)
    row = buffer[2]
    row.sin_()
    return (buffer * buffer.flip(0)).sum() + buffer[3].prod()


@case()
def inplace_under_no_grad(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = net(XS[t]) + metas["w"]
    with torch.no_grad():
        h[0].mul_(0.5)
        h.clamp_(-1, 1)
    return (h * YS[t]).sum() + 0.1 * sum(p.square().sum() for p in net.parameters())


@case()
def old_function(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    return (
        OldCube.apply(net(XS[t]), metas["w"], 3).square().mean()
        + 0.1 * OldCube.apply(net(XS[t]).cos(), metas["w"], 2).sum()
    )


@case()
def detach_and_no_grad(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = net(XS[t])
    with torch.no_grad():
        target = net(XS[t] + 1).tanh()
    mask = (h > 0).double()
    return ((h - h.detach() * 0.5 - target) * (mask + 0.5) * metas["w"]).square().mean()


@case()
def requires_grad_inside(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = net(XS[t]).detach().requires_grad_()
    loss = (h * metas["w"]).square().sum()
    (g,) = torch.autograd.grad(loss, h, create_graph=True)
    return F.mse_loss(net(XS[t]), g)


@case()
def carried_hidden_state(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = carried.get("h")
    out = net(XS[t] if h is None else XS[t] + 0.3 * h @ torch.ones(2, 3))
    carried["h"] = out.tanh() * metas["w"]
    return F.mse_loss(out, YS[t])


@case(
    lambda: nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.GroupNorm(2, 4), nn.SiLU(), nn.Linear(4, 2)
    )
)
def norms(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    return F.mse_loss(net(XS[t]), YS[t]) * metas["w"].exp()


@case()
def checkpointed(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = checkpoint(lambda x: net(x).tanh() * metas["w"], XS[t], use_reentrant=False)
    return F.mse_loss(h, YS[t])


@case()
def functional_transforms(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    w = dict(net.named_parameters())["0.weight"]
    per_row = torch.func.vmap(lambda x: (w @ x).tanh().sum())(XS[t])
    slope = torch.func.grad(lambda s: (s * per_row).sin().sum())(torch.tensor(0.7))
    return F.mse_loss(net(XS[t]), YS[t]) + metas["w"] * slope


@case()
def random_numbers(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = net(XS[t] + 0.1 * torch.randn_like(XS[t]))
    h = F.dropout(h, 0.3) * metas["w"] + torch.normal(torch.zeros(2), torch.ones(2))
    return (torch.native_dropout(h, 0.2, True)[0] - YS[t]).square().mean()


@case()
def indexing(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = net(XS[t])
    a, b = h.split(1, 1)
    g = torch.gather(h, 0, torch.tensor([[0, 1], [t, 2]]))
    return (
        (a * b).sum()
        + g.prod()
        + torch.stack([h[t], h[-1]]).logsumexp(0).sum() * metas["w"]
        + torch.cat([a, b]).amax()
    )


@case()
def forward_mode(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    _, tangent = torch.func.jvp(lambda x: net(x).sum(), (XS[t],), (torch.ones(5, 3),))
    return (tangent * metas["w"]).square() + F.mse_loss(net(XS[t]), YS[t])


# -- tensors changed in place while they are carried from step to step ------------------------------------------------


def _accumulated(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = carried["h"] = carried.get("h", torch.zeros(5, 2)) * 0.9 + net(XS[t]).tanh()
    return F.mse_loss(h * metas["w"], YS[t]) + net(XS[t]).square().mean()


@case(out_of_place=_accumulated)
def carried_accumulator(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = carried.setdefault("h", torch.zeros(5, 2))
    h *= 0.9
    h += net(XS[t]).tanh()
    return F.mse_loss(h * metas["w"], YS[t]) + net(XS[t]).square().mean()


def _read_early(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = carried.get("h", metas["w"] * torch.ones(2))
    early = (h + 1).sum() + net(XS[t]).sum()
    h = carried["h"] = h + net(XS[t]).mean(0) * 0.1
    return F.mse_loss(net(XS[t]) * h, YS[t]) + 0.01 * early.square()


@case(out_of_place=_read_early)
def carried_accumulator_read_before_it_changes(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = carried.setdefault("h", metas["w"] * torch.ones(2))
    early = (h + 1).sum() + net(XS[t]).sum()
    h += net(XS[t]).mean(0) * 0.1
    return F.mse_loss(net(XS[t]) * h, YS[t]) + 0.01 * early.square()


def _remembered(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    memory = carried["memory"] = carried.get("memory", torch.full((STEPS, 5, 2), 0.3)).clone()
    memory[t] = net(XS[t]).tanh() * metas["w"]
    return F.mse_loss(net(XS[t]) + memory.mean(0), YS[t])


@case(out_of_place=_remembered)
def memory_written_at_t(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    memory = carried.setdefault("memory", torch.full((STEPS, 5, 2), 0.3))
    memory[t] = net(XS[t]).tanh() * metas["w"]
    return F.mse_loss(net(XS[t]) + memory.mean(0), YS[t])


def _weighted(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    weight = carried.get("weight", metas["w"] * 1.0)
    loss = F.mse_loss(net(XS[t]), YS[t]) + (net(XS[t]).mean() + weight).square()
    if t % 2:
        weight = weight * 0.7 + 0.1 * metas["s"][0]
        loss = loss + net(XS[t]).mean() * weight
    carried["weight"] = weight
    return loss


@case(out_of_place=_weighted)
def meta_changed_in_place(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    weight = carried.setdefault("weight", metas["w"] * 1.0)
    loss = F.mse_loss(net(XS[t]), YS[t]) + (net(XS[t]).mean() + weight).square()
    if t % 2:
        weight *= 0.7
        weight += 0.1 * metas["s"][0]
        loss = loss + net(XS[t]).mean() * weight
    return loss


@case()
def discount(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    gamma, total = torch.ones(()), torch.zeros(())
    for reward in YS[t, :, 0]:
        total += gamma * reward
        gamma *= metas["w"]
    return (net(XS[t])[:, 0] - total).square().mean()


@case()
def written_through_data(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    h = net(XS[t]) + metas["w"]
    h.data.mul_(0.5 + 0.1 * t)
    return (h + YS[t]).sum() * 0.1 + F.mse_loss(net(XS[t]), YS[t])


@case()
def zeros_of_both_signs(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    sign = torch.copysign(torch.ones(()), net(XS[t]).detach() * 0 + (0.0 if t % 2 else -0.0))
    return (net(XS[t]) * sign * metas["w"]).sum() * (1 + 0.1 * t) + F.mse_loss(net(XS[t]), YS[t])


class _Ema(nn.Module):
    """Updates a buffer after its use, in the forward."""

    ema: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp()
        self.register_buffer("ema", torch.full((2,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x) + self.ema
        with torch.no_grad():
            self.ema.mul_(0.8).add_(out.mean(0), alpha=0.2)
        return out + 2 * self.ema


@case(_Ema)
def buffer_updated_after_its_use(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
    return F.mse_loss(net(XS[t]) * metas["w"], YS[t])


def construct(name: str, offline: bool) -> tuple[Problem, dict[str, Tensor | None]]:
    """The inner loop around a construct, and its meta-gradients by the full tape."""
    build, loss, out_of_place = CASES[name]
    case = Problem(
        build=build,
        optimizer="MetaAdam" if len(name) % 2 else "MetaSGD",
        steps=STEPS,
        offline=offline,
        loss=loss,
        outer=lambda net, metas: F.mse_loss(net(XS[STEPS]), YS[STEPS]),
        hyper=lambda metas: {"lr": metas["log_lr"].exp()},
        metas={
            "log_lr": torch.tensor(-2.0),
            "w": torch.tensor(0.8),
            "y": torch.randn(3, 2, generator=torch.Generator().manual_seed(1)),
            "s": torch.tensor([0.7, 1.2]),
        },
    )
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        expected = run_oracle(case if out_of_place is None else dataclasses.replace(case, loss=out_of_place))
    assert expected["log_lr"] is not None and expected["log_lr"].abs() > 1e-8
    return case, expected
