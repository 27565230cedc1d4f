"""The debugging aid `compile(recapture=True)`: is a captured function still the function it was captured from?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..compiler.ir.tensors import tensor_spec
from ..compiler.ir.text import plural
from ..compiler.ir.trace import Input, Noise
from ..errors import CaptureError
from .guards import Source


def compare(name: str, known: Any, again: Any) -> None:
    """Raise at the first difference of two captures of one function for equal guards: the first one, and one of now."""
    where = _difference(known, again)
    if where is None:
        return
    raise CaptureError(
        f"recapture=True: {name} is not what it was when it was captured, although its guards hold: {where}. It "
        "depends on something that is frozen at capture (the time of day, a file, what only Python's own functions "
        "give away); pass that as an argument, as a tensor if it changes often"
    )


def _difference(known: Any, again: Any) -> str | None:
    if _result(known) != _result(again):
        return f"what it returns besides tensors was {_result(known)[0]}, and is {_result(again)[0]}"
    if known.program.horizon != again.program.horizon:
        return f"it took {plural(known.program.horizon, 'inner step')}, and takes {again.program.horizon}"
    calls, calls_now = list(known.program.counted()), list(again.program.counted())
    for (was, count), (now, counts) in zip(calls, calls_now, strict=False):
        place = f"at {now.location}" if now.location else "after the last inner step"
        if was.step is not now.step:
            for a, b in zip(str(was.step).splitlines(), str(now.step).splitlines(), strict=False):
                if a != b:
                    return f"what it does {place} was\n    {a.strip()}\nand is\n    {b.strip()}\nSo it has changed"
            return f"it does something else {place}"
        if (was.reads, was.writes) != (now.reads, now.writes):
            return f"what it does {place} reads or leaves other values"
        for a, b in zip(was.inputs, now.inputs, strict=True):
            listed, listed_now = ((g.of if g.kind == "each" else (g,)) for g in (a, b))
            if [(g.kind, g.at) for g in (a, *listed)] != [(g.kind, g.at) for g in (b, *listed_now)]:
                return f"what it reads {place} is another row or number"
            for x, y in zip(listed, listed_now, strict=True):
                change = _change(x.of, y.of, known.sources, again.sources)
                if change:
                    return f"{change} {place}"
        if (count, [g.stride for g in was.inputs]) != (counts, [g.stride for g in now.inputs]):
            told = "is another row or number in other iterations, or so are their numbers"
            return f"what it reads {place} {told}"
    if len(calls) != len(calls_now):
        return f"it consisted of {len(calls)} parts, and consists of {len(calls_now)}"
    return None


def _result(program: Any) -> tuple[str, Any]:
    return repr(program.traced.leaves), program.traced.spec


def _change(x: Any, y: Any, was: Mapping[Input, Source], now: Mapping[Input, Source]) -> str | None:
    """What has become of something that a call is given."""
    if isinstance(x, Noise) or isinstance(y, Noise):
        return None  # drawn anew; how is part of the step
    if not isinstance(x, Input) or not isinstance(y, Input):
        same = type(x) is type(y) and repr(x) == repr(y)
        return None if same else f"the number {x!r} is now {y!r},"
    a, b = was[x], now[y]
    if isinstance(a, int) or isinstance(b, int):
        return None if a == b else "another tensor is read"
    if a is b:
        return None
    if a.requires_grad or b.requires_grad or tensor_spec(a) != tensor_spec(b):
        return f"another tensor of shape {tuple(b.shape)} is read"
    equal = torch.equal(a, b)  # a constant made inside is another tensor each time
    return None if equal else f"a constant tensor of shape {tuple(b.shape)} has other values"
