"""prune: what no gradient can reach takes part in no derivative."""

from __future__ import annotations

from ..ir.owners import identity
from ..ir.segments import Draft, Unit, sources
from ..ir.trace import Noise
from ..ir.values import Value


def prune(draft: Draft) -> str:
    """Find which inputs and outputs of each part depend on something that requires grad."""
    rounds = True
    while rounds:
        rounds = False
        for unit in draft.units:
            body = unit.body
            now = {at for at, ref in enumerate(unit.segment.inputs) if _active(draft, ref)}
            if now - body.active or (not body.active_outputs and now):
                body.active |= now
                found = _spread(body.units[0], body.active) & set(body.outputs)
                rounds |= bool(found - body.active_outputs)
                body.active_outputs |= found
    total = sum(len(b.outputs) for b in draft.bodies)
    active = sum(len(b.active_outputs) for b in draft.bodies)
    return f"{total - active} of {total} values passed between parts carry no gradient"


def keep_all(draft: Draft) -> str:
    """Take everything for differentiable: what prune saves is then computed."""
    for body in draft.bodies:
        inputs = body.units[0].segment.inputs
        body.active = {at for at, ref in enumerate(inputs) if not isinstance(ref, Noise)}
        body.active_outputs = set(body.outputs)
    return "left out; everything is differentiated"


def _active(draft: Draft, ref: object) -> bool:
    if not isinstance(ref, Value):
        return bool(getattr(ref, "grad", False))
    unit = draft.units[draft.unit_of[id(ref.entry)]]
    return (unit.segment.number_of[id(ref.entry)], ref.index) in unit.body.active_outputs


def _spread(unit: Unit, inputs: set[int]) -> set[tuple]:
    """Places of the calls' outputs that depend on the inputs at ``inputs``."""
    segment = unit.segment
    given = {identity(segment.inputs[at]) for at in inputs}
    reached: set[int] = set()
    for entry in segment.entries:
        if any(
            (isinstance(a, Value) and id(a.entry) in reached) or identity(a) in given for a in sources(entry)
        ):
            reached.add(id(entry))
    found = set()
    for number, index in unit.body.outputs:
        entry = segment.entries[number]
        if id(entry) in reached:
            found.add((number, index))
    return found
