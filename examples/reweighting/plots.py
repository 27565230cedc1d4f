"""The picture of the reweighting example."""

from __future__ import annotations

import os
import pathlib

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

_WRONG, _RIGHT, _GREY = "#c8553d", "#1f6f8b", "#8a8a8a"


def plot_weights(
    weights: Tensor, wrong: Tensor, losses: list[list[float]], scores: dict[str, Tensor], path: pathlib.Path
) -> None:
    """Draws the learnt weights, the outer losses, and the accuracies.

    Args:
        weights: of the examples of all splits, between 0 and 2.
        wrong: whether an example's label is wrong.
        losses: of the outer steps of each split.
        scores: test accuracies by kind of training, one for each split.
        path: where to write the picture.
    """
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 3.6), dpi=90, layout="constrained", width_ratios=(1, 0.8, 1.3)
    )
    bins = np.linspace(0, 2, 31)
    for rows, colour, label in ((~wrong, _RIGHT, "right label"), (wrong, _WRONG, "wrong label")):
        left.hist(weights[rows].numpy(), bins=bins, color=colour, alpha=0.75, label=label)
    left.axvline(1, color=_GREY, ls="--", lw=1.2)
    left.set(xlabel="learnt weight (1 at first)", ylabel="examples, all splits", title="weights")
    left.legend(frameon=False, fontsize=8)
    for curve in losses:
        middle.plot(curve, color=_RIGHT, lw=1, alpha=0.6)
    middle.set(xlabel="outer step", ylabel="loss on the trusted images", yscale="log", title="outer loss")
    names = list(scores)[::-1]
    for row, name in enumerate(names):
        values = 100 * scores[name].numpy()
        colour = _WRONG if name.startswith("learnt") else _RIGHT
        right.plot(values, np.full(len(values), row), "o", ms=4, color=colour, alpha=0.4, mew=0)
        right.plot(values.mean(), row, "|", ms=16, mew=2.2, color=colour)
    right.set_yticks(
        range(len(names)), [n.replace(" that agree with a", "\nthat agree with a") for n in names]
    )
    right.tick_params(axis="y", labelsize=8)
    right.grid(axis="x", color="#e3e3e3", lw=0.8)
    right.set(xlabel="test accuracy (%), each split and the mean", title="networks trained anew")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(partial, format="png")
    plt.close(figure)
    os.replace(partial, path)  # whole or not at all
