"""fx graph -> callable, and the cache of step graphs that equal steps share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

from torch import Tensor

from ..derive.choose import WORTH_SAVING, chosen, derivative
from ..derive.flat import FlatGraph
from ..derive.liveness import peak_bytes
from ..derive.mixed import why_not_mixed
from ..derive.residuals import Split, split
from ..derive.reverse import cotangent_outputs, derived_by_running, loss_graph, replay_graph
from ..ir.slices import tensor_spec
from ..ir.step import EAGER, Lowering, StepGraph
from .ambient import default_dtype, with_default_dtype
from .compile_graph import compiled

Lowered = Callable[..., Sequence[Any]]


def lowered(
    step: StepGraph, kind: str, inputs: Sequence[Tensor], lowering: Lowering = EAGER, at_once: bool = False
) -> Lowered:
    """The callable for one of a step's graphs, traced and compiled on first use.

    Args:
        step: the step.
        kind: "replay" or "vjp"; "loss", the VJP of its loss alone; or, where `residuals` has a split, "forward" or
            "backward".
        inputs: what it will be called with first.
        lowering: the backend and HVP mode of the step graphs.
        at_once: it will be called with ``inputs`` now, and with nothing else: a graph that is not there yet may then be
            found by running the step, and has its results.
    """
    program = step.programs.get((kind, lowering))
    if program is None:
        of, what = (loss_of(step, inputs[-1]), "vjp") if kind == "loss" else (step, kind)
        backend = lowering.backend_of(kind)
        results = _by_running(of, what, inputs, lowering.hvp) if at_once and backend == "eager" else None
        graph = _graph(of, what, lowering.hvp, inputs if step.dynamic else None)
        if backend == "eager":
            program = with_default_dtype(step.default_dtype, graph)
        else:
            cotangents = 0 if kind in ("replay", "forward") else len(cotangent_outputs(of))
            with default_dtype(step.default_dtype):
                program = compiled(graph.module, inputs, backend, cotangents, lowering.check)
            program = with_default_dtype(step.default_dtype, program)
        step.programs[kind, lowering] = program
        if results is not None:
            return lambda *_: results
    return program


def _graph(step: StepGraph, kind: str, hvp: str, example: Sequence[Tensor] | None) -> FlatGraph:
    if kind in ("forward", "backward"):
        divided = residuals(step, hvp)
        assert divided is not None
        return divided.forward if kind == "forward" else divided.backward
    return derived(step, hvp, example) if kind == "vjp" else replayed(step, example)


def _by_running(
    step: StepGraph, kind: str, inputs: Sequence[Tensor], hvp: str
) -> Sequence[Tensor | None] | None:
    """What a replay or VJP gives that has not been traced yet; None where it has been, or must be traced by itself."""
    if kind == "vjp":
        if is_derived(step, hvp) or not _reverse_will_do(step, hvp):
            return None
    elif kind != "replay" or "replay graph" in step.programs:
        return None
    with default_dtype(step.default_dtype):
        found = derived_by_running(step, kind, inputs)
    if found is None:
        return None
    graph, results = found
    if kind == "vjp":
        step.programs["vjp graph", hvp] = chosen(step, hvp, graph)
    else:
        step.programs["replay graph"] = graph
    return results


def _reverse_will_do(step: StepGraph, hvp: str) -> bool:
    """Whether reverse over reverse may run before it is known what it takes: where that is little, or all there is."""
    if hvp != "auto":
        return hvp == "reverse"
    small = "replay graph" in step.programs and 4 * peak_bytes(replayed(step).graph) < WORTH_SAVING
    return small or why_not_mixed(step) is not None


def derived(step: StepGraph, hvp: str, example: Sequence[Tensor] | None = None) -> FlatGraph:
    """The flat graph of a step's VJP."""
    if not is_derived(step, hvp):
        with default_dtype(step.default_dtype):
            step.programs["vjp graph", hvp] = derivative(step, hvp, example)
    return step.programs["vjp graph", hvp]


def loss_of(step: StepGraph, cotangent: Tensor) -> StepGraph:
    """A step's loss, whose ``cotangent`` looks like it, as a graph of its own."""
    if "loss" not in step.programs:
        step.programs["loss"] = loss_graph(step, tensor_spec(cotangent))
    return step.programs["loss"]


def is_derived(step: StepGraph, hvp: str) -> bool:
    """Whether `derived` has been asked for before."""
    return ("vjp graph", hvp) in step.programs


def replayed(step: StepGraph, example: Sequence[Tensor] | None = None) -> FlatGraph:
    """The flat graph of a step's replay."""
    if "replay graph" not in step.programs:
        with default_dtype(step.default_dtype):
            step.programs["replay graph"] = replay_graph(step, example)
    return step.programs["replay graph"]


def residuals(step: StepGraph, hvp: str) -> Split | None:
    """How a step and its derivative can share work; None if they cannot."""
    key = ("residuals", hvp)
    if key not in step.programs:
        learnt = any(p.differentiable for p in step.inputs) and bool(cotangent_outputs(step))
        shared = learnt and not step.dynamic
        step.programs[key] = split(step, replayed(step), derived(step, hvp)) if shared else None
    return step.programs[key]


class _Family:
    """Steps equal but for numbers: baked in until two of them differ, then lifted."""

    def __init__(self, numbers: tuple) -> None:
        self.first = _exact(numbers)
        self.lifted: frozenset[int] = frozenset()
        self.steps: dict[tuple, tuple[StepGraph, tuple[int, ...]]] = {}

    def masked(self, numbers: tuple) -> tuple:
        return tuple(None if i in self.lifted else n for i, n in enumerate(_exact(numbers)))


def _exact(numbers: tuple) -> tuple:
    return tuple(n.hex() if isinstance(n, float) else n for n in numbers)  # -0.0 is not 0.0


class StepCache:
    """Structure of a step -> its StepGraph. Least recently used structures are dropped."""

    def __init__(self, capacity: int = 512) -> None:
        self.capacity = capacity
        self._families: OrderedDict[Any, _Family] = OrderedDict()
        self._lock = RLock()

    def get(
        self, key: Any, numbers: tuple, build: Callable[[tuple[int, ...]], StepGraph]
    ) -> tuple[StepGraph, tuple[int, ...], bool]:
        """The step for ``key`` and ``numbers``, which of the numbers are its inputs, and whether it is new."""
        with self._lock:
            family = self._families.get(key)
            if family is None:
                family = self._families[key] = _Family(numbers)
                if len(self._families) > self.capacity:
                    self._families.popitem(last=False)
            else:
                self._families.move_to_end(key)
            found = family.steps.get(family.masked(numbers))
            if found is None and family.steps:
                differing = {
                    i for i, (a, b) in enumerate(zip(family.first, _exact(numbers), strict=True)) if a != b
                }
                family.lifted |= differing
                found = family.steps.get(family.masked(numbers))
            if found is not None:
                return (*found, False)
            lifted = tuple(sorted(family.lifted))
            step = build(lifted)
            family.steps[family.masked(numbers)] = (step, lifted)
            return step, lifted, True

    def discard(self, key: Any) -> None:
        """Forget a structure (its first check failed)."""
        with self._lock:
            self._families.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._families.clear()
