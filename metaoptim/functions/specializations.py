"""The specializations of one function: which of them serves a call, and why a new one was needed."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import warn
from .changes import Change, first_change
from .guards import Dependencies, Fact
from .places import Place, look
from .reads import Reads

_recompiles = logging.getLogger("metaoptim.recompiles")
#: After so many recompilations of one function a warning names what makes it compile anew.
RECOMPILE_LIMIT = 8


class Specializations:
    """What a function has become for the calls that it has had.

    Attributes:
        known: by what a call depends on by itself, by which list of places was read, and by the facts there.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[tuple[Any, int, Any], list[Any]] = {}
        self._places: dict[
            tuple[Fact, ...], list[list[Place]]
        ] = {}  # lists of places that captures have read
        self._last: Reads | None = None  # of the last capture

    def find(self, dependencies: Dependencies, window: Any = None) -> Any:
        """The one for ``dependencies``, which are extended by the facts at the places read; None if there is none."""
        key, mark = dependencies.key, dependencies.mark()
        for i, places in enumerate(self._places.get(key, ())):
            candidates = self.known.get((key, i, tuple(look(dependencies, places))), [])
            for found in list(candidates):
                if all(ref() is o for ref, o in zip(found.remembered, dependencies.objects, strict=True)):
                    if window is None or found.fits(window):
                        return found
                    candidates.remove(found)  # a layer is another one than in its last window
            dependencies.back_to(mark)
        return None

    def add(self, key: tuple[Fact, ...], reads: Reads, new: Any, seconds: float) -> None:
        """Keep a new one; say why it was needed, if there was another.

        Args:
            key: what the call depends on by itself.
            reads: of the capture.
            new: the specialization.
            seconds: how long it took to make.
        """
        recompilations = sum(map(len, self.known.values()))
        if self._last is None:
            _recompiles.info("%s compiled in %.2f s", self.name, seconds)
        elif _recompiles.isEnabledFor(logging.INFO) or recompilations == RECOMPILE_LIMIT:
            change = first_change(self._last, reads) or Change("an object: is another one than before")
            _recompiles.info(
                "%s recompiled in %.2f s, since a guard failed: %s", self.name, seconds, change.text
            )
            if recompilations == RECOMPILE_LIMIT:
                warn(
                    f"{self.name} has been recompiled {RECOMPILE_LIMIT} times, the last time since a guard failed: "
                    f"{change.text}. {change.advice}"
                )
        self._last = reads
        lists, at = self._places.setdefault(key, []), [place.identity for place in reads.places]
        i = next((i for i, places in enumerate(lists) if [p.identity for p in places] == at), len(lists))
        lists[i:] = lists[i:] or [reads.places]
        self.known.setdefault((key, i, tuple(reads.found)), []).append(new)
