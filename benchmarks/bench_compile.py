"""Compiled windows: time and memory of a meta-gradient against plain eager PyTorch, and compile time in T.

An MLP 64-128-128-10 on scikit-learn's digits, batches of 64 made beforehand, offline. The full tape is a hand-written
loop with `functional_call` and `create_graph=True`; both run alternately in one process, and medians are printed.

    python benchmarks/bench_compile.py                  # speed: T = 1,000, SGD with momentum and Adam
    python benchmarks/bench_compile.py --what horizon   # compile time and programs, T = 10 ... 10,000
    python benchmarks/bench_compile.py --what plain     # capture time of a plain `for`
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "SGD momentum": (metaoptim.MetaSGD, {"momentum": 0.9}, 1.0),
    "Adam": (metaoptim.MetaAdam, {}, 0.03),
}


class Problem:
    """The inner loop in its two forms."""

    def __init__(self, horizon: int, optimizer: str, scan: bool = True) -> None:
        torch.manual_seed(0)
        digits = load_digits()
        x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        chosen = torch.randint(len(x), (horizon, 64))
        self.data = (x[chosen], y[chosen], x[:256], y[:256])
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
        )
        self.log_lr = torch.tensor(-3.0, requires_grad=True)
        self.cls, self.options, self.scale = OPTIMIZERS[optimizer]
        self.scan = scan

    def window(
        self, net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor, **options: Any
    ) -> Tensor:
        """As a user of metaoptim writes it."""
        inner = self.cls([net], lr=log_lr.exp() * self.scale, **self.options)
        with metaoptim.SlidingWindow(offline=True, **options) as window:
            for x, y in window.scan(xs, ys) if self.scan else zip(xs, ys):
                inner.step(F.cross_entropy(net(x), y))
            return F.cross_entropy(net(xq), yq)

    def full_tape(
        self, net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor
    ) -> Tensor:
        """By hand."""
        hyper = {
            **self.cls([nn.Linear(1, 1)]).defaults,
            **self.options,
            "lr": log_lr.exp() * self.scale,
        }
        theta: dict[str, Tensor] = dict(net.named_parameters())
        state: dict[str, dict] = {n: self.cls.init_state(p, hyper) for n, p in theta.items()}
        for x, y in zip(xs, ys):
            loss = F.cross_entropy(functional_call(net, theta, (x,)), y)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            new = {n: self.cls.update(p, g, state[n], hyper) for (n, p), g in zip(theta.items(), grads)}
            theta, state = {n: v for n, (v, _) in new.items()}, {n: s for n, (_, s) in new.items()}
        return F.cross_entropy(functional_call(net, theta, (xq,)), yq)

    def gradient(self, form: Callable) -> tuple[float, Tensor]:
        """Seconds of one meta-gradient, and what it is for the learning rate."""
        for p in (*self.net.parameters(), self.log_lr):
            p.grad = None
        begun = time.perf_counter()
        form(self.net, self.log_lr, *self.data).backward()
        assert self.log_lr.grad is not None
        return time.perf_counter() - begun, self.log_lr.grad


def speed(horizon: int, backend: str, repeats: int, slots: int | None) -> None:
    """Steady-state time and peak, side by side."""
    print("| optimizer | form | seconds | against the full tape | peak MiB | first call, s |")
    print("|---|---|---|---|---|---|")
    for name in OPTIMIZERS:
        problem = Problem(horizon, name)
        forms: dict[str, Callable] = {
            "full tape": problem.full_tape,
            "window": partial(problem.window, slots=slots),
            "window, derivatives compiled": partial(problem.window, slots=slots, backend=backend),
            "compiled": metaoptim.compile(problem.window, backend=backend, slots=slots),
        }
        if slots is None:
            forms["compiled, with residuals"] = metaoptim.compile(
                problem.window, backend=backend, memory_budget="4GiB"
            )
        first, found = {}, {}
        for form, run in forms.items():
            first[form], gradient = problem.gradient(run)
            found[form] = gradient.clone()
            torch.testing.assert_close(found[form], found["full tape"], rtol=1e-3, atol=1e-6)
        times: dict[str, list[float]] = {form: [] for form in forms}
        for _ in range(repeats):
            for form, run in forms.items():
                times[form].append(problem.gradient(run)[0])
        tape = statistics.median(times["full tape"])
        for form, run in forms.items():
            with AllocatorMeter() as meter:
                problem.gradient(run)
            took = statistics.median(times[form])
            print(
                f"| {name} | {form} | {took:.2f} | {took / tape:.2f} | {meter.peak / 2**20:.0f} | {first[form]:.1f} |",
                flush=True,
            )


def compiling(horizon: int, backend: str, slots: int | None, scan: bool) -> tuple[float, float, float, int]:
    """Seconds to capture, beyond a usual call in the first one, and of a usual one; step graphs."""
    problem = Problem(horizon, "SGD momentum", scan)
    compiled = metaoptim.compile(problem.window, backend=backend, slots=slots)
    begun = time.perf_counter()
    compiled.explain(problem.net, problem.log_lr, *problem.data)
    captured = time.perf_counter() - begun
    first, _ = problem.gradient(compiled)
    after = statistics.median(problem.gradient(compiled)[0] for _ in range(3 if horizon <= 1000 else 1))
    (programs,) = compiled._specializations.known.values()
    return captured, captured + first - after, after, len(programs[0].program.step_graphs)


def by_horizon(backend: str, slots: int, scan: bool, horizons: list[int]) -> None:
    """Compile time and programs by T, each in fresh processes: with an empty disk cache, and with a filled one."""
    print(
        "| T | capture, s | all of compiling, s: cold | with a disk cache | ms per step after | step graphs |"
    )
    print("|---|---|---|---|---|---|")
    for t in horizons:
        with tempfile.TemporaryDirectory() as cache:
            rows = []
            for _ in range(2):
                command = [
                    sys.executable,
                    __file__,
                    "--what",
                    "one",
                    "--horizon",
                    str(t),
                    "--backend",
                    backend,
                ]
                command += ["--slots", str(slots), *([] if scan else ["--plain"])]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                rows.append([float(x) for x in done.stdout.split()])
        (captured, cold, after, graphs), (_, warm, _, _) = rows
        print(
            f"| {t:,} | {captured:.2f} | {cold:.1f} | {warm:.1f} | {1e3 * after / t:.2f} | {graphs:.0f} |",
            flush=True,
        )


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=("speed", "horizon", "plain", "one"), default="speed")
    parser.add_argument("--horizon", type=int, default=1000)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--slots", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "speed":
        speed(args.horizon, args.backend, args.repeats, args.slots)
    elif args.what == "one":
        print(*compiling(args.horizon, args.backend, args.slots, not args.plain))
    else:
        scan = args.what == "horizon"
        horizons = [10, 100, 1000, 10000] if scan else [10, 100, 1000]
        by_horizon(args.backend, args.slots or 20, scan, horizons)


if __name__ == "__main__":
    main()
