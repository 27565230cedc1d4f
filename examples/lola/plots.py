"""The picture of the learners."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import torch
from torch import Tensor

_COLOURS = {
    "naive": "#8a8a8a",
    "looks ahead only": "#7a9e3a",
    "LOLA": "#c8553d",
    "LOLA against naive": "#1f6f8b",
}
_TIT_FOR_TAT = (1, 1, 0, 1, 0)


def plot_learning(
    payoffs: dict[str, Tensor],
    policies: dict[str, Tensor],
    memories: Sequence[str],
    by_rate: dict[float, Tensor],
    path: pathlib.Path,
) -> None:
    """Draws payoffs while learning, learnt policies, and payoffs by the rate of the steps looked ahead.

    Args:
        payoffs: by pair of learners, the mean of the two players, (outer steps + 1, matches).
        policies: by learner, probabilities to cooperate, (policies, memories).
        memories: what they cooperate after.
        by_rate: by rate, the last payoffs, (matches,).
        path: where to write the picture.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.9), dpi=90, layout="constrained")
    for name, of in payoffs.items():
        left.plot(of.numpy(), color=_COLOURS[name], lw=0.3, alpha=0.25)
        left.plot(of.mean(1).numpy(), color=_COLOURS[name], lw=2, label=name)
    left.axhline(-1, color="#bbbbbb", lw=1, ls="--")
    left.axhline(-2, color="#bbbbbb", lw=1, ls="--")
    left.set(xlabel="learning step", ylabel="payoff of a round", title="mean of both players, and each match")
    left.legend(framealpha=0.9, edgecolor="none", fontsize=8, loc=(0.5, 0.06))

    places = torch.arange(len(memories), dtype=torch.float64)
    scatter = torch.Generator().manual_seed(0)
    for shift, (name, of) in zip((-0.18, 0.18), policies.items()):
        across = places + shift + 0.2 * (torch.rand(of.shape, generator=scatter) - 0.5)
        middle.scatter(across.numpy(), of.numpy(), s=7, alpha=0.35, color=_COLOURS[name], lw=0, label=name)
    middle.hlines(_TIT_FOR_TAT, places - 0.35, places + 0.35, color="black", lw=1.5, label="tit-for-tat")
    middle.set_xticks(places.numpy(), memories)
    middle.set(
        xlabel="after (own move, the other's)", ylabel="probability to cooperate", title="learnt policies"
    )
    middle.legend(frameon=False, fontsize=8, loc=(0.3, 0.6), markerscale=2)

    rates = list(by_rate)
    for rate, of in by_rate.items():
        across = rate * torch.exp(0.25 * (torch.rand(len(of), generator=scatter) - 0.5))
        right.scatter(across.numpy(), of.numpy(), s=7, alpha=0.4, color=_COLOURS["LOLA"], lw=0)
    means = [float(of.mean()) for of in by_rate.values()]
    right.plot(rates, means, color="black", marker="o", ms=4, lw=1, label="mean")
    right.set(xscale="log", xlabel="rate of the steps looked ahead", ylabel="payoff of a round")
    right.set_title("each match, by what LOLA expects")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(partial, format="png")
    plt.close(figure)
    os.replace(partial, path)  # whole or not at all
