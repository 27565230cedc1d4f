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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import OpOverload

from .derived import FlatGraph, Measured, Split, StepCost
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

    def positions(self, *roles: Role) -> list[int]:
        """Positions of the inputs with these roles."""
        return [i for i, port in enumerate(self.inputs) if port.role in roles]

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


@dataclass(slots=True)
class StepCall:
    """One recorded inner step: a StepGraph and what it was called with.

    Attributes:
        step: the graph.
        theta: state indices behind the THETA inputs, in order.
        update: state indices of theta', in order.
        opt_state: state indices of the optimizer state before (None: created by this step) and after.
        back: how many positions before its own lies the state that its loss has read.
        inputs: what fills the META and SCAN inputs, in order.
        metas: for each META input, the number under which its gradient is collected.
        location: the user's line.
        rng: state index of the random generator's state, if the step draws; -1 if not.
        lowering: the backend and HVP mode of the step graphs.
        spies: the tensor hooks that are part of the step.
    """

    step: StepGraph
    theta: tuple[int, ...]
    update: tuple[int, ...]
    opt_state_in: tuple[int, ...]
    opt_state_out: tuple[int, ...]
    back: int
    inputs: list[Any]
    metas: tuple[Any, ...]
    location: str
    rng: int = -1
    lowering: Lowering = EAGER
    spies: tuple[Any, ...] = ()

    def changed(self) -> Iterator[tuple[int, int]]:
        """Outputs of the step and the state indices they go to."""
        return enumerate((*self.update, *self.opt_state_out))


@dataclass(slots=True)
class Assign:
    """State entries set to values from outside.

    Attributes:
        indices, values: what is set to what.
        adoption: the values are a network's own parameters (cotangents that arrive here are theirs); otherwise the
            assignment is a history cut (an in-place load), where cotangents end.
    """

    indices: tuple[int, ...]
    values: list[Tensor]
    adoption: bool = False


@dataclass
class Loop:
    """Iterations that only differ in the slices and numbers their calls are given.

    Attributes:
        calls: those of the first iteration; in each later one they find their inputs where these have left them.
        count: how many iterations.
        strides: for each call, by how much each of its inputs advances from one iteration to the next (slices of a
            scan, lifted numbers; else 0).
    """

    calls: tuple[StepCall, ...]
    count: int
    strides: tuple[tuple[int, ...], ...]


def calls_of(item: StepCall | Loop) -> tuple[StepCall, ...]:
    """A call, or those of one iteration of a loop."""
    return item.calls if isinstance(item, Loop) else (item,)
