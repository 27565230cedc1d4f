"""Reads of theta each of which is a root of its own: over the last steps, or with derivatives that came along."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Sized
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.programs.calls import StepCall
from metaoptim.compiler.ir.traces.slices import Slice
from metaoptim.compiler.ir.values import Epoch
from metaoptim.compiler.ir.weak import WeakTable
from metaoptim.errors import CaptureError, WindowError

from ..engine.engine import Engine
from ..engine.estimators.implicit import Implicit
from ..engine.estimators.tangents import TangentRead, Tangents
from ..engine.nodes import Alias, Life, WindowedLoss, WindowedRead, new_token
from ..engine.sweep import warn_cut
from .reads import CommonReads, WholeReads


class RootedReads(CommonReads):
    """Reads each of which is a root of its own; the tape forgets what none goes back to."""

    waiting: Sized = ()
    option: str  # the one of the window that asks for them

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._lives = WeakTable[Life]()  # at the lowest position each goes back to

    def hold(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Refused: W steps back from such a state are not W steps back from a loss, nor has it tangents."""
        raise WindowError(
            f"extract_state by reference or copy, in a window with {self.option}: its gradient would need a root of "
            "its own. Use by='detached', or leave the option out"
        )

    def loss(self, loss: Tensor, position: int, call: StepCall, sliced: Slice) -> Tensor | None:
        """The loss of a step that has been taken, with what it has read for its history.

        None where that is not known: theta that was written into since, or was read by two tensors.
        """
        thetas = [theta.tensor for theta in sliced.thetas]
        if sliced.twins or (call.back and any(t.is_leaf for t in thetas)):
            return None
        life = Life(position - call.back)
        self._lives.add(life)
        fixed = position, loss.detach(), call.theta, call.metas, life
        metas = [x.tensor for x in sliced.externals if x.grad]
        with torch.enable_grad():
            return WindowedLoss.apply(self.engine, *fixed, *thetas, *metas)  # type: ignore[return-value]

    def results(self, indices: list[int]) -> tuple[Tensor, ...]:
        """Refused: a result would need a root of its own."""
        raise CaptureError(
            f"a compiled step that returns what depends on the parameters, in a window with {self.option}; return "
            "detached values, and compute outer losses outside the step"
        )

    def trim(self, epochs: list[Epoch]) -> None:
        """Let the tape forget what no read goes back to, and no loss that has not been stepped by."""
        self.engine.trim(min([self._oldest(epochs), *(life.at for life in self._lives)]))

    def _oldest(self, epochs: list[Epoch]) -> int:
        """The first position that a loss may have read theta at that is stepped by later."""
        return min((e.position for e in epochs if e.read), default=self.engine.position)


class SlidingReads(RootedReads):
    """`window=W`: reads over the last W super-steps."""

    option = "window=W"

    def __init__(self, engine: Engine, window: int, offline: bool, implicit: Implicit | None = None) -> None:
        super().__init__(engine)
        self.window, self.offline, self.implicit = window, offline, implicit
        self._superstep = 0
        self._starts: deque[int] = deque(maxlen=window)
        # number of a meta-parameter -> with its history then, and the last super-step that read it
        self._read: dict[int, tuple[Tensor, int]] = {}
        self._entered: dict[int, int] = {}  # state index -> the position where it was put on the tape
        # position, state index -> the tensor that theta was started from there, and how many super-steps were before
        self._started: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self._warned = False

    @property
    def truncates(self) -> bool:
        return self._superstep > self.window

    def enter(self, position: int, indices: tuple[int, ...], own: list[Tensor]) -> None:
        self._entered.update((index, position) for index in indices)

    def start(self, position: int, indices: tuple[int, ...], values: Sequence[Tensor]) -> None:
        for index, tensor in zip(indices, values, strict=True):
            if tensor.requires_grad:
                self._started[position, index] = tensor, self._superstep

    def begin(self, position: int, superstep: int) -> None:
        self._superstep = superstep
        self._starts.append(position)

    def step(self, position: int, metas: list[Tensor]) -> tuple[int, ...]:
        numbers, _ = self._numbers(metas)
        for number, tensor in zip(numbers, metas, strict=True):
            known = self._read.get(number)
            with torch.enable_grad():
                tensor = tensor if tensor.is_leaf else Alias.apply(tensor) if known is None else known[0]
            self._read[number] = (tensor, self._superstep)  # type: ignore[assignment]
        self._known = {k: (n, t) for k, (n, t) in self._known.items() if n in self._read}
        return numbers

    def read(self, indices: list[int], own: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        engine, oldest = self.engine, self._superstep - self.window
        self._read = {n: (t, last) for n, (t, last) in self._read.items() if last > oldest}
        self._started = {k: (t, n) for k, (t, n) in self._started.items() if n >= oldest}
        whole = not self.truncates
        bottom = engine.program.start if whole else self._starts[0]
        first: dict[tuple[int, int], Tensor] = {
            (self._entered[index], index): p
            for index, p in zip(indices, own, strict=True)
            if (whole and self.offline) or index in engine.untrained
        }
        first.update((key, tensor) for key, (tensor, _) in self._started.items())
        life = Life(bottom)
        self._lives.add(life)
        on_cut = self._cut if self.offline and not whole and self.implicit is None else None
        fixed = tuple(indices), own, bottom, tuple(self._read), tuple(first), life, on_cut, self.implicit
        tensors = (new_token(), *(t for t, _ in self._read.values()), *first.values())
        with torch.enable_grad():
            shown: Any = WindowedRead.apply(engine, engine.position, *fixed, *tensors)
        return shown

    def meta_params(self) -> list[tuple[int, Tensor]]:
        """What the last W super-steps have read that requires grad, with its number."""
        return [(n, t) for n, t in self._known.values() if n in self._read]

    def _cut(self) -> None:
        if not self._warned:
            self._warned = True
            warn_cut(self.window)

    def close(self) -> None:
        self._known.clear()
        self._read.clear()
        self._started.clear()


class ForwardReads(RootedReads):
    """`gradient="forward"`: reads that have their derivatives with them, as the steps have carried them along."""

    truncates = False
    option = "gradient='forward'"

    def __init__(self, engine: Engine, offline: bool) -> None:
        super().__init__(engine)
        self.offline = offline
        self.tangents = engine.tangents = Tangents()
        self._tensors: dict[Any, Tensor] = {}  # key of a direction -> what it is an entry of

    def enter(self, position: int, indices: tuple[int, ...], own: list[Tensor]) -> None:
        self.tangents.entered.update(zip(indices, own, strict=True))

    def start(self, position: int, indices: tuple[int, ...], values: Sequence[Tensor]) -> None:
        for index in indices:
            self.tangents.entered.pop(index, None)
        self._differentiate_by(
            {(position, i): t for i, t in zip(indices, values, strict=True) if t.requires_grad}
        )

    def begin(self, position: int, superstep: int) -> None:
        """Nothing changes with a super-step."""

    def prepare(self, call: StepCall, metas: list[Tensor]) -> None:
        step = call.step
        if step.opaque or step.hooked:
            raise CaptureError(
                f"gradient='forward': the inner step at {call.location} holds a custom autograd.Function or a tensor "
                "hook, which need not be linear in a gradient; use gradient='exact'"
            )
        call.metas, _ = self._numbers(metas)
        new: dict[Any, Tensor] = {
            n: t for n, t in zip(call.metas, metas, strict=True) if n not in self._tensors
        }
        for index in call.theta:
            if index in self.tangents.entered and self._learnt(index):
                new[-1, index] = self.tangents.entered[index]
        self._differentiate_by(new)
        self.tangents.prepare(self.engine, call)

    def _learnt(self, index: int) -> bool:
        """Whether a parameter receives a gradient as it has entered."""
        return self.offline or index in self.engine.untrained

    def _differentiate_by(self, new: dict[Any, Tensor]) -> None:
        self.tangents.admit(new)
        for key, t in new.items():
            with torch.enable_grad():
                alias: Any = t if t.is_leaf else Alias.apply(t)
            self._tensors[key] = alias
            if not isinstance(key, int):
                self.tangents.entered.pop(key[1], None)

    def step(self, position: int, metas: list[Tensor]) -> tuple[int, ...]:
        return self._numbers(metas)[0]

    def read(self, indices: list[int], own: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        of = {key: k for k, key in enumerate(sorted(self._tensors, key=lambda key: not isinstance(key, int)))}
        directions = zip(self.tangents.directions, self.tangents.of(indices), strict=True)
        found = [(of[d.key], d.entry, tangent) for d, tangent in directions if tangent]
        direct = [i for i in indices if i in self.tangents.entered and self._learnt(i)]
        fixed = tuple(indices), own, found, direct, sum(isinstance(key, int) for key in of)
        tensors = (
            new_token(),
            *(self._tensors[key] for key in of),
            *(self.tangents.entered[i] for i in direct),
        )
        with torch.enable_grad():
            shown: Any = TangentRead.apply(self.engine, *fixed, *tensors)
        return shown

    def meta_params(self) -> list[tuple[int, Tensor]]:
        """What steps have read that requires grad, with its number."""
        return [(key, t) for key, t in self._tensors.items() if isinstance(key, int)]

    def trim(self, epochs: list[Epoch]) -> None:
        super().trim(epochs)
        self.tangents.forget(self._oldest(epochs))

    def close(self) -> None:
        self._known.clear()
        self._tensors.clear()
        self.tangents.entered.clear()


Reads: TypeAlias = WholeReads | SlidingReads | ForwardReads
