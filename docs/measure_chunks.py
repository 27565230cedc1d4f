"""The table of steps in chunks in docs/memory.md: peaks of the allocator, once the graphs are known.

Five steps of Adam on an MLP of four layers of 64, with batches of 4,096 and a weight for every example, offline, with
the backward.

    python docs/measure_chunks.py
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter

EXAMPLES, STEPS, WIDTH = 4096, 5, 64


def peaks(chunks: int | None, compiled: bool) -> tuple[float, float]:
    """MiB that the forward and the whole hold at their peaks; None takes ordinary steps."""
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    log_lr, w = torch.tensor(-4.0, requires_grad=True), torch.zeros(EXAMPLES, requires_grad=True)
    xs = torch.randn(STEPS, EXAMPLES, WIDTH)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return (w.sigmoid() * (net(x) - x).square().mean(1)).mean()

    def meta_loss(net: nn.Module, log_lr: Tensor, w: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                if chunks is None:
                    inner.step(loss(x, w))
                else:
                    inner.step_in_chunks(loss, x, w, chunks=chunks)
            return loss(xs[0, :64], w[:64])

    run: Any = metaoptim.compile(backend="eager")(meta_loss) if compiled else meta_loss
    for _ in range(2):
        with AllocatorMeter() as forward:
            outer = run(net, log_lr, w, xs)
        with AllocatorMeter() as backward:
            outer.backward()
        del outer
        gc.collect()
    return forward.peak / 2**20, max(forward.peak, forward.held + backward.peak) / 2**20


if __name__ == "__main__":
    print("| | window: forward | with the backward | compiled: forward | with the backward |")
    print("|---|---|---|---|---|")
    for chunks in (None, 1, 4, 16, 64):
        found = [f"{mib:.1f}" for compiled in (False, True) for mib in peaks(chunks, compiled)]
        print(f"| {'`step`' if chunks is None else f'`chunks={chunks}`'} | {' | '.join(found)} |", flush=True)
