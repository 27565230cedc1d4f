"""A step's VJP by mixed-mode differentiation: forward over reverse, with the layers of the step rematerialised.

With θ' = Υ(g, θ, s, η) and g = ∇_θ L(θ, η), cotangents of θ' and s' are first pulled back through Υ alone, which gives
u, the cotangent of g, and direct terms for θ, s, η. The rest of the gradient is
u·∂g/∂(θ, η) = ∂_t ∇_(θ,η) L(θ + t u, η) at t = 0, one forward-mode
derivative of a gradient (MixFlow-MG, arXiv 2505.00793): the second-order tape that reverse over reverse keeps is never
built. What remains alive are the activations of L and their tangents, and those are made
again layer by layer (`rematerialised`).
"""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import FakeTensorMode, OpOverload
from metaoptim.errors import MetaOptimError

from ..ir.operators import op_info
from ..ir.step import FlatGraph, StepGraph, gradient, show
from ..ir.values import reached
from .flat import Traced, flat_graph, tracing
from .graphs import alive_bytes, copied, drop_dead, merge_equal, mutates, peak_bytes, results_of, storages
from .norms import FORMULAS
from .reverse import checked, in_formulas, ports_of, pulled_back


class NotMixed(Exception):
    """The step has no mixed-mode derivative; the message says why."""


def mixed_vjp_graph(step: StepGraph) -> FlatGraph:
    """inputs, cotangents -> a cotangent, or None, per input.

    Raises:
        NotMixed: for several gradients in one step, hooks, custom Functions, in-place operators, random shapes, or an
            operator without a forward derivative.
    """
    if (reason := why_not_mixed(step)) is not None:
        raise NotMixed(reason)
    result: list[FlatGraph | Exception] = []

    def work() -> None:  # a trace through jvp that fails can poison autograd for its whole thread
        try:
            result.append(_MixedStep(step).vjp_graph())
        except (MetaOptimError, torch.OutOfMemoryError) as error:
            result.append(error)
        except Exception as error:  # whatever an operator without a forward derivative raises
            result.append(NotMixed(f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=work)
    with tracing(step.default_dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own forward mode uses torch.jit.script
        thread.start()
        thread.join()
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def why_not_mixed(step: StepGraph) -> str | None:
    """Why a step has no mixed-mode derivative, as far as that is seen without a trace."""
    if step.steps != 1:
        return f"it takes {step.steps} inner gradients"
    if step.chunked:
        return "its loss comes in chunks, which are made again one by one"
    if step.opaque or step.dynamic or step.hooked or step.first_order:
        return "it holds hooks, custom Functions, or shapes that depend on values"
    for node in step.graph.nodes:
        if isinstance(node.target, OpOverload) and op_info(node.target).writes:
            return f"it writes in place ({node.target})"
        if node.target in FORMULAS:
            return f"torch differentiates an operator of its loss wrongly ({node.target})"
    return None


class _MixedStep:
    """A step graph on either side of the node ``taken``, its gradient of ``loss`` by ``thetas``.

    The inputs at ``wanted`` get a cotangent. ``marks`` gives traced nodes the phase that `rematerialised` goes by.
    """

    def __init__(self, step: StepGraph) -> None:
        self.step, graph = step, step.graph
        (self.taken,) = (n for n in graph.nodes if n.target is gradient)
        self.loss, self.thetas = self.taken.args
        self.inputs, self.outputs = list(graph.find_nodes(op="placeholder")), results_of(graph)
        self.cotangents = step.cotangents
        self.wanted = [i for i, p in enumerate(step.inputs) if p.differentiable]
        self.marks: dict[str, str] = {}

    def vjp_graph(self) -> FlatGraph:
        """See `mixed_vjp_graph`."""
        free, count = self._is_linear(), len(self.inputs)

        def vjp(*args: Tensor) -> tuple:
            values, given = args[:count], args[count:]
            taken = self._run(self.thetas, values)
            first = [torch.zeros_like(t) for t in taken] if free else self._gradient(values, taken)
            direct, u = self._through_update(values, first, given)
            primal, tangent = self._forward_over_reverse(values, taken, u)
            if free:  # u did not need the gradient, but what the update gives for its other arguments may
                direct, _ = self._through_update(values, primal, given)
            found: list[Tensor | None] = [None] * count
            for i, a, b in zip(self.wanted, direct, tangent, strict=True):
                total = a if b is None else b if a is None else a + b
                # tangents of Python numbers are of the default dtype, and may widen those of scalars
                found[i] = None if total is None else total.to(values[i].dtype)
            return tuple(found)

        flat = checked(self._traced(vjp))
        if any(map(mutates, flat.graph.nodes)):
            return flat
        tried: list[fx.Graph] = []
        for held in (False, True):
            graph = copied(flat.graph)
            merge_equal(graph, held)
            tried.append(rematerialised(graph))
        peaks = [*map(peak_bytes, tried)]  # what is needed twice may be better computed twice than kept
        return FlatGraph(tried[peaks[1] < 0.95 * peaks[0]], flat.constants)

    def _is_linear(self) -> bool:
        """Whether u does not depend on the inner gradient itself."""
        count, thetas = len(self.inputs), len(self.thetas)

        def pull(*args: Tensor) -> tuple:
            values, given, grads = args[:count], args[count:-thetas], args[-thetas:]
            return tuple(self._through_update(values, grads, given)[1])

        graph = self._traced(pull, gradients=True).graph
        drop_dead(graph)
        return not any(n.users for n in list(graph.find_nodes(op="placeholder"))[-thetas:])

    def _traced(self, fn: Callable[..., tuple], gradients: bool = False) -> Traced:
        """A function of the step's inputs and cotangents, and of its inner gradient, as a flat graph."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            given = [p.spec.empty() for p in ports_of(self.step, "vjp")]
            if gradients:
                given += [torch.empty_like(t) for t in self._run(self.thetas, given[: len(self.inputs)])]
            return flat_graph(fn, given, in_formulas(self.step), marks=self.marks)

    def _run(
        self, wanted: Sequence[fx.Node], values: Sequence[Tensor], known: Mapping[fx.Node, Any] | None = None
    ) -> list[Any]:
        """The values of nodes, from those of the inputs and of ``known`` ones: only what they depend on is run."""
        env: dict[fx.Node, Any] = dict(zip(self.inputs, values, strict=True)) | dict(known or {})
        needed = reached(wanted, lambda n: () if n in env else n.all_input_nodes)
        for node in sorted(n for n in needed if n not in env):
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            target: Any = (lambda t: t.view_as(t)) if node.target is show else node.target
            with torch.set_grad_enabled(node.meta.get("grad", True) and torch.is_grad_enabled()):
                env[node] = target(*args, **kwargs)
        return [env[n] for n in wanted]

    def _loss(self, values: Sequence[Tensor], thetas: Sequence[Tensor]) -> Tensor:
        """L, from the step's inputs, with ``thetas`` in the place of what the gradient is taken by."""
        (loss,) = self._run([self.loss], values, dict(zip(self.thetas, thetas, strict=True)))
        return loss

    def _leaves(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [
            v.detach().requires_grad_(p.differentiable) for v, p in zip(values, self.step.inputs, strict=True)
        ]

    def _gradient(self, values: Sequence[Tensor], taken: Sequence[Tensor]) -> Sequence[Tensor]:
        leaves = [t.detach().requires_grad_() for t in taken]
        with torch.enable_grad():
            self.marks["phase"] = "first forward"
            loss = self._loss([v.detach() for v in values], leaves)
            self.marks["phase"] = "first backward"
            grads = torch.autograd.grad(loss, leaves)
            self.marks.clear()
        return grads

    def _through_update(
        self, values: Sequence[Tensor], grads: Sequence[Tensor], given: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], list[Tensor]]:
        """Cotangents pulled back through what follows the gradient: for the wanted inputs, and for the gradient."""
        with torch.enable_grad():
            held, taken = self._leaves(values), [g.detach().requires_grad_() for g in grads]
            results = self._run(self.outputs, held, {self.taken: tuple(taken)})
            sources = [held[i] for i in self.wanted] + taken
            found = pulled_back([results[i] for i in self.cotangents], given, sources)
        count = len(self.wanted)
        u = [torch.zeros_like(g) if f is None else f for f, g in zip(found[count:], grads, strict=True)]
        return found[:count], u

    def _forward_over_reverse(
        self, values: Sequence[Tensor], taken: Sequence[Tensor], u: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], list[Tensor | None]]:
        """∇_θ L, and for the wanted inputs the derivative of ∇L by θ in direction u."""
        count = len(taken)
        others = [i for i in self.wanted if self.inputs[i] not in self.thetas]

        def loss(*arguments: Tensor) -> Tensor:
            inside = list(values)
            for i, argument in zip(others, arguments[count:], strict=True):
                inside[i] = argument
            self.marks["phase"] = "forward"
            result = self._loss(inside, arguments[:count])
            self.marks["phase"] = "backward"
            return result.reshape(())

        def gradients(*thetas: Tensor) -> tuple[Tensor, ...]:
            arguments = (*thetas, *(values[i] for i in others))
            return torch.func.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)

        self.marks["phase"] = "backward"
        primal, tangent = torch.func.jvp(gradients, tuple(taken), tuple(u))  # pyright: ignore[reportAssignmentType]
        self.marks.clear()
        found: dict[int, Tensor] = dict(zip(others, tangent[count:], strict=True))
        with torch.enable_grad():  # theta may itself be made of inputs
            held = self._leaves(values)
            sources = [held[i] for i in self.wanted]
            through = pulled_back(self._run(self.thetas, held), tangent[:count], sources)
            for i, g in zip(self.wanted, through, strict=True):
                if g is not None:
                    found[i] = found[i] + g if i in found else g
        return primal[:count], [found.get(i) for i in self.wanted]


# -- rematerialisation ------------------------------------------------------------------------------------------------
# The forward half of a graph is cut at narrow places, and each part run again for its backward: between two cuts only
# what crosses them stays alive. Candidates are the places where least is alive; the lowest peak decides.

_WIDTHS = 6  # how many widths of cuts are tried


def rematerialised(graph: fx.Graph) -> fx.Graph:
    """``graph`` with the nodes of a forward phase made again, part by part, for those that read them later.

    Nodes say in ``meta["phase"]`` where they belong; both forward phases are looked at.
    """
    best, least = graph, peak_bytes(graph)
    for phase in ("first forward", "forward"):
        start = best
        for cuts in _proposals(start, phase):
            tried = _cut(start, phase, cuts)
            peak = peak_bytes(tried)
            if peak < 0.95 * least:
                best, least = tried, peak
    return best


def _of_phase(graph: fx.Graph, phase: str) -> list[fx.Node]:
    return [n for n in graph.nodes if n.meta.get("phase") == phase]


def _makers(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Which node makes each piece of memory."""
    return {s: n for n in reversed(graph.nodes) for s, _ in storages(n)}


def _proposals(graph: fx.Graph, phase: str) -> list[tuple[int, ...]]:
    """Ordinals of nodes of ``phase`` to cut after: where less is alive than around, up to some width, all or half."""
    nodes = _of_phase(graph, phase)
    elsewhere = {s for s, n in _makers(graph).items() if n.meta.get("phase") != phase}
    alive = alive_bytes(nodes, elsewhere, after=True)
    inner = range(1, len(nodes) - 1)
    narrow = [i for i in inner if 0 < alive[i] < alive[i - 1] and alive[i] <= alive[i + 1]]
    found: dict[tuple[int, ...], None] = {}
    for limit in sorted({alive[i] for i in narrow})[:_WIDTHS]:
        chosen = [i for i in narrow if alive[i] <= limit]
        found |= {tuple(chosen[::stride]): None for stride in (1, 2)}
    return list(found)


def _cut(graph: fx.Graph, phase: str, cuts: Sequence[int]) -> fx.Graph:
    """A copy of ``graph`` in which all that reads a value of ``phase`` from outside of it reads one made again."""
    new = copied(graph)
    home = _makers(new)
    part = {n: bisect_left(cuts, i) for i, n in enumerate(_of_phase(new, phase))}
    crossing = {n for n in part if any(part.get(u, part[n]) != part[n] for u in n.users)}
    dropped = {n for n in part if n not in crossing and part[n] != len(cuts)}
    again: dict[fx.Node, fx.Node] = {}

    def name_memory(node: fx.Node, of: fx.Node) -> None:
        """``node`` lies where ``of`` does, or where that has been made again."""
        node.meta["memory"] = tuple(
            (("again", s) if home[s] in again else s, size) for s, size in storages(of)
        )

    for node in list(new.nodes):
        if node in part:
            continue
        reads = [a for a in node.all_input_nodes if a in dropped]
        missing = reached(reads, lambda n: [a for a in n.all_input_nodes if a in dropped])
        with new.inserting_before(node):
            for top in sorted(n for n in missing if n not in again):
                again[top] = new.node_copy(top, lambda a: again.get(a, a))
                name_memory(again[top], top)
        for used in reads:
            node.replace_input_with(used, again[used])
        name_memory(node, node)
    new.lint()
    return new
