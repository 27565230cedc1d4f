"""A program for one task becomes one for many: its step graphs are batched once, and loops stay loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from metaoptim.errors import CaptureError, WindowError

from ..compat import FakeTensorMode
from ..derive.flat import flat_graph, tracing
from ..derive.graphs import mutates, results_of
from ..derive.reverse import cleaned
from ..ir.programs.calls import Loop, Operand, StepCall, calls_of
from ..ir.programs.program import Program
from ..ir.step import FlatGraph, Port, Role, StepGraph
from ..ir.tensors import TensorSpec, tensor_spec
from ..ir.values import Input, Noise
from ..lower.compile_graph import difference
from ..lower.derivatives import derived, replayed


class Arranged(NamedTuple):
    """How an input of a batched program is made of the caller's tensor."""

    source: Input  # of the program for one task
    mapped: bool  # whether the caller's tensor has a dimension of tasks; otherwise it is repeated for each
    dim: int  # where the tasks are: behind the rows, for what is read row by row


class BatchedStep(NamedTuple):
    """A step graph for all tasks, and the one for one task that it was made of."""

    step: StepGraph
    one: StepGraph
    over: tuple[bool, ...]  # which of its inputs hold all tasks


@dataclass
class Batched:
    """A program for many tasks.

    Attributes:
        program: its registers and inputs hold all tasks, along the leading dimension.
        arranged: by input, for those that are not the caller's tensor as it is.
        outputs: for each output, whether it holds all tasks; otherwise it is the same for each.
        steps: its step graphs, with those that they were made of.
    """

    program: Program
    arranged: dict[Input, Arranged]
    outputs: list[bool]
    steps: list[BatchedStep]


def batch(program: Program, mapped: Mapping[Input, bool], size: int, hvp: str, randomness: str) -> Batched:
    """The program that does for ``size`` tasks at once what ``program`` does for one.

    Args:
        program: as the passes leave it, without a plan of what is kept.
        mapped: inputs that differ from task to task; the others are shared, and their gradients are summed over tasks.
        size: how many tasks.
        hvp: how derivatives were asked for.
        randomness: "different" or "same" numbers for the tasks, or "error" where any are drawn.
    """
    return _Batch(program, mapped, size, hvp, randomness).batched()


class _Batch:
    def __init__(
        self, program: Program, mapped: Mapping[Input, bool], size: int, hvp: str, randomness: str
    ) -> None:
        self.program, self.mapped, self.size = program, mapped, size
        self.hvp, self.randomness = hvp, randomness
        self.arranged: dict[Input, Arranged] = {}
        self._made: dict[Arranged, Input] = {}
        self._noise: dict[int, Noise] = {}
        self._steps: dict[tuple[int, tuple[bool, ...]], BatchedStep] = {}
        self._spread: dict[TensorSpec, StepGraph] = {}
        self.over: set[int] = set()  # registers that hold all tasks

    def batched(self) -> Batched:
        program = self.program
        if program.backward_hook is not None:
            raise WindowError("vmap: a backward_hook sees one task's cotangents; leave it out")
        specs: dict[int, Port] = {}
        calls: list[StepCall | Loop] = []
        for item in program.calls:
            first = calls_of(item)
            if isinstance(item, Loop):
                calls += self._spread_before(first, specs)
            made = tuple([self._call(call) for call in first])
            calls.append(Loop(made, item.count) if isinstance(item, Loop) else made[0])
            for call in first:
                specs.update((r, call.step.outputs[k]) for k, r in enumerate(call.writes) if r >= 0)
        for target, where in program.writes:
            if self._is_over(where):
                what = (
                    "optimizer state"
                    if isinstance(target, tuple)
                    else f"a tensor of shape {tuple(target.shape)}"
                )
                raise WindowError(
                    f"vmap: the function leaves another value for each task in {what}, which has room for one; open "
                    "the window with offline=True, and let batch norm keep no statistics (track_running_stats=False)"
                )
        outputs = [
            w if isinstance(w, int) else self._input(w, 0, whole=self._is_over(w)) for w in program.outputs
        ]
        held = [self._is_over(where) for where in program.outputs]
        made = replace(program, calls=calls, outputs=outputs, compiled=None)
        return Batched(made, self.arranged, held, list(self._steps.values()))

    def _is_over(self, where: int | Input) -> bool:
        return where in self.over if isinstance(where, int) else self.mapped.get(where, False)

    def _call(self, call: StepCall) -> StepCall:
        """A call for all tasks; it stays as it is where nothing that it is given differs."""
        given = self._enter(call)
        if not any(given):
            return call
        step = self._step(call.step, tuple(given))
        inputs = [
            self._operand(g, over) for g, over in zip(call.inputs, given[len(call.reads) :], strict=True)
        ]
        return replace(call, step=step, inputs=inputs)

    def _enter(self, call: StepCall) -> list[bool]:
        """Which inputs hold all tasks. If any does, so do the registers it writes from then on, else no longer."""
        given = [r in self.over for r in call.reads]
        given += [any(map(self._differs, _chosen(g))) for g in call.inputs]
        written = {r for r in call.writes if r >= 0}
        self.over = self.over | written if any(given) else self.over - written
        return given

    def _differs(self, given: Operand) -> bool:
        if given.kind == "noise":
            if self.randomness == "error":
                raise WindowError(
                    "vmap: the function draws random numbers; say randomness='different' for numbers of its own for "
                    "each task, or randomness='same'"
                )
            return self.randomness == "different"
        return given.kind in ("input", "scan") and self.mapped.get(given.of, False)

    def _operand(self, given: Operand, over: bool) -> Operand:
        if given.kind == "each":
            return replace(given, of=type(given.of)(self._operand(g, over) for g in given.of))
        if not over:
            return given
        if given.kind == "noise":
            noise = self._noise.setdefault(
                id(given.of), replace(given.of, spec=_of_all(given.of.spec, self.size), tasks=self.size)
            )
            return replace(given, of=noise)
        if given.kind == "number":
            raise CaptureError(
                "vmap: in a loop, a number of one iteration is a tensor of each task in another"
            )
        return replace(given, of=self._input(given.of, int(given.kind == "scan"), whole=True))

    def _input(self, x: Input, dim: int, whole: bool) -> Input:
        """What stands for an input: for the tensors of all tasks if ``whole``, which are along ``dim``."""
        if not whole:
            return x
        how = Arranged(x, self.mapped.get(x, False), dim)
        known = self._made.get(how)
        if known is None:
            known = self._made[how] = Input.of(_of_all(x.spec, self.size, dim), x.grad)
            known.tensor, known.location = x.tensor, x.location
            self.arranged[known] = how
        return known

    # -- step graphs -----------------------------------------------------------------------------------------------

    def _spread_before(self, calls: Sequence[StepCall], specs: Mapping[int, Port]) -> list[StepCall]:
        """Calls that repeat for each task what a loop finds alike for all at first, and different from then on."""
        entered, found = set(self.over), set[int]()
        while True:
            self.over, written = entered | found, set[int]()
            read_first: set[int] = set()
            for call in calls:
                read_first |= set(call.reads) - written
                self._enter(call)
                written |= set(call.writes)
            more = (self.over & read_first) - entered
            if more <= found:
                break
            found |= more
        self.over = entered | found
        return [self._spread_call(r, specs[r], calls[0].location) for r in sorted(found)]

    def _spread_call(self, register: int, port: Port, location: str) -> StepCall:
        step = self._spread.get(port.spec)
        if step is None:
            wide = _of_all(port.spec, self.size)

            def replay(t: Tensor) -> tuple[Tensor]:
                return (t.expand(wide.shape).contiguous(),)

            def vjp(t: Tensor, cotangent: Tensor) -> tuple[Tensor]:
                return (cotangent.sum(0),)

            one, all_of = (Port(Role.CARRY, s, "spread") for s in (port.spec, wide))
            graph = _traced("replay", replay, [port.spec])
            step = self._spread[port.spec] = StepGraph(graph.graph, (one,), (all_of,), given=True)
            step.derived.replay = graph
            step.derived.vjp[self.hvp] = _traced("vjp", vjp, [port.spec, wide])
            step.derivatives[self.hvp] = "by hand: a sum over tasks"
        return StepCall(step, (register,), (register,), [], location)

    def _step(self, step: StepGraph, over: tuple[bool, ...]) -> StepGraph:
        """A step graph batched over these of its inputs, and all of its outputs."""
        key = (id(step), over)
        if key not in self._steps:
            self._steps[key] = BatchedStep(self._batched_step(step, over), step, over)
        return self._steps[key].step

    def _batched_step(self, step: StepGraph, over: tuple[bool, ...]) -> StepGraph:
        if step.dynamic:
            raise CaptureError(
                "vmap: a step whose shapes depend on values; use torch.where instead of selecting"
            )
        size = self.size
        inputs = tuple(
            replace(p, spec=_of_all(p.spec, size)) if o else p for p, o in zip(step.inputs, over, strict=True)
        )
        outputs = tuple(replace(p, spec=_of_all(p.spec, size)) for p in step.outputs)
        dims = tuple(0 if o else None for o in over)
        flat = replayed(step)

        def replay(*given: Tensor) -> tuple[Tensor, ...]:
            run = _with_constants(flat, given[len(inputs) :])
            return tuple([t.contiguous() for t in torch.func.vmap(run, dims)(*given[: len(inputs)])])

        graph = _traced("replay", replay, [p.spec for p in inputs], flat.constants)
        made = StepGraph(
            graph.graph,
            inputs,
            outputs,
            step.opaque,
            first_order=step.first_order,
            hooked=step.hooked,
            given=True,
            default_dtype=step.default_dtype,
        )
        # the graph of all tasks has no gradient node to be looked at
        vars(made).update(steps=step.steps, chunked=step.chunked)
        made.derived.replay = graph
        one = derived(step, self.hvp)
        there = [i for i, r in enumerate(results_of(one.graph)) if isinstance(r, fx.Node)]
        cotangents = [outputs[i].spec for i in step.cotangents]

        count = len(inputs) + len(cotangents)

        def vjp(*given: Tensor) -> tuple[Tensor | None, ...]:
            grads: list[Tensor | None] = [None] * len(inputs)
            run = _with_constants(one, given[count:])

            def each(*given: Tensor) -> tuple[Tensor, ...]:
                found = run(*given)
                return tuple([found[i] for i in there])

            found = torch.func.vmap(each, (*dims, *[0] * len(cotangents)))(*given[:count]) if there else ()
            for i, g in zip(there, found, strict=True):
                grads[i] = g.contiguous() if over[i] else g.sum(0)
            return tuple(grads)

        made.derived.vjp[self.hvp] = _traced(
            "vjp", vjp, [*(p.spec for p in inputs), *cotangents], one.constants, step.chunked
        )
        made.derivatives[self.hvp] = f"{step.derivatives.get(self.hvp, '')}, for {size} tasks at once"
        return made


def _chosen(given: Operand) -> Sequence[Operand]:
    return given.of if given.kind == "each" else (given,)


def _of_all(spec: TensorSpec, size: int, dim: int = 0) -> TensorSpec:
    """The spec of the tensors of all tasks together, which are contiguous."""
    shape = (*spec.shape[:dim], size, *spec.shape[dim:])
    return TensorSpec(shape, spec.dtype, torch.empty(shape, device="meta").stride(), spec.device)


def _with_constants(flat: FlatGraph, constants: Sequence[Tensor]) -> Callable[..., Any]:
    """A flat graph as a function, with these tensors in the place of its constants; it writes into nothing."""
    run = fx.GraphModule(dict(zip(flat.constants, constants, strict=True)), flat.graph).forward
    return torch.func.functionalize(run) if any(map(mutates, flat.graph.nodes)) else run


def _traced(
    kind: str,
    fn: Callable[..., tuple[Any, ...]],
    specs: Sequence[TensorSpec],
    constants: Mapping[str, Tensor] = MappingProxyType({}),
    chunked: bool = False,
) -> FlatGraph:
    """The flat graph of a function of all tasks, whose last arguments are ``constants`` of the graph."""
    with tracing(), FakeTensorMode(allow_non_fake_inputs=True):
        wanted = [*specs, *map(tensor_spec, constants.values())]
        fakes = [s.empty() for s in wanted]
        try:
            traced = flat_graph(fn, fakes)
        except (RuntimeError, ValueError) as error:
            raise CaptureError(
                f"vmap: a step cannot be taken for all tasks at once: {error}. Call the function for each task in a "
                "loop, or write the step with operators that torch.func.vmap knows"
            ) from error
    graph = traced.graph
    for node, (name, value) in zip(
        list(graph.find_nodes(op="placeholder"))[len(specs) :], constants.items(), strict=True
    ):
        with graph.inserting_after(node):  # by another name than those of the trace's own
            node.replace_all_uses_with(graph.get_attr(f"task{name}"))
        graph.erase_node(node)
        traced.constants[f"task{name}"] = value
    return cleaned(kind, traced, chunked)


def wrong(batched: BatchedStep, inputs: Sequence[Tensor], hvp: str) -> str | None:
    """What is wrong with a batched step's replay or VJP, on the first of the tasks in ``inputs``; None if nothing."""
    step, one, over = batched
    generator = torch.Generator().manual_seed(0)
    specs = [step.outputs[i].spec for i in step.cotangents]
    drawn = [torch.randn(s.shape[1:], generator=generator).to(s.device, s.dtype) for s in specs]
    given = [t[0] if o else t for t, o in zip(inputs, over, strict=True)]
    zeros = [torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in specs]
    if not _finite(replayed(step)(*inputs)) or not _finite(derived(step, hvp)(*inputs, *zeros)):
        # 0 · NaN of other tasks is no 0 in a sum over tasks
        inputs = [t[:1].expand_as(t) if o else t for t, o in zip(inputs, over, strict=True)]
    wide = [*inputs, *zeros]

    def first(results: Sequence[Tensor | None], held: Sequence[bool]) -> list[Tensor | None]:
        return [r if r is None or not of_all else r[0] for r, of_all in zip(results, held, strict=True)]

    def replay(*alone: Tensor) -> Sequence[Tensor | None]:
        found = replayed(step)(*_with_first(inputs, alone, over))
        return first(found, [True] * len(found))

    def vjp(
        *alone: Tensor,
    ) -> Sequence[Tensor | None]:  # a gradient summed over tasks is that of the first alone
        held = (*over, *[True] * len(specs))
        return first(derived(step, hvp)(*_with_first(wide, alone, held)), over)

    return difference(replayed(one).module, replay, given) or difference(
        derived(one, hvp).module, vjp, [*given, *drawn]
    )


def _finite(results: Sequence[Tensor | None]) -> bool:
    return all(bool(r.isfinite().all()) for r in results if r is not None)


def _with_first(wide: Sequence[Tensor], alone: Sequence[Tensor], over: Sequence[bool]) -> list[Tensor]:
    """Tensors of all tasks, with these in the place of the first task's."""
    found: list[Tensor] = []
    for t, one, of_all in zip(wide, alone, over, strict=True):
        if of_all:
            t = t.clone()
            t[0] = one
        found.append(t if of_all else one)
    return found
