"""Cotangents on their way back through the inner loop, and through which calls they have to be pulled back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

from torch import Tensor

from metaoptim.compiler.ir.programs.calls import Assign, StepCall
from metaoptim.compiler.ir.step import Role
from metaoptim.compiler.ir.values import Input
from metaoptim.errors import UnreachableWarning, warn

# in the place of a state index, at the position after a step: the loss of that step (-1 stands for none)
LOSS = -2
Tell = Callable[[int], object]


class Sweep:
    """Cotangents on their way back through the tape, from position ``top``; they have come to ``position``."""

    call: StepCall  # that is being pulled back through
    received: dict[int, Tensor]  # output of it, or `LOSS` -> cotangent

    def __init__(self) -> None:
        self.position = self.top = -1
        self.cotangents: dict[int, Tensor] = {}  # by state index, at `position`
        self.deposits: dict[int, list[tuple[int, Tensor]]] = {}  # position -> cotangents that join there
        self.metas: dict[
            Any, Tensor
        ] = {}  # gradients so far, by number, or what else stands for a meta-parameter
        # position, state index -> cotangent that arrived where that parameter was adopted, or started anew
        self.adopted: dict[tuple[int, int], Tensor] = {}

    def deposit(self, position: int, index: int, grad: Tensor) -> None:
        """Let a cotangent of state entry ``index``, or of the `LOSS` of the step before, join at ``position``."""
        self.deposits.setdefault(position, []).append((index, grad))

    def add(self, index: int, grad: Tensor) -> None:
        """Accumulate at the current position."""
        known = self.cotangents.get(index)
        self.cotangents[index] = grad if known is None else known + grad

    def meta(self, key: Any, grad: Tensor) -> None:
        """Accumulate the gradient of a meta-parameter."""
        known = self.metas.get(key)
        self.metas[key] = grad if known is None else known + grad

    def arrive(self, position: int) -> None:
        """Move to ``position`` and merge what was deposited there."""
        self.position = position
        for index, grad in self.deposits.pop(position, ()):
            self.add(index, grad)

    def targets(
        self, program: Any, bottom: int, tell: Tell | None = None, untrained: Container[int] = ()
    ) -> Iterator[tuple[int, int]]:
        """Calls that cotangents arrive at, down to ``bottom``: the position of each, and that which its loss has read.

        Each must have been pulled back through, by `take`, before the next is asked for. ``tell`` is called with every
        position that is left behind; ``untrained`` are state indices of parameters that no optimizer steps.
        """
        self.arrive(self.position)
        while self.position > bottom:
            position = self.position - 1
            call = program[position]
            if not isinstance(call, StepCall):
                self._assigned(call, position, untrained)
            elif self._receives(call, self.cotangents):
                yield position, position - call.back
            self.arrive(position)
            if tell is not None:
                tell(position)

    def _receives(self, call: StepCall, cotangents: dict[int, Tensor]) -> bool:
        """Whether any of ``cotangents`` is of what ``call`` has made; they are `received` then."""
        pop = cotangents.pop
        self.call = call
        self.received = {k: pop(index) for k, index in enumerate(call.writes) if index in cotangents}
        if not call.step.cotangents:  # what it has made depends on nothing that a gradient goes to
            self.received = {}
        if LOSS in cotangents:
            self.received[LOSS] = pop(LOSS)
        return bool(self.received)

    def _assigned(self, call: Assign, position: int, untrained: Container[int]) -> None:
        for index in call.indices:
            if index in untrained and not call.adoption:
                continue
            arrived = self.cotangents.pop(index, None)
            if call.adoption and arrived is not None:
                self.adopted[position, index] = arrived

    def take(self, position: int, found: Iterable[tuple[Role, Any, Tensor]]) -> None:
        """Gradients have come out of the call at ``position``: the role and state index of the input of each."""
        cotangents, back = self.cotangents, self.call.back
        for role, index, grad in found:
            if role is Role.META:
                self.meta(index, grad)
            elif back and role is Role.THETA:
                self.deposit(position - back, index, grad)
            else:  # `add`, without a call for each
                known = cotangents.get(index)
                cotangents[index] = grad if known is None else known + grad


class GradientSweep(Sweep):
    """A sweep over a whole program, in which the gradients of a scanned tensor's slices gather in one (``zeros``)."""

    def __init__(self, zeros: Callable[[Input], Tensor]) -> None:
        super().__init__()
        self._zeros = zeros
        self._scans: dict[Input, Tensor] = {}

    def meta(self, key: Any, grad: Tensor) -> None:
        """Accumulate the gradient of an input, or of a slice of one."""
        if not isinstance(key, tuple):
            return super().meta(key, grad)
        source, at = key
        if source not in self._scans:
            self._scans[source] = self._zeros(source)
        self._scans[source][at].add_(grad)

    def gradients(self) -> dict[Input, Tensor]:
        """Of all inputs, when it has come down."""
        for source in list(self._scans):
            super().meta(source, self._scans.pop(source))
        return self.metas


class TruncatedSweep(GradientSweep):
    """`window=W` over a whole program: every read of theta by an outer loss sees the W super-steps before it.

    Cotangents of what the user's own code carries from step to step (sums, hidden states) flow on without end, as on
    autograd's tape. Where they reach theta or optimizer state (an outer loss has read it there), a sweep of its own
    goes back W super-steps and ends: W step-VJPs for each such read.
    """

    def __init__(self, zeros: Callable[[Input], Tensor], window: int, offline: bool) -> None:
        super().__init__(zeros)
        self.window, self.offline = window, offline
        self._inner = Sweep()  # cotangents of theta and optimizer state
        self._below = False  # whether it is they that are pulled back

    def targets(
        self, program: Any, bottom: int, tell: Tell | None = None, untrained: Container[int] = ()
    ) -> Iterator[tuple[int, int]]:
        """The calls that cotangents arrive at; those of the last W super-steps, again for each read of theta."""
        steps = [p for p in range(program.end) if program.takes_step(p)]
        cut = False
        self.arrive(self.position)
        while self.position > bottom:
            position = self.position - 1
            self._inner, self._below = Sweep(), False
            if self._receives(program[position], self.cotangents):
                yield position, position
            self.arrive(position)
            if tell is not None:
                tell(position)
            if not self._inner.cotangents:
                continue
            self._below = True
            done = bisect_left(steps, position)
            cut |= done > self.window
            end = steps[done - self.window] if done > self.window else 0
            for below in range(position - 1, end - 1, -1):
                if self._receives(program[below], self._inner.cotangents):
                    yield below, below
        if cut and self.offline:
            warn_cut(self.window)

    def take(self, position: int, found: Iterable[tuple[Role, Any, Tensor]]) -> None:
        """Gradients have come out of the call at ``position``."""
        for role, index, grad in found:
            if role is Role.META:
                self.meta(index, grad)
            elif role in (Role.THETA, Role.OPT_STATE):
                self._inner.add(index, grad)
            elif self._below:
                self.deposit(position, index, grad)
            else:
                self.add(index, grad)


def warn_cut(window: int) -> None:
    """Warn that a loss lies too far from the start of an offline window."""
    warn(
        f"the loss lies more than window={window} steps after the start of an offline window: the initial parameters "
        "receive no gradient (None) from it",
        UnreachableWarning,
    )
