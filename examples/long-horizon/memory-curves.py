"""Memory of one meta-gradient through T steps of the training: the full tape, √T states, and a budget.

Each point is measured in a process of its own: how far its resident memory rises above where it was before the call.

    python memory-curves.py                      # T up to 20,000, some eight minutes on two cores
    python memory-curves.py --longest 2000       # minutes

The full tape takes 4 GiB for 5,000 steps, and is left out beyond.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

import metaoptim
from digits import corrupted_digits
from plots import plot_memory
from training import batches, layers, network, train

HERE = pathlib.Path(__file__).resolve().parent
HORIZONS = (125, 250, 500, 1_000, 2_000, 5_000, 10_000, 20_000)
KINDS = ("full tape", "√T states", "budget")
PAGE = 4096


def resident() -> int:
    """Returns the bytes this process has in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Watch:
    """The most memory resident inside a block, above its start, in bytes: `rise`."""

    def __enter__(self) -> Watch:
        self.begin = self.most = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, resident())

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.rise = max(self.most, resident()) - self.begin


def measure(kind: str, steps: int, budget: str) -> int:
    """Returns the bytes that one meta-gradient takes, in this process."""
    torch.set_num_threads(1)
    digits, _ = corrupted_digits(800, 500, 0.2, 0)
    net = network(0)
    log_rates = torch.full((len(layers(net)),), math.log(7e-3), requires_grad=True)
    logits = torch.zeros(800, requires_grad=True)

    def meta_loss(rows: torch.Tensor, **window: object) -> torch.Tensor:
        return train(net, "sgd", 5e-3, log_rates, logits, digits, rows, **window)[0]

    def run(rows: torch.Tensor) -> torch.Tensor:
        if kind == "full tape":
            return meta_loss(rows, strategy="full_tape")
        if kind == "budget":
            return compiled(rows, memory_budget=budget)
        return compiled(rows, slots=math.isqrt(len(rows)))

    compiled = metaoptim.compile(meta_loss, backend="eager")  # a compiler's own memory would hide the rest
    for _ in range(2):
        run(batches(800, 64, 20, 0)).backward()  # traced, and what is needed once is there
    rows = batches(800, 64, steps, 0)  # the user's own
    with Watch() as watch:
        run(rows).backward()
    return watch.rise


def main() -> None:
    """Measures, prints a table and draws it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="16MiB", help="of the third curve (default: 16MiB)")
    parser.add_argument("--longest", type=int, default=HORIZONS[-1], help="largest T (default: 20,000)")
    parser.add_argument("--tape", type=int, default=5_000, help="largest T of the full tape (default: 5,000)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=HERE, metavar="DIR", help="folder for the picture"
    )
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "T"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure[0], int(args.measure[1]), args.budget))
        return
    points = [
        (kind, steps)
        for steps in HORIZONS
        for kind in KINDS
        if steps <= args.longest and (kind != "full tape" or steps <= args.tape)
    ]

    def measured(point: tuple[str, int]) -> int:
        command = [sys.executable, __file__, "--measure", point[0], str(point[1]), "--budget", args.budget]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    with ThreadPoolExecutor(args.jobs) as pool:
        rises = list(tqdm(pool.map(measured, points), total=len(points), desc="points", disable=None))
    found: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
    for (kind, steps), rise in zip(points, rises, strict=True):
        found[kind][steps] = rise
    print("| T | " + " | ".join(KINDS) + " |")
    print("|---|" + "---|" * len(KINDS))
    for steps in sorted({steps for _, steps in points}):
        cells = (f"{found[kind][steps] / 2**20:.1f}" if steps in found[kind] else "–" for kind in KINDS)
        print(f"| {steps:,} | {' | '.join(cells)} |")
    path = args.out / "memory-curves.png"
    plot_memory(found, args.budget, path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
