"""What is looked at when a step has been captured: whether it does what eager has done, and what reaches nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.compiler.ir.calls import StepCall
from metaoptim.compiler.ir.slices import Slice
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.compiler.lower.derivatives import lowered
from metaoptim.compiler.lower.rounding import agree, noise_of, precision_of, size_of
from metaoptim.errors import CaptureError, UnreachableWarning, user_name_of, warn

from ..engine.engine import Engine
from .dependence import leaves_of

_told: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check(
    engine: Engine,
    call: StepCall,
    sliced: Slice,
    update: Any,
    stale: bool,
    expected_state: list[Tensor],
    names: Sequence[Any],
) -> None:
    """The gradient of the captured step against the eager one, and what the update makes of it.

    Raises:
        CaptureError: if they differ.
    """
    # the engine has theta as the loss has read it, which may have been overwritten since
    base = engine.state_at(engine.position - call.back) if call.back else engine.state
    inputs = [base[t.index] for t in sliced.thetas] + (update.old if stale else [])
    inputs += [v for s in update.states for v in s.values()]
    with unaffected():
        inputs += [h.tensor for h in call.inputs]
        try:
            results = lowered(call.step, "replay", inputs, at_once=True)(*inputs)
        except CaptureError:
            raise
        except Exception as error:
            raise uncapturable(error) from error
        count = len(results) - len(update.grads)
        grads, state = results[count:], results[:count]
        if not all(map(torch.equal, grads, update.grads)):
            # Adam turns a rounding error in a gradient that should be 0 into a whole step: its results may differ now.
            program = lowered(call.step, "replay", inputs)
            wrong = _differing(call, lambda *moved: program(*moved)[count:], inputs, grads, update.grads)
            if wrong is not None:
                got, expected = grads[wrong], update.grads[wrong]
                worst = float((got - expected).abs().max())
                raise unrecorded(names[update.ordinals[wrong]], worst, float(expected.abs().max()))
        elif not all(agree(got, want, want.dtype) for got, want in zip(state, expected_state, strict=True)):
            raise CaptureError(
                f"{update.plan.__name__} does not give the same result when it is run again on the same arguments; it "
                "must be a pure function of them"
            )


def _differing(
    call: StepCall,
    gradient: Callable[..., Sequence[Tensor]],
    inputs: list[Tensor],
    grads: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> int | None:
    """Which of ``grads`` is another than ``expected``, by more than rounding; None if there is none."""
    precision, largest = precision_of(call.step.graph, inputs), max(map(size_of, expected))
    noise: list[float] = []
    for i, (got, want) in enumerate(zip(grads, expected, strict=True)):
        if not agree(got, want, precision, largest):
            if not noise and not call.step.dynamic:  # other inputs may give it other shapes
                noise = noise_of(gradient, inputs, grads, precision)
            if not noise or not agree(got, want, precision, largest, noise[i]):
                return i
    return None


def tell_unreachable(session: Any, sliced: Slice) -> None:
    """Warn of what requires grad and reaches the step of ``session`` only where no gradient flows."""
    taint = session.recorder.taint
    if not taint.of_storage:
        return
    reached = {id(x.source) for x in sliced.externals if x.grad}
    for x in sliced.externals:
        if x.grad:
            continue
        source = x.source
        for ref in taint.of(x.held.tensor if source is None else source).values():
            leaf = ref()
            if (
                leaf is None
                or id(leaf) in reached
                or leaf in _told
                or session.networks.index_of(leaf) is not None
            ):
                continue
            _told[leaf] = True
            name = user_name_of(leaf)
            if name is not None and not any(
                leaf is x for y in sliced.externals if y.tensor is not None for x in leaves_of(y.tensor)
            ):
                session.engine.reaches = True  # there is a better explanation
                warn(
                    f"{name!r} requires grad, but reaches the inner loss only where no gradient flows (under "
                    "torch.no_grad() or through .detach()), so it receives no meta-gradient from it. Compute what "
                    f"depends on {name!r} outside no_grad.",
                    UnreachableWarning,
                )


def uncapturable(error: Exception) -> CaptureError:
    """What to raise for a step that cannot be captured."""
    return CaptureError(
        f"the inner step cannot be captured: {type(error).__name__}: {error}. Open the window with "
        "strategy='full_tape' for this loss."
    )


def unrecorded(name: str, worst: float | None = None, scale: float | None = None) -> CaptureError:
    """What to raise for a step that gives another gradient than eager."""
    found = "" if worst is None else f" (largest difference {worst:.3g}, largest entry {scale:.3g})"
    return CaptureError(
        f"the recorded inner step does not reproduce the gradient eager PyTorch gives for parameter {name!r}{found}: "
        "something in the loss cannot be seen by the recorder, such as a hook on an autograd node, a C++ autograd "
        "function, or a module compiled beforehand. Open the window with strategy='full_tape' for this loss."
    )
