"""The picture of the schedules."""

from __future__ import annotations

import os
import pathlib

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import torch
from torch import Tensor

_COLOURS = ("#c8553d", "#1f6f8b", "#7a9e3a", "#d9a441", "#7b5ea7")


def plot_schedules(
    rates: dict[str, Tensor], base: Tensor, gains: Tensor, found: dict[str, Tensor], path: pathlib.Path
) -> None:
    """Draws the rates, the gain while they were learnt, and the losses of new runs.

    Args:
        rates: learnt, by group, (steps,).
        base: the cosine schedule that they began as, (steps,).
        gains: of each outer step, over that schedule on the same run.
        found: losses on the test text by name, (runs,); the first two names are drawn against the third.
        path: where to write the picture.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.9), dpi=90, layout="constrained")
    for (name, of), colour in zip(rates.items(), _COLOURS):
        left.plot(of.numpy(), color=colour, lw=1.6, label=name)
    left.plot(base.numpy(), color="black", lw=1.4, ls="--", label="best cosine")
    left.set(yscale="log", xlabel="inner step", ylabel="learning rate", title="what was learnt")
    left.legend(frameon=False, fontsize=8)

    middle.plot(gains.numpy(), color="#8a8a8a", lw=0.8, label="each outer step, a new run")
    width = min(10, len(gains))
    smooth = gains.unfold(0, width, 1).mean(1)
    middle.plot(
        torch.arange(width - 1, len(gains)).numpy(),
        smooth.numpy(),
        color=_COLOURS[0],
        lw=1.8,
        label=f"mean of {width}",
    )
    middle.axhline(0, color="#bbbbbb", lw=1, ls="--")
    middle.set(xlabel="outer step", ylabel="less loss than the cosine (nats a byte)", title="while learning")
    middle.legend(frameon=False, fontsize=8)

    names = list(found)
    for name, colour in zip(names[:2], _COLOURS):
        right.scatter(found[names[2]].numpy(), found[name].numpy(), s=16, color=colour, lw=0, label=name)
    both = torch.cat([found[name] for name in names[:3]])
    ends = [float(both.min()) - 0.01, float(both.max()) + 0.01]
    right.plot(ends, ends, color="#bbbbbb", lw=1, ls="--", label="no better")
    right.set(xlabel=f"{names[2]}: loss", ylabel="loss", title="new runs, test text")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(partial, format="png")
    plt.close(figure)
    os.replace(partial, path)  # whole or not at all
