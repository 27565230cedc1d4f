"""The picture of the long-horizon example."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

_INK, _GREY = "#222222", "#8a8a8a"
_WRONG, _RIGHT = "#c8553d", "#1f6f8b"
_LAYERS = ("#1f6f8b", "#7a9e3a", "#b0722c", "#6a4c93")


def plot_learnt(
    curves: dict[str, list[Any]],
    weights: Tensor,
    wrong: Tensor,
    compared: dict[str, float],
    title: str,
    path: str | os.PathLike,
) -> None:
    """Draws the learnt weights, the learning rates, and the accuracies on the way.

    Args:
        curves: by outer step: `rates` (of each layer) and `auc`, with one more entry for what was learnt last, and
            `val`, `test` (accuracies between 0 and 1).
        weights: of the training examples, between 0 and 2.
        wrong: whether an example's label is wrong.
        compared: test accuracy by kind of training.
        title: what was trained.
        path: where to write the picture.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.9), dpi=100, layout="constrained")
    _histogram(left, weights.numpy(), wrong.numpy(), curves["auc"][-1])
    _rates(middle, np.array(curves["rates"]))
    _accuracies(right, curves, compared)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.suptitle(title, x=0.005, ha="left", fontsize=11, color=_INK)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(partial, format="png")
    plt.close(figure)
    os.replace(partial, path)  # whole or not at all


def _histogram(axes: Any, weights: np.ndarray, wrong: np.ndarray, auc: float) -> None:
    bins = np.linspace(0, 2, 41)
    for rows, colour, label in ((~wrong, _RIGHT, "right label"), (wrong, _WRONG, "wrong label")):
        axes.hist(
            weights[rows], bins=bins, color=colour, alpha=0.75, label=f"{label} ({np.count_nonzero(rows)})"
        )
    axes.axvline(1, color=_GREY, linestyle="--", linewidth=1.2)
    axes.set(xlabel="learnt weight (1 at first)", ylabel="training examples", xlim=(0, 2))
    axes.set_title(f"Weights: AUC {auc:.3f}", loc="left", fontsize=10, color=_INK)
    axes.legend(frameon=False)


def _rates(axes: Any, rates: np.ndarray) -> None:
    for k, colour in zip(range(rates.shape[1]), _LAYERS):
        axes.plot(rates[:, k], color=colour, linewidth=2, marker="o", markersize=3, label=f"layer {k + 1}")
    axes.set_yscale("log")
    axes.set(xlabel="outer step", ylabel="learning rate")
    axes.set_title("Learning rates", loc="left", fontsize=10, color=_INK)
    axes.grid(axis="y", which="both", color="#e3e3e3", linewidth=0.8)
    axes.legend(frameon=False)


def _accuracies(axes: Any, curves: dict[str, list[Any]], compared: dict[str, float]) -> None:
    steps = range(len(curves["test"]))
    axes.plot(
        steps, 100 * np.array(curves["val"]), color=_GREY, linewidth=1.5, label="validation (learnt from)"
    )
    axes.plot(
        steps,
        100 * np.array(curves["test"]),
        color=_RIGHT,
        linewidth=2,
        marker="o",
        markersize=3,
        label="test",
    )
    lines = {
        "no weights, best of five rates": (_WRONG, "--"),
        "wrong labels left out, learnt rates": (_INK, ":"),
    }
    for kind, (colour, style) in lines.items():
        axes.axhline(
            100 * compared[kind], color=colour, linestyle=style, linewidth=1.4, label=f"test, {kind}"
        )
    axes.set(xlabel="outer step", ylabel="accuracy (%)")
    axes.set_title("Accuracy", loc="left", fontsize=10, color=_INK)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8)


def plot_memory(found: dict[str, dict[int, int]], budget: str, path: str | os.PathLike) -> None:
    """Draws the memory of one meta-gradient against T.

    Args:
        found: kind of run -> T -> bytes.
        budget: of the run under one, as text.
        path: where to write the picture.
    """
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    names = {"budget": f"budget of {budget}"}
    for kind, color in zip(found, (_WRONG, _LAYERS[2], _RIGHT), strict=True):
        horizons = sorted(found[kind])
        sizes = [found[kind][t] / 2**20 for t in horizons]
        axes.plot(horizons, sizes, "o-", ms=4, color=color, label=names.get(kind, kind))
    axes.set(xscale="log", yscale="log", xlabel="T, inner steps", ylabel="MiB, resident, above the start")
    axes.set_title("memory of one meta-gradient", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_time(
    predicted: dict[int, dict[bool, list[tuple[int, float]]]],
    measured: list[tuple[bool, int, float]],
    steps: int,
    path: str | os.PathLike,
) -> None:
    """Draws the time of one meta-gradient against its budget.

    Args:
        predicted: T -> whether states are offloaded -> bytes and work, relative to keeping every state.
        measured: whether states were offloaded, bytes, and time relative to keeping every state.
        steps: T of what was measured.
        path: where to write the picture.
    """
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    for horizon, color in zip(predicted, (_RIGHT, _LAYERS[2])):
        for offload, style in ((False, "-"), (True, "--")):
            sizes, work = zip(*predicted[horizon][offload])
            label = f"T = {horizon:,}, predicted" + (", with offload" if offload else "")
            axes.plot(np.array(sizes) / 2**20, work, style, color=color, drawstyle="steps-post", label=label)
    for offload, marker in ((False, "o"), (True, "s")):
        found = np.array([(size / 2**20, ratio) for o, size, ratio in measured if o == offload])
        if len(found):
            label = f"T = {steps:,}, measured" + (", with offload" if offload else "")
            axes.plot(*found.T, marker, color=_WRONG, ms=5, label=label)
    axes.axhline(1, color=_GREY, linewidth=0.8)
    axes.set(xscale="log", ylim=(0.5, 4), xlabel="MiB, budget or measured peak")
    axes.set_ylabel("work, or processor time,\nrelative to keeping every state")
    axes.set_title("time of one meta-gradient", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
