"""The inner loop: a network trained for thousands of steps, as a function of what is learnt about the training.

`train` is the loop that meta-gradients go through. It is ordinary PyTorch inside a window, and `metaoptim.compile`
takes it as it stands. `retrain` is the same training by torch.optim, without meta-gradients: what has been learnt is
used there as anybody would use it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from digits import CLASSES, Digits

MOMENTUM = 0.9


def network(seed: int) -> nn.Sequential:
    """Returns the network, 64-128-128-10, as `reset` leaves it."""
    # tanh: through thousands of steps the kinks of a ReLU make the outer loss a rough function of the rates.
    net = nn.Sequential(
        nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, CLASSES)
    )
    reset(net, seed)
    return net


def layers(net: nn.Module) -> list[nn.Linear]:
    """Returns the layers that have a learning rate each."""
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


@torch.no_grad()
def reset(net: nn.Module, seed: int) -> None:
    """Draws all parameters anew, in place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(net):
        bound = layer.in_features**-0.5
        for p in layer.parameters():
            p.uniform_(-bound, bound, generator=generator)


def batches(examples: int, size: int, steps: int, seed: int) -> Tensor:
    """Returns the rows of every batch, (steps, size): epochs in random order, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * size // examples)
    rows = torch.cat([torch.randperm(examples, generator=generator) for _ in range(epochs)])
    return rows[: steps * size].view(steps, size)


def weights_of(logits: Tensor) -> Tensor:
    """Returns the weights of the examples, between 0 and 2: logits of 0 are ordinary training."""
    return 2 * logits.sigmoid()


def train(
    net: nn.Sequential,
    optimizer: str,
    weight_decay: float,
    log_rates: Tensor,
    logits: Tensor,
    digits: Digits,
    rows: Tensor,
    gather: str = "step",
    **window: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Trains a network inside a window; after the window it is as it was before.

    Args:
        net: the network.
        optimizer: "sgd" (with momentum) or "adam".
        weight_decay: of the optimizer.
        log_rates: logarithm of the learning rate of each layer, (layers,).
        logits: of the weights of the training examples, (examples,).
        digits: the data.
        rows: training examples of every batch, (steps, batch).
        gather: "step" collects a batch when its step takes place, "before" all of them beforehand.
        window: what is kept of the inner loop, ``slots`` or ``memory_budget``; as of `metaoptim.SlidingWindow`.

    Returns:
        The validation loss of the trained network, and its logits of the validation and test images.
    """
    rates = log_rates.exp().unbind()
    groups = [{"params": layer, "lr": rate} for layer, rate in zip(layers(net), rates, strict=True)]
    if optimizer == "sgd":
        inner = metaoptim.MetaSGD(groups, momentum=MOMENTUM, weight_decay=weight_decay)
    else:
        inner = metaoptim.MetaAdam(groups, weight_decay=weight_decay)
    weights = weights_of(logits)
    with metaoptim.SlidingWindow(offline=True, **window) as opened:
        if gather == "step":
            for i in opened.scan(rows):
                losses = F.cross_entropy(net(digits.x[i]), digits.y[i], reduction="none")
                inner.step((weights[i] * losses).mean())
        else:
            for x, y, weight in opened.scan(digits.x[rows], digits.y[rows], weights[rows]):
                inner.step((weight * F.cross_entropy(net(x), y, reduction="none")).mean())
        val = net(digits.x_val)
        with torch.no_grad():
            test = net(digits.x_test)
        return F.cross_entropy(val, digits.y_val), val.detach(), test


def retrain(
    optimizer: str,
    weight_decay: float,
    rates: Tensor,
    weights: Tensor,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    seed: int,
) -> nn.Sequential:
    """Trains a new network by torch.optim, with learning rates and weights that stay as they are.

    Args:
        optimizer, weight_decay: as in `train`.
        rates: learning rate of each layer.
        weights: of the examples, (n,).
        x, y: the examples.
        rows: of every batch, (steps, batch).
        seed: of the initial parameters.

    Returns:
        The trained network.
    """
    net = network(seed)
    groups = [
        {"params": layer.parameters(), "lr": rate}
        for layer, rate in zip(layers(net), rates.tolist(), strict=True)
    ]
    if optimizer == "sgd":
        optim: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=weight_decay)
    else:
        optim = torch.optim.Adam(groups, weight_decay=weight_decay)
    for i in rows:
        optim.zero_grad()
        (weights[i] * F.cross_entropy(net(x[i]), y[i], reduction="none")).mean().backward()
        optim.step()
    return net


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Returns the fraction of rows of `logits` whose largest entry is at the label."""
    return (logits.argmax(1) == labels).float().mean().item()
