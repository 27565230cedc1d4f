"""Networks and losses in torch, for ours and for all peers that are written in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems import Problem, layer_of

Tensors = dict[str, Tensor]
Net = Callable[[Tensor], Tensor]  # a module, or a module with other parameters


class TorchProblem:
    """A problem as tensors.

    Attributes:
        theta, meta: leaves that require grad.
        windows: for each window, the inputs of its inner steps (T, ...) and of its outer loss.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype = torch.float32) -> None:
        def tensor(array: np.ndarray) -> Tensor:
            made = torch.from_numpy(array).to(problem.device)
            return made.to(dtype) if made.is_floating_point() else made

        self.numbers = problem
        self.online = problem.online
        self.theta = {name: tensor(a).requires_grad_() for name, a in problem.theta.items()}
        self.meta = {name: tensor(a).requires_grad_() for name, a in problem.meta.items()}
        steps, outer = ({k: tensor(a) for k, a in part.items()} for part in (problem.steps, problem.outer))
        self.windows = [
            ({k: a[w] for k, a in steps.items()}, {k: a[w] for k, a in outer.items()})
            for w in range(problem.windows)
        ]
        self.inner_loss, self.outer_loss, self._build = _MODELS[problem.model]

    def network(self) -> nn.Module:
        """The network, with parameters of its own."""
        net = self._build(self.numbers)
        net.load_state_dict(self.theta)
        return net.to(next(iter(self.theta.values())))

    def layer_lrs(self) -> list[Tensor]:
        """The learning rate of each layer, on a new graph."""
        return list(self.meta["log_lr"].exp().unbind())

    def lrs(self, meta: Tensors) -> Tensors:
        """The learning rate of each parameter."""
        by_layer = dict(zip(self.numbers.layers, meta["log_lr"].exp().unbind()))
        return {name: by_layer[layer_of(name)] for name in self.theta}

    def collect(self, loss: float, theta: Tensors) -> dict[str, np.ndarray]:
        """The meta-gradient out of .grad, which is emptied; ``theta`` is where that of the initial parameters is."""
        found = {"loss": np.array(loss)}
        for name, leaf in (self.meta | ({} if self.online else theta)).items():
            assert leaf.grad is not None, f"{name} has no gradient"
            found[name] = leaf.grad.cpu().numpy()
        for leaf in (*self.meta.values(), *theta.values()):
            leaf.grad = None
        return found


def batches(steps: Tensors) -> Iterator[Tensors]:
    """The inputs of one step after the other."""
    for row in zip(*steps.values()):
        yield dict(zip(steps, row))


# -- networks and losses ----------------------------------------------------------------------------------------------


def classification_loss(net: Net, meta: Tensors, batch: Tensors) -> Tensor:
    """Cross-entropy over everything that has a class."""
    return F.cross_entropy(net(batch["x"]).flatten(0, -2), batch["y"].flatten())


def query_loss(net: Net, batch: Tensors) -> Tensor:
    """The same for the outer loss."""
    return classification_loss(net, {}, batch)


def mlp(problem: Problem) -> nn.Module:
    """Three layers."""
    width = len(problem.theta["0.bias"])
    return nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )


def weighted_loss(net: Net, meta: Tensors, batch: Tensors) -> Tensor:
    """Cross-entropy with a learnt weight for each example."""
    weights = 2 * meta["logit"][batch["index"]].sigmoid()
    return (weights * F.cross_entropy(net(batch["x"]), batch["y"], reduction="none")).mean()


class ActorCritic(nn.Module):
    """Logits of action 1, and values."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        hidden = len(problem.theta["actor.0.bias"])
        self.actor, self.critic = (
            nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., 4) to (..., 2)."""
        return torch.cat([self.actor(x), self.critic(x)], -1)


def actor_critic_losses(net: Net, played: Tensors, gamma: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Advantage actor-critic with generalised advantages A_t = Σ_j (γλ)^{j-t} δ_j."""
    logits, values = net(played["observations"]).unbind(-1)
    logits, fixed = logits[:-1], values.detach()
    delta = played["rewards"] + gamma * played["alive"] * fixed[1:] - fixed[:-1]
    steps = torch.arange(len(delta), device=delta.device)
    gap = (steps[None, :] - steps[:, None]).clamp(min=0).to(delta.dtype)
    advantages = (((gamma * lam) ** gap)[..., None] * played["reaches"] * delta[None]).sum(1)
    taken = torch.where(played["actions"] > 0, F.logsigmoid(logits), F.logsigmoid(-logits))
    error = advantages + fixed[:-1] - values[:-1]
    return -(taken * advantages).mean(), error.square().mean()


def learning_loss(net: Net, meta: Tensors, batch: Tensors) -> Tensor:
    """Both losses; each reaches its own half of the network only."""
    gamma, lam = meta["logit"].sigmoid().unbind()
    actor, critic = actor_critic_losses(net, batch, gamma, lam)
    return actor + critic


def judging_loss(net: Net, batch: Tensors) -> Tensor:
    """The actor's, with a fixed γ and λ."""
    gamma, lam = batch["rewards"].new_tensor([0.99, 0.95]).unbind()
    return actor_critic_losses(net, batch, gamma, lam)[0]


class Conv4(nn.Module):
    """Convolutions of stride two, batch norm by the statistics of the batch at hand, ReLU."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        channels, filters = 1, len(problem.theta["block0.1.bias"])
        for block in range(4):
            conv = nn.Conv2d(channels, filters, 3, stride=2, padding=1, bias=False)
            norm = nn.BatchNorm2d(filters, track_running_stats=False)
            self.add_module(f"block{block}", nn.Sequential(conv, norm, nn.ReLU()))
            channels = filters
        self.head = nn.Linear(4 * filters, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        for block in range(4):
            x = self.get_submodule(f"block{block}")(x)
        return self.head(x.flatten(1))


class Block(nn.Module):
    """A causal transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and an MLP, each beside a residual."""
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        # By hand: torch's fused attention has no second derivative on a CPU.
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, bytes out."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        length, width = problem.theta["position.weight"].shape
        self.embedding, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.block0, self.block1 = (Block(width, problem.heads) for _ in range(2))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) to (batch, length, 256); the embedding is the last layer's weight too."""
        x = self.embedding(tokens) + self.position.weight
        return self.norm(self.block1(self.block0(x))) @ self.embedding.weight.T


_MODELS = {
    "mlp": (weighted_loss, query_loss, mlp),
    "actor_critic": (learning_loss, judging_loss, ActorCritic),
    "conv4": (classification_loss, query_loss, Conv4),
    "gpt": (classification_loss, query_loss, GPT),
}
