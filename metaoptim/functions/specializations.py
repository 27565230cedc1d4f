"""The specializations of one function: which of them serves a call, and which failed guard made a new one needed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from ..compiler.lower.compile_graph import waiting
from ..errors import warn
from ..optim.base.alive import refresh_optimizers
from ..runtime.windows.recording_session import RecordedSession
from .guards import Dependencies, Fact, ReadAt, look
from .reads import Reads
from .specialization import Specialization, StepSpecialization, name_of

D = TypeVar("D", bound=Dependencies)
_graphs = logging.getLogger("metaoptim.graphs")
_recompiles = logging.getLogger("metaoptim.recompiles")
#: After so many recompilations of one function a warning names what makes it compile anew.
RECOMPILE_LIMIT = 8


class Specializations:
    """What a function has become for the calls that it has had."""

    def __init__(self, fn: Callable) -> None:
        self._fn, self.name = fn, name_of(fn)
        # by what a call depends on by itself, by which list of places was read, and by the facts there
        self.known: dict[tuple[Any, int, Any], list[Specialization | StepSpecialization]] = {}
        # lists of places that captures have read
        self._places: dict[tuple[Fact, ...], list[list[ReadAt]]] = {}
        self._last: Reads | None = None  # of the last capture

    def serve(
        self,
        args: tuple,
        kwargs: dict,
        specialize: Callable[[D, tuple, dict, Reads], Specialization | StepSpecialization],
        window: RecordedSession | None = None,
        of_call: Callable[..., D] = Dependencies.of_call,
    ) -> tuple[Specialization | StepSpecialization, D, bool]:
        """The one for a call, what the call depends on, and whether it was captured now, there having been none."""
        unseen = nullcontext if window is None else window.recorder.paused  # outside of windows nobody looks
        with unseen():
            dependencies = of_call(self._fn, args, kwargs, window)
            found = self.find(dependencies, window)
        if window is not None:
            window.look_at(dependencies.tensors)
        elif found is None and refresh_optimizers():
            dependencies = of_call(self._fn, args, kwargs)
            found = self.find(dependencies)
        if found is not None:
            return found, dependencies, False
        begun = time.perf_counter()
        with unseen():
            reads = Reads(self._fn, args, kwargs, window)
        with waiting(f"capturing {self.name} ..."):
            found = specialize(dependencies, args, kwargs, reads)
        self.add(reads, found, time.perf_counter() - begun)
        if _graphs.isEnabledFor(logging.INFO):
            step = found.step.step if isinstance(found, StepSpecialization) else None
            text = step or found.program.text(operators=_graphs.isEnabledFor(logging.DEBUG))
            _graphs.info("%s: %s", self.name, text)
        return found, dependencies, True

    def find(
        self, dependencies: Dependencies, window: RecordedSession | None = None
    ) -> Specialization | StepSpecialization | None:
        """The one for ``dependencies``, which are extended by the facts at the places read; None if there is none."""
        key, mark = dependencies.key, dependencies.mark()
        for i, places in enumerate(self._places.get(key, ())):
            candidates = self.known.get((key, i, tuple(look(dependencies, places))), [])
            for found in list(candidates):
                if all(ref() is o for ref, o in zip(found.remembered, dependencies.objects, strict=True)):
                    if isinstance(found, Specialization) or window is None or found.step.fits(window):
                        return found
                    candidates.remove(found)  # a layer is another one than in its last window
            dependencies.back_to(mark)
        return None

    def add(self, reads: Reads, new: Specialization | StepSpecialization, seconds: float) -> None:
        """Keep a new one, whose capture took ``seconds``; say why it was needed, if there was another."""
        recompilations = sum(map(len, self.known.values()))
        if self._last is None:
            _recompiles.info("%s compiled in %.2f s", self.name, seconds)
        elif _recompiles.isEnabledFor(logging.INFO) or recompilations == RECOMPILE_LIMIT:
            text, advice = _first_change(self._last, reads)
            _recompiles.info("%s recompiled in %.2f s, since a guard failed: %s", self.name, seconds, text)
            if recompilations == RECOMPILE_LIMIT:
                warn(
                    f"{self.name} has been recompiled {RECOMPILE_LIMIT} times, the last time since a guard failed: "
                    f"{text}. {advice}"
                )
        self._last = reads
        lists, at = self._places.setdefault(reads.key, []), [place.identity for place in reads.places]
        i = next((i for i, places in enumerate(lists) if [p.identity for p in places] == at), len(lists))
        lists[i:] = lists[i:] or [reads.places]
        self.known.setdefault((reads.key, i, tuple(reads.found)), []).append(new)


# -- which guard failed -----------------------------------------------------------------------------------------------

_VALUES = (
    "Python values are part of what is compiled. Pass a number that changes as a tensor (torch.tensor(value)), or keep "
    "it out of the compiled function"
)
_KINDS = (
    "Every kind of arguments is compiled once: pass the same objects and shapes again, or pad to few shapes"
)
_WAS = "{path}: was {old}, is {new}"
_OBJECTS: dict[Any, str] = {"module": "a module", "optimizer": "an optimizer", "object": "an object"}
_WORDS = _OBJECTS | {"missing": "not there", "again": "an object met before", "keys": "a dict"}
_TENSOR = ("shape", "dtype", "strides", "device", "requires_grad")
_KIND = "{path}: its class, or its hooks, are others than before"
#: First entry of two facts -> for each other entry, what to say where it is the first that differs.
_SAID = {
    "tensor": [
        *(f"{{path}}: {of} was {{old}}, is {{new}}" for of in _TENSOR),
        "{path}: has other hooks than before",
    ],
    "kind": [_KIND, _KIND, "{path}.training: was {old}, is {new}"],
    "is": ["{path}: {new}"],
    "mode": [_WAS],
    "name": [_WAS],
    "keys": ["{path}: others than before, or in another order"],
    **{kind: [f"{{path}}: another {kind} than before"] for kind in _OBJECTS},
}


def _first_change(old: Reads, new: Reads) -> tuple[str, str]:
    """The first fact of a capture that differs from that of an earlier one, in words; what to do about it."""
    for key, (path, b) in new.told.items():
        _, a = old.told.get(key, (path, b))
        if a != b:
            kind, same = b[0], a[0] == b[0]
            if not same or kind not in _SAID:
                text = _WAS.format(path=path, old=_described(a, same), new=_described(b, same))
                return text, _KINDS if kind in _OBJECTS else _VALUES
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            was, now = (str(tuple(x)) if isinstance(x, tuple) else str(x) for x in (a[at], b[at]))
            of_value = kind in ("is", "keys") or (kind, at) == ("kind", 3)
            return _SAID[kind][at - 1].format(path=path, old=was, new=now), _VALUES if of_value else _KINDS
    return "an object: is another one than before", _KINDS


def _described(fact: Fact, same: bool) -> str:
    """A fact in words, beside another one that is about the ``same`` kind of thing or not."""
    kind = fact[0]
    if kind is float:
        return repr(float.fromhex(fact[1]))
    if kind == "tensor":
        return f"a tensor of shape {tuple(fact[1])}"
    if isinstance(kind, type) and issubclass(kind, (list, tuple)):
        return str(fact[1]) if same else f"a {kind.__name__} of length {fact[1]}"
    return _WORDS.get(kind) or (repr(fact[1]) if len(fact) == 2 else "another one")
