"""Time of one meta-gradient against its memory budget: predicted for T = 20,000, predicted and measured for less.

    python time-curve.py                  # measures at T = 1,000, some six minutes on one core
    python time-curve.py --points 3       # minutes

Predicted is what `metaoptim.plan` says, without running anything. Measured are processor time, by that with every state
kept, and the peak that the allocator was asked for.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import metaoptim
from digits import corrupted_digits
from plots import plot_time
from training import batches, layers, network, train

HERE = pathlib.Path(__file__).resolve().parent
REPEATS = 3


class Problem:
    """The meta-gradient of `learn-weights.py`'s first outer step."""

    def __init__(self) -> None:
        self.digits, _ = corrupted_digits(800, 500, 0.2, 0)
        self.net = network(0)
        self.log_rates = torch.full((len(layers(self.net)),), math.log(7e-3), requires_grad=True)
        self.logits = torch.zeros(800, requires_grad=True)

    def compiled(self, **options: Any) -> Any:
        """Returns the function of the rows of the batches, with a budget of its own."""

        def meta_loss(rows: Tensor) -> Tensor:
            return train(self.net, "sgd", 5e-3, self.log_rates, self.logits, self.digits, rows)[0]

        return metaoptim.compile(meta_loss, backend="eager", **options)  # a compiler changes the allocations

    def cost(self, steps: int, budget: int | str, offload: str | None = None) -> Any:
        """Returns what `metaoptim.plan` says."""
        plan = metaoptim.plan(self.compiled(), horizon=steps, memory_budget=budget, offload=offload)
        return plan(batches(800, 64, 20, 0))

    def measure(self, rows: Tensor, **options: Any) -> tuple[float, int]:
        """Returns the processor time and the peak of a meta-gradient, in seconds and bytes."""
        fn = self.compiled(**options)
        seconds = []
        for _ in range(1 + REPEATS):  # the first one plans
            begun = time.process_time()
            torch.autograd.grad(fn(rows), [self.log_rates, self.logits])
            seconds.append(time.process_time() - begun)
        peak = metaoptim.explain(fn, measure=True)(rows).measured_peak_bytes
        return min(seconds[1:]), peak


def budgets(cost: Any, points: int, offload: bool) -> list[int]:
    """Returns some budgets of a predicted curve, evenly by their logarithms, where work does not explode."""
    every = cost.slots * cost.model.state_bytes
    curve = [b for b, work in cost.curve(200, offload=offload) if work < 4 and (b < every or not offload)]
    wanted = [curve[0] * (curve[-1] / curve[0]) ** (k / max(points - 1, 1)) for k in range(points)]
    return [min(curve, key=lambda b: abs(math.log(b / w))) for w in wanted]


def main() -> None:
    """Measures, prints a table and draws it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--horizon", type=int, default=20_000, help="T that is predicted (default: 20,000)")
    parser.add_argument("--steps", type=int, default=1_000, help="T that is measured (default: 1,000)")
    parser.add_argument("--points", type=int, default=7, help="measured without offloading (default: 7)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=HERE, metavar="DIR", help="folder for the picture"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem, rows = Problem(), batches(800, 64, args.steps, 0)
    asked = {t: problem.cost(t, "64GiB", "disk") for t in (args.horizon, args.steps)}
    predicted = {t: {o: list(asked[t].curve(80, offload=o)) for o in (False, True)} for t in asked}
    print(asked[args.horizon])
    points = [
        (offload, budget)
        for offload, count in ((None, args.points), ("disk", args.points // 2))
        for budget in budgets(asked[args.steps], count, offload is not None)
    ]
    once, _ = problem.measure(rows)
    measured: list[tuple[bool, int, float]] = []
    print("| plan | budget, MiB | measured peak | predicted peak | time | predicted work |\n|" + 6 * "---|")
    for offload, budget in tqdm(points, desc="budgets", disable=None):
        seconds, peak = problem.measure(rows, memory_budget=budget, offload=offload)
        cost = problem.cost(args.steps, budget, offload)
        measured.append((offload is not None, peak, seconds / once))
        sizes = " | ".join(f"{b / 2**20:.2f}" for b in (budget, peak, cost.peak_bytes))
        print(f"| {cost.plan} | {sizes} | {seconds / once:.2f} | {cost.time_factor:.2f} |", flush=True)
    path = args.out / "time-curve.png"
    plot_time(predicted, measured, args.steps, path)
    print(f"every state kept, T = {args.steps:,}: {once:.1f} s of processor time\npicture: {path}")


if __name__ == "__main__":
    main()
