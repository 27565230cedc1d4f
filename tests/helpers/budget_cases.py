"""Random inner loops under memory budgets, and what the allocator says that they take."""

from __future__ import annotations

import gc
import itertools
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter

Gradients = dict[str, Tensor | None]

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda net, lr: metaoptim.MetaSGD([net], lr=lr),
    "momentum": lambda net, lr: metaoptim.MetaSGD([net], lr=lr, momentum=0.8),
    "adam": lambda net, lr: metaoptim.MetaAdam([net], lr=lr),
}


class Case:
    """An inner loop at random: state, activations or inputs take most of its memory, in turn.

    Args:
        seed: of everything.
        steps: T; None for one drawn log-uniformly up to ``most``.
        dominant: what takes most; None for as it comes.
        most: the highest T drawn.
    """

    def __init__(
        self, seed: int, steps: int | None = None, dominant: str | None = None, most: int = 3000
    ) -> None:
        draw = random.Random(seed)
        self.dominant = dominant or ("state", "activations", "inputs")[seed % 3]
        self.optimizer = draw.choice(list(OPTIMIZERS))
        self.offline = draw.random() < 0.5
        drawn = round(most ** draw.random())
        self.steps = drawn if steps is None else steps
        self.width = draw.randint(24, 48) if self.dominant == "state" else draw.randint(4, 12)
        self.batch = 4 if self.dominant == "state" else 64
        self.features = 64 if self.dominant == "inputs" else 5
        self.depth = draw.randint(1, 3)
        self.seed, self.share = seed, draw.random()
        rows = draw.choice((2, 64, 200))  # of the outer loss
        torch.manual_seed(seed + 1)
        self.judged = torch.randn(rows, self.features), torch.randn(rows, 3)

    def __repr__(self) -> str:
        return f"{self.dominant} {self.optimizer} T={self.steps} offline={self.offline} seed={self.seed}"

    def cut(self, steps: int) -> Case:
        """The same loop with at most so many steps."""
        return Case(self.seed, min(steps, self.steps), self.dominant)

    def between(self, low: int, high: int) -> int:
        """A budget, log-uniformly at random."""
        return int(low * math.exp(self.share * math.log(max(high, low) / low)))

    def make(self) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        """The network, the log learning rate, and the batches."""
        torch.manual_seed(self.seed)
        sizes = [self.features, *[self.width] * self.depth]
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
        net = nn.Sequential(*layers, nn.Linear(sizes[-1], 3))
        few = min(self.steps, 100)  # of a long loop they repeat
        xs, ys = torch.randn(few, self.batch, self.features), torch.randn(few, self.batch, 3)
        at = torch.arange(self.steps) % few
        return net, torch.tensor(-4.0, requires_grad=True), xs[at], ys[at]

    def gradients_on_the_tape(self) -> Gradients:
        """What the full tape gives."""
        return self._in_a_window(False, nullcontext(), strategy="full_tape")

    def loop(self, fresh: bool, **options: Any) -> tuple[Gradients, int]:
        """Gradients in an ordinary window, and the bytes it took; ``fresh``: every batch is the window's own."""
        first = self.cut(4)  # a window measures its steps once, where nobody else measures
        first._in_a_window(fresh, nullcontext(), **options | {"memory_budget": "1GiB"})
        gc.collect()  # what an earlier meter has seen and is freed later would count
        meter = AllocatorMeter()
        return self._in_a_window(fresh, meter, **options), meter.peak

    def _in_a_window(self, fresh: bool, meter: Any, **options: Any) -> Gradients:
        net, log_lr, xs, ys = self.make()
        inner = OPTIMIZERS[self.optimizer](net, log_lr.exp())
        watch = getattr(meter, "watch", lambda done, total: None)
        with meter, metaoptim.progress(watch), metaoptim.SlidingWindow(offline=self.offline, **options):
            for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
                inner.step(F.mse_loss(net(x.clone() if fresh else x), y))
                watch(t, self.steps)
            F.mse_loss(net(self.judged[0]), self.judged[1]).backward()
        return gradients(net, log_lr)

    def outer(self) -> int:
        """Bytes of the outer loss's own graph, which no budget counts."""
        net, *_ = self.make()
        with AllocatorMeter() as meter:
            F.mse_loss(net(self.judged[0]), self.judged[1]).backward()
        return meter.peak - sum(p.nbytes for p in net.parameters())

    def compiled(self, **options: Any) -> Any:
        """The loop as a compiled function of what `make` makes."""

        x_judged, y_judged = self.judged

        @metaoptim.compile(**{"backend": "eager", **options})
        def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
            inner = OPTIMIZERS[self.optimizer](net, log_lr.exp())
            with metaoptim.SlidingWindow(offline=self.offline) as window:
                for x, y in window.scan(xs, ys):
                    inner.step(F.mse_loss(net(x), y))
                return F.mse_loss(net(x_judged), y_judged)

        return meta_loss

    def run(self, **options: Any) -> tuple[Gradients, int, Any]:
        """Gradients of the compiled function, the bytes its second call took, and its plan."""
        net, log_lr, xs, ys = self.make()
        meta_loss = self.compiled(**options)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        meta_loss(net, log_lr, xs, ys)
        net.load_state_dict(before)
        ((program,),) = meta_loss._specializations.known.values()
        gc.collect()
        meter = AllocatorMeter()
        with meter, metaoptim.progress(meter.watch):
            meta_loss(net, log_lr, xs, ys).backward()
        return gradients(net, log_lr), meter.peak, program.plan


def gradients(net: nn.Module, log_lr: Tensor) -> Gradients:
    """Of everything that may have one."""
    return {**{n: p.grad for n, p in net.named_parameters()}, "log_lr": log_lr.grad}


def same(got: Gradients, expected: Gradients) -> None:
    """Equal to rounding."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


def state_bytes(case: Case) -> int:
    """Bytes of a state, of as much optimizer state as there can be."""
    net, *_ = case.make()
    return 3 * sum(p.nbytes for p in net.parameters())
