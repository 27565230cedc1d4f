"""Draws docs/img/offline and docs/img/online, as SVG and PNG: `python docs/draw_modes.py [folder]`."""

from __future__ import annotations

import itertools
import math
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

HERE = pathlib.Path(__file__).resolve().parent

INK, GREY, PALE = "#1f2a37", "#6b7280", "#f1f4f8"
INNER, OUTER, META = "#1f6f8b", "#c8553d", "#5b4b8a"

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "mathtext.fontset": "dejavuserif",
        "svg.hashsalt": "metaoptim",  # equal input, equal file
        "svg.fonttype": "path",  # looks the same where the font is missing
    }
)


class Canvas:
    """An empty sheet with a few shapes; one unit is one inch."""

    def __init__(self, width: float, height: float):
        self.figure = plt.figure(figsize=(width, height), facecolor="white")
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.set_axis_off()

    def text(self, x: float, y: float, text: str, colour: str = INK, size: float = 10.5, **options) -> None:
        options = {"ha": "center", "va": "center", "zorder": 5, "linespacing": 1.35} | options
        self.axes.text(x, y, text, color=colour, fontsize=size, **options)

    def box(self, x: float, y: float, width: float, height: float, fill: str, edge: str = "none") -> None:
        style = "round,pad=0,rounding_size=0.12"
        shape = FancyBboxPatch(
            (x, y), width, height, style, facecolor=fill, edgecolor=edge, linewidth=1.2, zorder=1
        )
        self.axes.add_patch(shape)

    def node(self, x: float, y: float, label: str, fill: str = INNER, radius: float = 0.27) -> None:
        self.axes.add_patch(
            Circle((x, y), radius, facecolor=fill, edgecolor="white", linewidth=1.5, zorder=4)
        )
        self.text(x, y - 0.01, label, "white", 12.5)

    def loss(self, x: float, y: float) -> None:
        self.box(x - 0.27, y - 0.25, 0.54, 0.5, OUTER)
        self.text(x, y, r"$\mathcal{L}$", "white", 15)

    def arrow(self, start, end, colour=INK, dashed=False, bend=0.0, width=1.6, gap=0.32) -> None:
        shape = FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>,head_length=0.42,head_width=0.2",
            mutation_scale=14,
            connectionstyle=f"arc3,rad={bend}",
            linestyle=(0, (3.2, 2)) if dashed else "solid",
            shrinkA=72 * gap,
            shrinkB=72 * gap,
            color=colour,
            linewidth=width,
            zorder=3,
        )
        self.axes.add_patch(shape)

    def there_and_back(self, left, right, apart: float = 0.09) -> None:
        """An inner step to the right and the gradient through it to the left."""
        (x0, y0), (x1, y1) = left, right
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = apart * (y0 - y1) / length, apart * (x1 - x0) / length
        self.arrow((x0 + dx, y0 + dy), (x1 + dx, y1 + dy), INK)
        self.arrow((x1 - dx, y1 - dy), (x0 - dx, y0 - dy), OUTER, dashed=True)

    def legend(self, x: float, y: float, entries: list[tuple[str, str, bool]], apart: float) -> None:
        for number, (label, colour, dashed) in enumerate(entries):
            left = x + number * apart
            self.arrow((left, y), (left + 0.55, y), colour, dashed, gap=0)
            self.text(left + 0.66, y, label, GREY, 10, ha="left")

    def save(self, path: pathlib.Path) -> None:
        self.figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        self.figure.savefig(path.with_suffix(".png"), dpi=160)
        plt.close(self.figure)


def draw_offline() -> Canvas:
    """Windows over several tasks, all starting at the same parameters."""
    sheet = Canvas(10.4, 5.3)
    sheet.text(
        0.35, 4.98, "Offline: every window starts from the same parameters", size=14, ha="left", weight="bold"
    )

    start = (1.45, 2.75)
    sheet.box(0.35, 1.15, 2.2, 2.95, "#eceaf4")
    sheet.text(1.45, 3.83, "meta-parameters", META, 10.5, weight="bold")
    sheet.node(*start, r"$\theta_0$", META, 0.36)
    sheet.text(1.45, 1.9, "where every task starts,", GREY, 9.5)
    sheet.text(1.45, 1.67, r"and $\eta$: learning rates,", GREY, 9.5)
    sheet.text(1.45, 1.44, "loss weights, data, …", GREY, 9.5)

    for number, y in enumerate((4.05, 2.75, 1.45), start=1):
        sheet.box(3.45, y - 0.5, 6.6, 1.0, PALE)
        sheet.text(4.86, y + 0.36, f"window, task {number}", GREY, 9, ha="left")
        for x, label in ((4.5, "1"), (5.8, "2"), (7.1, "3"), (8.4, "T")):
            sheet.node(x, y, rf"$\theta_{label}$")
        sheet.loss(9.5, y)
        for left, right in ((4.5, 5.8), (5.8, 7.1), (8.4, 9.5)):
            sheet.there_and_back((left, y), (right, y))
        sheet.text(7.75, y + 0.07, "· · ·", INK, 13, weight="bold")
        sheet.text(7.75, y - 0.11, "· · ·", OUTER, 13, weight="bold")
        fan = 0.16 * (2 - number)
        sheet.there_and_back((start[0] + 0.07, start[1] + fan), (4.5, y))

    sheet.text(9.5, 0.76, "outer loss", OUTER, 9.5)
    entries = [
        ("forward", INK, False),
        ("meta-gradient", OUTER, True),
    ]
    sheet.legend(0.4, 0.32, entries, 1.85)
    sheet.text(
        10.05,
        0.32,
        r"after each window the network holds $\theta_0$ again; the outer step then moves it",
        INK,
        10,
        ha="right",
    )
    return sheet


def draw_online() -> Canvas:
    """Consecutive windows over one long trajectory."""
    sheet = Canvas(10.4, 5.3)
    sheet.text(
        0.35, 4.98, "Online: every window goes on where the last one ended", size=14, ha="left", weight="bold"
    )

    y, below, above = 2.75, 1.1, 4.05
    for number, left in enumerate((0.35, 5.05)):
        sheet.box(left, 1.75, 4.1, 2.85, PALE)
        sheet.text(left + 0.15, 4.38, f"window {number + 1}", GREY, 9, ha="left")
        xs = [left + 0.5 + 1.03 * k for k in range(4)]
        names = [str(3 * number + k) for k in range(4)]
        eta = (left + 2.05, below)
        for x, following in itertools.pairwise(xs):
            sheet.there_and_back((x, y), (following, y))
            middle = (x + following) / 2
            sheet.arrow(
                (eta[0] + (middle - eta[0]) * 0.12 - 0.08, eta[1]),
                (middle - 0.08, y + 0.02),
                META,
                width=1.2,
                gap=0.3,
            )
            sheet.arrow(
                (middle + 0.08, y - 0.08),
                (eta[0] + (middle - eta[0]) * 0.12 + 0.08, eta[1]),
                OUTER,
                True,
                width=1.2,
                gap=0.3,
            )
        for x, name in zip(xs, names):
            sheet.node(x, y, rf"$\theta_{name}$")
        sheet.loss(xs[-1], above)
        sheet.text(xs[-1] - 0.4, above, "outer loss", OUTER, 9.5, ha="right")
        sheet.arrow((xs[-1] - 0.09, y), (xs[-1] - 0.09, above), INK)
        sheet.arrow((xs[-1] + 0.09, above), (xs[-1] + 0.09, y), OUTER, dashed=True)
        sheet.node(*eta, rf"$\eta_{number}$", META, 0.32)

    sheet.arrow((3.94, y + 0.09), (5.55, y + 0.09), INK)
    for x in (4.71, 4.79):
        sheet.axes.plot(
            (x, x), (y - 0.32, y - 0.06), color=OUTER, linewidth=2, solid_capstyle="round", zorder=4
        )
    sheet.text(4.75, y + 0.42, "values\ngo on", INK, 9)
    sheet.text(4.75, y - 0.62, "the gradient\nstops", OUTER, 9)

    sheet.arrow((2.4, below), (7.1, below), META, gap=0.36)
    sheet.text(4.75, below - 0.2, "outer step", META, 9.5)
    sheet.arrow((7.1, below), (10.15, below), META, gap=0.36)
    sheet.arrow((8.64, y + 0.09), (10.3, y + 0.09), INK)
    sheet.text(0.5, below, r"meta-parameter $\eta$," + "\nsay a discount factor", META, 9.5, ha="left")

    entries = [
        ("forward", INK, False),
        ("meta-gradient", OUTER, True),
    ]
    sheet.legend(0.4, 0.32, entries, 1.85)
    sheet.text(
        10.05, 0.32, "the network keeps learning; each window moves the meta-parameter", INK, 10, ha="right"
    )
    return sheet


def main(folder: pathlib.Path) -> None:
    """Writes the four files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_offline().save(folder / "offline")
    draw_online().save(folder / "online")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "img")
