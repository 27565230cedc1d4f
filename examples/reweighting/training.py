"""The inner loop: a network trained with weights on its examples, inside a window and by torch.optim."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from data import CLASSES, Digits

HIDDEN, BATCH, DECAY = 64, 100, 0.1


class Setting(NamedTuple):
    """How a network is trained: the learning rate of AdamW, its steps, and how much the trusted images count."""

    rate: float
    steps: int
    trusted: float = 0.0

    def text(self) -> str:
        """Returns it in words."""
        trusted = f", trusted {self.trusted}" if self.trusted else ""
        return f"rate {self.rate:g}, {self.steps} steps{trusted}"


def network(seed: int) -> nn.Sequential:
    """Returns the network, 64-64-10, as `reset` leaves it."""
    net = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
    reset(net, seed)
    return net


@torch.no_grad()
def reset(net: nn.Module, seed: int) -> None:
    """Draws all parameters anew, in place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (m for m in net.modules() if isinstance(m, nn.Linear)):
        bound = layer.in_features**-0.5
        for p in layer.parameters():
            p.uniform_(-bound, bound, generator=generator)


def batches(examples: int, steps: int, seed: int) -> Tensor:
    """Returns the rows of every batch, (steps, size): epochs in random order, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    size = min(BATCH, examples)
    epochs = -(-steps * size // examples)
    order = torch.cat([torch.randperm(examples, generator=generator) for _ in range(epochs)])
    return order[: steps * size].view(steps, size)


def weights_of(logits: Tensor) -> Tensor:
    """Returns weights between 0 and 2: logits of 0 are ordinary training."""
    return 2 * logits.sigmoid()


def train(
    net: nn.Sequential, logits: Tensor, group: Tensor, digits: Digits, rows: Tensor, rate: float
) -> Tensor:
    """Trains a network on the noisy labels inside a window; after the window it is as it was before.

    Args:
        net: the network.
        logits: of the weights, one for each group of examples.
        group: the group of each of the noisy examples, (n,): its source, or itself.
        digits: the data.
        rows: of every batch, (steps, batch).
        rate: of AdamW.

    Returns:
        The outer loss: that of the trained network on the trusted images, none of which it has seen.
    """
    weights = weights_of(logits)[group]
    inner = metaoptim.MetaAdamW([net], lr=rate, weight_decay=DECAY)
    with metaoptim.SlidingWindow(offline=True) as window:
        for i in window.scan(rows):
            losses = F.cross_entropy(net(digits.x[i]), digits.y[i], reduction="none")
            inner.step((weights[i] * losses).mean())
        return F.cross_entropy(net(digits.x_trusted), digits.y_trusted)


def fit(
    net: nn.Sequential, digits: Digits, y: Tensor, weights: Tensor, setting: Setting, seed: int
) -> nn.Sequential:
    """Trains a network by torch.optim, with weights that stay as they are.

    Args:
        net: the network; it is trained in place.
        digits: the data.
        y: labels of the many images.
        weights: of the many images; where all are 0, these are left out.
        setting: how to train.
        seed: of the batches.

    Returns:
        The network.
    """
    optim = torch.optim.AdamW(net.parameters(), lr=setting.rate, weight_decay=DECAY)
    noisy = batches(len(y), setting.steps, seed)
    trusted = batches(len(digits.y_trusted), setting.steps, seed)
    many = bool(weights.any())
    for i, j in zip(noisy, trusted):
        loss = torch.zeros(())
        if many:
            loss = loss + (weights[i] * F.cross_entropy(net(digits.x[i]), y[i], reduction="none")).mean()
        if setting.trusted:
            loss = loss + setting.trusted * F.cross_entropy(net(digits.x_trusted[j]), digits.y_trusted[j])
        optim.zero_grad()
        loss.backward()
        optim.step()
    return net


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns the share of images that the network gets right."""
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())
