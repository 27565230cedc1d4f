"""Forward mode: derivatives of the state by each entry of few tensors, carried along with the steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from metaoptim.compiler.compat import disable_current_modes
from metaoptim.compiler.ir.programs.calls import Assign, StepCall
from metaoptim.compiler.ir.step import Role
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.compiler.lower.derivatives import pushed
from metaoptim.errors import CaptureError, MetaOptimError, WindowError

from ...states.slots import State
from ..engine import Engine
from ..nodes import as_parameter, defined, hooked, refuse_third_order, tell_if_nothing_is_reached

#: Most entries that tensors may have in all which a forward gradient is taken by.
MOST = 100
Vector: TypeAlias = dict[int, Tensor]  # state index -> entry; none for zeros


class Direction(NamedTuple):
    """One entry of a tensor that the state is differentiated by."""

    key: Any  # the number of a meta-parameter, or a position and the state index of what has entered there
    entry: int


class Tangents:
    """The derivatives of an engine's state by entries of tensors: one more state for each `Direction`.

    The engine has it, so it does not have the engine: that would be a cycle.

    Attributes:
        directions: in the order in which they have come.
        entered: state index -> the user's own parameter, while the state has that and is not differentiated by it.
        asked: whether somebody has asked for a gradient.
    """

    def __init__(self) -> None:
        self.directions: list[Direction] = []
        self.entered: dict[int, Tensor] = {}
        self.asked = False
        self._at: dict[int, list[Vector]] = {}  # position -> by direction; shorter where there were fewer
        self._now: list[Vector] = []
        self._next: list[Vector] = []  # after the call that is about to be taken

    def admit(self, new: dict[Any, Tensor]) -> None:
        """Let the state be differentiated by tensors from here on, each under a key.

        Raises:
            WindowError: for complex ones, and where they have more than `MOST` entries in all.
        """
        count = len(self.directions) + sum(t.numel() for t in new.values())
        if count > MOST:
            sizes = ", ".join(str(tuple(t.shape)) for t in new.values())
            raise WindowError(
                f"gradient='forward': tensors that require grad have {count} entries in all, with those of shape "
                f"{sizes} that this step reads for the first time, and at most {MOST} can be carried along; detach or "
                "freeze those that need no gradient, or use gradient='exact'. The initial parameters are among them "
                "where offline=True"
            )
        if any(t.is_complex() for t in new.values()):
            raise WindowError("gradient='forward': complex tensors that require grad; use gradient='exact'")
        for key, tensor in new.items():
            for entry in range(tensor.numel()):
                self.directions.append(Direction(key, entry))
                # another list: that of this position may be kept
                self._now = [*self._now, {} if isinstance(key, int) else {key[1]: _unit(tensor, entry)}]

    def of(self, indices: Iterable[int]) -> list[Vector]:
        """By direction, the derivative of these state entries as they are now."""
        indices = tuple(indices)
        return [{i: tangent[i] for i in indices if i in tangent} for tangent in self._now]

    def prepare(self, engine: Engine, call: StepCall) -> None:
        """Find what the tangents are after ``call``, which ``engine`` is about to take.

        Raises:
            CaptureError: where autograd cannot transpose its VJP.
        """
        position = engine.position
        base, before = engine.state, self._now
        if call.back:
            base, before = engine.state_at(position - call.back), self._at[position - call.back]
        both = zip_longest(self._now, before, fillvalue={})  # there are directions that have come since
        given = [
            self._given(call, direction, now, then)
            for direction, (now, then) in zip(self.directions, both, strict=True)
        ]
        found = _pushed(engine, call, base, given) if any(given) else [{}] * len(given)
        self._next = []
        for now, changes in zip(self._now, found, strict=True):
            after = {i: t for i, t in now.items() if i not in call.writes}
            after.update((call.writes[k], t) for k, t in changes.items() if call.writes[k] >= 0)
            self._next.append(after)

    def through(self, engine: Engine, call: StepCall | Assign) -> None:
        """``engine`` is about to append ``call``, which is `prepare`d if it is a step."""
        self._at[engine.position] = self._now
        if isinstance(call, StepCall):
            self._now, self._next = self._next, []
            return
        gone = {i for i in call.indices if call.adoption or i not in engine.untrained}
        self._now = [{i: t for i, t in tangent.items() if i not in gone} for tangent in self._now]
        for index in () if call.adoption else gone:
            self.entered.pop(index, None)

    def forget(self, before: int) -> None:
        """No step will read a state before this position."""
        self._at = {p: tangents for p, tangents in self._at.items() if p >= before}

    def _given(self, call: StepCall, direction: Direction, now: Vector, before: Vector) -> Vector:
        """The tangents of the step's inputs, by their number."""
        given: Vector = {}
        for (i, role), index in zip(call.step.gradients, (*call.reads, *call.metas), strict=True):
            if role is Role.META:
                if index == direction.key:
                    given[i] = _unit(call.step.inputs[i].spec.empty(), direction.entry)
            elif (tangent := (before if role is Role.THETA else now).get(index)) is not None:
                given[i] = tangent
        return given


def _pushed(engine: Engine, call: StepCall, base: State, given: list[Vector]) -> list[dict[int, Tensor]]:
    """What the outputs of ``call`` change by in each direction, where its inputs change by ``given``."""
    step = call.step
    with disable_current_modes(), unaffected():
        inputs = [t.detach() for t in engine.operands(call, engine.state, base, engine.position)]
        try:
            return pushed(step, call.lowering.hvp, inputs, given)
        except (MetaOptimError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise CaptureError(
                f"gradient='forward': the derivative of the inner step at {call.location} has no derivative in its "
                f"turn: {str(error).rstrip('.')}; use gradient='exact'"
            ) from error


def _unit(like: Tensor, entry: int) -> Tensor:
    unit = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
    unit[entry] = 1
    return unit.view(like.shape)


class TangentRead(torch.autograd.Function):
    """Theta at a position as parameters the user's code can use, with its derivatives by ``tensors``.

    The first ``metas`` of these are meta-parameters, the others the user's own parameters. ``found`` has the
    derivatives: by which of the tensors, and which entry of it. The last tensors are parameters that nothing has moved
    or read since they have entered, ``direct`` their state indices.
    """

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        indices: Sequence[int],
        own: Sequence[nn.Parameter],
        found: Sequence[tuple[int, int, Vector]],
        direct: Sequence[int],
        metas: int,
        anchor: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.engine, ctx.position, ctx.indices = engine, engine.position, tuple(indices)
        ctx.found, ctx.direct, ctx.hooked = found, direct, hooked(tensors)
        ctx.ids = [None] * metas + [id(t) for t in tensors[metas:]]
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors[: len(tensors) - len(direct)]]
        return tuple(as_parameter(engine.state[i], p) for i, p in zip(indices, own, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_third_order()
        tell_if_nothing_is_reached(ctx.engine)
        ctx.engine.tangents.asked = True
        arrived = {i: g for i, g in zip(ctx.indices, grads, strict=True) if g is not None}
        sums: list[Tensor | None] = [None] * len(ctx.like)
        for which, entry, tangent in ctx.found:
            parts = [(arrived[i].conj() * t).sum().real for i, t in tangent.items() if i in arrived]
            if parts:
                shape, dtype, device = ctx.like[which]
                total = sums[which]
                if total is None:
                    total = sums[which] = torch.zeros(shape, dtype=dtype, device=device)
                total.view(-1)[entry] = sum(part.to(device) for part in parts)
        sums = [*sums, *(arrived.get(i) for i in ctx.direct)]
        opened = [None if i in ctx.engine.closed else g for g, i in zip(sums, ctx.ids, strict=True)]
        return *[None] * 6, torch.empty(0, device="cpu"), *defined(opened, ctx.hooked)
