"""The graphs of a step, derived and lowered on first use: its VJP by reverse over reverse, or by mixed mode."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor

from metaoptim.errors import CaptureError

from ..compat import FakeTensorMode
from ..derive.flat import default_dtype
from ..derive.forward import pushed_forward, transposable, zero_cotangents
from ..derive.graphs import peak_bytes, work_of
from ..derive.mixed import NotMixed, mixed_vjp_graph, why_not_mixed
from ..derive.residuals import split
from ..derive.reverse import derived_by_running, derived_by_tracing, loss_graph
from ..ir.step import EAGER, FlatGraph, Lowered, Lowering, Split, StepGraph
from ..ir.tensors import TensorSpec, tensor_spec
from ..ir.text import readable_bytes
from .ambient import with_default_dtype
from .compile_graph import compiled
from .cuda_graphs import captured
from .files.remembered import Derivation, remembered
from .processes.handover import Handover, elsewhere, tell, waits

#: Below this many live bytes of reverse over reverse there is nothing worth saving: mixed mode takes a third more work.
WORTH_SAVING = 64 << 20
#: A graph of which so much has run (`work_of`) has taken about a second.
PAYS = 300_000
#: Where the user has asked for compiled graphs, one that runs again and again is compiled sooner.
ASKED = 20_000


def lowered(
    step: StepGraph, kind: str, inputs: Sequence[Tensor], lowering: Lowering = EAGER, at_once: bool = False
) -> Lowered:
    """The callable for one of a step's graphs, traced and compiled on first use.

    Args:
        step: the step.
        kind: "replay" or "vjp"; "loss", the VJP of its loss alone; "forward" or "backward" of its `residuals`.
        inputs: what it will be called with first.
        lowering: the backend and HVP mode of the step graphs.
        at_once: it is called with ``inputs`` now and no more, so a graph may be found by running the step.
    """
    program = step.derived.lowered.get((kind, lowering))
    if program is not None:
        return program
    of, what = _source(step, kind, inputs)
    # a compiler would move operators from chunk to chunk, and take long
    backend, hvp = "eager" if step.chunked else lowering.backend_of(kind), lowering.hvp
    results = _by_running(of, what, inputs, hvp) if at_once and backend == "eager" else None
    graph = _flat(of, what, hvp, inputs)
    cotangents = 0 if kind in ("replay", "forward") else len(of.cotangents)

    def lower(part: FlatGraph, given: Sequence[Tensor], cotangents: int) -> Lowered:
        if backend == "eager":
            return part
        with default_dtype(step.default_dtype):
            return compiled(part, given, backend, cotangents, lowering.check)

    if lowering.cuda_graphs and not step.chunked and not step.dynamic:
        program = captured(graph, inputs, cotangents, lower)
    else:
        program = lower(graph, inputs, cotangents)
    if backend != "eager":
        step.derived.since[kind, lowering] = time.time()
    program = step.derived.lowered[kind, lowering] = with_default_dtype(step.default_dtype, program)
    return program if results is None else lambda *_: results


def taken(
    step: StepGraph, kind: str, inputs: Sequence[Tensor], lowering: Lowering, later: bool = False
) -> Lowering:
    """How a step's graph runs now: by ``lowering`` once its compiled form is there, and as it is until then.

    With ``later``, only compiled forms are run that have been before: to check one takes memory.
    """
    asked = lowering
    if step.chunked:
        return lowering.uncompiled
    if lowering.backend == "auto":
        if not _pays(step, kind, lowering):
            return lowering.uncompiled
        lowering = lowering.compiled
    if (kind, lowering) in step.derived.lowered or lowering.backend_of(kind) != "inductor":
        return lowering
    if not elsewhere(inputs):
        return lowering if asked is lowering else lowering.uncompiled
    if waits() and asked is lowering:
        return lowering
    coming = step.derived.coming.get((kind, lowering))
    if coming is None and (kind, lowering.uncompiled) in step.derived.lowered:
        of, what = _source(step, kind, inputs)
        coming = _begun(step, kind, lowering, _flat(of, what, lowering.hvp, inputs), map(tensor_spec, inputs))
    if waits() and coming is not None:  # compiling was nobody's wish, so that it fails is no error
        coming.wait()
    if later or coming is None or not coming.ended:
        return lowering.uncompiled
    if coming.complaint is not None:
        tell(coming.complaint, asked is lowering)
        step.derived.lowered[kind, lowering] = lowered(step, kind, inputs, lowering.uncompiled)
    return lowering


def _pays(step: StepGraph, kind: str, lowering: Lowering) -> bool:
    """Whether a graph has taken so long by now that compiling it is no waste."""
    derived, graph = step.derived, None
    divided = derived.splits.get(lowering.hvp)
    if kind == "vjp":
        graph = derived.vjp.get(lowering.hvp)
    elif kind == "replay" and lowering.replays:
        graph = derived.replay
    elif kind in ("forward", "backward") and divided is not None:
        graph = divided.forward if kind == "forward" else divided.backward
    if graph is None or step.dynamic:
        return False
    runs = derived.runs[kind] = derived.runs.get(kind, 0) + 1
    if kind not in derived.work:
        derived.work[kind] = work_of(graph.graph)
    return runs > 1 and runs * derived.work[kind] > (PAYS if lowering.patient else ASKED)


def begin(step: StepGraph, lowering: Lowering, saving: bool = False) -> None:
    """Have a step's replay and VJP compiled, before they are needed for the first time.

    When ``saving`` residuals, these are its forward and backward.
    """
    states, outputs = [p.spec for p in step.inputs], step.cotangents
    if lowering.backend != "inductor" or step.dynamic or step.chunked or not elsewhere(states):
        return
    again, back = ("forward", "backward") if saving else ("replay", "vjp")
    for kind in (back, again) if outputs else (again,):  # the derivative takes longer
        if (
            not {(kind, lowering)} & {*step.derived.coming, *step.derived.lowered}
            and lowering.backend_of(kind) != "eager"
        ):
            given = [*states]
            if kind == back:
                given += _residual_specs(step, lowering.hvp) if saving else ()
                given += [step.outputs[i].spec for i in outputs]
            _begun(step, kind, lowering, _flat(step, kind, lowering.hvp, ()), given)


def divisible(step: StepGraph, lowering: Lowering) -> bool:
    """Whether a step may run as its forward with residuals and its backward from now on, if it has any.

    Where graphs are compiled meanwhile, these come after the replay and the VJP: they are derived from both.
    """
    if step.dynamic or step.chunked or not step.cotangents:
        return True  # it stays whole
    if lowering.backend != "inductor" or waits() or not elsewhere(p.spec for p in step.inputs):
        return True
    if not (_is_there(step, "replay", lowering) and _is_there(step, "vjp", lowering)):
        return False
    if residuals(step, lowering.hvp) is None:
        return True
    begin(step, lowering, saving=True)
    return _is_there(step, "forward", lowering) and _is_there(step, "backward", lowering)


def compiled_with_residuals(step: StepGraph, lowering: Lowering) -> Lowering | None:
    """How a step of an ordinary window runs compiled, forward and backward, once both graphs are there.

    They are begun when the compiled form of its derivative is there: compiling it has paid.
    """
    if lowering.backend not in ("inductor", "auto"):
        return None
    asked, how, kinds = lowering.compiled, lowering.compiled.whole, ("forward", "backward")
    if all(_is_there(step, kind, how) for kind in kinds):
        return how
    if not _is_there(step, "vjp", asked) or not elsewhere(p.spec for p in step.inputs):
        return None
    if step.dynamic or step.chunked or residuals(step, lowering.hvp) is None:
        return None
    return how if compiled_in_time(step, how, saving=True) else None


def compiled_in_time(step: StepGraph, lowering: Lowering, saving: bool) -> bool:
    """Whether the compiled forms of a step's replay and VJP are there, which are begun; or of forward and backward."""
    begin(step, lowering, saving)
    kinds = ("forward", "backward") if saving else ("replay", "vjp")
    for kind in kinds if waits() else ():
        if (coming := step.derived.coming.get((kind, lowering))) is not None:
            coming.wait()
    return all(_is_there(step, kind, lowering) for kind in kinds)


def _is_there(step: StepGraph, kind: str, lowering: Lowering) -> bool:
    """Whether there is the compiled form of a graph."""
    coming = step.derived.coming.get((kind, lowering))
    there = coming is not None and coming.ended and coming.complaint is None
    return there or (kind, lowering) in step.derived.lowered


def _residual_specs(step: StepGraph, hvp: str) -> list[TensorSpec]:
    divided = residuals(step, hvp)
    assert divided is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = divided.forward(*(p.spec.empty() for p in step.inputs))
    return [tensor_spec(made[i]) for i in divided.residuals]


def _begun(
    step: StepGraph, kind: str, lowering: Lowering, graph: FlatGraph, given: Iterable[TensorSpec]
) -> Handover:
    with default_dtype(step.default_dtype):
        step.derived.coming[kind, lowering] = coming = Handover(graph, list(given))
    return coming


def settled(steps: Sequence[StepGraph], lowering: Lowering) -> Lowering:
    """What ``steps`` run by from now on: ``lowering``, unless there is one whose compiled form is not there."""
    if (
        lowering.backend != "inductor"
        or waits()
        or not all(elsewhere(p.spec for p in s.inputs) for s in steps)
    ):
        return lowering
    coming = [c for step in steps for (_, how), c in step.derived.coming.items() if how == lowering]
    there = bool(coming) and all(c.ended and c.complaint is None for c in coming)
    return lowering if there else lowering.uncompiled


def compiled_since(step: StepGraph) -> dict[str, str]:
    """For each kind of graph that is or will be compiled, since when it runs so."""
    derived, found = step.derived, dict[str, str]()
    for key, coming in derived.coming.items():
        if not coming.ended:
            found[key[0]] = "being compiled"
        else:
            found[key[0]] = (
                f"not compiled: {coming.complaint}" if coming.complaint else "from its next run on"
            )
    for (kind, _), seconds in derived.since.items():
        found[kind] = f"since {time.strftime('%H:%M:%S', time.localtime(seconds))}"
    return found


def _source(step: StepGraph, kind: str, inputs: Sequence[Tensor]) -> tuple[StepGraph, str]:
    """What a kind of graph is derived from, and how: of the loss, whose cotangent looks like it, it is the VJP."""
    if kind != "loss":
        return step, kind
    step.derived.loss = step.derived.loss or loss_graph(step, tensor_spec(inputs[-1]))
    return step.derived.loss, "vjp"


def _flat(step: StepGraph, kind: str, hvp: str, inputs: Sequence[Tensor]) -> FlatGraph:
    example = inputs if step.dynamic else None
    if kind in ("forward", "backward"):
        divided = residuals(step, hvp)
        assert divided is not None
        return divided.forward if kind == "forward" else divided.backward
    return derived(step, hvp, example) if kind == "vjp" else replayed(step, example)


def loss_of(step: StepGraph, inputs: Sequence[Tensor], spec: TensorSpec) -> Lowered:
    """A step's loss, which has this ``spec``, as a function of the step's inputs."""
    step.derived.loss = step.derived.loss or loss_graph(step, spec)
    return lowered(step.derived.loss, "replay", inputs)


def replayed(step: StepGraph, example: Sequence[Tensor] | None = None) -> FlatGraph:
    """The flat graph of a step's replay; ``example``: real inputs, for a step whose shapes depend on values."""
    if step.derived.replay is None:
        (step.derived.replay,), _ = remembered(
            step, "replay", lambda: ([derived_by_tracing(step, "replay", example)], "")
        )
    return step.derived.replay


def derived(step: StepGraph, hvp: str, example: Sequence[Tensor] | None = None) -> FlatGraph:
    """The flat graph of a step's VJP, by the mode ``hvp`` asks for; `StepGraph.derivatives` notes what it became.

    "auto" is mixed where that is legal and takes much less memory than a reverse over reverse that takes a lot.
    """
    found = step.derived.vjp.get(hvp)
    if found is None:
        kind = f"vjp, {hvp} from {WORTH_SAVING}"
        (found,), step.derivatives[hvp] = remembered(step, kind, partial(_derived, step, hvp, example))
        step.derived.vjp[hvp] = found
    return found


def _derived(step: StepGraph, hvp: str, example: Sequence[Tensor] | None) -> Derivation:
    if hvp != "mixed" or not step.steps:
        return _chosen(step, hvp, derived_by_tracing(step, "vjp", example))
    try:
        found = mixed_vjp_graph(step)
    except NotMixed as error:
        raise CaptureError(
            f"hvp='mixed': a step has no mixed-mode derivative: {error}. Use hvp='auto' or 'reverse'"
        ) from error
    return [found], f"mixed, {readable_bytes(peak_bytes(found.graph))} alive"


def pushed(
    step: StepGraph, hvp: str, inputs: Sequence[Tensor], directions: Sequence[Mapping[int, Tensor]]
) -> list[dict[int, Tensor]]:
    """`pushed_forward` through a step, by the VJP that the mode ``hvp`` gives it."""
    graph = step.derived.transposable.get(hvp)
    if graph is None:
        example = [*inputs, *zero_cotangents(step)] if step.dynamic else None
        graph = step.derived.transposable[hvp] = transposable(derived(step, hvp, example))
    return pushed_forward(step, graph, inputs, directions)


def _chosen(step: StepGraph, hvp: str, reverse: FlatGraph) -> Derivation:
    """The derivative of a step, given the one by reverse over reverse, and what it is."""
    peak = peak_bytes(reverse.graph)
    note = f"reverse, {readable_bytes(peak)} alive"
    if hvp == "auto" and step.steps and peak > WORTH_SAVING:
        try:
            mixed = mixed_vjp_graph(step)
        except NotMixed as error:
            return [reverse], f"{note} (not mixed: {error})"
        less = peak_bytes(mixed.graph)
        if less < 0.6 * peak:
            return [mixed], f"mixed, {readable_bytes(less)} alive instead of {readable_bytes(peak)}"
    return [reverse], note


def _by_running(
    step: StepGraph, kind: str, inputs: Sequence[Tensor], hvp: str
) -> Sequence[Tensor | None] | None:
    """What a replay or VJP gives that has not been traced yet; None where it has been, or must be traced by itself."""
    known = step.derived.replay if kind == "replay" else step.derived.vjp.get(hvp)
    if (
        known is not None
        or kind not in ("replay", "vjp")
        or (kind == "vjp" and not _reverse_will_do(step, hvp))
    ):
        return None
    found = derived_by_running(step, kind, inputs)
    if found is None:
        return None
    graph, results = found
    if kind == "vjp":
        (step.derived.vjp[hvp],), step.derivatives[hvp] = _chosen(step, hvp, graph)
    else:
        step.derived.replay = graph
    return results


def _reverse_will_do(step: StepGraph, hvp: str) -> bool:
    """Whether reverse over reverse may run before it is known what it takes: where that is little, or all there is."""
    if hvp != "auto":
        return hvp == "reverse"
    replay = step.derived.replay
    small = replay is not None and 4 * peak_bytes(replay.graph) < WORTH_SAVING
    return small or why_not_mixed(step) is not None


def residuals(step: StepGraph, hvp: str) -> Split | None:
    """How a step and its derivative can share work; None if they cannot."""
    splits = step.derived.splits
    if hvp not in splits:
        learnt = any(p.differentiable for p in step.inputs) and step.cotangents
        splits[hvp] = None
        if learnt and not step.dynamic and not step.chunked:
            graphs, facts = remembered(step, f"split, {hvp} from {WORTH_SAVING}", partial(_split, step, hvp))
            if graphs:
                splits[hvp] = Split(graphs[0], graphs[1], **facts)
    return splits[hvp]


def _split(step: StepGraph, hvp: str) -> Derivation:
    found = split(step, replayed(step), derived(step, hvp))
    if found is None:
        return (), None
    facts = {"residuals": found.residuals, "fresh": found.fresh, "saves": found.saves, "shared": found.shared}
    return (found.forward, found.backward), facts
