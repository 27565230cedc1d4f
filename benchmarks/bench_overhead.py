"""What recording costs: a window's forward loop against plain eager PyTorch's first-order inner loop, side by side.

Both run in one process, in turn; the ratio is taken pair by pair and its median reported.

    python benchmarks/bench_overhead.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import metaoptim


def mlp() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The digits MLP, batch 64."""
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return net, [(torch.randn(64, 64), torch.randint(0, 10, (64,))) for _ in range(50)]


def few_shot() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The few-shot network (4 × conv 64, batch norm), 5-way 5-shot."""
    blocks: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        blocks += [nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 5)), [
        (torch.randn(25, 1, 28, 28), torch.arange(25) % 5)
    ] * 5


def ratio(build: Callable, optimizer: str, pairs: int) -> tuple[float, float, float]:
    """Median microseconds per step of both, and the median ratio."""
    (plain_net, batches), (net, _) = build(), build()
    plain = getattr(torch.optim, optimizer)(plain_net.parameters(), lr=0.01)
    inner = getattr(metaoptim, f"Meta{optimizer}")([net], lr=0.01)

    def eager() -> None:
        for x, y in batches:
            plain.zero_grad()
            F.cross_entropy(plain_net(x), y).backward()
            plain.step()

    def window() -> None:
        with metaoptim.SlidingWindow(offline=True):
            for x, y in batches:
                inner.step(F.cross_entropy(net(x), y))

    times: list[tuple[float, float]] = []
    for _ in range(pairs + 1):
        start = time.perf_counter()
        eager()
        middle = time.perf_counter()
        window()
        times.append(((middle - start) / len(batches), (time.perf_counter() - middle) / len(batches)))
    times = times[1:]
    return (
        1e6 * statistics.median(a for a, _ in times),
        1e6 * statistics.median(b for _, b in times),
        statistics.median(b / a for a, b in times),
    )


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| network | optimizer | eager first-order, µs/step | window, µs/step | ratio |")
    print("|---|---|---|---|---|")
    for name, build, pairs in (
        ("MLP 64-128-128-10, batch 64", mlp, 21),
        ("few-shot conv4, 25 images", few_shot, 11),
    ):
        for optimizer in ("SGD", "Adam"):
            a, b, r = ratio(build, optimizer, pairs)
            print(f"| {name} | {optimizer} | {a:.0f} | {b:.0f} | {r:.2f} |", flush=True)


if __name__ == "__main__":
    main()
