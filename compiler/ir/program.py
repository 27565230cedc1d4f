"""A whole function as calls of step graphs on registers: what the passes arrive at and the engine runs."""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .retention import UNSAID, Retention
from .step import Loop, Lowering, Port, Role, StepCall, StepGraph, calls_of
from .tensors import TensorSpec
from .trace import Input

_MOST_SHAPES = 6  # of one role and dtype that are written out
_STATE = (Role.THETA, Role.OPT_STATE, Role.CARRY)


@dataclass(frozen=True)
class Operand:
    """An input of a call that is no register.

    Attributes:
        kind: "input", "scan" (a slice of one), "noise", "number", or "each" (of several, the one at ``at``).
        of: the `Input`, the `Noise`, the number, or what there is to choose from.
        at: for a slice, its position.
    """

    kind: str
    of: Any
    at: int = 0

    def advanced(self, by: int) -> Operand:
        """The one ``by`` further on."""
        if self.kind in ("scan", "each"):
            return Operand(self.kind, self.of, self.at + by)
        return Operand(self.kind, self.of + by)

    @property
    def chosen(self) -> Operand:
        """Itself, or the one of several that it stands for now."""
        return self.of[self.at] if self.kind == "each" else self

    @property
    def sources(self) -> list[Any]:
        """What it may read: an `Input`, a `Noise` or a number, or several."""
        return [g.of for g in self.of] if self.kind == "each" else [self.of]


@dataclass(frozen=True)
class Kept:
    """What of an inner loop is kept for its derivative.

    Attributes:
        slots: how many states at a time, others being made again; None for all.
        saved: over how many of the last calls residuals are.
        offload: where states go that have no slot; see `metaoptim.compile`.
    """

    slots: int | None = None
    saved: int = 0
    offload: str | os.PathLike[str] | None = None

    def __str__(self) -> str:
        text = "every state" if self.slots is None else f"at most {plural(self.slots, 'state')}"
        text += f", residuals of the last {plural(self.saved, 'call')}" if self.saved else ""
        return text + ("" if self.offload is None else f", others in {os.fspath(self.offload)}")


class Calls:
    """Calls of step graphs, those of loops once: what a program is, of a function or of a window."""

    def counted(self) -> Iterator[tuple[StepCall, int]]:
        """Each call, and how many times it is made."""
        raise NotImplementedError

    @property
    def horizon(self) -> int:
        """Number of inner steps."""
        return sum(count * call.step.steps for call, count in self.counted())

    @property
    def step_graphs(self) -> list[StepGraph]:
        """The distinct step graphs, in order of appearance."""
        return list({id(call.step): call.step for call, _ in self.counted()}.values())

    def names(self) -> dict[int, str]:
        """Id of a step graph -> its name in the text."""
        return {id(g): step_name(i) for i, g in enumerate(self.step_graphs)}


@dataclass
class Program(Calls):
    """A whole function as calls on registers.

    Attributes:
        calls: in order.
        registers: how many values are alive at most.
        outputs, writes: where what the function returns, and what it leaves in tensors from outside, is found in the
            end: a register, or an `Input` passed through.
        dead: places of the outputs that carry no gradient.
        retention, backward_hook: options of its windows.
        kept: what the pass checkpoint has decided on.
        compiled: ids of the step graphs that go through the compiler, as the pass lower has decided; None for all.
        window: W, where gradients are truncated.
        offline: whether a window's own parameters receive a gradient.
    """

    calls: list[StepCall | Loop] = field(default_factory=list)
    registers: int = 0
    outputs: list[int | Input] = field(default_factory=list)
    writes: list[tuple[Any, int | Input]] = field(default_factory=list)
    dead: tuple[int, ...] = ()
    retention: Retention = UNSAID
    backward_hook: Callable[..., Any] | None = None
    kept: Kept | None = None
    compiled: frozenset[int] | None = None
    window: int | None = None
    offline: bool = False

    def lowering_of(self, step: StepGraph, stated: Lowering) -> Lowering:
        """The lowering of one of its step graphs, where ``stated`` is asked for."""
        if self.compiled is None or id(step) in self.compiled:
            return stated
        return replace(stated, backend="eager")

    @property
    def positions(self) -> int:
        """Number of calls when it runs, those of its loops one by one."""
        return sum(count for _, count in self.counted())

    @property
    def swept(self) -> int:
        """Over how many of its last positions a backward goes back, besides what comes before the inner steps.

        All of them, unless gradients are truncated and no loss lies between the steps.
        """
        _, inner, after = self._stretches()
        if self.window is None or self.loss_between or self.window >= sum(count for _, count in inner):
            return self.positions
        return self.window + sum(count for _, count in after)

    @property
    def loss_between(self) -> bool:
        """Whether a cotangent may come from between the inner steps."""
        return any(
            not step.steps or any(p.role is Role.CARRY and p.differentiable for p in step.outputs)
            for step, _ in self._stretches()[1]
        )

    def _stretches(self) -> tuple[list[tuple[StepGraph, int]], ...]:
        """Step graphs and how often they are called: before the inner steps, from the first to the last, after them."""
        items = [(call.step, count) for call, count in self.counted()]
        taking = [i for i, (step, _) in enumerate(items) if step.steps]
        first, end = (taking[0], taking[-1] + 1) if taking else (len(items), len(items))
        return items[:first], items[first:end], items[end:]

    @property
    def state_bytes(self) -> int:
        """Bytes in the registers, when there are most."""
        sizes: dict[int, int] = {}
        most = 0
        for call, _ in self.counted():
            for k, register in call.changed():
                if register >= 0:
                    sizes[register] = nbytes(call.step.outputs[k].spec)
            most = max(most, sum(sizes.values()))
        return most

    @property
    def inputs(self) -> list[Input]:
        """What it reads of tensors from outside, in the order they are met."""
        given = [x for call, _ in self.counted() for g in call.inputs for x in g.sources]
        found = [*given, *self.outputs, *(where for _, where in self.writes)]
        return list({id(x): x for x in found if isinstance(x, Input)}.values())

    def counted(self) -> Iterator[tuple[StepCall, int]]:
        """Each call, and how many times it is made."""
        for item in self.calls:
            for call in calls_of(item):
                yield call, item.count if isinstance(item, Loop) else 1

    def text(self, inputs: Mapping[Input, str] | None = None, *, operators: bool = False) -> str:
        """The program as text.

        Args:
            inputs: names for the tensors it reads; x0, x1, ... without.
            operators: whether to write out the operators of every step graph.
        """
        named = {x: f"x{i}" for i, x in enumerate(self.inputs)} | dict(inputs or {})
        names = self.names()
        mode = "offline" if self.offline else "online"
        lines = [
            f"program of {plural(self.horizon, 'inner step')}, {mode}: {plural(self.positions, 'call')} of "
            f"{plural(len(names), 'step graph')}, {plural(self.registers, 'register')} "
            f"({readable_bytes(self.state_bytes)})"
            + (f", truncated to {self.window} super-steps" if self.window else "")
            + (f"; kept: {self.kept}" if self.kept is not None else "")
        ]
        for item in self.calls:
            if not isinstance(item, Loop):
                lines.append("  " + _call_text(item, [0] * len(item.inputs), names, named))
                continue
            loop = f"  loop {item.count} times, t = 0, 1, ...:"
            inside = [
                _call_text(call, strides, names, named)
                for call, strides in zip(item.calls, item.strides, strict=True)
            ]
            lines += [f"{loop} {inside[0]}"] if len(inside) == 1 else [loop, *("    " + i for i in inside)]
        lines.append("  return " + (", ".join(_place_text(w, named) for w in self.outputs) or "nothing"))
        lines += [f"  {_target_text(t, named)} := {_place_text(w, named)}" for t, w in self.writes]
        for step in self.step_graphs:
            lines.append(signature(step, names[id(step)]))
            if operators:
                lines += ["    " + line for line in str(step).splitlines()[1:]]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def step_name(i: int) -> str:
    """step_a, step_b, ..., step_26, ..."""
    return f"step_{chr(97 + i)}" if i < 26 else f"step_{i}"


def state_ports(step: StepGraph) -> list[Port]:
    """The inputs of a step graph that are registers, in order."""
    return [p for p in step.inputs if p.role in _STATE]


def given_ports(step: StepGraph) -> list[Port]:
    """The inputs of a step graph that are none, in order."""
    return [p for p in step.inputs if p.role not in _STATE]


def nbytes(spec: TensorSpec) -> int:
    """Bytes of memory that a tensor of this spec spans."""
    shape, dtype, stride, _ = spec
    if 0 in shape:
        return 0
    stride = stride if len(stride) == len(shape) else torch.empty(shape, device="meta").stride()
    return dtype.itemsize * (1 + sum((size - 1) * s for size, s in zip(shape, stride, strict=True)))


def memory_bytes(t: Tensor) -> int:
    """Bytes of the memory that ``t`` keeps alive, of which it may be a small part."""
    if t.layout is torch.strided:
        return t.untyped_storage().nbytes()
    if t.layout is torch.sparse_coo:
        return t._indices().nbytes + t._values().nbytes
    return t.numel() * t.element_size()


def memory_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors keep alive; what they share counts once."""
    found = {}
    for t in tensors:
        found[t.untyped_storage()._cdata if t.layout is torch.strided else id(t)] = memory_bytes(t)
    return sum(found.values())


def plural(count: int | None, word: str) -> str:
    """1 call, 2 calls, 2 entries."""
    many = word[:-1] + "ies" if word.endswith("ry") else word + "s"
    return f"{count} {word if count == 1 else many}"


def readable_bytes(size: float) -> str:
    """``size`` bytes, as people write it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def shapes_text(specs: Iterable[TensorSpec]) -> str:
    """Dtypes and shapes, equal ones once: ``float32 4×3, 4 (2 of them)``."""
    groups: dict[torch.dtype, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.dtype, []).append(spec)
    parts = []
    for dtype, group in groups.items():
        counts = Counter("×".join(map(str, s.shape)) or "scalar" for s in group)
        shown = [name + (f" ({n} of them)" if n > 1 else "") for name, n in counts.items()]
        if len(shown) > _MOST_SHAPES:
            shown[_MOST_SHAPES:] = [f"{len(shown) - _MOST_SHAPES} more shapes"]
        parts.append(f"{str(dtype).removeprefix('torch.')} {', '.join(shown)}")
    return "; ".join(parts)


def signature(step: StepGraph, name: str) -> str:
    """What a step graph takes and gives, by role, with shapes and bytes."""
    operators = operator_count(step.graph)
    lines = [f"{name}: {plural(step.steps, 'inner step')}, {plural(operators, 'operator')}"]
    for verb, ports in (("takes", step.inputs), ("gives", step.outputs)):
        for role, group in by_role(ports).items():
            size = readable_bytes(sum(nbytes(p.spec) for p in group))
            lines.append(
                f"  {verb} {len(group):>3} {role:<9} {size:>10}  {shapes_text(p.spec for p in group)}"
            )
    return "\n".join(lines)


def operator_count(graph: fx.Graph) -> int:
    """How many of its nodes compute something."""
    return sum(n.op == "call_function" and n.target is not operator.getitem for n in graph.nodes)


def by_role(ports: Sequence[Port]) -> dict[str, list[Port]]:
    """Ports by the name of their role, in order of appearance."""
    found: dict[str, list[Port]] = {}
    for port in ports:
        found.setdefault(port.role.value, []).append(port)
    return found


def registers_text(registers: Sequence[int]) -> str:
    """r0-r4 r7 r3-r1: runs, up or down, are shortened; what is dropped (-1) is an underscore."""
    runs: list[list[int]] = []
    for r in registers:
        run = runs[-1] if runs else []
        step = r - run[-1] if run else 0
        if run and abs(step) == 1 and min(r, run[-1]) >= 0 and (len(run) == 1 or run[1] - run[0] == step):
            run.append(r)
        else:
            runs.append([r])
    texts = []
    for run in runs:
        names = ["_" if r < 0 else f"r{r}" for r in run]
        texts.append(f"{names[0]}-{names[-1]}" if len(run) > 2 else " ".join(names))
    return " ".join(texts)


def _call_text(
    call: StepCall, strides: Sequence[int], names: Mapping[int, str], named: Mapping[Input, str]
) -> str:
    read = [registers_text(call.opt_state_in)] if call.opt_state_in else []
    given = [_given_text(g, s, named) for g, s in zip(call.inputs, strides, strict=True)]
    arguments = "; ".join([*read, *([", ".join(given)] if given else [])])
    where = f"  # {_short(call.location)}" if call.location else ""
    made = registers_text(call.opt_state_out) or "nothing"
    return f"{made} = {names[id(call.step)]}({arguments}){where}"


def _given_text(given: Operand, stride: int, named: Mapping[Input, str]) -> str:
    if given.kind == "each":
        first, *_, last = (_given_text(g, 0, named) for g in given.of)
        return f"({first}, ..., {last})[{_moving(given.at, stride)}]"
    if given.kind == "noise":
        return given.of.op._schema.name.removeprefix("aten::") + "()"
    if given.kind == "number":
        return f"{given.of}" if not stride else _moving(given.of, stride)
    name = named[given.of]
    return name if given.kind == "input" else f"{name}[{_moving(given.at, stride) if stride else given.at}]"


def _moving(start: int, stride: int) -> str:
    return (f"{start} + " if start else "") + (f"{stride}·t" if stride != 1 else "t")


def _place_text(where: int | Input, named: Mapping[Input, str]) -> str:
    return f"r{where}" if isinstance(where, int) else named[where]


def _target_text(target: Any, named: Mapping[Input, str]) -> str:
    if isinstance(target, tuple):
        optimizer, _, name = target
        return f"{type(optimizer).__name__}.state[...][{name!r}]"
    known = (name for x, name in named.items() if getattr(x, "tensor", None) is target)
    return next(known, f"a tensor of shape {tuple(target.shape)}")


def _short(location: str) -> str:
    return location.replace("\\", "/").rpartition("/")[2]
