"""The picture of the learned optimizer."""

from __future__ import annotations

import os
import pathlib

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from torch import Tensor

_COLOURS = ("#c8553d", "#1f6f8b", "#7a9e3a", "#8a8a8a")


def plot_curves(curves: dict[str, Tensor], losses: list[float], steps: int, path: pathlib.Path) -> None:
    """Draws the losses on tasks held out, and the outer losses.

    Args:
        curves: by name, the mean loss before the first step and after each.
        losses: of the outer steps.
        steps: how many the rule was trained for.
        path: where to write the picture.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), dpi=100, layout="constrained")
    for (name, curve), colour in zip(curves.items(), _COLOURS):
        left.plot(curve.numpy(), label=name, color=colour, lw=1.6)
    left.axvline(steps, color="#bbbbbb", lw=1, ls="--", label="horizon of the outer loss")
    left.set(yscale="log", xlabel="inner step", ylabel="loss on the queries", title="tasks held out")
    left.legend(frameon=False, fontsize=8)
    right.plot(losses, color=_COLOURS[0], lw=1.2)
    right.set(yscale="log", xlabel="outer step", ylabel="outer loss", title="training of the rule")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(partial, format="png")
    plt.close(figure)
    os.replace(partial, path)  # whole or not at all
