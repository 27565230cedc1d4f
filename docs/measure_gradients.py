"""Measures every way to a meta-gradient on one problem: `python docs/measure_gradients.py [folder]`.

Prints the table of docs/gradients.md, and draws docs/img/gradients as SVG and PNG. It takes about a minute.

The inner problem is ridge regression by 60 steps on random halves of the data; the meta-parameter is the weight decay,
the outer loss that on other data. Each way is taken on the same runs; its error on a run is the difference to the exact
gradient of that run, by the mean exact gradient. Bias is the mean of the errors, spread their standard deviation.
"""

from __future__ import annotations

import pathlib
import sys
import time
import warnings
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import metaoptim
from metaoptim import Evolution, Implicit

IMAGES = pathlib.Path(__file__).resolve().parent / "img"
INK, INNER, OUTER = "#1f2a37", "#1f6f8b", "#c8553d"
STEPS, RUNS, SIZE, WINDOWS = 60, 16, 8, 6
plt.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "metaoptim", "svg.fonttype": "path"})


class Run:
    """One inner loop: its data, which batches it sees, and its gradient by the decay."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)
        truth = draw(SIZE, 1)
        self.x, self.xq = draw(64, SIZE), draw(64, SIZE)
        self.y, self.yq = (x @ truth + draw(64, 1) for x in (self.x, self.xq))
        self.batches = [torch.randperm(64, generator=generator)[:32] for _ in range(STEPS)]
        self.noise = torch.Generator().manual_seed(seed)
        self.net, self.decay = torch.nn.Linear(SIZE, 1, bias=False), torch.tensor(0.1, requires_grad=True)
        with torch.no_grad():
            self.net.weight.copy_(draw(1, SIZE))
        self.inner = metaoptim.MetaSGD([self.net], lr=0.15, weight_decay=self.decay)

    def steps(self, batches: list[Tensor]) -> None:
        for batch in batches:
            self.inner.step((self.net(self.x[batch]) - self.y[batch]).square().mean() / 2)

    def outer(self) -> Tensor:
        return (self.net(self.xq) - self.yq).square().mean() / 2

    def gradient(self, stepped: bool = False, **options: object) -> Tensor | None:
        with metaoptim.SlidingWindow(**options):  # type: ignore[arg-type]
            self.steps(self.batches)
            loss = self.outer()
            if stepped:
                self.inner.step(loss)
            loss.backward()
        return self.decay.grad

    def evolution(self, pairs: int, persistent: bool = False) -> Evolution:
        return Evolution(0.02, pairs, self.noise, persistent)

    def persistent(self, pairs: int) -> Tensor | None:
        gradient, length = self.evolution(pairs, True), STEPS // WINDOWS
        for k in range(WINDOWS):
            with metaoptim.SlidingWindow(gradient=gradient):
                self.steps(self.batches[k * length : (k + 1) * length])
                if k == WINDOWS - 1:
                    loss = self.outer()
                    self.inner.step(loss)
                    loss.backward()
        return self.decay.grad


def implicit(solver: str, **options: object) -> Implicit:
    return Implicit(solver, converged=10.0, tolerance=1e-3, **options)  # type: ignore[arg-type]


WAYS: dict[str, Callable[[Run], Tensor | None]] = {
    "exact": lambda run: run.gradient(),
    "exact, slots=4": lambda run: run.gradient(slots=4),
    "forward": lambda run: run.gradient(gradient="forward"),
    "window=5": lambda run: run.gradient(window=5),
    "window=20": lambda run: run.gradient(window=20),
    "first_order": lambda run: run.gradient(gradient="first_order"),
    "neumann": lambda run: run.gradient(gradient=implicit("neumann")),
    "cg": lambda run: run.gradient(gradient=implicit("cg")),
    "nystrom, rank 4": lambda run: run.gradient(
        gradient=implicit("nystrom", rank=4, rho=0.15, generator=run.noise)
    ),
    "nystrom, rank 8": lambda run: run.gradient(
        gradient=implicit("nystrom", rank=8, rho=1e-4, generator=run.noise)
    ),
    "evolution, 4 pairs": lambda run: run.gradient(gradient=run.evolution(4)),
    "evolution, 32 pairs": lambda run: run.gradient(gradient=run.evolution(32)),
    "evolution, 32, stepped": lambda run: run.gradient(gradient=run.evolution(32), stepped=True),
    "persistent, 32 pairs": lambda run: run.persistent(32),
}


def measure() -> dict[str, tuple[float, float, float]]:
    """By way: bias, spread, and the time of loop and backward by that of exact, medians over the runs."""
    found: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for name, way in WAYS.items():
        grads, times = [], []
        for seed in range(RUNS):
            run, begun = Run(seed), time.perf_counter()
            grad = way(run)
            times.append(time.perf_counter() - begun)
            assert grad is not None
            grads.append(grad.double())
        found[name], seconds[name] = torch.stack(grads), sorted(times)[RUNS // 2]
    exact = found["exact"]
    errors = {name: (grads - exact) / exact.mean() for name, grads in found.items()}
    return {k: (float(e.mean()), float(e.std()), seconds[k] / seconds["exact"]) for k, e in errors.items()}


def draw(rows: dict[str, tuple[float, float, float]], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(9.2, 4.6), layout="constrained")
    names = list(rows)[::-1]
    at, most = range(len(names)), 30
    axes.plot([max(abs(rows[n][0]), 1e-7) for n in names], at, "o", color=OUTER, markersize=8, label="bias")
    axes.plot([max(rows[n][1], 1e-7) for n in names], at, "d", color=INNER, markersize=8, label="spread")
    for y, name in enumerate(names):
        axes.text(most, y, f"{rows[name][2]:.1f}", color=INK, va="center", ha="right")
    axes.text(most, len(names) - 0.3, "time", color=INK, ha="right")
    axes.set(xscale="log", xlim=(5e-8, 40), yticks=at, yticklabels=names)
    axes.set_xlabel("relative error of the meta-gradient; 1e-7 stands for less")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, frameon=False)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # how far the implicit ones are from a solution is what is measured
    rows = measure()
    print("| | bias | spread | time, by that of exact |\n|---|---|---|---|")
    for name, (bias, spread, cost) in rows.items():
        print(f"| {name} | {bias:+.1e} | {spread:.1e} | {cost:.1f} |")
    draw(rows, (pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES) / "gradients")
