"""Slice of a recording + update plan -> StepGraph, by way of a trace of one part and the passes on it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..derive.flat import uncollected
from ..ir.segments import Hooks, Roles, ordered
from ..ir.slices import Slice, restored
from ..ir.step import Role, StepGraph, gradient
from ..ir.tensors import TensorSpec
from ..ir.trace import Input, Trace
from ..ir.update import UpdatePlan
from ..ir.values import Entry, Number, Value
from ..ir.verify import verify_step
from .build import GradientHooks, build_segment
from .pipeline import shaped
from .split import single

aten = torch.ops.aten
State = dict[str, TensorSpec]


class StepSpec(NamedTuple):
    """What a step is besides its slice. All of it is part of the step's signature.

    Attributes:
        plan: the update; its slots are the slice's roots after the first.
        params: for each updated parameter, its place among the slice's thetas.
        stale: whether the update finds other parameters than the loss has read.
        thetas, now: specs of the slice's thetas and of the updated parameters.
        states: specs of the states of the updated parameters, before the step, by name.
        grad_hooks: for each updated parameter, keys of the hooks of the user's own that change its gradient.
        first_order: whether g is taken as a constant (FOMAML).
        hooked: whether the window has a backward_hook.
    """

    plan: UpdatePlan
    params: tuple[int, ...]
    stale: bool
    thetas: tuple[TensorSpec, ...]
    now: tuple[TensorSpec, ...]
    states: tuple[tuple[tuple[str, TensorSpec], ...], ...]
    grad_hooks: tuple[tuple[Any, ...], ...]
    first_order: bool
    hooked: bool


def build_step(
    sliced: Slice,
    spec: StepSpec,
    new_states: Sequence[State],
    lifted: Sequence[int],
    hooks: Sequence[Sequence[Any]],
) -> StepGraph:
    """The StepGraph of a recorded step.

    Args:
        sliced: what the loss (first root) and the hyper-parameters (the other roots) depend on.
        spec: what else there is to the step.
        new_states: specs of the states of the updated parameters, after the step.
        lifted: which of the slice's numbers are inputs.
        hooks: for each updated parameter, the hooks behind ``spec.grad_hooks``.
    """
    with uncollected():
        return _built(_Step(sliced, spec, new_states, hooks), spec, lifted, any(hooks))


def _built(step: _Step, spec: StepSpec, lifted: Sequence[int], hooked: bool) -> StepGraph:
    partition = single(step.trace, Hooks(step.trace, step.hooked_inputs))
    records = shaped(partition)
    (part,) = partition.parts
    segment = part.segment
    inputs = [step.roles[id(x)] for x in segment.inputs]
    places = [(segment.number_of[id(v.entry)], v.index) for v in step.trace.outputs]
    roles = Roles(inputs, ordered(inputs), dict(zip(places, step.output_roles, strict=True)))
    graph = build_segment(segment, part.kind, lifted, spec.hooked, roles, spec.first_order)
    graph.opaque |= hooked
    graph.records = records
    verify_step(graph)
    return graph


class _Step:
    """A step as a trace.

    Attributes:
        trace: the calls of its slice, its gradient and its update.
        roles: id of an input -> its role.
        output_roles: in order.
        hooked_inputs: id of an input -> the hooks on it.
    """

    def __init__(
        self, sliced: Slice, spec: StepSpec, new_states: Sequence[State], hooks: Sequence[Sequence[Any]]
    ) -> None:
        self.sliced, self.trace = sliced, Trace(indexed=True)
        self.roles: dict[int, Role] = {}
        self.output_roles: list[Role] = []
        self.thetas = [self._input(Role.THETA, s) for s in spec.thetas]
        self.externals = [self._input(Role.META if grad else Role.SCAN, s) for s, grad in sliced.key[2]]
        self.numbers = [Number(n) for n in sliced.numbers]
        for entry, key in zip(sliced.entries, sliced.key[0], strict=True):
            self._take(entry, key)
        self._update(spec, new_states, hooks)
        self.hooked_inputs: dict[int, list[Any]] = {}
        for where, spies in sliced.hooks.items():
            if where[0] == "v":
                at: int = where[1]
                self.trace.hooks.setdefault(id(self.trace.entries[at]), {})[where[2]] = spies
            else:
                self.hooked_inputs[id(self._value(where))] = spies

    def _input(self, role: Role, spec: TensorSpec) -> Input:
        made = Input.of(spec, role is not Role.SCAN)
        self.roles[id(made)] = role
        self.trace.inputs.append(made)
        return made

    def _add(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        deps: tuple[Any, ...] = (),
        grad: bool = True,
    ) -> Entry:
        entries = self.trace.entries
        entries.append(Entry(op, args, kwargs or {}, None, len(entries), deps, grad))  # type: ignore[arg-type]
        return entries[-1]

    def _take(self, entry: Entry, key: tuple[Any, ...]) -> None:
        """A call of the slice, with what stands for its arguments there."""
        args = tuple(map(self._value, key[1]))
        deps = tuple(self.trace.entries[self.sliced.number_of[id(d)]] for d in entry.deps)
        kwargs = {k: self._value(v) for k, v in key[2]}
        self._add(entry.op, args, kwargs, deps, entry.grad).shape = entry.shape

    def _update(self, spec: StepSpec, new_states: Sequence[State], hooks: Sequence[Sequence[Any]]) -> None:
        loss, *slots = map(self._value, self.sliced.roots)
        thetas = tuple(self.thetas[i] for i in spec.params)
        now = tuple(self._input(Role.THETA_NOW, s) for s in spec.now) if spec.stale else thetas
        states = tuple({k: self._input(Role.OPT_STATE, s) for k, s in state} for state in spec.states)
        taken = self._add(gradient, (loss, thetas))
        grads = [Value(taken, k) for k in range(len(thetas))]
        grads = [self._call(GradientHooks(h), g) if h else g for g, h in zip(grads, hooks, strict=True)]
        used = [self._call(aten.detach.default, g) for g in grads] if spec.first_order else grads
        update = Value(self._add(spec.plan, (now, tuple(used), states, tuple(slots))), None)
        for k, of in enumerate(spec.now):
            self._give(Role.THETA, self._part(update, 0, k), of)
        for k, state in enumerate(new_states):
            for name, of in state.items():
                self._give(Role.OPT_STATE, self._part(update, 1, k, name), of)
        for g, of in zip(grads, spec.now, strict=True):
            self._give(Role.GRADIENT, g, of)

    def _call(self, op: Any, *args: Any) -> Value:
        return Value(self._add(op, args), None)

    def _part(self, value: Value, *path: Any) -> Value:
        """A piece of the update's nested result."""
        for at in path:
            value = self._call(operator.getitem, value, at)
        return value

    def _give(self, role: Role, value: Value, spec: TensorSpec) -> None:
        value.ref = spec
        self.trace.outputs.append(value)
        self.output_roles.append(role)

    def _value(self, token: Any) -> Any:
        """What a token of the slice stands for."""
        return restored(token, self._found)

    def _found(self, token: tuple[Any, ...]) -> Any:
        kind: str = token[0]
        at: int = token[1]
        if kind == "v":
            return Value(self.trace.entries[at], token[2])
        stands: dict[str, Sequence[Any]] = {"t": self.thetas, "x": self.externals, "n": self.numbers}
        return stands[kind][at]
