"""Where the time of a meta-gradient goes: a table and a bar, beside what its matrix products alone would take."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compiler.compat import FakeTensorMode, TorchDispatchMode
from ..compiler.ir.tensors import TensorSpec, tensor_spec
from ..compiler.ir.text import plural
from ..compiler.lower.ambient import unaffected
from ..compiler.lower.derivatives import lowered
from ..runtime.engine.monitoring.times import Ran, Times, listen

aten = torch.ops.aten
_PRODUCTS = {
    *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default),
    *(aten.convolution.default, aten.convolution_backward.default),
}
#: The parts in their order, by the names that the engine knows them by.
_PARTS = {
    "forward": "graphs, forward",
    "again": "graphs, run again for the backward",
    "derivative": "graphs, derivatives",
    "lower": "graphs looked up, or derived and compiled",
    "data": "inputs of steps, looked at",
    "loop": "the engine, forward",
    "sweep": "the engine, backward",
    "step": "inner.step of windows: gradient, update, recording",
    "else": "all else: losses, their recording, your own code",
}
_REPEATS = 5


class _Product(NamedTuple):
    """A matrix product or a convolution: what is called, with layouts in the place of tensors."""

    op: Any
    args: tuple[Any, ...]

    def seconds(self) -> float:
        """How long one takes by itself: the median of a few."""
        args = [_like(a) for a in self.args]
        found: list[float] = []
        for _ in range(_REPEATS + 1):
            begun = time.perf_counter()
            out = self.op(*args)
            if any(t.is_cuda for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)):
                torch.cuda.synchronize()
            found.append(time.perf_counter() - begun)
        return statistics.median(found[1:])


def _like(a: Any) -> Any:
    if not isinstance(a, TensorSpec):
        return a
    span = 1 + sum((size - 1) * stride for size, stride in zip(a.shape, a.stride, strict=True))
    return torch.ones(max(span, 0), dtype=a.dtype, device=a.device).as_strided(a.shape, a.stride)


class _Products(TorchDispatchMode):
    """Notes the products that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[_Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _PRODUCTS:
            self.found[_Product(func, tuple([_layout(a) for a in args]))] += 1
        return func(*args, **(kwargs or {}))


def _layout(a: Any) -> Any:
    if isinstance(a, Tensor):
        return tensor_spec(a)
    return tuple(a) if isinstance(a, list) else a


@dataclass
class Profile:
    """Seconds of what ran in a block of `metaoptim.profile`.

    Attributes:
        total: seconds from the block's begin to its end.
        seconds: by part: "forward", "again" and "derivative" (step graphs), "lower" (graphs looked up; at first derived
            and compiled), "data" (inputs, looked at for changes), "loop" and "sweep" (the engine's own Python), "step"
            (`inner.step` of ordinary windows), "else".
        runs: how many step graphs have run "forward", "again" and as a "derivative".
        products: seconds that the matrix products and convolutions of these graphs take by themselves, the bound that
            no loop of these steps can pass; None where a graph's shapes depend on values.

    Example:
        >>> with metaoptim.profile() as found:
        ...     _ = torch.ones(3) * 2
        >>> found.runs, found.products
        ({}, 0)
    """

    total: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PARTS, 0.0))
    runs: dict[str, int] = field(default_factory=lambda: {})
    products: float | None = None

    def __str__(self) -> str:
        width = max(map(len, _PARTS.values()))
        lines = [f"{'total':{width}}  {self.total * 1e3:10.1f} ms"]
        for part, label in _PARTS.items():
            seconds = self.seconds[part]
            if seconds:
                runs = f"  {plural(self.runs[part], 'run')}" if self.runs.get(part) else ""
                lines.append(f"{label:{width}}  {seconds * 1e3:10.1f} ms {seconds / self.total:6.1%}{runs}")
        if self.products is not None:
            label = "the graphs' matrix products alone"
            lines.append(f"{label:{width}}  {self.products * 1e3:10.1f} ms {self.products / self.total:6.1%}")
        return "\n".join(lines)

    def plot(self, axes: Any = None) -> Any:
        """Draw the parts as one stacked bar, with matplotlib, and the products' bound as a line.

        Args:
            axes: to draw into; None for new ones.

        Returns:
            The axes.

        Raises:
            ImportError: where matplotlib is not installed.
        """
        import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

        axes = plt.figure(figsize=(9, 2.6), layout="constrained").subplots() if axes is None else axes
        left = 0.0
        for part, label in _PARTS.items():
            if self.seconds[part]:
                axes.barh([0], [self.seconds[part] * 1e3], left=[left], label=label)
                left += self.seconds[part] * 1e3
        if self.products is not None:
            axes.axvline(self.products * 1e3, color="black", linestyle="--", label="matrix products alone")
        axes.set(xlabel="milliseconds", yticks=[])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=2, fontsize="small")
        return axes


@contextmanager
def profile() -> Iterator[Profile]:
    """Say where the time goes of what runs in a block: windows, compiled functions, and their backwards.

    The first call of anything captures and compiles: let it run once before. On a GPU each graph is waited for, so that
    its time is its own; the block takes longer for it.

    Yields:
        A `Profile`, filled when the block ends. It prints as a table, and draws a bar.

    Raises:
        RuntimeError: while another profile is being taken.

    Example:
        >>> net = torch.nn.Linear(3, 1)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1)
        >>> def meta_gradient():
        ...     with metaoptim.SlidingWindow(offline=True, slots=2):
        ...         for _ in range(4):
        ...             inner.step(net(torch.ones(2, 3)).square().mean())
        ...         net(torch.ones(2, 3)).square().mean().backward()
        >>> meta_gradient()
        >>> with metaoptim.profile() as found:
        ...     meta_gradient()
        >>> found.runs["derivative"]
        4
        >>> print(str(found).splitlines()[-1][:33])
        the graphs' matrix products alone
    """
    times, found = Times(), Profile()
    begun = time.perf_counter()
    with listen(times):
        yield found
    found.total = time.perf_counter() - begun
    found.seconds |= dict(times.seconds)
    found.runs = dict(times.runs)
    found.products = _bound(times)


def _bound(times: Times) -> float | None:
    """Seconds of the products in the graphs that have run."""
    counted: Counter[_Product] = Counter()
    with unaffected():
        for ran, runs in times.graphs.values():
            if ran[0].step.dynamic:
                return None
            for product, count in _products_of(ran).items():
                counted[product] += runs * count
        return sum(product.seconds() * count for product, count in counted.items())


def _products_of(ran: Ran) -> Counter[_Product]:
    """The products in one run of a graph."""
    call, kind, specs = ran
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes:
        operands = [s.empty() for s in specs]
    program = lowered(call.step, kind, operands, call.lowering.uncompiled)
    with fakes, _Products() as products:
        program(*operands)
    return products.found
