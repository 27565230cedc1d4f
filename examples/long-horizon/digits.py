"""Scikit-learn's digits with some of the training labels made wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = 10


class Digits(NamedTuple):
    """1,797 images of 8x8 pixels between 0 and 1, flattened, in three parts.

    Attributes:
        x, y: the training part: images (n, 64), and labels (n,) of which some are wrong.
        x_val, y_val: images and right labels of the outer loss.
        x_test, y_test: images and right labels that nothing is fitted to.
    """

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor


def corrupted_digits(train: int, val: int, share: float, seed: int) -> tuple[Digits, Tensor]:
    """Splits the digits and corrupts training labels.

    Args:
        train: images to train on.
        val: images of the outer loss; what is left over is the test set.
        share: how many of the training labels become another digit, drawn evenly.
        seed: of the split and of the corruption.

    Returns:
        The digits, and for every training label whether it is wrong.

    Raises:
        ValueError: the parts do not fit.
    """
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    if train < 1 or val < 1 or train + val >= len(x):
        raise ValueError(
            f"got {train} images to train on and {val} to validate with, expected at least one of each and fewer "
            f"than {len(x)} together, so that some are left to test on"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    parts = order[:train], order[train : train + val], order[train + val :]
    wrong = torch.zeros(train, dtype=torch.bool)
    wrong[torch.randperm(train, generator=generator)[: round(share * train)]] = True
    labels = y[parts[0]]
    other = (labels + torch.randint(1, CLASSES, (train,), generator=generator)) % CLASSES
    labels = torch.where(wrong, other, labels)
    return Digits(x[parts[0]], labels, x[parts[1]], y[parts[1]], x[parts[2]], y[parts[2]]), wrong
