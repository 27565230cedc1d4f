"""Pictures of the meta-gradient example."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np

_INK, _GREY = "#222222", "#8a8a8a"
_COLOURS = ("#1f6f8b", "#c8553d", "#7d7461", "#8a5fa8", "#4f8a3d")


def plot_learning(runs: dict[str, list[dict[str, Any]]], title: str, path: str | os.PathLike) -> None:
    """Draws episode length over environment steps: one line per variant, mean over seeds and a 95% interval.

    Args:
        runs: variant -> what `training.train` gave for each seed.
        title: what was trained.
        path: where to write the picture.
    """
    figure, axes = plt.subplots(figsize=(7.6, 4.6), dpi=150, layout="constrained")
    for colour, (name, found) in zip(_COLOURS, runs.items()):
        steps, lengths = _on_grid(found, "length")
        _band(axes, steps, lengths, colour, name)
    _finish(axes, title, "mean length of the last 20 episodes")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")
    _save(figure, path)


def plot_paths(runs: dict[str, list[dict[str, Any]]], title: str, path: str | os.PathLike) -> None:
    """Draws the paths of γ and λ side by side: a thin line per seed, their mean, and the fixed values.

    Args:
        runs: as for `plot_learning`.
        title: what was trained.
        path: where to write the picture.
    """
    figure, both = plt.subplots(1, 2, figsize=(9.2, 3.9), dpi=150, layout="constrained")
    for axes, key, symbol in zip(both, ("gamma", "lam"), ("γ", "λ")):
        for colour, (name, found) in zip(_COLOURS, runs.items()):
            steps, values = _on_grid(found, key)
            if np.ptp(values) > 0:
                axes.plot(steps, values.T, color=colour, linewidth=0.7, alpha=0.5)
            axes.plot(steps, values.mean(0), color=colour, linewidth=2, label=name)
        _finish(axes, f"{symbol}, {title}", symbol)
        axes.set_ylim(top=1.0)
    both[0].legend(frameon=False, loc="center right", fontsize=9)
    _save(figure, path)


def _on_grid(found: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Curves of several seeds at common numbers of steps, (points,) and (seeds, points)."""
    steps = np.array(found[0]["steps"], dtype=float)
    return steps, np.stack([np.interp(steps, run["steps"], run[key]) for run in found])


def _band(axes: Any, steps: np.ndarray, values: np.ndarray, colour: str, name: str) -> None:
    mean = values.mean(0)
    axes.plot(steps, mean, color=colour, linewidth=2, label=name)
    if len(values) > 1:
        half = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
        axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)


def _finish(axes: Any, title: str, label: str) -> None:
    axes.set_xlabel("environment steps")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY)


def _save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a picture whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(partial, format="png")
    plt.close(figure)
    os.replace(partial, path)
