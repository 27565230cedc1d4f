"""What one call of a step graph costs and depends on, read off its flat graphs: bytes, shared memory, derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .differentiate import cotangent_outputs
from .ir import StepGraph
from .liveness import peak_bytes, storages
from .lower import derived, replayed
from .program import operator_count


@dataclass(frozen=True)
class Made:
    """One result of a flat graph.

    Attributes:
        size: bytes of memory of its own; 0 where it shares some.
        of_input: which argument of the graph it lies in the memory of; -1 for none.
        of_result: which earlier result; -1 for none.
    """

    size: int
    of_input: int = -1
    of_result: int = -1


@dataclass(frozen=True)
class StepCost:
    """Of one step graph.

    Attributes:
        replay_bytes, vjp_bytes: most that a call of either allocates, its results included.
        replay_operators, vjp_operators: how many operators they call.
        outputs: memory of the replay's results, in the order of the step's outputs without the loss.
        gradients: for each input, memory of its gradient, or None where it has none. Arguments of the VJP are the
            inputs, then the cotangents.
        depends: for each input, the outputs whose cotangents its gradient depends on.
    """

    replay_bytes: int
    vjp_bytes: int
    replay_operators: int
    vjp_operators: int
    outputs: tuple[Made, ...]
    gradients: tuple[Made | None, ...]
    depends: tuple[frozenset[int], ...]


def step_cost(step: StepGraph, hvp: str) -> StepCost:
    """Trace ``step``, if need be, and read off what its calls cost; ``hvp`` says how it is differentiated."""
    key = ("cost", hvp)
    found = step.programs.get(key)
    if found is None:
        replay, vjp = replayed(step).graph, derived(step, hvp).graph
        found = step.programs[key] = StepCost(
            peak_bytes(replay),
            peak_bytes(vjp),
            operator_count(replay),
            operator_count(vjp),
            tuple(m for m in _made(replay) if m is not None),
            tuple(_made(vjp)),
            _depends(step, vjp),
        )
    return found


def results_of(graph: fx.Graph) -> Sequence[Any]:
    """What a flat graph returns."""
    (output,) = graph.find_nodes(op="output")
    found = output.args[0]
    return found if isinstance(found, (tuple, list)) else (found,)


def _made(graph: fx.Graph) -> list[Made | None]:
    given: dict[int, int] = {}
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        for storage, _ in storages(node):
            given[storage] = i
    constant = {s for node in graph.find_nodes(op="get_attr") for s, _ in storages(node)}
    first: dict[int, int] = {}
    found: list[Made | None] = []
    for k, node in enumerate(results_of(graph)):
        if not isinstance(node, fx.Node):
            found.append(None)
            continue
        memory = next(iter(storages(node)), None)
        if memory is None or memory[0] in constant:
            found.append(Made(0))
        elif memory[0] in given:
            found.append(Made(0, of_input=given[memory[0]]))
        elif memory[0] in first:
            found.append(Made(0, of_result=first[memory[0]]))
        else:
            first[memory[0]] = k
            found.append(Made(memory[1]))
    return found


def _depends(step: StepGraph, vjp: fx.Graph) -> tuple[frozenset[int], ...]:
    reached: dict[fx.Node, frozenset[int]] = {}
    cotangents = dict(enumerate(cotangent_outputs(step), start=len(step.inputs)))
    placeholders = {node: i for i, node in enumerate(vjp.find_nodes(op="placeholder"))}
    none: frozenset[int] = frozenset()
    for node in vjp.nodes:
        at = placeholders.get(node, -1)
        own = frozenset({cotangents[at]}) if at in cotangents else none
        reached[node] = own.union(*(reached[n] for n in node.all_input_nodes))
    return tuple(reached[n] if isinstance(n, fx.Node) else none for n in results_of(vjp))
