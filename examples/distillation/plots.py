"""The picture of the distillation example."""

from __future__ import annotations

import os
import pathlib

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

_COLOURS = ("#c8553d", "#1f6f8b")


def plot_distilled(
    rows: dict[str, Tensor],
    labels: Tensor,
    losses: list[list[float]],
    found: dict[str, dict[str, list[Tensor]]],
    path: pathlib.Path,
) -> None:
    """Draws the images, their labels, the outer losses, and the accuracies.

    Args:
        rows: images by what they are, (10, 64) each.
        labels: of the distilled images, (10, 10), probabilities.
        losses: of the outer steps of each data set.
        found: kind of network -> what it was trained on -> test accuracies, for each data set those of its networks.
        path: where to write the picture.
    """
    figure = plt.figure(figsize=(12.5, 5.2), dpi=90, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    grid = above.subplots(len(rows), 10)
    for line, (name, images) in zip(grid, rows.items()):
        for k, (axes, image) in enumerate(zip(line, images)):
            axes.imshow(image.view(8, 8).numpy(), cmap="gray", vmin=-0.5, vmax=1.5)
            axes.set(xticks=[], yticks=[])
            if k == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center")
    left, middle, right = below.subplots(1, 3, width_ratios=(0.7, 1, 1.6))
    left.imshow(labels.numpy(), cmap="Blues", vmin=0, vmax=1)
    left.set(xticks=range(10), yticks=range(10), xlabel="digit", ylabel="image", title="learnt labels")
    left.tick_params(labelsize=7)
    for curve in losses:
        middle.plot(curve, color=_COLOURS[1], lw=1, alpha=0.6)
    middle.set(xlabel="outer step", ylabel="loss on the real images", yscale="log", title="outer loss")
    names = list(next(iter(found.values())))[::-1]
    for offset, (kind, colour) in enumerate(zip(found, _COLOURS)):
        for row, name in enumerate(names):
            values = 100 * torch.cat(found[kind][name]).numpy()
            height = row + 0.15 - 0.3 * offset
            label = f"{kind} networks" if row == 0 else None
            right.plot(
                values, np.full(len(values), height), "o", ms=3.5, color=colour, alpha=0.3, mew=0, label=label
            )
            right.plot(values.mean(), height, "|", ms=12, mew=2, color=colour)
    right.set_yticks(range(len(names)), names)
    right.grid(axis="x", color="#e3e3e3", lw=0.8)
    right.set(xlabel="test accuracy (%), each network and the mean", title="networks trained anew")
    right.legend(frameon=False, fontsize=8, loc="lower left")
    for axes in (middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(partial, format="png")
    plt.close(figure)
    os.replace(partial, path)  # whole or not at all
