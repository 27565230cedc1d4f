"""What is looked at when a step has been captured: whether it does what eager has done, and what reaches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.errors import CaptureError, UnreachableWarning, user_name_of, warn

from ..compiler.ambient import unaffected
from ..compiler.capture.slicing import Slice
from ..compiler.ir import StepCall
from ..compiler.lower import lowered
from .dependence import leaves_of
from .engine import Engine

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
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
    try:
        with unaffected():
            inputs += [h.tensor for h in call.inputs]
            results = lowered(call.step, "replay", inputs, at_once=True)(*inputs)
    except CaptureError:
        raise
    except Exception as error:
        raise uncapturable(error) from error
    count = len(results) - len(update.grads)
    grads, state = results[count:], results[:count]
    for i, got, expected in zip(update.ordinals, grads, update.grads, strict=True):
        if not _agree(got, expected):
            worst = float((got - expected).abs().max())
            raise unrecorded(names[i], worst, float(expected.abs().max()))
    # Adam turns a rounding error in a gradient that should be 0 into a whole step: compare after equal gradients.
    if all(map(torch.equal, grads, update.grads)) and not all(map(_agree, state, expected_state)):
        raise CaptureError(
            f"{update.plan.__name__} does not give the same result when it is run again on the same arguments; it "
            "must be a pure function of them"
        )


def tell_unreachable(session: Any, sliced: Slice) -> None:
    """Warn of what requires grad and reaches the step of ``session`` only where no gradient flows."""
    taint = session.recorder.taint
    if not taint.of_storage:
        return
    reached = {id(x.source) for x in sliced.externals if x.grad}
    for x in sliced.externals:
        if x.grad:
            continue
        for ref in taint.of(x.source).values():
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
                leaf is x for y in sliced.externals if y.grad for x in leaves_of(y.tensor)
            ):
                session.engine.reaches = True  # there is a better explanation
                warn(
                    f"{name!r} requires grad, but reaches the inner loss only where no gradient flows (under "
                    "torch.no_grad() or through .detach()), so it receives no meta-gradient from it. Compute what "
                    f"depends on {name!r} outside no_grad.",
                    UnreachableWarning,
                )


def _agree(got: Tensor, expected: Tensor) -> bool:
    if not expected.numel():
        return True
    scale, worst = float(expected.abs().max()), float((got - expected).abs_().max())
    if isfinite(scale) and isfinite(worst):
        return worst <= _TOLERANCE.get(expected.dtype, 1e-4) * scale + 1e-30
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    got, expected = got[finite], expected[finite]
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    worst = float((got - expected).abs().max()) if expected.numel() else 0.0
    return worst <= _TOLERANCE.get(expected.dtype, 1e-4) * scale + 1e-30


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
