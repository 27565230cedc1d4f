"""StepGraphs and their calls: what an inner loop is, as data.

A `StepGraph` is an fx graph of one inner step: from theta, optimizer state, meta-parameters and data to the loss, from
the loss to its gradient (one `gradient` node), from the gradient to theta' and the new optimizer state. Its operators
are ATen calls; custom autograd Functions, hooks and the optimizer's update are calls too, since they may have a
derivative of their own. Everything
that runs - the replay of the step and its VJP - is derived from this graph and from nothing else.

An inner loop is a sequence of calls of such graphs: `program.Program` for a whole function,
`tape.Tape` for what a window records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import OpOverload

from .functions import Function
from .tensors import TensorSpec

Lowered = Callable[..., Sequence[Any]]


class Role(str, Enum):
    """What an input or output of a StepGraph is to the inner loop."""

    THETA = "theta"  # parameters as the loss read them
    THETA_NOW = "theta_now"  # parameters as the update finds them, where another step came between
    OPT_STATE = "opt_state"
    CARRY = "carry"  # any other value passed from one part of a compiled program to a later one
    META = "meta"  # requires grad: receives a gradient
    SCAN = "scan"  # differs per step, no gradient
    NOISE = "noise"  # random numbers, drawn for every step
    GRADIENT = "gradient"


@dataclass(frozen=True)
class Port:
    """One input or output: its role, and what tensors are like there."""

    role: Role
    spec: TensorSpec
    name: str
    active: bool = True  # whether it depends on anything that requires grad

    @property
    def differentiable(self) -> bool:
        """Whether a cotangent can exist here."""
        number = self.spec.dtype.is_floating_point or self.spec.dtype.is_complex
        return self.active and self.role not in (Role.SCAN, Role.NOISE) and number

    def empty(self) -> Tensor:
        """An uninitialised tensor of this spec."""
        shape, dtype, stride, device = self.spec
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    def __str__(self) -> str:
        return f"{self.name}: {self.role.value}[{self.spec.outline}]"


def gradient(loss: Tensor, thetas: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """∇_thetas loss, as a node of a StepGraph."""
    raise RuntimeError("a StepGraph is run by compiler.interpret")


def show(theta: Tensor) -> Tensor:
    """A version of theta: a tensor of its own, by which gradients are taken."""
    raise RuntimeError("a StepGraph is run by compiler.interpret")


def again(value: Tensor) -> Tensor:
    """``value``, read after a call that has changed its memory in place."""
    return value


#: The order of a step graph's inputs by role; all others come after these.
RANK = {Role.THETA: 0, Role.THETA_NOW: 1, Role.OPT_STATE: 2, Role.CARRY: 2}
_USUAL = ("eager", "aot_eager", "inductor")  # known without loading dynamo


@dataclass(frozen=True)
class Lowering:
    """How flat graphs are run.

    Attributes:
        backend: "eager", or another backend of torch.compile.
        check: whether a compiled graph is compared with its uncompiled form on first use.
        hvp: how steps are differentiated: "reverse", "mixed" or "auto".
        replays: whether replays run on the backend too. Not where the forward was eager PyTorch's own: a state that is
            made again must be the same to the bit.
    """

    backend: str = "eager"
    check: bool = True
    hvp: str = "reverse"
    replays: bool = True

    @staticmethod
    def stated(backend: str, hvp: str, self_check: bool, replays: bool = True) -> Lowering:
        """The lowering that a user asks for.

        Raises:
            ValueError: for a backend that torch.compile does not know, or an unknown ``hvp``.
        """
        if hvp not in ("auto", "reverse", "mixed"):
            raise ValueError(f"hvp: got {hvp!r}, expected 'auto', 'reverse' or 'mixed'")
        if backend not in _USUAL and backend not in torch.compiler.list_backends(exclude_tags=()):
            usual = {*_USUAL, *torch.compiler.list_backends()}
            raise ValueError(
                f"backend: got {backend!r}, expected one of {', '.join(sorted(usual))}, or another backend of "
                "torch.compile"
            )
        return Lowering(backend, self_check, hvp, replays)

    def backend_of(self, kind: str) -> str:
        """What a step's graph of this kind runs on."""
        return self.backend if self.replays or kind != "replay" else "eager"


EAGER = Lowering()


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


@dataclass
class Derived:
    """What has been derived from a step graph so far; each on first use.

    Attributes:
        replay: the flat graph of its replay.
        vjp: HVP mode -> the flat graph of its VJP.
        splits: HVP mode -> how a call and its derivative share residuals; None where they cannot.
        loss: its loss alone, as a step graph.
        lowered: (kind of graph, lowering) -> what runs.
        costs: HVP mode -> what its graphs say that it costs.
        measured: (kind of graph, lowering) -> what the lowered graph was seen to take.
    """

    replay: FlatGraph | None = None
    vjp: dict[str, FlatGraph] = field(default_factory=dict)
    splits: dict[str, Split | None] = field(default_factory=dict)
    loss: StepGraph | None = None
    lowered: dict[tuple[str, Lowering], Lowered] = field(default_factory=dict)
    costs: dict[str, StepCost] = field(default_factory=dict)
    measured: dict[tuple[str, Lowering], Measured] = field(default_factory=dict)


@dataclass
class StepGraph:
    """One distinct inner step.

    Attributes:
        graph: placeholders in the order of `inputs`; the output node holds one tuple in the order of `outputs`.
        inputs, outputs: the ports.
        opaque: holds custom Functions or hooks, so every use is checked against eager.
        dynamic: holds an operator whose output shape depends on values.
        first_order: g is taken as a constant (FOMAML).
        default_dtype: torch's when it was captured: operators depend on it.
        derived: its graphs, what runs, and what it costs.
        derivatives: which mode of differentiation was taken, by what was asked for.
        records: what the passes did that made it.
    """

    graph: fx.Graph
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opaque: bool = False
    dynamic: bool = False
    first_order: bool = False
    hooked: bool = False
    default_dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    derived: Derived = field(default_factory=Derived)
    derivatives: dict[str, str] = field(default_factory=dict)
    records: list[Any] = field(default_factory=list)

    @cached_property
    def steps(self) -> int:
        """How many inner steps it takes."""
        return sum(node.target is gradient for node in self.graph.nodes)

    @cached_property
    def thetas(self) -> int:
        """How many inputs, the first ones, are theta."""
        return sum(port.role is Role.THETA for port in self.inputs)

    @cached_property
    def states(self) -> int:
        """How many inputs, the first ones, are found in the state: theta and other values passed on."""
        return sum(port.role in RANK for port in self.inputs)

    @property
    def metas(self) -> list[int]:
        """Positions of the inputs that receive a gradient and are not found in the state."""
        return [i for i, port in enumerate(self.inputs) if port.role is Role.META]

    def __str__(self) -> str:
        lines = [f"step({', '.join(map(str, self.inputs))}):"]
        for node in self.graph.nodes:
            if node.op == "call_function":
                args = ", ".join(
                    [_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()]
                )
                mark = "" if node.meta.get("grad", True) else "  # no_grad"
                lines.append(f"  {node.name} = {_target_name(node.target)}({args}){mark}")
        (result,) = self.graph.find_nodes(op="output")
        pairs = zip(self.outputs, result.args[0], strict=True)
        lines.append("  return " + ", ".join(f"{p.name}={_show(v)}" for p, v in pairs))
        return "\n".join(lines)


def _target_name(target: Any) -> str:
    if isinstance(target, (OpOverload, Function)):
        return str(target)
    return getattr(target, "__name__", str(target))


def _show(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_show, value)) + ("," if len(value) == 1 else "") + ")"
    return str(value)
