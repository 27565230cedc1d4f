"""The step of a `torch.optim.Optimizer`, captured as a pure graph for one parameter.

The optimizer's own ``step`` runs once over fake tensors, on an instance that has this parameter alone. What it calls is
written down: (parameter, gradient, state, hyper-parameters) -> (parameter, state). Nothing is written again by hand.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    compiling_flag,
    init_group,
    outside_transforms,
    unset_fake_temporarily,
)
from metaoptim.compiler.derive.flat import Traced, flat_graph, tracing
from metaoptim.compiler.ir.bindings import bound
from metaoptim.compiler.ir.tensors import tensor_spec
from metaoptim.errors import CaptureError, MetaOptimError

from ..base.hyper import safe_sqrt
from .shims import Decides, Numbers, shims

State = dict[str, Tensor]

#: What to do about a step that cannot be captured.
INSTEAD = "write it as init_state and update of a metaoptim.MetaOptimizer (docs/optimizers.md)"
#: Options that say how torch runs a step, not what it computes.
HOW = {"foreach": False, "fused": False, "differentiable": False, "capturable": False}
_aten = torch.ops.aten


class Source(NamedTuple):
    """Whose step it is: a class, and what its instances have beside parameters, groups and state."""

    cls: type[torch.optim.Optimizer]
    attributes: tuple[tuple[str, Any], ...] = ()
    surroundings: tuple[Any, ...] = ()  # what its functions read of their module and class
    # Integers in the groups that a step changes, with what they begin at, if they are there: they are state here.
    counted: tuple[tuple[str, int | None], ...] = ()
    numbers: tuple[str, ...] = ()  # what is a Python number in the optimizer's own state

    def instance(self, groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> Any:
        """An optimizer of this class with given groups and state; no constructor runs."""
        made = object.__new__(self.cls)
        made.__dict__.update(
            _optimizer_step_pre_hooks=OrderedDict(),
            _optimizer_step_post_hooks=OrderedDict(),
            defaults={k: v for k, v in groups[0].items() if k != "params"},
            param_groups=groups,
            state=defaultdict(dict, state),
        )
        made.__dict__.update(copy.deepcopy(dict(self.attributes)))
        return made


class Captured(NamedTuple):
    """A captured step, or the making of an initial state."""

    run: Callable[..., tuple[Tensor, ...]]
    names: tuple[str, ...]  # of the states it returns, after the parameter
    counts: tuple[int, ...]  # places of arguments that are counts: nothing is learnt through them


def initial(source: Source, param: Tensor, hyper: Mapping[str, Any]) -> State:
    """The state before the first step; {} for an optimizer that makes it in the step."""
    counts = {k: torch.tensor(float(n), dtype=torch.float64) for k, n in source.counted if n is not None}
    return widened(step(source, param, None, {}, hyper)[1], param) | counts


def widened(state: State, param: Tensor) -> State:
    """A state with its counts and products in float64: float32 loses digits of what is computed from them."""
    return {
        k: v.double() if param.dim() and not v.dim() and v.is_floating_point() else v
        for k, v in state.items()
    }


def step(
    source: Source, param: Tensor, grad: Tensor | None, state: State, hyper: Mapping[str, Any]
) -> tuple[Tensor, State]:
    """One step of one parameter: new tensors, differentiable by all that is given.

    Without a gradient no step is made: the state is the initial one.
    """
    numbers: list[Any] = []
    options = tuple([(name, HOW[name] if name in HOW else outline(v, numbers)) for name, v in hyper.items()])
    tensors = [param] if grad is None else [param, grad]
    tensors += widened(state, param).values()
    tensors += [v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in numbers]
    specs = tuple([(t.shape, t.dtype, t.stride(), t.device) for t in tensors])
    captured = _captured(source, grad is not None, tuple(state), options, specs)
    for i in captured.counts:
        tensors[i] = tensors[i].detach()
    new, *after = captured.run(*tensors)
    return new, dict(zip(captured.names, after, strict=True))


def outline(value: Any, numbers: list[Any]) -> Any:
    """A hyper-parameter with `Given` in the place of what a graph is given, which is put into ``numbers``.

    A float other than 0 is given, too, so that a new learning rate needs no new graph; 0 switches a term off.
    """
    if isinstance(value, Tensor) or (type(value) is float and value != 0 and math.isfinite(value)):
        numbers.append(value)
        return Given
    if isinstance(value, (tuple, list)):
        return tuple([outline(v, numbers) for v in value])
    return value


def _filled(outline: Any, numbers: Iterator[Tensor]) -> Any:
    if outline is Given:
        return next(numbers)
    return tuple(_filled(v, numbers) for v in outline) if type(outline) is tuple else outline


class Given:
    """Stands for a hyper-parameter that a graph is given."""


@functools.lru_cache(maxsize=1024)
def _captured(
    source: Source,
    steps: bool,
    states: tuple[str, ...],
    options: tuple[tuple[str, Any], ...],
    specs: tuple[tuple[torch.Size, torch.dtype, tuple[int, ...], torch.device], ...],
) -> Captured:
    """The graph of a step (or of an initial state) for tensors like these."""
    names: list[str] = []

    def run(capturable: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        param = next(rest).clone()
        param.grad = next(rest).clone() if steps else torch.zeros_like(param)
        state = {name: next(rest).clone() for name in states}
        numbers = list(rest)
        given = iter(numbers)
        group = {name: _filled(value, given) for name, value in options}
        if capturable:
            group["capturable"] = True
        for name, _ in source.counted:
            if name in state:
                group[name] = state.pop(name)
        low = group.pop("ns_dtype", torch.bfloat16)
        optimizer = source.instance([{"params": [param], **group}], {param: state} if state else {})
        with torch.no_grad(), compiling_flag(), Numbers(numbers, low), shims():
            if steps:
                step_of(source.cls)(optimizer)
            else:
                init_group(optimizer)
        after = dict(optimizer.state.get(param, {}))
        now = optimizer.param_groups[0]
        after |= {name: now[name] for name, _ in source.counted if name in now}
        kept = as_tensors(source.cls, {k: v for k, v in after.items() if v is not None})
        names[:] = kept
        return (param, *kept.values())

    def write(capturable: bool) -> Traced:
        with tracing(), FakeTensorMode(allow_non_fake_inputs=True):
            fakes = [torch.empty_strided(size, at, dtype=dtype, device=on) for size, dtype, at, on in specs]
            traced = flat_graph(torch.func.functionalize(functools.partial(run, capturable)), fakes)
            if any(t.requires_grad for t in traced.constants.values()):
                raise CaptureError(
                    f"{source.cls.__name__}.step reads a tensor that requires grad and is no hyper-parameter, so that "
                    "it would get no gradient; make it an option of the parameter groups"
                )
            _Specs(fx.GraphModule(traced.constants, traced.graph)).run(*fakes)
        _tidy(traced.graph, _root_or_0 if capturable else safe_sqrt)
        return traced

    with unset_fake_temporarily(), outside_transforms():  # those of torch.func
        try:
            found = write(False)
        except (DataDependentOutputException, DynamicOutputShapeException, Decides) as error:
            if "capturable" not in dict(options):
                raise _refused(source, error) from error
            # There torch decides by `torch.where`, and not in Python.
            try:
                found = write(True)
            except (DataDependentOutputException, DynamicOutputShapeException, Decides) as again:
                raise _refused(source, again) from again
        except MetaOptimError:
            raise
        except Exception as error:
            raise _refused(source, error) from error
    program = fx.GraphModule(found.constants, bound(found.graph)).forward
    return Captured(program, tuple(names), _counts(found.graph, names, states, 1 + steps))


def _counts(graph: fx.Graph, after: Sequence[str], before: Sequence[str], first: int) -> tuple[int, ...]:
    """Places of states that a step adds a number to, and that are made of nothing else."""
    places = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    (made,) = next(reversed(graph.nodes)).args
    counts = []
    for name, node in zip(after, made[1:], strict=True):
        added = False
        while node.target is _aten.add.Tensor and isinstance(node.args[1], (int, float)):
            node, added = node.args[0], True
        if added and name in before and places.get(node) == first + before.index(name):
            counts.append(places[node])
    return tuple(counts)


class _Specs(fx.Interpreter):
    """Notes what each node of a graph makes."""

    def run_node(self, n: fx.Node) -> Any:
        """As the base."""
        made = super().run_node(n)
        n.meta["spec"] = tensor_spec(made)[:2] if isinstance(made, Tensor) else None
        return made


def _tidy(graph: fx.Graph, root: Callable[[Tensor], Tensor]) -> None:
    """Without copies that nobody needs where nothing is changed in place, and with derivatives that are finite."""
    for node in graph.nodes:
        if node.target is _aten.clone.default and node.args[0].op == "placeholder":
            node.replace_all_uses_with(node.args[0])
        elif node.target is _aten.copy.default:
            if node.args[0].meta["spec"] == node.args[1].meta["spec"]:
                node.replace_all_uses_with(node.args[1])
            node.target = _copied
        elif node.target is _aten.sqrt.default or (
            node.target is _aten.pow.Tensor_Scalar and node.args[1] == 0.5
        ):
            node.target, node.args = root, node.args[:1]
    graph.eliminate_dead_code()


def _root_or_0(x: Tensor) -> Tensor:
    """The square root for what a `torch.where` chooses: where it does not, 0 · NaN would make NaN of a derivative."""
    return safe_sqrt(x.clamp(min=0))


def _copied(into: Tensor, value: Tensor) -> Tensor:
    """What ``into.copy_(value)`` makes of it; `aten.copy` has no derivative."""
    return value.to(into.dtype).broadcast_to(into.shape).clone()


def step_of(owner: Any) -> Callable[..., Any]:
    """The function ``step`` of an optimizer or a class, without what torch has wrapped around it."""
    step = owner.step
    while hasattr(step, "__wrapped__") and step.__globals__["__name__"].partition(".")[0] == "torch":
        step = step.__wrapped__
    return getattr(step, "__func__", step)


def _refused(source: Source, error: Exception) -> CaptureError:
    file = inspect.getsourcefile(step_of(source.cls))
    trace = error.__traceback__
    frames = [f for f in inspect.getinnerframes(trace) if f.filename == file] if trace is not None else []
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    asks = isinstance(error, DataDependentOutputException)
    why = "it asks in Python for the value of a tensor" if asks else error
    return CaptureError(
        f"{source.cls.__name__}.step cannot be captured{where}: {why}. A step must compute with tensors, and decide "
        f"by torch.where; {INSTEAD}"
    )


def as_tensors(cls: type, state: Mapping[str, Any]) -> State:
    """What a step has left as state, as tensors."""
    found: State = {}
    for name, value in state.items():
        if not isinstance(value, (Tensor, int, float)):
            raise CaptureError(
                f"{cls.__name__} keeps {type(value).__name__} as state {name!r}, expected tensors and numbers; "
                f"{INSTEAD}"
            )
        number = not isinstance(value, Tensor)
        found[name] = torch.tensor(float(value), dtype=torch.float64) if number else value
    return found
