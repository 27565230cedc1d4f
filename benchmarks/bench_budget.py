"""Long horizons in little memory: time per step and measured peak as T grows, and as the budget does.

Form C: a small network, MLP 8-16-1 with Adam, `metaoptim.compile` with 64 slots. Form A: MLP 64-32-10 with momentum in
an ordinary window under a memory budget; its batches are slices of one tensor.

    python benchmarks/bench_budget.py                  # all three tables, several minutes
    python benchmarks/bench_budget.py --what horizon   # form C, T = 1,000, 10,000, 100,000
    python benchmarks/bench_budget.py --what window    # form A, T = 2,000 and 20,000
    python benchmarks/bench_budget.py --what budget    # form C, T = 300, budgets from the smallest up
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.states.schedule import extra_forwards

SLOTS = 64


def problem(horizon: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, a learning rate to be learnt, and batches."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    xs = torch.randn(512, 16, 8)[torch.arange(horizon) % 512]
    return net, torch.tensor(-6.0, requires_grad=True), xs, xs.sum(-1, keepdim=True).sin()


def loop(net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The inner loop, as a compiled function."""
    inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
    with metaoptim.SlidingWindow(offline=True) as window:
        for x, y in window.scan(xs, ys):
            inner.step(F.mse_loss(net(x), y))
        return F.mse_loss(net(xs[0]), ys[0])


def seconds(fn: Any, arguments: Any, backward: bool, repeats: int) -> float:
    """The least time of some calls."""
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        if backward:
            fn(*arguments).backward()
        else:
            with torch.no_grad():
                fn(*arguments)
        found.append(time.perf_counter() - begun)
    return min(found)


def horizon_table(backend: str) -> None:
    """Time per step in T, against that of the calls it consists of."""
    everything = metaoptim.compile(loop, backend=backend)
    few = metaoptim.compile(loop, backend=backend, slots=SLOTS)
    arguments = problem(1000)
    seconds(everything, arguments, True, 1)  # compiles
    forward = seconds(everything, arguments, False, 3) / 1000
    pull = seconds(everything, arguments, True, 3) / 1000 - forward
    print(
        f"one step {1e6 * forward:.0f} us, its derivative {1e6 * pull:.0f} us (T = 1,000, every state kept)\n"
    )
    print("| T | extra forwards per step | seconds | us per step | against its calls | peak MiB (resident) |")
    print("|---|---|---|---|---|---|")
    for horizon in tqdm((1_000, 10_000, 100_000), disable=None, leave=False):
        arguments = problem(horizon)
        if horizon == 1_000:
            seconds(few, arguments, True, 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        took = seconds(few, arguments, True, 3 if horizon == 1_000 else 1)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        extra = extra_forwards(horizon, SLOTS)
        calls = (horizon + extra) * forward + horizon * pull
        print(
            f"| {horizon:,} | {extra / horizon:.2f} | {took:.2f} | {1e6 * took / horizon:.0f} | {took / calls:.2f} | "
            f"+{grown:.1f} |",
            flush=True,
        )


def window_table(budget: str) -> None:
    """Peak of an ordinary window in T, each in a process of its own."""
    print(f"\nForm A, MLP 64-32-10 with momentum, memory_budget={budget!r}\n")
    print("| T | seconds | states kept at the end | peak KiB (allocator) | resident MiB above the start |")
    print("|---|---|---|---|---|")
    for horizon in (2_000, 20_000):
        command = [sys.executable, __file__, "--what", "one", "--horizon", str(horizon), "--budget", budget]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


def one_window(horizon: int, budget: str) -> None:
    """A row of `window_table`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    xs, ys = torch.randn(512, 16, 64), torch.randint(10, (512, 16))
    log_lr = torch.tensor(-4.0, requires_grad=True)

    def run(steps: int, watch: Callable[[int, int], object]) -> int | None:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp(), momentum=0.9)
        with (
            metaoptim.progress(watch),
            metaoptim.SlidingWindow(offline=True, memory_budget=budget) as window,
        ):
            for t in range(steps):
                inner.step(F.cross_entropy(net(xs[t % 512]), ys[t % 512]))
                watch(t, steps)
            F.cross_entropy(net(xs[0]), ys[0]).backward()
            return window._session.engine.store.slots  # type: ignore[union-attr]

    def silent(done: int, total: int) -> None: ...

    run(4, silent)  # traces the step, and measures it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    kept = run(horizon, silent)
    took = time.perf_counter() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with AllocatorMeter() as meter:
        run(horizon, meter.watch)
    print(f"| {horizon:,} | {took:.1f} | {kept} | {meter.peak / 1024:.1f} | {grown:.1f} |")


def budget_table() -> None:
    """Measured peak and time, from the smallest budget up."""
    arguments = problem(300)
    least = metaoptim.plan(metaoptim.compile(loop, backend="eager"))(*arguments).minimum_budget
    print("\nForm C, backend eager, T = 300\n")
    print(
        "| budget KiB | states kept | extra forwards per step | predicted peak KiB | measured KiB | seconds |"
    )
    print("|---|---|---|---|---|---|")
    for times in (1.3, 2, 4, 16, 64):
        budget = int(times * least)
        fn = metaoptim.compile(loop, backend="eager", memory_budget=budget)
        took = min(seconds(fn, arguments, True, 1) for _ in range(2))
        with AllocatorMeter() as meter:
            fn(*arguments).backward()
        ((program,),) = fn._specializations.known.values()
        slots = program.plan.slots
        extra = 0.0 if slots is None else extra_forwards(302, slots) / 300
        kept = "all" if slots is None else slots
        predicted, measured = program.plan.peak_bytes / 1024, meter.peak / 1024
        print(
            f"| {budget / 1024:.0f} | {kept} | {extra:.2f} | {predicted:.1f} | {measured:.1f} | {took:.2f} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=["all", "horizon", "window", "budget", "one"], default="all")
    parser.add_argument("--backend", default="inductor", help="of the first table")
    parser.add_argument("--budget", default="1MiB", help="of the second table")
    parser.add_argument("--horizon", type=int, default=2_000, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "one":
        one_window(options.horizon, options.budget)
    if options.what in ("all", "horizon"):
        horizon_table(options.backend)
    if options.what in ("all", "window"):
        window_table(options.budget)
    if options.what in ("all", "budget"):
        budget_table()


if __name__ == "__main__":
    main()
