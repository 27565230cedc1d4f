"""Pictures of the few-shot example."""

from __future__ import annotations

import os
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects

from episodes import Episode
from glyphs import Characters

_INK, _GREY = "#222222", "#8a8a8a"
_BEFORE, _AFTER = "#c8553d", "#1f6f8b"


def plot_accuracies(
    curves: dict[str, list[float]], chance: float, title: str, path: str | os.PathLike
) -> None:
    """Draws accuracy before and after adaptation over meta-training.

    Args:
        curves: `iteration`, and `before`, `after` with the half widths of their
            intervals, `before_half`, `after_half`; accuracies between 0 and 1.
        chance: accuracy of a guess.
        title: what was trained.
        path: where to write the picture.
    """
    figure, axes = plt.subplots(figsize=(7.6, 4.6), dpi=150, layout="constrained")
    iterations = np.array(curves["iteration"])
    for key, colour, label in (
        ("after", _AFTER, "after adaptation"),
        ("before", _BEFORE, "before adaptation"),
    ):
        mean, half = 100 * np.array(curves[key]), 100 * np.array(curves[f"{key}_half"])
        axes.fill_between(iterations, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        axes.plot(iterations, mean, color=colour, linewidth=2, marker="o", markersize=3.5, label=label)
        axes.annotate(
            f"{mean[-1]:.1f}%",
            (iterations[-1], mean[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
    axes.axhline(
        100 * chance,
        color=_GREY,
        linestyle="--",
        linewidth=1.2,
        label=f"chance ({100 * chance:g}%)",
        zorder=0,
    )
    axes.set_ylim(0, 100)
    axes.set_xlim(0, max(1, iterations[-1]))
    axes.set_xlabel("meta-training iteration")
    axes.set_ylabel("query accuracy on held-out alphabets (%)")
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.45))
    _save(figure, path)


def plot_episodes(
    episodes: Sequence[Episode],
    predictions: Sequence[Sequence[int]],
    characters: Characters,
    path: str | os.PathLike,
) -> None:
    """Draws test episodes: per row one character, its support images, then its queries.

    Args:
        episodes: what to draw.
        predictions: for each episode the class predicted for every query image after
            adaptation; a wrong one is framed and shows the position it was taken for.
        characters: the set the episodes were drawn from.
        path: where to write the picture.
    """
    ways = len(episodes[0].characters)
    shots, queries = (len(y) // ways for y in (episodes[0].y_spt, episodes[0].y_qry))
    shown_ways, shown_shots, shown_queries = min(ways, 8), min(shots, 5), min(queries, 6)
    columns = shown_shots + shown_queries
    across = min(len(episodes), 3 if columns <= 8 else 2)
    down = -(-len(episodes) // across)

    part = f" (the first {shown_ways} characters)" if shown_ways < ways else ""

    # All in inches, so that images are square and equally large for any ways and shots.
    cell, gap, margin, heading = 0.52, 0.35, 0.12, 0.5
    caption = 0.3
    longest = max(len(line) for name in characters.alphabets for line in _lines(name))
    label = 0.075 * longest + 0.3
    block_width = label + cell * (columns + 0.35)
    width = across * block_width + (across - 1) * gap + 2 * margin
    height = down * (cell * shown_ways + heading) + margin + caption
    figure = plt.figure(figsize=(width, height), dpi=110)
    blocks = figure.add_gridspec(
        down,
        across,
        wspace=gap / block_width,
        hspace=heading / (cell * shown_ways),
        left=margin / width,
        right=1 - margin / width,
        bottom=margin / height,
        top=1 - (caption + heading) / height,
    )
    figure.text(
        margin / width,
        1 - margin / height,
        f"Held-out alphabets, {ways}-way {shots}-shot{part}. After adaptation on the support images, a framed"
        " query was taken for the character of the row whose number it bears.",
        va="top",
        fontsize=9,
        color=_INK,
    )
    for number, (episode, predicted) in enumerate(zip(episodes, predictions)):
        block = blocks[number // across, number % across].subgridspec(
            shown_ways,
            columns + 2,
            width_ratios=[label / cell] + [1] * shown_shots + [0.35] + [1] * shown_queries,
            wspace=0.07,
            hspace=0.07,
        )
        support = episode.x_spt.reshape(ways, shots, *episode.x_spt.shape[-2:]).cpu()
        query = episode.x_qry.reshape(ways, queries, *episode.x_qry.shape[-2:]).cpu()
        guesses = np.asarray(predicted).reshape(ways, queries)
        right = np.mean(guesses == np.arange(ways)[:, None])
        for row in range(shown_ways):
            alphabet = characters.alphabets[episode.characters[row]]
            text = figure.add_subplot(block[row, 0])
            text.set_axis_off()
            lines = _lines(alphabet)
            lines[0] = f"{lines[0]}  {row + 1}"
            text.text(0.94, 0.5, "\n".join(lines), ha="right", va="center", fontsize=8.5, color=_INK)
            for k in range(shown_shots):
                axes = _image(figure, block[row, 1 + k], support[row, k], "#1b2a38")
                if row == 0 and k == 0:
                    axes.set_title("support", fontsize=8.5, color=_GREY, loc="left", pad=4)
            for k in range(shown_queries):
                axes = _image(figure, block[row, 2 + shown_shots + k], query[row, k], "#1c1c1c")
                if row == 0 and k == 0:
                    axes.set_title(
                        f"query ({100 * right:.0f}% right)", fontsize=8.5, color=_GREY, loc="left", pad=4
                    )
                if guesses[row, k] != row:
                    for spine in axes.spines.values():
                        spine.set(visible=True, color=_BEFORE, linewidth=2.2)
                    axes.text(
                        0.95,
                        0.05,
                        str(guesses[row, k] + 1),
                        transform=axes.transAxes,
                        ha="right",
                        va="bottom",
                        fontsize=8,
                        fontweight="bold",
                        color="#ff9d85",
                        path_effects=[patheffects.withStroke(linewidth=2.5, foreground="#1c1c1c")],
                    )
    _save(figure, path)


def plot_methods(
    found: dict[tuple[str, int], dict[str, Any]], chance: float, path: str | os.PathLike
) -> None:
    """Draws what ways to a meta-gradient reach and cost, against the inner steps.

    Args:
        found: method and T -> `accuracy` and `milliseconds` (lists, one entry for each seed) and `bytes`.
        chance: accuracy of a guess.
        path: where to write the picture.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), dpi=90, layout="constrained")
    names = list(dict.fromkeys(name for name, _ in found))
    for name, colour, marker in zip(names, (_AFTER, _GREY, _BEFORE), "os^"):
        of = {steps: values for (key, steps), values in found.items() if key == name}
        horizons = list(of)
        scores = 100 * np.array([values["accuracy"] for values in of.values()])
        error = scores.std(1, ddof=1) / scores.shape[1] ** 0.5 if scores.shape[1] > 1 else 0
        left.errorbar(horizons, scores.mean(1), error, fmt=f"{marker}-", color=colour, label=name, capsize=3)
        times = [np.mean(values["milliseconds"]) for values in of.values()]
        middle.plot(horizons, times, f"{marker}-", color=colour)
        right.plot(horizons, [values["bytes"] / 2**20 for values in of.values()], f"{marker}-", color=colour)
    left.axhline(100 * chance, color=_GREY, ls="--", lw=1.2)
    left.set(ylabel="query accuracy, held-out alphabets (%)")
    middle.set(ylabel="processor time per outer step (ms)", ylim=(0, None))
    right.set(ylabel="peak memory of a task (MiB)", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.set(xlabel="T, inner steps")
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _lines(alphabet: str) -> list[str]:
    """Breaks the name of an alphabet into short lines."""
    return textwrap.wrap(alphabet, 14) or [""]


def _image(figure, place, image, background: str):
    """Shows one image in a cell of a grid, strokes white."""
    axes = figure.add_subplot(place)
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("strokes", [background, "white"])
    axes.imshow(image.numpy(), cmap=shades, vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _save(figure, path: str | os.PathLike) -> None:
    """Writes a picture whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(partial, format="png")
    plt.close(figure)
    os.replace(partial, path)
