"""Slice of a recording + update plan -> StepGraph, by way of a trace of one part and the passes on it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..derive.flat import uncollected
from ..ir.step import Role, StepGraph, gradient
from ..ir.tensors import TensorSpec
from ..ir.traces.slices import Slice, restored
from ..ir.traces.trace import Roles, Trace
from ..ir.update import UpdatePlan
from ..ir.values import Entry, Input, Number, Value
from ..ir.verify import verify_step
from .build import GradientHooks, build_step_graph
from .pipeline import shaped
from .traces.split import single

State = dict[str, TensorSpec]


class StepSpec(NamedTuple):
    """What a step is besides its slice. All of it is part of the step's signature.

    Attributes:
        plan: the update; its hyper-references are the slice's roots after the losses.
        params: for each updated parameter, its place among the slice's thetas.
        stale: whether the update finds other parameters than the loss has read.
        thetas, now: specs of the slice's thetas and of the updated parameters.
        states: specs of the states of the updated parameters, before the step, by name.
        grad_hooks: for each updated parameter, keys of the hooks of the user's own that change its gradient.
        first_order: whether g is taken as a constant (FOMAML).
        hooked: whether the window has a backward_hook.
        losses: how many of the slice's roots, the first ones, are losses: more than one of a step in chunks.
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
    losses: int = 1


@uncollected()
def build_step(
    sliced: Slice,
    spec: StepSpec,
    new_states: Sequence[State],
    lifted: Sequence[int],
    hooks: Sequence[Sequence[Any]],
) -> StepGraph:
    """The StepGraph of a recorded step.

    Args:
        sliced: what the losses (first roots) and the hyper-parameters (the other roots) depend on.
        spec: what else there is to the step.
        new_states: specs of the states of the updated parameters, after the step.
        lifted: which of the slice's numbers are inputs.
        hooks: for each updated parameter, the hooks behind ``spec.grad_hooks``.
    """
    step = _StepTrace(sliced, spec)
    step.update(spec, new_states, hooks)
    partition = single(step.trace)
    records = shaped(partition)
    (part,) = partition.parts
    places = [partition.made(v)[1] for v in step.trace.outputs]
    inputs = [step.roles[id(x)] for x in part.segment.inputs]
    roles = Roles(inputs, dict(zip(places, step.output_roles, strict=True)))
    graph = build_step_graph(part, lifted, spec.hooked, roles, spec.first_order)
    graph.opaque |= any(hooks)
    graph.records = records
    verify_step(graph)
    return graph


class _StepTrace:
    """A step as a trace, and the roles of its inputs and outputs: its slice's calls, its gradient and its update."""

    def __init__(self, sliced: Slice, spec: StepSpec) -> None:
        self.sliced, self.trace = sliced, Trace(indexed=True)
        self.roles: dict[int, Role] = {}
        self.output_roles: list[Role] = []
        self.thetas = [self._input(Role.THETA, s) for s in spec.thetas]
        self.externals = [self._input(Role.META if grad else Role.SCAN, s) for s, grad in sliced.key[2]]
        self.numbers = [Number(n) for n in sliced.numbers]
        entries = self.trace.entries
        for entry, key in zip(sliced.entries, sliced.key[0], strict=True):
            made = self._call(entry.op, *map(self._value, key[1])).entry
            made.kwargs = {k: self._value(v) for k, v in key[2]}
            made.deps = tuple(entries[sliced.number_of[id(d)]] for d in entry.deps)
            made.grad, made.shape = entry.grad, entry.shape
        for where, spies in sliced.hooks.items():
            made = self._value(where)
            if isinstance(made, Value):
                self.trace.hooks.setdefault(id(made.entry), {})[made.index] = spies
            else:
                self.trace.hooks[id(made)] = {None: spies}

    def update(self, spec: StepSpec, new_states: Sequence[State], hooks: Sequence[Sequence[Any]]) -> None:
        """Add the gradient and the update."""
        roots = tuple(map(self._value, self.sliced.roots))
        losses, hyper_values = roots[: spec.losses], roots[spec.losses :]
        thetas = tuple(self.thetas[i] for i in spec.params)
        now = tuple(self._input(Role.THETA_NOW, s) for s in spec.now) if spec.stale else thetas
        states = tuple({k: self._input(Role.OPT_STATE, s) for k, s in state} for state in spec.states)
        taken = self._call(gradient, losses if losses[1:] else losses[0], thetas).entry
        grads = [Value(taken, k) for k in range(len(thetas))]
        grads = [self._call(GradientHooks(h), g) if h else g for g, h in zip(grads, hooks, strict=True)]
        detach = torch.ops.aten.detach.default
        used = tuple(self._call(detach, g) for g in grads) if spec.first_order else tuple(grads)
        after = self._call(spec.plan, now, used, states, hyper_values)

        def part(*path: Any) -> Value:
            """A piece of the update's nested result."""
            return functools.reduce(lambda value, at: self._call(operator.getitem, value, at), path, after)

        for k, of in enumerate(spec.now):
            self._give(Role.THETA, part(0, k), of)
        for k, state in enumerate(new_states):
            for name, of in state.items():
                self._give(Role.OPT_STATE, part(1, k, name), of)
        for g, of in zip(grads, spec.now, strict=True):
            self._give(Role.GRADIENT, g, of)

    def _input(self, role: Role, spec: TensorSpec) -> Input:
        made = Input.of(spec, role is not Role.SCAN)
        self.roles[id(made)] = role
        self.trace.inputs.append(made)
        return made

    def _call(self, op: Any, *args: Any) -> Value:
        entries = self.trace.entries
        entries.append(Entry(op, args, {}, None, len(entries), (), True))  # type: ignore[arg-type]
        return Value(entries[-1], None)

    def _give(self, role: Role, value: Value, spec: TensorSpec) -> None:
        value.ref = spec
        self.trace.outputs.append(value)
        self.output_roles.append(role)

    def _value(self, token: Any) -> Any:
        """What a token of the slice stands for."""
        stands: dict[str, Sequence[Any]] = {"t": self.thetas, "x": self.externals, "n": self.numbers}

        def found(token: tuple[Any, ...]) -> Any:
            kind: str = token[0]
            at: int = token[1]
            return Value(self.trace.entries[at], token[2]) if kind == "v" else stands[kind][at]

        return restored(token, found)
