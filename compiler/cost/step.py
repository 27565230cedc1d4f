"""What one call of a step graph costs and depends on: bytes, shared memory, derivatives; by its graphs, or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx

from ..derive.graphs import peak_bytes, results_of, storages
from ..ir.step import Lowering, Measured, ResultMemory, StepCost, StepGraph
from ..ir.tensors import nbytes
from ..ir.text import operator_count
from ..lower.derivatives import derived, replayed, residuals

_known: WeakKeyDictionary[fx.Graph, Measured] = WeakKeyDictionary()  # what graphs say that they take


def measured(step: StepGraph, kind: str, lowering: Lowering) -> Measured | None:
    """What was measured of a step graph's program, if anything."""
    return step.derived.measured.get((kind, lowering))


def step_cost(step: StepGraph, lowering: Lowering) -> StepCost:
    """What calls of ``step`` cost: as measured where its programs were, else as its graphs say, traced if need be."""
    found = _static_cost(step, lowering.hvp)
    replay, vjp = measured(step, "replay", lowering), measured(step, "vjp", lowering)
    if replay is not None:
        made = tuple(m for m in replay.made if m is not None)
        found = replace(found, replay_bytes=replay.peak_bytes, outputs=made)
    return found if vjp is None else replace(found, vjp_bytes=vjp.peak_bytes, gradients=vjp.made)


def check_bytes(step: StepGraph, lowering: Lowering) -> int:
    """Bytes that comparing a compiled derivative with the graph it is compiled from takes, at most."""
    given = sum(nbytes(p.spec) for p in (*step.inputs, *step.outputs))
    # copies of what it is given, which results may lie in; both results; one of the two at work; random generators
    return 4 * given + 3 * step_cost(step, lowering).vjp_bytes + (16 << 10)


def residual_cost(step: StepGraph, lowering: Lowering) -> tuple[int, int]:
    """Bytes that saving a call's residuals takes until its derivative, and how much more either takes while it runs.

    As measured, else as the graphs say; (0, 0) where there are none.
    """
    divided = residuals(step, lowering.hvp)
    if divided is None:
        return 0, 0
    forward = measured(step, "forward", lowering) or _static(divided.forward.graph)
    backward = measured(step, "backward", lowering) or _static(divided.backward.graph)
    kept = sum(m.size for m in forward.made[len(forward.made) - divided.fresh :] if m is not None)
    cost = step_cost(step, lowering)
    return kept, max(0, forward.peak_bytes - kept - cost.replay_bytes, backward.peak_bytes - cost.vjp_bytes)


def _static_cost(step: StepGraph, hvp: str) -> StepCost:
    found = step.derived.costs.get(hvp)
    if found is None:
        replay, vjp = replayed(step).graph, derived(step, hvp).graph
        again, back = _static(replay), _static(vjp)
        found = step.derived.costs[hvp] = StepCost(
            again.peak_bytes,
            back.peak_bytes,
            operator_count(replay),
            operator_count(vjp),
            tuple(m for m in again.made if m is not None),
            back.made,
            _depends(step, vjp),
        )
    return found


def _static(graph: fx.Graph) -> Measured:
    """What a graph says that it takes."""
    if (known := _known.get(graph)) is not None:
        return known
    given = {s: i for i, n in enumerate(graph.find_nodes(op="placeholder")) for s, _ in storages(n)}
    constant = {s for node in graph.find_nodes(op="get_attr") for s, _ in storages(node)}

    def memory(node: fx.Node) -> tuple[Any, int] | None:
        found = next(iter(storages(node)), None)
        return None if found is None or found[0] in constant else found

    made = made_of([memory(n) if isinstance(n, fx.Node) else () for n in results_of(graph)], given)
    _known[graph] = found = Measured(peak_bytes(graph), 0, tuple(made))
    return found


def made_of(results: Sequence[Any], given: dict[Any, int]) -> list[ResultMemory | None]:
    """Whose memory results lie in.

    Args:
        results: for each the identity and the bytes of its memory, None if it has none of its own, () for no result.
        given: identity of an argument's memory -> which argument.
    """
    first: dict[Any, int] = {}
    found: list[ResultMemory | None] = []
    for k, memory in enumerate(results):
        if memory is None:
            found.append(ResultMemory(0))
        elif not memory:
            found.append(None)
        elif memory[0] in given:
            found.append(ResultMemory(0, of_input=given[memory[0]]))
        elif memory[0] in first:
            found.append(ResultMemory(0, of_result=first[memory[0]]))
        else:
            first[memory[0]] = k
            found.append(ResultMemory(memory[1]))
    return found


def _depends(step: StepGraph, vjp: fx.Graph) -> tuple[frozenset[int], ...]:
    reached: dict[fx.Node, frozenset[int]] = {}
    cotangents = dict(enumerate(step.cotangents, start=len(step.inputs)))
    placeholders = {node: i for i, node in enumerate(vjp.find_nodes(op="placeholder"))}
    none: frozenset[int] = frozenset()
    for node in vjp.nodes:
        at = placeholders.get(node, -1)
        own = frozenset({cotangents[at]}) if at in cotangents else none
        reached[node] = own.union(*(reached[n] for n in node.all_input_nodes))
    return tuple(reached[n] if isinstance(n, fx.Node) else none for n in results_of(vjp))
