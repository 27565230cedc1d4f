"""Steps of a known kind, taken by their graphs in the place of autograd's gradient and the optimizer's update.

What a loss has recorded is the program of its step. Where it has been compiled, and there is ample room, it is run from
the beginning and saves residuals: the loss is computed twice, but the step's derivative computes neither loss nor
gradient again. (Uncompiled that takes as long as autograd, and more memory.)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metaoptim.compiler.ir.programs.calls import StepCall
from metaoptim.compiler.ir.step import Lowering, StepGraph
from metaoptim.compiler.ir.traces.slices import Slice
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.compiler.lower.derivatives import compiled_with_residuals, lowered
from metaoptim.errors import StaleInputError

from ..engine.nodes import stepped
from .recorded_step import RecordedStep
from .updates.update import InnerOptimizer, Update, trained

if TYPE_CHECKING:
    from .recording_session import RecordedSession


class Taken(NamedTuple):
    """A step on its way to the tape."""

    call: StepCall
    update: Update
    state: Sequence[Tensor]  # what it leaves: parameters, then optimizer states
    new_states: list[dict[str, Tensor]]
    results: Sequence[Tensor] | None = None  # of a graph that has saved residuals


class _Kind(NamedTuple):
    """A kind of steps, and what eager PyTorch did in the last of them."""

    key: Hashable  # what its loss and its hyper-parameters depend on, and how
    read: list[int | None]  # the ids of the parameters that its loss reads
    graph: StepGraph
    trainable: list[bool]  # for each parameter of the optimizer: whether it requires grad
    reached: list[bool]  # whether the loss has a gradient by it
    names: list[list[str]]  # for each that has: its optimizer states afterwards


#: The kind of step that an optimizer has taken last, by autograd.
_last: WeakKeyDictionary[InnerOptimizer, _Kind] = WeakKeyDictionary()


def note(
    session: RecordedSession,
    optimizer: InnerOptimizer,
    sliced: Slice,
    taken: Taken,
    grads: Sequence[Tensor | None],
) -> None:
    """A step was taken by autograd, with these gradients by the optimizer's parameters."""
    graph = taken.call.step
    if graph.opaque or compiled_with_residuals(graph, session.options.lowering) is None:
        return
    if taken.update.plan.is_users:  # its Python may count steps
        return
    read, trainable = _read(session, sliced), _trainable(session, optimizer)
    names, reached = [list(state) for state in taken.new_states], [g is not None for g in grads]
    _last[optimizer] = _Kind(sliced.key, read, graph, trainable, reached, names)


def expected(
    session: RecordedSession, optimizer: InnerOptimizer, loss: Tensor, sliced: Slice
) -> Lowering | None:
    """How a step by ``loss`` may be taken by its graph; None where autograd's gradient is needed."""
    kind = _last.get(optimizer)
    if kind is None or kind.key != sliced.key or kind.read != _read(session, sliced):
        return None
    view, originals = session.view, session.networks.originals
    # what only autograd does
    if (
        not session.engine.may_save
        or session.engine.later
        or session.options.implicit is not None
        or session.networks.recomputes
        or _retains_grad(loss, sliced)
        or sliced.hooks
        or sliced.spies
        or sliced.twins
        or view.stepped.behind
        or stepped(loss) is not None
        or torch.is_anomaly_enabled()
        or any(x.suspect for x in (*sliced.externals, *sliced.values, *sliced.thetas))
        or any(originals[i]._backward_hooks for i in session.ordinals(optimizer))
        or any(transform.check is not None for transform in optimizer.transforms)
        or kind.trainable != _trainable(session, optimizer)
        or not all(map(view.versions.unchanged, sliced.thetas))
    ):
        return None
    return compiled_with_residuals(kind.graph, session.options.lowering)


def take(
    session: RecordedSession,
    optimizer: InnerOptimizer,
    update: Update,
    sliced: Slice,
    how: Lowering,
    fixed: tuple[bool, bool],
) -> Taken | None:
    """A step that was expected, by its graph; None where there is no room, or an input is another one by now."""
    kind = _last[optimizer]
    view, engine = session.view, session.engine
    if update.plan.init is not None or any(update.hooks):
        return None
    indices = tuple(view.indices[i] for i in update.ordinals)
    old = [engine.state[x] for x in indices]
    step = RecordedStep(engine, sliced, 1, set(), 0, update, indices, old, [], [], *fixed)
    call = step.known(kind.graph, *session.opt_states.indices(optimizer, update, kind.names), how)
    if call is None or not engine.saves(call):
        return None
    call.saved = True
    try:
        inputs = [*(engine.state[i] for i in call.reads), *(held.get() for held in call.inputs)]
    except StaleInputError:
        return None
    with unaffected():
        results = lowered(call.step, "forward", inputs, how, at_once=True)(*inputs)
    state = iter(results[len(indices) : len(call.writes)])
    new_states = [{name: next(state) for name in names} for names in kind.names]
    return Taken(call, update, results[: len(call.writes)], new_states, results)


def stand_ins(session: RecordedSession, optimizer: InnerOptimizer) -> list[Tensor | None]:
    """What stands for the gradients of a step that is expected, which its graph takes itself."""
    reached, shown = _last[optimizer].reached, session.networks.shown
    ordinals = session.ordinals(optimizer)
    return [shown[i].detach() if there else None for i, there in zip(ordinals, reached, strict=True)]


def _read(session: RecordedSession, sliced: Slice) -> list[int | None]:
    return [session.engine.thetas.get(t.index) for t in sliced.thetas]


def _retains_grad(loss: Tensor, sliced: Slice) -> bool:
    """Whether somebody has asked for the gradient of what the loss is computed from."""
    values = (v.ref() for v in sliced.values if v.ref is not None)
    tensors = (loss, *values, *(x.tensor for x in sliced.externals), *(t.tensor for t in sliced.thetas))
    return any(t is not None and t.retains_grad for t in tensors)


def _trainable(session: RecordedSession, optimizer: InnerOptimizer) -> list[bool]:
    shown = session.networks.shown
    return [shown[i].requires_grad for i, _ in trained(optimizer, session.networks)]
