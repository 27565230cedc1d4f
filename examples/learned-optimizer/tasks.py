"""Small tasks: five of scikit-learn's digits, to be told apart by a small network after few steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

WAYS, HIDDEN = 5, 20


class Task(NamedTuple):
    """Batches of steps, and images that the trained network is asked about.

    Attributes:
        xs, ys: (steps, batch, 64) and (steps, batch), labels from 0 to 4.
        xq, yq: (queries, 64) and (queries,); none of the images is among the batches.
    """

    xs: Tensor
    ys: Tensor
    xq: Tensor
    yq: Tensor


class Digits:
    """Draws tasks; those that are held out have images of their own."""

    def __init__(self) -> None:
        digits = load_digits()
        images = torch.tensor(digits.data / 16, dtype=torch.float32)
        self.x, self.y = images - images.mean(0), torch.tensor(digits.target)

    def task(self, seed: int, steps: int, held_out: bool, batch: int = 32, queries: int = 100) -> Task:
        """Draws digits, their labels, images and batches."""
        generator = torch.Generator().manual_seed(seed)
        label_of = torch.full((10,), -1)
        label_of[torch.randperm(10, generator=generator)[:WAYS]] = torch.arange(WAYS)
        mine = (torch.arange(len(self.x)) % 5 >= 3) == held_out  # two fifths are held out
        rows = torch.nonzero(mine & (label_of[self.y] >= 0)).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        asked, trained = rows[:queries], rows[queries:]
        of_batch = trained[torch.randint(len(trained), (steps, batch), generator=generator)]
        return Task(self.x[of_batch], label_of[self.y[of_batch]], self.x[asked], label_of[self.y[asked]])


def network() -> nn.Sequential:
    """Returns the network that tasks train."""
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WAYS))


@torch.no_grad()
def reset(net: nn.Module, seed: int) -> None:
    """Draws the network's weights anew, in place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (m for m in net.modules() if isinstance(m, nn.Linear)):
        bound = layer.in_features**-0.5
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.zero_()
