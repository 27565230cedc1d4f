"""Scikit-learn's digits from twenty sources, some of which label them wrongly, and a few trusted images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES, SOURCES = 10, 20
NOISES = ("shifted", "guessed")


class Digits(NamedTuple):
    """1,797 images of 8x8 pixels, flattened and centred, in three parts.

    Attributes:
        x, y: the many: images (n, 64), and labels (n,) of which a share is wrong.
        source: where each of the many comes from, (n,), from 0 to 19.
        clean: the labels that the many should have; only the ceiling and the pictures read them.
        x_trusted, y_trusted: the few, as many of every digit, with right labels.
        x_test, y_test: images and right labels that nothing is fitted to.
    """

    x: Tensor
    y: Tensor
    source: Tensor
    clean: Tensor
    x_trusted: Tensor
    y_trusted: Tensor
    x_test: Tensor
    y_test: Tensor


def digits_of_sources(many: int, trusted: int, bad: int, noise: str, seed: int) -> Digits:
    """Splits the digits among sources and spoils the labels of some.

    Args:
        many: images with noisy labels, as many from each source.
        trusted: images with right labels, as many of every digit; what is left over is the test set.
        bad: how many of the 20 sources are bad.
        noise: what these do: "shifted": they call every digit by the next one's name; "guessed": they guess.
        seed: of the split and of the noise.

    Raises:
        ValueError: the parts do not fit.
    """
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    x, labels = images - images.mean(0), torch.tensor(digits.target)
    if (
        many < SOURCES
        or trusted < CLASSES
        or trusted % CLASSES
        or many + trusted >= len(x)
        or not 0 < bad < SOURCES
    ):
        raise ValueError(
            f"got {many} noisy and {trusted} trusted images and {bad} bad sources, expected at least {SOURCES} noisy "
            f"ones, a multiple of {CLASSES} trusted ones, fewer than {len(x)} in all, so that some are left to test "
            f"on, and 1 to {SOURCES - 1} bad sources"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    few = torch.cat([order[labels[order] == k][: trusted // CLASSES] for k in range(CLASSES)])
    rest = order[~torch.isin(order, few)]
    noisy, test = rest[:many], rest[many:]
    source = torch.arange(many) % SOURCES
    spoilt = torch.isin(source, torch.randperm(SOURCES, generator=generator)[:bad])
    clean = labels[noisy]
    guess = torch.randint(CLASSES, (many,), generator=generator)
    y = torch.where(spoilt, (clean + 1) % CLASSES if noise == "shifted" else guess, clean)
    return Digits(x[noisy], y, source, clean, x[few], labels[few], x[test], labels[test])
