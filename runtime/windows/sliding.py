"""`window=W`: reads that see the last W super-steps only, and what the tape may forget."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.calls import StepCall
from metaoptim.compiler.ir.slices import Slice
from metaoptim.errors import UnreachableWarning, warn

from ..engine.engine import Engine
from ..engine.nodes import Alias, Life, WindowedLoss, WindowedRead, new_token


class Sliding:
    """Reads of a sliding window.

    Args:
        engine: the tape.
        window: W, in super-steps.
    """

    def __init__(self, engine: Engine, window: int) -> None:
        self.engine, self.window = engine, window
        self.count = 0
        self._starts: deque[int] = deque(maxlen=window)
        self._metas: dict[
            int, tuple[Tensor, int]
        ] = {}  # number -> the tensor, the last super-step that read it
        # position, state index -> the tensor that theta was started from there, and how many super-steps were before
        self._started: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self._lives: weakref.WeakSet[Life] = weakref.WeakSet()  # at the lowest position each goes back to
        self._warned = False

    def step(self, position: int, fresh: bool, metas: dict[int, Tensor]) -> None:
        """A step at ``position`` is about to be appended; ``fresh``: it begins a super-step."""
        if fresh:
            self.count += 1
            self._starts.append(position)
        for number, tensor in metas.items():
            known = self._metas.get(number)
            with torch.enable_grad():
                tensor = tensor if tensor.is_leaf else Alias.apply(tensor) if known is None else known[0]
            self._metas[number] = (tensor, self.count)

    def start(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Theta at ``indices`` has the values of ``tensors`` now, which receive its gradient."""
        position = self.engine.position - 1
        for index, tensor in zip(indices, tensors, strict=True):
            if tensor.requires_grad:
                self._started[position, index] = tensor, self.count

    def reads(self, number: int) -> bool:
        """Whether a step that reads of now will see has read this meta-parameter."""
        return number in self._metas

    def read(
        self,
        indices: Sequence[int],
        since: Sequence[int],
        originals: Sequence[nn.Parameter],
        offline: bool,
        constant: Sequence[int],
        oldest: int,
    ) -> tuple[Tensor, ...]:
        """Theta now.

        Args:
            indices: its state indices.
            since: the positions at which they were adopted.
            originals: the parameters behind them, which receive a gradient offline.
            offline: whether they do.
            constant: places of those that no optimizer steps: they do in any case.
            oldest: position whose theta a pending loss may have read.
        """
        engine = self.engine
        self._metas = {
            n: (t, last) for n, (t, last) in self._metas.items() if last > self.count - self.window
        }
        whole = self.count <= self.window
        bottom = engine.program.start if whole else self._starts[0]
        reached = range(len(indices)) if whole and offline else constant
        first: dict[tuple[int, int], Tensor] = {(since[k], indices[k]): originals[k] for k in reached}
        recent = {k: (t, n) for k, (t, n) in self._started.items() if self.count - n <= self.window}
        self._started = recent
        first.update((key, tensor) for key, (tensor, _) in recent.items())
        life = Life(bottom)
        with torch.enable_grad():
            shown = WindowedRead.apply(
                engine,
                engine.position,
                tuple(indices),
                originals,
                bottom,
                tuple(self._metas),
                tuple(first),
                life,
                self._cut if offline and not whole else None,
                new_token(),
                *(t for t, _ in self._metas.values()),
                *first.values(),
            )
        self._lives.add(life)
        engine.trim(min(oldest, *(life.at for life in self._lives)))
        return shown

    def loss(self, loss: Tensor, position: int, call: StepCall, sliced: Slice) -> Tensor | None:
        """``loss``, which the step ``call`` at ``position`` was taken by, with what it has read for its history.

        None where that history is not known: theta that was written into since, or was read by two tensors.
        """
        thetas = [theta.tensor for theta in sliced.thetas]
        if sliced.twins or (call.back and any(t.is_leaf for t in thetas)):
            return None
        life = Life(position - call.back)
        self._lives.add(life)
        metas = [x.tensor for x in sliced.externals if x.grad]
        return WindowedLoss.apply(
            self.engine, position, loss.detach(), call.theta, call.metas, life, *thetas, *metas
        )

    def _cut(self) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"the loss lies more than window={self.window} steps after the start of an offline window: the initial "
                "parameters receive no gradient (None) from it",
                UnreachableWarning,
            )

    def close(self) -> None:
        """Drop the user's tensors."""
        self._metas.clear()
        self._started.clear()
