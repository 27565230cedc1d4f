"""The autograd nodes that join an engine to the user's graph (docs/architecture.md: Joining autograd).

A Read hands out theta at one position; its only differentiable input is a token. A Link stands where a step first read
some differentiable tensors: its inputs are those and the previous token. Autograd runs a node after everything that
depends on it, so when a Link's backward runs, all cotangents above it have been deposited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.compiler.compat import graph_task
from metaoptim.errors import MetaOptimError, UnreachableWarning, WindowError, warn

from .engine import Engine
from .estimators.evolution import EvolutionSweep
from .estimators.implicit import Implicit, SolutionSweep, only_step
from .sweep import LOSS, Sweep


def new_token() -> Tensor:
    """The empty tensor a chain of Links begins with."""
    return torch.empty(0, device="cpu", requires_grad=True)


class InnerParameter(nn.Parameter):
    """What a network shows inside a window: a parameter that need not be a leaf.

    Its ``grad`` is that of the user's own parameter behind it, so that zero_grad and clipping inside the block act on
    what the outer optimizer will see.
    """

    own: nn.Parameter
    #: Freezes it, where no optimizer that trains it has stepped; raises otherwise.
    freeze: Callable[[], None] | None = None

    grad = property(lambda self: self.own.grad, lambda self, value: setattr(self.own, "grad", value))  # type: ignore[assignment]  # pyright: ignore

    def _set_values(self, value: Tensor) -> None:
        # what the tape knows of this parameter is its memory: copy into it (a history cut), never swap it
        if (value.shape, value.dtype, value.device) != (self.shape, self.dtype, self.device):
            raise WindowError(
                f"net.to(...), or p.data = ..., inside a window: got {tuple(value.shape)} of {value.dtype} on "
                f"{value.device}, expected {tuple(self.shape)} of {self.dtype} on {self.device}; convert the "
                "network outside the window"
            )
        with torch.no_grad():
            self.copy_(value)

    data = property(torch.Tensor.data.__get__, _set_values)  # type: ignore[assignment]  # pyright: ignore

    def detach_(self) -> Tensor:
        """Refused: it would freeze the parameter."""
        raise WindowError(
            "a parameter was detached in place inside a window, which would freeze it; use p.detach() for a constant"
        )

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:  # type: ignore[override]
        """Refused for False where inner steps train it: that is fixed while they can be differentiated."""
        if not requires_grad:
            if self.freeze is not None:
                self.freeze()
                return self
            raise WindowError(
                "a parameter was frozen inside a window; freeze it before the window, or give its network a group "
                "of its own with lr=0"
            )
        return super().requires_grad_()

    requires_grad = property(torch.Tensor.requires_grad.__get__, requires_grad_)  # type: ignore[assignment]  # pyright: ignore

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        copy = memo[id(self)] = nn.Parameter(self.detach().clone(), self.own.requires_grad)
        return copy


def as_parameter(value: Tensor, own: nn.Parameter) -> InnerParameter:
    """``value`` as a parameter that shares its memory and nothing else; ``own``: the user's parameter behind it."""
    shown: InnerParameter = torch.Tensor._make_subclass(InnerParameter, value, False)  # type: ignore[assignment]
    shown.own = own
    return shown


def refuse_third_order() -> None:
    """Raise if the backward that is running is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise MetaOptimError(
            "backward through a window with create_graph=True: metaoptim gives meta-gradients, not their "
            "derivatives. Drop create_graph, or open the window with strategy='full_tape'."
        )


class Begin(torch.autograd.Function):
    """The user's own parameters, as networks show them from the entry of the window on.

    They receive their gradient unless they are ``closed``: an online window cuts them off once their optimizer steps.
    """

    @staticmethod
    def forward(ctx: Any, closed: set[int], values: list[Tensor], *own: nn.Parameter) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.closed, ctx.ids, ctx.hooked = closed, tuple(map(id, own)), hooked(own)
        return _as_parameters(values, own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        opened = [None if i in ctx.closed else g for g, i in zip(grads, ctx.ids, strict=True)]
        return None, None, *defined(opened, ctx.hooked)


def _as_parameters(values: Iterable[Tensor], own: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    return tuple(as_parameter(value, p) for value, p in zip(values, own, strict=True))


def hooked(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Zeros for those that have hooks: torch would call these with None where no gradient arrives."""
    return {
        k: torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)
        for k, t in enumerate(tensors)
        if t._backward_hooks
    }


def defined(grads: list[Tensor | None], zeros: dict[int, Tensor]) -> list[Tensor | None]:
    """Gradients, with ``zeros`` where there are none."""
    return [zeros[k].clone() if g is None and k in zeros else g for k, g in enumerate(grads)]


def _enter(
    ctx: Any, metas: Sequence[int], thetas: Sequence[tuple[int, int]], tensors: Sequence[Tensor]
) -> None:
    """``tensors`` enter the tape: the meta-parameters ``metas``, then theta, at positions and state indices."""
    ctx.metas, ctx.thetas, ctx.hooked = tuple(metas), tuple(thetas), hooked(tensors)
    ctx.ids = tuple(map(id, tensors[len(ctx.metas) :]))


def _gradients(ctx: Any, sweep: Sweep, bottom: int) -> list[Tensor | None]:
    """Gradients of what has entered at ``ctx``, pulled back down to ``bottom``."""
    if not isinstance(sweep, EvolutionSweep):
        ctx.engine.pull_back(sweep, bottom)
    elif ctx.metas or ctx.thetas:  # other Links are there to keep cotangents from waiting together
        sweep.estimate(ctx.engine)
    found = [sweep.metas.pop(m, None) for m in ctx.metas]
    for (position, index), own in zip(ctx.thetas, ctx.ids, strict=True):
        at_bottom = sweep.cotangents.get(index) if position < bottom else None
        grad = sweep.adopted.pop((position, index), at_bottom)
        found.append(None if own in ctx.engine.closed else grad)
    return defined(found, ctx.hooked)


class Life:
    """Lives as long as a read of theta, and so as long as a loss behind it; ``at`` is for whoever counts them."""

    __slots__ = ("at", "__weakref__")

    def __init__(self, at: int) -> None:
        self.at = at


class Read(torch.autograd.Function):
    """Theta at a position, as parameters the user's code can use."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        position: int,
        indices: Sequence[int],
        own: Sequence[nn.Parameter],  # type: ignore[override]
        life: Life,
        token: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.engine, ctx.position, ctx.indices, ctx.life = engine, position, tuple(indices), life
        return _as_parameters((engine.state[i] for i in indices), own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        _deposit(ctx, ctx.engine.sweep_of(graph_task()), grads)
        return *[None] * (len(ctx.needs_input_grad) - 1), torch.empty(0, device="cpu")


def _deposit(ctx: Any, sweep: Sweep, grads: Sequence[Tensor | None]) -> None:
    """Let cotangents of the state entries that ``ctx`` has shown join ``sweep``."""
    refuse_third_order()
    tell_if_nothing_is_reached(ctx.engine)
    for index, grad in zip(ctx.indices, grads, strict=True):
        if grad is not None:
            sweep.deposit(ctx.position, index, grad)


def tell_if_nothing_is_reached(engine: Engine) -> None:
    if engine.program.begun and not engine.reaches:
        engine.reaches = True  # once
        opened = {i for i, own in engine.thetas.items() if own not in engine.closed}
        if any(not opened.isdisjoint(c.theta) for c, _ in engine.program.counted()):
            return  # networks of optimizers that do not step here
        warn(
            "the backward goes through inner steps of an online window, none of which has read a tensor that requires "
            "grad: nothing receives a gradient from them. For a gradient of the initial parameters (MAML) open the "
            "window with offline=True",
            UnreachableWarning,
        )


class Results(torch.autograd.Function):
    """What a compiled step returned, as it left it at ``position``; entries of the state like theta itself."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, position: int, indices: Sequence[int], token: Tensor) -> tuple:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.engine, ctx.position, ctx.indices = engine, position, tuple(indices)
        return tuple(engine.state[i].clone() for i in indices)

    backward = Read.backward  # type: ignore[assignment]


class Position(torch.autograd.Function):
    """Entries of the state at a position that may be gone back to: what goes on from them hangs on these."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, position: int, indices: Sequence[int], token: Tensor) -> tuple:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.engine, ctx.position, ctx.indices = engine, position, tuple(indices)
        return tuple(torch.Tensor._make_subclass(torch.Tensor, engine.state[i], False) for i in indices)

    backward = Read.backward  # type: ignore[assignment]


class StepLoss(torch.autograd.Function):
    """The loss of the step at ``position``, once that has been taken: its gradient comes out of the sweep."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, position: int, loss: Tensor, token: Tensor) -> Tensor:  # type: ignore[override]
        ctx.engine, ctx.position = engine, position
        return torch.Tensor._make_subclass(torch.Tensor, loss, False)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        refuse_third_order()
        tell_if_nothing_is_reached(ctx.engine)
        ctx.engine.sweep_of(graph_task()).deposit(ctx.position + 1, LOSS, grad)
        return None, None, None, torch.empty(0, device="cpu")


class Alias(torch.autograd.Function):
    """A tensor with its history as it is now, whatever in-place calls make of it later."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # type: ignore[override]
        return torch.Tensor._make_subclass(torch.Tensor, value.detach(), False)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Link(torch.autograd.Function):
    """Where differentiable tensors enter: a new token that stands for them and for everything before.

    ``metas`` are the numbers of the meta-parameters among ``tensors``; ``thetas`` the state indices of the rest, which
    are parameters adopted at ``position``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        position: int,
        metas: Sequence[int],
        thetas: Sequence[int],
        token: Tensor,  # type: ignore[override]
        *tensors: Tensor,
    ) -> Tensor:
        ctx.engine, ctx.position = engine, position
        _enter(ctx, metas, [(position, i) for i in thetas], tensors)
        return torch.empty(0, device="cpu")

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        refuse_third_order()
        if ctx.thetas and ctx.engine.closed.issuperset(ctx.ids):
            return *[None] * 4, torch.empty(0, device="cpu"), *[None] * len(ctx.ids)
        grads = _gradients(ctx, ctx.engine.sweep_of(graph_task()), ctx.position)
        return *[None] * 4, torch.empty(0, device="cpu"), *grads


class WindowedRead(torch.autograd.Function):
    """Theta at a position with the last W super-steps behind it: its own root, its own sweep down to ``bottom``.

    The window keeps what nodes need whose ``life`` has not ended.
    """

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        position: int,
        indices: Sequence[int],
        own: Sequence[nn.Parameter],  # type: ignore[override]
        bottom: int,
        metas: Sequence[int],
        thetas: Sequence[tuple[int, int]],
        life: Life,
        on_cut: Callable[[], None] | None,
        implicit: Implicit | None,
        anchor: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.engine, ctx.position, ctx.indices, ctx.bottom = engine, position, tuple(indices), bottom
        ctx.life, ctx.on_cut, ctx.implicit = life, on_cut, implicit
        _enter(ctx, metas, thetas, tensors)
        return _as_parameters((engine.state[i] for i in indices), own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        sweep, engine = Sweep(), ctx.engine
        if ctx.implicit is not None:
            sweep = SolutionSweep(ctx.implicit)
            last = only_step(engine.program, max(ctx.bottom, engine.program.start), ctx.position)
            if last is not None:
                states = [engine.state_at(p) for p in (last, last + 1)]
                ctx.implicit.check(*([state[i] for i in ctx.indices] for state in states))
        _deposit(ctx, sweep, grads)
        found = _gradients(ctx, sweep, ctx.bottom)
        if ctx.on_cut is not None:
            ctx.on_cut()
        return *[None] * 10, torch.empty(0, device="cpu"), *found


class WindowedLoss(torch.autograd.Function):
    """The loss of the step at ``position``, behind the reads of ``thetas`` and the ``metas`` that it has read."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        position: int,
        loss: Tensor,
        thetas: Sequence[int],  # type: ignore[override]
        metas: Sequence[int],
        life: Life,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.engine, ctx.position, ctx.life = engine, position, life
        ctx.thetas, ctx.metas = tuple(thetas), tuple(metas)
        return torch.Tensor._make_subclass(torch.Tensor, loss, False)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        refuse_third_order()
        sweep = gradient_of_loss(ctx.engine, ctx.position, grad)
        found = [sweep.cotangents.get(i) for i in ctx.thetas] + [sweep.metas.get(m) for m in ctx.metas]
        return *[None] * 6, *found


def gradient_of_loss(engine: Engine, position: int, cotangent: Tensor) -> Sweep:
    """A sweep with the gradient of one step's loss alone, by the theta that it has read and by meta-parameters."""
    sweep = Sweep()
    sweep.deposit(position + 1, LOSS, cotangent)
    engine.pull_back(sweep, position - engine.program[position].back)  # type: ignore[union-attr]
    return sweep


STEPPED = (StepLoss._backward_cls, WindowedLoss._backward_cls)  # type: ignore[attr-defined]  # pyright: ignore


def stepped(tensor: Tensor) -> Any:
    """The node of a loss that has been stepped by and has left its graph; None for any other tensor."""
    return tensor.grad_fn if isinstance(tensor.grad_fn, STEPPED) else None
