"""What to run on the day a GPU is at hand: tests, memory against T, and time per step, in at most eight minutes.

    make gpu-check                                     # on the first CUDA device, else a rehearsal on the CPU
    python benchmarks/gpu_check.py --device cuda:1 --minutes 8 --out benchmarks/gpu

First the tests marked `gpu` run (exactness in float64 in the three forms, budgets, offloading, autocast, random
numbers, CUDA graphs). Then three inner loops at sizes worth a GPU: an MLP, a four-layer convolution with batch norm,
and a small GPT, each as a hand-written eager tape, an ordinary window, a window with 20 states, a compiled function
without and with a budget, and with CUDA graphs, of compiled kernels and of PyTorch's own. In the time that is left,
`peers/run.py` runs there too. Results are written as JSON and as a table, named after the device. Without a device the
same runs at small sizes on the CPU, where aot_eager stands in for inductor. That checks this script; nothing is
written, unless --out says where.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter

ROOT = Path(__file__).resolve().parent.parent
MiB = 2**20


# -- the problems -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A causal transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attention and an MLP, each beside a residual."""
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def mlp(width: int) -> nn.Module:
    """Three layers, for digits."""
    return nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )


def conv4(filters: int) -> nn.Module:
    """Four convolutions with batch norm, for images of 28 by 28 pixels."""
    layers: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        layers += [
            nn.Conv2d(channels, filters, 3, stride=2, padding=1),
            nn.BatchNorm2d(filters, track_running_stats=False),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * filters, 5))


def gpt(width: int) -> nn.Module:
    """Bytes in, bytes out."""
    return nn.Sequential(
        nn.Embedding(256, width),
        *[Block(width, 4) for _ in range(2)],
        nn.LayerNorm(width),
        nn.Linear(width, 256),
    )


@dataclass(frozen=True)
class Problem:
    """An inner loop with a learnt learning rate.

    Attributes:
        build: makes the network.
        optimizer, options: of the inner loop.
        log_lr: logarithm of the learning rate at which it is differentiated.
        batch: (generator, batches) -> inputs and targets, the leading axis being the batches.
        horizons: T, ascending.
        budget: bytes for the runs under a budget.
    """

    name: str
    build: Callable[[], nn.Module]
    optimizer: str
    options: dict[str, Any]
    log_lr: float
    batch: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
    horizons: tuple[int, ...]
    budget: int

    def loss(self, net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy over everything that has a class."""
        return F.cross_entropy(net(x).flatten(0, -2), y.flatten())

    def window(
        self, net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor, **options: Any
    ) -> Tensor:
        """The outer loss, by metaoptim."""
        inner = getattr(metaoptim, self.optimizer)([net], lr=log_lr.exp(), **self.options)
        with metaoptim.SlidingWindow(offline=True, **options) as window:
            for x, y in window.scan(xs, ys):
                inner.step(self.loss(net, x, y))
            return self.loss(net, xq, yq)

    def tape(self, net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        """The outer loss, by hand."""
        kind = getattr(metaoptim, self.optimizer)
        hyper = {**kind([nn.Linear(1, 1)]).defaults, **self.options, "lr": log_lr.exp()}
        theta: dict[str, Tensor] = dict(net.named_parameters())
        state = {n: kind.init_state(p, hyper) for n, p in theta.items()}

        def of(x: Tensor) -> Tensor:
            return functional_call(net, theta, (x,))

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            for x, y in zip(xs, ys):
                grads = torch.autograd.grad(self.loss(of, x, y), list(theta.values()), create_graph=True)
                new = {n: kind.update(p, g, state[n], hyper) for (n, p), g in zip(theta.items(), grads)}
                theta, state = {n: v for n, (v, _) in new.items()}, {n: s for n, (_, s) in new.items()}
            return self.loss(of, xq, yq)


def _images(size: tuple[int, ...], classes: int) -> Callable[[torch.Generator, int], tuple[Tensor, Tensor]]:
    def batch(g: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(classes, (count, size[0]), generator=g)
        means = torch.randn(classes, *size[1:], generator=g)
        return means[y] + 0.5 * torch.randn(count, *size, generator=g), y

    return batch


def _text(rows: int, length: int) -> Callable[[torch.Generator, int], tuple[Tensor, Tensor]]:
    def batch(g: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        text = torch.randint(256, (count, rows, length + 1), generator=g)
        return text[..., :-1], text[..., 1:]

    return batch


def problems(small: bool) -> list[Problem]:
    """At sizes for a GPU, or small enough for a rehearsal."""
    momentum, adam = ("MetaSGD", {"momentum": 0.9}, -3.0), ("MetaAdam", {}, -6.0)
    if small:
        return [
            Problem("digits", lambda: mlp(16), *momentum, _images((16, 64), 10), (5, 10), MiB // 4),
            Problem("conv4", lambda: conv4(4), *momentum, _images((10, 1, 28, 28), 5), (5,), MiB),
            Problem("gpt", lambda: gpt(16), *adam, _text(2, 16), (5,), 4 * MiB),
        ]
    return [
        Problem("digits", lambda: mlp(1024), *momentum, _images((256, 64), 10), (100, 1000, 5000), 256 * MiB),
        Problem("conv4", lambda: conv4(64), *momentum, _images((200, 1, 28, 28), 5), (5, 50), 512 * MiB),
        Problem("gpt", lambda: gpt(512), *adam, _text(16, 256), (20, 100), 4096 * MiB),
    ]


# -- measuring --------------------------------------------------------------------------------------------------------


class Memory:
    """Peak bytes allocated on a device inside a block, beyond what was there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> Memory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._meter = AllocatorMeter().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._meter.__exit__(*error)
            self.peak = self._meter.peak


def measured(problem: Problem, horizon: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A row for each form: seconds of the first call, milliseconds a step after it, peak, error against the tape."""
    torch.manual_seed(0)
    net = problem.build().to(device)
    log_lr = torch.tensor(problem.log_lr, device=device, requires_grad=True)
    g = torch.Generator().manual_seed(1)
    data = [t.to(device) for t in problem.batch(g, horizon)]
    data += [t[0].to(device) for t in problem.batch(g, 1)]
    budget = problem.budget
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    forms: dict[str, Callable] = {
        "eager tape": problem.tape,
        "window": problem.window,
        "window, 20 states": lambda *a: problem.window(*a, slots=20),
        "compiled": metaoptim.compile(problem.window, backend=backend),
        "compiled, budget": metaoptim.compile(problem.window, backend=backend, memory_budget=budget),
    }
    if device.type == "cuda":
        forms["compiled, CUDA graphs"] = metaoptim.compile(
            problem.window, backend=backend, mode="reduce-overhead"
        )
        forms["CUDA graphs alone"] = metaoptim.compile(
            problem.window, backend="eager", mode="reduce-overhead"
        )
    rows: list[dict[str, Any]] = []
    expected: Tensor | None = None
    for form, run in forms.items():
        row: dict[str, Any] = {"problem": problem.name, "T": horizon, "form": form}
        rows.append(row)

        def gradient(run: Callable = run) -> float:
            for p in (*net.parameters(), log_lr):
                p.grad = None
            _wait(device)
            begun = time.perf_counter()
            run(net, log_lr, *data).backward()
            _wait(device)
            return time.perf_counter() - begun

        try:
            row["first_s"] = gradient()
            found = torch.cat([p.grad.flatten() for p in (log_lr, *net.parameters()) if p.grad is not None])
            if expected is None:
                expected = found.clone()
            row["error"] = float((found - expected).norm() / expected.norm())
            row["ms_per_step"] = 1e3 * statistics.median(gradient() for _ in range(repeats)) / horizon
            with Memory(device) as memory:
                gradient()
            row["peak_mib"] = memory.peak / MiB
            if "budget" in form:
                row["budget_mib"] = budget / MiB
                row["within_budget"] = memory.peak <= budget
        except (torch.OutOfMemoryError, metaoptim.MetaOptimError, RuntimeError) as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tests(device: torch.device, seconds: float) -> dict[str, Any]:
    """Run the tests marked `gpu` on the device."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "METAOPTIM_TEST_DEVICE": str(device)}
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not ended after {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-500:]]
    return {
        "passed": done.returncode == 0,
        "summary": lines[-1],
        "seconds": time.perf_counter() - begun,
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def peers(device: torch.device, seconds: float) -> str:
    """What `peers/run.py` has found when time is up, as a table; or why there is none."""
    options = ["--small", "--problem", "digits-sgd", "--peer", "eager-tape,ours-window"]
    if device.type == "cuda":
        names = "eager-tape,torchopt,ours-window,ours-step,ours-compiled,ours-graphs"
        options = ["--problem", "digits-sgd,gpt", "--T", "100", "--peer", names, "--repeats", "3"]
    folder = ROOT / "benchmarks" / "peers"
    with tempfile.TemporaryDirectory() as out:
        run = [sys.executable, folder / "run.py", "--device", str(device), "--out", out, *options]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(run, capture_output=True, timeout=max(seconds, 60), check=False)
        table = [sys.executable, folder / "report.py", out]
        done = subprocess.run(table, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"No table of peers: {done.stderr.strip().splitlines()[-1]}"
    return done.stdout.strip()


# -- reporting --------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# {results['device']}",
        "",
        f"torch {results['torch']}, Python {results['python']}, {results['date']}; "
        f"tests marked `gpu`: {results['tests']['summary']}",
        "",
        "| problem | T | form | first call, s | ms a step | peak, MiB | budget, MiB | error against the tape |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [row["problem"], f"{row['T']:,}", row["form"]]
        if "failed" in row:
            cells += [row["failed"].replace("|", "/"), "", "", "", ""]
        else:
            cells += [f"{row['first_s']:.2f}", f"{row['ms_per_step']:.3f}", f"{row['peak_mib']:.1f}"]
            cells += [f"{row['budget_mib']:.1f}" if "budget_mib" in row else "", f"{row['error']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *results["left_out"], "", "## Beside other libraries", "", results["peers"]]
    return "\n".join(lines).rstrip() + "\n"


def wrong(results: dict[str, Any]) -> list[str]:
    """What is not as promised."""
    found = [] if results["tests"]["passed"] else [f"tests: {results['tests']['summary']}"]
    if results["peers"].startswith("No table"):
        found.append(results["peers"])
    for row in results["rows"]:
        where = f"{row['problem']}, T = {row['T']}, {row['form']}"
        if "failed" in row and row["form"] != "eager tape":  # that one may well run out of memory
            found.append(f"{where}: {row['failed']}")
        if row.get("error", 0.0) > 1e-2:
            found.append(f"{where}: the gradient is off by {row['error']:.1e} in float32")
        if row.get("within_budget") is False:
            found.append(f"{where}: {row['peak_mib']:.1f} MiB, over the budget of {row['budget_mib']:.1f}")
    return found


def main() -> int:
    """Run it all; 1 if something is not as promised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="what has not begun by then is left out")
    parser.add_argument(
        "--out", type=Path, help="where results go; benchmarks/gpu for a GPU, nowhere for the CPU"
    )
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    args = parser.parse_args()
    device = torch.device(args.device)
    end = time.perf_counter() + 60 * args.minutes
    small = device.type == "cpu"
    if small:
        torch.set_num_threads(1)
        print(
            "No GPU: a rehearsal on the CPU, at small sizes. Its figures say nothing about a GPU.", flush=True
        )
    results: dict[str, Any] = {
        "device": platform.machine() + " CPU, rehearsal" if small else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "tests": {"passed": True, "summary": "not run"},
        "rows": [],
        "left_out": [],
    }
    if not args.no_tests:
        results["tests"] = tests(device, 0.5 * 60 * args.minutes)
        print(
            "tests:", results["tests"]["summary"], *results["tests"].get("failures", []), sep="\n", flush=True
        )
    plans = [(p, t) for p in problems(small) for t in p.horizons]
    for problem, horizon in sorted(plans, key=lambda plan: plan[0].horizons.index(plan[1])):
        if time.perf_counter() > end:
            results["left_out"].append(f"Not run for want of time: {problem.name}, T = {horizon:,}.")
            continue
        rows = measured(problem, horizon, device, repeats=1 if small else 3)
        results["rows"] += rows
        print(*(json.dumps(row) for row in rows), sep="\n", flush=True)
    results["peers"] = peers(device, end - time.perf_counter())
    print(table(results))
    out = args.out or (None if small else ROOT / "benchmarks" / "gpu")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = "-".join(results["device"].lower().replace(",", "").split())
        (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / f"{name}.md").write_text(table(results))
        print(f"written to {out / name}.json and .md")
    for complaint in wrong(results):
        print("NOT AS PROMISED:", complaint)
    return 1 if wrong(results) else 0


if __name__ == "__main__":
    sys.exit(main())
