"""What is derived from a step graph: flat graphs of its replay and its VJP, and what calls of them cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx


class FlatGraph:
    """A flat graph and its constants. It becomes code when it is called again: many are called once, or never.

    Attributes:
        graph: inputs -> a tuple of results.
        constants: by the names of its attributes.
    """

    def __init__(self, graph: fx.Graph, constants: Mapping[str, Any]) -> None:
        self.graph, self.constants = graph, dict(constants)
        self._called = False

    @cached_property
    def module(self) -> fx.GraphModule:
        """It as a module."""
        return fx.GraphModule(self.constants, self.graph)

    def __call__(self, *inputs: Tensor) -> Any:
        if self._called:
            return self.module.forward(*inputs)
        self._called = True
        nodes, given = list(self.graph.nodes), iter(inputs)
        last = {used: node for node in nodes for used in (node, *node.all_input_nodes)}
        values: dict[fx.Node, Any] = {}
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return args[0]
            if node.op == "call_function":
                values[node] = node.target(*args, **kwargs)
            else:
                values[node] = next(given) if node.op == "placeholder" else self.constants[str(node.target)]
            del args, kwargs
            for used in {node, *node.all_input_nodes}:
                if last[used] is node:
                    del values[used]
        raise AssertionError("a graph without an output")


@dataclass(frozen=True)
class Split:
    """A step's two graphs.

    Attributes:
        forward: inputs -> outputs but for the loss, then residuals that are none of them.
        backward: inputs, residuals, cotangents -> a cotangent, or None, per input: what the VJP gives.
        residuals: which results of the forward they are; what is kept as a state anyway costs nothing.
        fresh: how many of these results are residuals alone.
        saves: operators that the backward does not run again.
    """

    forward: FlatGraph
    backward: FlatGraph
    residuals: tuple[int, ...]
    fresh: int
    saves: int


@dataclass(frozen=True)
class ResultMemory:
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
    outputs: tuple[ResultMemory, ...]
    gradients: tuple[ResultMemory | None, ...]
    depends: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Measured:
    """What the lowered program of a step graph was seen to take.

    Attributes:
        peak_bytes: most that a call allocates, its results included.
        first_bytes: the same of its compilation and first-use check.
        made: memory of its results.
    """

    peak_bytes: int
    first_bytes: int
    made: tuple[ResultMemory | None, ...]
