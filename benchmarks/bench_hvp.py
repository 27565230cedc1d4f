"""Memory of one inner step's derivative on an 8-layer transformer: reverse over reverse, and mixed mode.

Live bytes of the graphs, and the peak that the CPU allocator measures when they run (`AllocatorMeter`).
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.derive.graphs import peak_bytes
from metaoptim.compiler.ir.step import Port, StepGraph
from metaoptim.compiler.lower.derivatives import derived
from metaoptim.runtime.budget.meter import AllocatorMeter


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, each added to the stream."""
        batch, length, width = x.shape
        split = [
            t.view(batch, length, self.heads, -1).transpose(1, 2)
            for t in self.qkv(self.norm_1(x)).chunk(3, -1)
        ]
        q, k, v = split
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


def inner_step(layers: int, width: int, length: int, batch: int, optimizer: str) -> StepGraph:
    """The step graph of one step, as a compiled function captures it."""
    torch.manual_seed(0)
    net = nn.Sequential(*[Block(width, 4) for _ in range(layers)], nn.Linear(width, 10))
    log_lr = torch.tensor(-3.0, requires_grad=True)
    x, y = torch.randn(batch, length, width), torch.randint(10, (batch * length,))

    @metaoptim.compile(backend="eager", hvp="reverse")
    def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
        inner = getattr(metaoptim, optimizer)([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(offline=True) as window:
            for x in window.scan(xs):
                inner.step(F.cross_entropy(net(x).flatten(0, 1), y))
            return net(xs[0]).square().mean()

    with torch.no_grad():
        meta_loss(net, log_lr, x.expand(6, *x.shape))
    (programs,) = meta_loss._specializations.known.values()
    steps = [s for s in programs[0].program.step_graphs if s.steps]
    return steps[-1]


def _filled(port: Port) -> Tensor:
    t = port.empty()
    return t.normal_().mul_(0.05) if t.is_floating_point() else t.zero_()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("layers", 8), ("width", 64), ("length", 64), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--optimizers", nargs="+", default=["MetaSGD", "MetaAdam"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| optimizer | derivative | live MiB | measured MiB | seconds | ops |")
    print("|---|---|---|---|---|---|")
    for optimizer in args.optimizers:
        step = inner_step(args.layers, args.width, args.length, args.batch, optimizer)
        torch.manual_seed(1)
        inputs = [_filled(p) for p in step.inputs] + [_filled(step.outputs[i]) for i in step.cotangents]
        for hvp in ("reverse", "mixed"):
            graph = derived(step, hvp)
            with torch.no_grad():
                graph(*inputs)
                with AllocatorMeter() as meter:
                    graph(*inputs)
                times = []
                for _ in range(5):
                    begun = time.perf_counter()
                    graph(*inputs)
                    times.append(time.perf_counter() - begun)
            live, ops = peak_bytes(graph.graph) / 2**20, len(graph.graph.nodes)
            seconds = sorted(times)[2]
            print(
                f"| {optimizer} | {hvp} | {live:.1f} | {meter.peak / 2**20:.1f} | {seconds:.3f} | {ops} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
