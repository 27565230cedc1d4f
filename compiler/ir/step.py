"""StepGraphs: what an inner step is, as data.

A `StepGraph` is an fx graph of one inner step: from theta, optimizer state, meta-parameters and data to the loss, from
the loss to its gradient (one `gradient` node), from the gradient to theta' and the new optimizer state. Its operators
are ATen calls; custom autograd Functions, hooks and the optimizer's update are calls too, since they may have a
derivative of their own. Everything that runs (the replay of the step and its VJP) is derived from this graph alone, but
for batched steps, which are made together with their derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from .bindings import bound
from .operators import is_several, op_text
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

    def __str__(self) -> str:
        return f"{self.name}: {self.role.value}[{self.spec.outline}]"


def gradient(loss: Tensor | tuple[Tensor, ...], thetas: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """∇_thetas loss, as a node of a StepGraph.

    Of several losses (a step in chunks) it is the gradient of their sum, and is taken of one after the other.
    """
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
    """How flat graphs are run."""

    backend: str = "eager"  # or another backend of torch.compile; "auto": inductor once that pays
    check: bool = True  # whether a compiled graph is compared with its uncompiled form on first use
    hvp: str = "reverse"  # how steps are differentiated: "reverse", "mixed" or "auto"
    # Whether replays run on the backend too. Not where the forward was eager PyTorch's own: a state that is made again
    # must be the same to the bit.
    replays: bool = True
    cuda_graphs: bool = False  # whether what runs on a GPU is captured and replayed
    patient: bool = False  # whether "auto" compiles what has run for long only, as nobody has asked for it

    @cached_property
    def _hash(self) -> int:
        return hash((self.backend, self.check, self.hvp, self.replays, self.cuda_graphs, self.patient))

    def __hash__(self) -> int:  # graphs are looked up by it for every step that runs
        return self._hash

    @staticmethod
    def stated(
        backend: str, hvp: str, self_check: bool, replays: bool = True, mode: str | None = None
    ) -> Lowering:
        """The lowering that a user asks for.

        Raises:
            ValueError: for a backend that torch.compile does not know, or an unknown ``hvp`` or ``mode``.
        """
        if mode not in (None, "default", "reduce-overhead"):
            raise ValueError(f"mode: got {mode!r}, expected 'default' or 'reduce-overhead' (CUDA graphs)")
        if hvp not in ("auto", "reverse", "mixed"):
            raise ValueError(f"hvp: got {hvp!r}, expected 'auto', 'reverse' or 'mixed'")
        if backend == "auto" and not replays:
            return Lowering(backend, self_check, hvp, replays, patient=True)
        if backend not in _USUAL and backend not in torch.compiler.list_backends(exclude_tags=()):  # pyright: ignore
            usual = {*_USUAL, *(() if replays else ("auto",)), *torch.compiler.list_backends()}  # pyright: ignore[reportUnknownMemberType]
            raise ValueError(
                f"backend: got {backend!r}, expected one of {', '.join(sorted(usual))}, or another backend of "
                "torch.compile"
            )
        return Lowering(backend, self_check, hvp, replays, mode == "reduce-overhead")

    @cached_property
    def uncompiled(self) -> Lowering:
        """The same, with graphs that run as they are."""
        return replace(self, backend="eager")

    @cached_property
    def compiled(self) -> Lowering:
        """What "auto" becomes when that pays."""
        return replace(self, backend="inductor")

    @cached_property
    def whole(self) -> Lowering:
        """The same, with replays on the backend too, as the forward is."""
        return replace(self, replays=True)

    @cached_property
    def recorded(self) -> Lowering:
        """The same, with replays that run as they are, as the forward has."""
        return replace(self, replays=False)

    def backend_of(self, kind: str) -> str:
        """What a step's graph of this kind runs on: "auto" is told apart by `taken`."""
        runs = self.replays or kind not in ("replay", "forward")
        return self.backend if runs and self.backend != "auto" else "eager"


EAGER = Lowering()


class FlatGraph:
    """A flat graph and its constants. It becomes code when it is called again: many are called once, or never."""

    def __init__(self, graph: fx.Graph, constants: Mapping[str, Any]) -> None:
        self.graph = graph  # inputs -> a tuple of results
        self.constants = dict(constants)  # by the names of its attributes
        self._called = False

    @property
    def holder(self) -> torch.nn.Module:
        """The constants as attributes."""
        held = torch.nn.Module()
        vars(held).update(self.constants)
        return held

    @cached_property
    def module(self) -> fx.GraphModule:
        """The graph as a module."""
        return fx.GraphModule(self.constants, self.graph)

    @cached_property
    def program(self) -> Lowered:
        """The graph as Python code."""
        return fx.GraphModule(self.constants, bound(self.graph)).forward

    def __call__(self, *inputs: Tensor) -> Any:
        if self._called:
            return self.program(*inputs)
        self._called = True
        runner = fx.Interpreter(self.holder, graph=self.graph)
        runner.extra_traceback = False  # a user's error is hers, without the names of our nodes
        return runner.run(*inputs, enable_io_processing=False)


@dataclass(frozen=True)
class Split:
    """A step's two graphs."""

    forward: FlatGraph  # inputs -> outputs but for the loss, then residuals that are none of them
    backward: FlatGraph  # inputs, residuals, cotangents -> what the VJP gives
    residuals: tuple[int, ...]  # which results of the forward they are; what is a state anyway costs nothing
    fresh: int  # how many of these results are residuals alone
    saves: int  # operators that the backward does not run again
    shared: bool  # whether residuals lie in memory of the forward's other results


@dataclass(frozen=True)
class ResultMemory:
    """The memory of one result of a flat graph."""

    size: int  # bytes of its own; 0 where it shares some
    of_input: int = -1  # the argument of the graph whose memory it shares; -1 for none
    of_result: int = -1  # the earlier result whose memory it shares; -1 for none


@dataclass(frozen=True)
class StepCost:
    """What calls of one step graph cost."""

    replay_bytes: int  # most that a replay allocates, its results included
    vjp_bytes: int
    replay_operators: int  # how many operators it calls
    vjp_operators: int
    outputs: tuple[ResultMemory, ...]  # of the replay, in the order of the step's outputs without the loss
    # Per input, of its gradient; None where it has none. Arguments of the VJP are the inputs, then the cotangents.
    gradients: tuple[ResultMemory | None, ...]
    depends: tuple[frozenset[int], ...]  # per input, the outputs whose cotangents its gradient depends on


@dataclass(frozen=True)
class Measured:
    """What the lowered program of a step graph was seen to take."""

    peak_bytes: int  # most that a call allocates, its results included
    first_bytes: int  # the same of its compilation and first-use check
    made: tuple[ResultMemory | None, ...]  # of its results


@dataclass(frozen=True)
class FewBits:
    """What a step's updates are given in bfloat16 or float16."""

    parameters: tuple[
        int, ...
    ]  # positions of the inputs that are parameters; empty where nothing has few bits
    dtypes: frozenset[tuple[str, torch.dtype]]  # "parameters" or "optimizer state", and their types


class Coming(Protocol):
    """A compiled form that is being made."""

    @property
    def ended(self) -> bool: ...
    @property
    def complaint(self) -> str | None: ...
    def wait(self) -> None: ...


@dataclass
class Derived:
    """What has been derived from a step graph so far; each on first use, by HVP mode, kind of graph and lowering."""

    replay: FlatGraph | None = None
    vjp: dict[str, FlatGraph] = field(default_factory=lambda: {})
    transposable: dict[str, FlatGraph] = field(default_factory=lambda: {})
    splits: dict[str, Split | None] = field(default_factory=lambda: {})  # None where it cannot be
    loss: StepGraph | None = None  # its loss alone
    few_bits: FewBits | None = None
    lowered: dict[tuple[str, Lowering], Lowered] = field(default_factory=lambda: {})
    runs: dict[str, int] = field(
        default_factory=lambda: {}
    )  # how often a kind of graph has run, where that decides
    work: dict[str, int] = field(default_factory=lambda: {})  # about how long it takes, in small operators
    since: dict[tuple[str, Lowering], float] = field(
        default_factory=lambda: {}
    )  # when a compiled form was taken over
    coming: dict[tuple[str, Lowering], Coming] = field(default_factory=lambda: {})
    costs: dict[str, StepCost] = field(default_factory=lambda: {})  # as its graphs say
    measured: dict[tuple[str, Lowering], Measured] = field(default_factory=lambda: {})


@dataclass
class StepGraph:
    """One distinct inner step."""

    graph: fx.Graph  # placeholders in the order of `inputs`; its output is a tuple in the order of `outputs`
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opaque: bool = False  # holds custom Functions or hooks, so every use is checked against eager
    dynamic: bool = False  # holds an operator whose output shape depends on values
    first_order: bool = False  # g is taken as a constant (FOMAML)
    hooked: bool = False  # the window has a backward_hook
    given: bool = False  # its derivative was made beside it, and does not follow from its graph
    default_dtype: torch.dtype = field(default_factory=torch.get_default_dtype)  # operators depend on it
    derived: Derived = field(default_factory=Derived)
    derivatives: dict[str, str] = field(default_factory=dict[str, str])  # HVP mode asked for -> the one taken
    records: list[Any] = field(default_factory=list[Any])  # what the passes did that made it

    @cached_property
    def steps(self) -> int:
        """How many inner steps it takes."""
        return sum(node.target is gradient for node in self.graph.nodes)

    @cached_property
    def chunked(self) -> bool:
        """Whether an inner gradient in it is that of several losses."""
        return any(node.target is gradient and is_several(node.args[0]) for node in self.graph.nodes)

    @cached_property
    def thetas(self) -> int:
        """How many inputs, the first ones, are theta."""
        return sum(port.role is Role.THETA for port in self.inputs)

    @cached_property
    def states(self) -> int:
        """How many inputs, the first ones, are found in the state: theta and other values passed on."""
        return sum(port.role in RANK for port in self.inputs)

    @cached_property
    def cotangents(self) -> list[int]:
        """Positions of the outputs that take a cotangent."""
        roles = (Role.THETA, Role.OPT_STATE, Role.CARRY)
        return [i for i, p in enumerate(self.outputs) if p.role in roles and p.differentiable]

    @cached_property
    def gradients(self) -> list[tuple[int, Role]]:
        """Positions and roles of the inputs whose gradients go somewhere: to a state, or to a meta-parameter."""
        passed = (Role.SCAN, Role.NOISE)
        return [(i, port.role) for i, port in enumerate(self.inputs) if port.role not in passed]

    @property
    def metas(self) -> list[int]:
        """Positions of the inputs that receive a gradient and are not found in the state."""
        return [i for i, port in enumerate(self.inputs) if port.role is Role.META]

    def __str__(self) -> str:
        lines = [f"step({', '.join(map(str, self.inputs))}):"]
        for node in self.graph.nodes:
            if node.op == "call_function":
                args = [*map(_shown, node.args), *(f"{k}={_shown(v)}" for k, v in node.kwargs.items())]
                mark = "" if node.meta.get("grad", True) else "  # no_grad"
                lines.append(f"  {node.name} = {op_text(node.target)}({', '.join(args)}){mark}")
        (result,) = self.graph.find_nodes(op="output")
        values: Any = result.args[0]
        pairs = zip(self.outputs, values, strict=True)
        lines.append("  return " + ", ".join(f"{p.name}={_shown(v)}" for p, v in pairs))
        return "\n".join(lines)


def _shown(value: Any) -> str:
    if is_several(value):
        return f"({', '.join(map(_shown, value))}{',' * (len(value) == 1)})"
    return str(value)
