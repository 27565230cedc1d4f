"""Many tasks: `metaoptim.vmap` beside a loop over them, and beside torch.func.vmap written by hand, in one process.

The meta-gradients of `metaoptim.vmap` and of the loop are compared in float64 first. What is written by hand is wrong
where there is batch norm, if autograd differentiates through ``torch.func.vmap(grad(...))`` as here (torch 2.13): how
much, in float64, is in the last column. The three run in turn; quoted are the median of each, and of the ratios.

    python benchmarks/bench_tasks.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import metaoptim

TASKS, STEPS, RATE = 16, 5, 0.05


class Problem(NamedTuple):
    """A network, a loss, and the tasks' data: support inputs and targets, query inputs and targets."""

    net: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    data: tuple[Tensor, Tensor, Tensor, Tensor]


def sine() -> Problem:
    """Sine waves of other phases: 1-40-40-1, ten points."""
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    x = 10 * torch.rand(2, TASKS, 10, 1) - 5
    y = torch.sin(x + 3 * torch.rand(TASKS, 1, 1))
    return Problem(net, F.mse_loss, (x[0], y[0], x[1], y[1]))


def glyphs() -> Problem:
    """Images 28 × 28, 5-way 1-shot: three convolutions of 32 filters with batch norm."""
    blocks: list[nn.Module] = []
    for channels in (1, 32, 32):
        norm = nn.BatchNorm2d(32, track_running_stats=False)
        blocks += [nn.Conv2d(channels, 32, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(288, 5))
    x, y = torch.randn(2, TASKS, 5, 1, 28, 28), torch.arange(5).expand(2, TASKS, 5)
    return Problem(net, F.cross_entropy, (x[0], y[0], x[1], y[1]))


def ways(problem: Problem) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The meta-gradient, by name of the way it is made."""
    net, loss, data = problem
    theta = dict(net.named_parameters())

    def adapted(x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=RATE)
        with metaoptim.SlidingWindow(offline=True):
            for _ in range(STEPS):
                inner.step(loss(net(x), y))
            return loss(net(xq), yq)

    def by_hand(theta: dict[str, Tensor], x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        for _ in range(STEPS):
            grads = grad(lambda t: loss(functional_call(net, t, (x,)), y))(theta)
            theta = {k: v - RATE * grads[k] for k, v in theta.items()}
        return loss(functional_call(net, theta, (xq,)), yq)

    batched = metaoptim.vmap(metaoptim.compile(adapted, backend="eager"))
    hand = vmap(by_hand, in_dims=(None, 0, 0, 0, 0))
    losses: dict[str, Callable[[], Tensor]] = {
        "vmap": lambda: batched(*data),
        "by hand": lambda: hand(theta, *data),
        "loop": lambda: torch.stack([adapted(*(t[b] for t in data)) for b in range(TASKS)]),
    }
    return {
        k: lambda run=run: torch.autograd.grad(run().mean(), list(theta.values()))
        for k, run in losses.items()
    }


def compare(name: str, build: Callable[[], Problem], repeats: int = 7) -> None:
    """See that the three agree in float64, measure them in float32, and print a line."""
    torch.set_default_dtype(torch.float64)
    found = {way: run() for way, run in ways(build()).items()}
    for got, want in zip(found["vmap"], found["loop"], strict=True):
        torch.testing.assert_close(got, want)
    pairs = zip(found["by hand"], found["loop"], strict=True)
    error = max(float((got - want).abs().max()) for got, want in pairs)
    error /= max(float(want.abs().max()) for want in found["loop"])
    torch.set_default_dtype(torch.float32)
    runs = ways(build())
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(repeats + 2):
        for way, run in runs.items():
            begun = time.process_time()
            run()
            times[way].append(1e3 * (time.process_time() - begun))
    steady = {way: taken[2:] for way, taken in times.items()}  # the first calls capture and derive
    ratio = statistics.median(a / b for a, b in zip(steady["vmap"], steady["by hand"], strict=True))
    medians = " | ".join(f"{statistics.median(taken):.0f}" for taken in steady.values())
    print(f"| {name} | {medians} | {ratio:.2f} | {error:.0e} |")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{TASKS} tasks, {STEPS} steps, ms\n")
    print(
        "| tasks | metaoptim.vmap | torch.func.vmap by hand | loop over tasks | vmap / by hand | error by hand |"
    )
    print("|---|---|---|---|---|---|")
    compare("sine", sine)
    compare("glyphs, batch norm", glyphs)
