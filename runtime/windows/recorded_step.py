"""A recorded step: from a slice and an update to a call of a step graph, compared with eager on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from metaoptim.compiler.ir.programs.calls import StepCall
from metaoptim.compiler.ir.step import Lowering, StepGraph
from metaoptim.compiler.ir.tensors import tensor_spec
from metaoptim.compiler.ir.traces.slices import Slice, hook_key
from metaoptim.compiler.lower.ambient import unaffected
from metaoptim.compiler.lower.derivatives import lowered
from metaoptim.compiler.lower.library import library
from metaoptim.compiler.lower.rounding import agree, noise_of, precision_of, size_of
from metaoptim.compiler.passes.from_recording import StepSpec, build_step
from metaoptim.errors import CaptureError, MetaOptimError, WindowError, user_location

from ..engine.engine import Engine
from ..engine.inputs import Snapshot
from .updates.update import Update


class StepPlaces(NamedTuple):
    """State indices of what a compiled step reads and leaves in a window.

    ``states`` are those of optimizer states that it has made, by (optimizer, ordinal, name), ``results`` those of what
    it returns that can be differentiated.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    states: dict[tuple[int, int, str], int]
    results: tuple[int, ...]


@dataclass(slots=True)
class RecordedStep:
    """A step of a window on its way to the tape."""

    engine: Engine
    sliced: Slice  # what its losses and its hyper-parameters depend on
    losses: int  # how many losses there are
    changed: set[int]  # state indices of thetas that have changed since the loss read them
    back: int  # how many calls ago that was, if any has changed
    update: Update
    indices: tuple[int, ...]  # state indices of the parameters that it changes
    old: list[Tensor]  # the parameters before it
    new: list[Tensor]  # after it, and their optimizer states
    new_states: list[dict[str, Tensor]]
    first_order: bool  # whether the inner gradient is taken as a constant
    hooked: bool  # whether the window has a backward_hook

    @property
    def state(self) -> list[Tensor]:
        """What it leaves: parameters, then optimizer states."""
        return [*self.new, *(v for s in self.new_states for v in s.values())]

    @property
    def stale(self) -> bool:
        """Whether the update finds other parameters than the loss has read."""
        return not self.changed.isdisjoint(self.indices)

    def call(
        self, before: tuple[int, ...], after: tuple[int, ...], lowering: Lowering, names: Sequence[str]
    ) -> StepCall:
        """The call of its step graph, with state indices of the optimizer states ``before`` it and ``after`` it.

        Raises:
            CaptureError: for a step whose graph does not do what eager has done (``names``: of the parameters).
        """
        sliced = self.sliced
        _check_requires_grad(sliced)
        spec = self._spec()
        key = sliced.key, spec
        with _capturing():
            graph, lifted, new = library.get(key, tuple(sliced.numbers), partial(self._build, spec))
        if graph.dynamic and lowering.backend_of("vjp") != "eager":
            library.discard(key)  # it has not been checked
            raise CaptureError(
                f"backend={lowering.backend!r}: the shapes in this step depend on values, and such a step cannot be "
                "compiled; use backend='eager'"
            )
        call = self._call(graph, lifted, before, after, lowering)
        suspect = any(x.suspect for x in (*sliced.externals, *sliced.values))
        if new or graph.opaque or suspect:
            try:
                self._compare(call, names)
            except CaptureError as error:
                if suspect:
                    raise CaptureError(
                        "a tensor was changed through .data or numpy between its use in the loss and the step, so that "
                        "autograd's gradient is that of neither value; change it before the loss or after the step"
                    ) from error
                library.discard(key)
                raise
        return call

    def known(
        self, graph: StepGraph, before: tuple[int, ...], after: tuple[int, ...], lowering: Lowering
    ) -> StepCall | None:
        """The call, if its step graph is ``graph``."""
        _check_requires_grad(self.sliced)
        found = library.find((self.sliced.key, self._spec()), tuple(self.sliced.numbers))
        if found is None or found[0] is not graph:
            return None
        return self._call(*found, before, after, lowering)

    def _call(
        self,
        graph: StepGraph,
        lifted: tuple[int, ...],
        before: tuple[int, ...],
        after: tuple[int, ...],
        lowering: Lowering,
    ) -> StepCall:
        sliced, held = self.sliced, [x.held for x in self.sliced.externals]
        dtypes = [port.spec.dtype for port in graph.inputs[len(graph.inputs) - len(lifted) :]]
        held += [
            Snapshot(torch.tensor(sliced.numbers[i], dtype=dtype, device="cpu"), None, "a number")
            for i, dtype in zip(lifted, dtypes, strict=True)
        ]
        thetas = [t.index for t in sliced.thetas]
        reads = (*thetas, *(self.indices if self.stale else ()), *before)
        return StepCall(
            graph, reads, (*self.indices, *after), held, user_location(), self.back, lowering=lowering
        )

    def _spec(self) -> StepSpec:
        update, place = self.update, {t.index: k for k, t in enumerate(self.sliced.thetas)}
        return StepSpec(
            update.plan,
            params=tuple(place[x] for x in self.indices),
            stale=self.stale,
            thetas=tuple(tensor_spec(t.tensor) for t in self.sliced.thetas),
            now=tuple(map(tensor_spec, self.old)),
            states=tuple(tuple((k, tensor_spec(v)) for k, v in s.items()) for s in update.states),
            grad_hooks=tuple(tuple(map(hook_key, h)) for h in update.hooks),
            first_order=self.first_order,
            hooked=self.hooked,
            losses=self.losses,
        )

    def _build(self, spec: StepSpec, lifted: tuple[int, ...]) -> StepGraph:
        after = [{k: tensor_spec(v) for k, v in s.items()} for s in self.new_states]
        return build_step(self.sliced, spec, after, lifted, self.update.hooks)

    def _compare(self, call: StepCall, names: Sequence[str]) -> None:
        """Raise unless the call gives the eager gradient, and the update the same again."""
        update, engine = self.update, self.engine
        # the engine has theta as the loss has read it, which may have been overwritten since
        base = engine.state_at(engine.position - call.back) if call.back else engine.state
        inputs = [base[t.index] for t in self.sliced.thetas] + (self.old if self.stale else [])
        inputs += [v for s in update.states for v in s.values()]
        with unaffected():
            inputs += [h.tensor for h in call.inputs]
            with _capturing():
                results = lowered(call.step, "replay", inputs, at_once=True)(*inputs)
            count = len(results) - len(update.grads)
            grads, state = results[count:], results[:count]
            if not all(map(torch.equal, grads, update.grads)):
                # Adam turns a rounding error in a gradient that should be 0 into a whole step: its results may differ
                program = lowered(call.step, "replay", inputs)
                wrong = _differing(call, lambda *moved: program(*moved)[count:], inputs, grads, update.grads)
                if wrong is not None:
                    got, expected = grads[wrong], update.grads[wrong]
                    worst = float((got - expected).abs().max())
                    raise unrecorded(names[update.ordinals[wrong]], worst, float(expected.abs().max()))
            elif not all(agree(got, want, want.dtype) for got, want in zip(state, self.state, strict=True)):
                raise CaptureError(
                    f"{update.plan.__name__} does not give the same result when it is run again on the same arguments; "
                    "it must be a pure function of them"
                )


def _check_requires_grad(sliced: Slice) -> None:
    for x in sliced.externals:
        # autograd looks at a saved leaf again in the backward: what it makes of it is neither the one nor the other
        source = x.source
        if source is None or x.written or (x.grad and x.tensor is not source):
            continue
        if x.grad != source.requires_grad:
            raise CaptureError(
                f"requires_grad of a tensor of shape {tuple(source.shape)} changed between its use in the loss "
                "and the step; change it before the loss or after the step, or use tensor.detach() in a part of it"
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


@contextmanager
def _capturing() -> Iterator[None]:
    """What fails in the block is a step that cannot be captured."""
    try:
        yield
    except (MetaOptimError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of torch, or of the user's custom Functions
        raise CaptureError(
            f"the inner step cannot be captured: {type(error).__name__}: {error}. Open the window with "
            "strategy='full_tape' for this loss."
        ) from error


def unrecorded(name: str, worst: float | None = None, scale: float | None = None) -> CaptureError:
    """What to raise for a step that gives another gradient than eager."""
    found = "" if worst is None else f" (largest difference {worst:.3g}, largest entry {scale:.3g})"
    return CaptureError(
        f"the recorded inner step does not reproduce the gradient eager PyTorch gives for parameter {name!r}{found}: "
        "something in the loss cannot be seen by the recorder, such as a hook on an autograd node, a C++ autograd "
        "function, or a module compiled beforehand. Open the window with strategy='full_tape' for this loss."
    )


def applied(update: Update, old: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Apply the update; its errors name the shapes that it was given."""
    plan, hyper_values = update.plan, update.hyper_values
    with torch.no_grad():
        try:
            return plan(old, update.grads, update.states, hyper_values)
        except (MetaOptimError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(s.shape)) for s in hyper_values if isinstance(s, Tensor)) or "none"
            failed = " or ".join([*(t.__name__ for t in plan.transforms), plan.__name__])
            raise WindowError(
                f"{failed} failed: {error}; shapes of the hyper-parameters that are tensors: {shapes}"
            ) from error
