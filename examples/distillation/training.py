"""The digits, the network, and its training on a handful of images: inside a window, and by torch.optim."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import metaoptim

CLASSES, PIXELS = 10, 64


class Digits(NamedTuple):
    """1,797 images of 8x8 pixels, flattened and centred, in two parts.

    Attributes:
        x, y: the images to distil (1200, 64) and their labels.
        x_test, y_test: the others; nothing is fitted to them.
        mean: what was taken from every image, (64,).
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    mean: Tensor


class Distilled(NamedTuple):
    """A data set of a few images, and how to train on it.

    Attributes:
        images: (n, 64).
        labels: logits of the soft labels, (n, 10).
        log_rate: logarithm of the learning rate of gradient descent, a number.
    """

    images: Tensor
    labels: Tensor
    log_rate: Tensor


def split_digits(seed: int) -> Digits:
    """Splits the digits."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1200], order[1200:]
    mean = x[train].mean(0)
    return Digits(x[train] - mean, y[train], x[test] - mean, y[test], mean)


def one_of_each(digits: Digits, seed: int) -> Tensor:
    """Returns a random image of every class, (10, 64)."""
    order = torch.randperm(len(digits.y), generator=torch.Generator().manual_seed(seed))
    return torch.stack([digits.x[order[digits.y[order] == k][0]] for k in range(CLASSES)])


def class_means(digits: Digits) -> Tensor:
    """Returns the mean image of every class, (10, 64)."""
    return torch.stack([digits.x[digits.y == k].mean(0) for k in range(CLASSES)])


def hard_labels() -> Tensor:
    """Returns logits that say which image is of which class, nearly surely."""
    return 8 * torch.eye(CLASSES)


def network(kind: str, seed: int) -> nn.Sequential:
    """Returns a network: "tanh", 64-64-10, or "relu", 64-128-128-10."""
    if kind == "tanh":
        net = nn.Sequential(nn.Linear(PIXELS, 64), nn.Tanh(), nn.Linear(64, CLASSES))
    else:
        net = nn.Sequential(
            nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES)
        )
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


def inner_loss(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross entropy with soft labels, over all the images."""
    return -(targets * net(images).log_softmax(1)).sum(1).mean()


def train(net: nn.Sequential, distilled: Distilled, steps: int, x: Tensor, y: Tensor) -> Tensor:
    """Trains a network on the distilled images inside a window; after the window it is as it was before.

    Args:
        net: the network.
        distilled: what is learnt.
        steps: inner steps, each on all of the images.
        x, y: real images and labels of the outer loss.

    Returns:
        The outer loss.
    """
    inner = metaoptim.MetaSGD([net], lr=distilled.log_rate.exp())
    with metaoptim.SlidingWindow(offline=True) as window:
        for _ in window.range(steps):
            inner.step(inner_loss(net, distilled.images, distilled.labels.softmax(1)))
        return F.cross_entropy(net(x), y)


def fit(net: nn.Sequential, distilled: Distilled, steps: int) -> nn.Sequential:
    """Trains a network on the distilled images by torch.optim, in place."""
    optim = torch.optim.SGD(net.parameters(), lr=float(distilled.log_rate.detach().exp()))
    images, targets = distilled.images.detach(), distilled.labels.detach().softmax(1)
    for _ in range(steps):
        optim.zero_grad()
        inner_loss(net, images, targets).backward()
        optim.step()
    return net


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns the share of images that the network gets right."""
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())
