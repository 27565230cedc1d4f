"""Memory of an inner loop in T, each point in a fresh process.

An MLP 64-128-128-10 on scikit-learn's digits, SGD with momentum 0.9, batches of 64 made beforehand, offline, with the
backward. Resident memory is the high-water mark above what the process held before the loop; allocator bytes come from
the profiler's allocation events in a second process.

    python benchmarks/bench_memory.py            # the whole table, as Markdown
    python benchmarks/bench_memory.py --point slots=8 200 rss
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter

HORIZONS = (50, 100, 200, 400, 800)
STRATEGIES: dict[str, dict[str, Any]] = {
    "full_tape": {"strategy": "full_tape"},
    "slots=None": {},
    "slots=8": {"slots": 8},
}


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def point(name: str, steps: int, meter: str) -> float:
    """MiB that the loop and its backward add at their peak."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (x[i].clone(), y[i].clone())
        for i in (torch.randint(len(x), (64,), generator=generator) for _ in range(steps))
    ]
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    lr = torch.tensor(0.1, requires_grad=True)
    inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.9)

    def run(count: int, **options: Any) -> None:
        with metaoptim.SlidingWindow(offline=True, **options):
            for bx, by in batches[:count]:
                inner.step(F.cross_entropy(net(bx), by))
            F.cross_entropy(net(x), y).backward()

    run(3, **STRATEGIES[name])  # programs are traced once
    run(3, slots=1)
    gc.collect()
    if meter == "allocator":
        with AllocatorMeter() as allocated:
            run(steps, **STRATEGIES[name])
        return allocated.peak / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    run(steps, **STRATEGIES[name])
    return (resident("VmHWM") - before) / 2**20


def main() -> None:
    """Print one point, or the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--point", nargs=3, metavar=("STRATEGY", "T", "METER"))
    arguments = parser.parse_args()
    if arguments.point:
        name, steps, meter = arguments.point
        print(point(name, int(steps), meter))
        return
    for meter in ("rss", "allocator"):
        print(f"\nPeak above the start, MiB ({meter})\n")
        print("| strategy | " + " | ".join(f"T={t}" for t in HORIZONS) + " |")
        print("|---" * (len(HORIZONS) + 1) + "|")
        for name in STRATEGIES:
            row = []
            for steps in HORIZONS:
                command = [sys.executable, __file__, "--point", name, str(steps), meter]
                row.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"| `{name}` | " + " | ".join(f"{v:.1f}" for v in row) + " |", flush=True)


if __name__ == "__main__":
    main()
