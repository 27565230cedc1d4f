"""prune: what no gradient can reach takes part in no derivative."""

from __future__ import annotations

from ...ir.traces.trace import OutputAt, Part, Partition, sources
from ...ir.values import Noise, Value, identity
from ..options import Options


def prune(partition: Partition, options: Options) -> tuple[Partition, str]:
    """Find which inputs and outputs of each part depend on something that requires grad."""
    changing = True
    while changing:
        changing = False
        for part in partition.parts:
            kind = part.kind
            now = {at for at, ref in enumerate(part.segment.inputs) if _active(partition, ref)}
            if now - kind.active or (not kind.active_outputs and now):
                kind.active |= now
                found = _spread(kind.parts[0], kind.active)
                changing |= bool(found - kind.active_outputs)
                kind.active_outputs |= found
    total = sum(len(b.outputs) for b in partition.kinds)
    active = sum(len(b.active_outputs) for b in partition.kinds)
    return partition, f"{total - active} of {total} values passed between parts carry no gradient"


def keep_all(partition: Partition, options: Options) -> tuple[Partition, str]:
    """Take everything for differentiable: what prune saves is then computed."""
    for kind in partition.kinds:
        inputs = kind.parts[0].segment.inputs
        kind.active = {at for at, ref in enumerate(inputs) if not isinstance(ref, Noise)}
        kind.active_outputs = set(kind.outputs)
    return partition, "left out; everything is differentiated"


def _active(partition: Partition, ref: object) -> bool:
    if not isinstance(ref, Value):
        return bool(getattr(ref, "grad", False))
    part, place = partition.made(ref)
    return place in part.kind.active_outputs


def _spread(part: Part, inputs: set[int]) -> set[OutputAt]:
    """Places of the part's outputs that depend on the inputs at ``inputs``."""
    segment = part.segment
    given = {identity(segment.inputs[at]) for at in inputs}
    reached: set[int] = set()
    for entry in segment.entries:
        if any(
            (isinstance(a, Value) and id(a.entry) in reached) or identity(a) in given for a in sources(entry)
        ):
            reached.add(id(entry))
    return {place for place in part.kind.outputs if id(segment.entries[place[0]]) in reached}
