"""The library of steps: equal steps, of windows and of functions, share one step graph and what is derived from it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import RLock

import torch

from ..ir.step import StepGraph
from ..ir.text import operator_count
from ..ir.values import exact

_log = logging.getLogger("metaoptim.cache")
Numbers = tuple[float, ...]


class _Family:
    """Steps equal but for numbers: baked in until two of them differ, then lifted."""

    def __init__(self, numbers: Numbers) -> None:
        self.first = exact(numbers)
        self.lifted: frozenset[int] = frozenset()
        self.steps: dict[tuple[float | str | None, ...], tuple[StepGraph, tuple[int, ...]]] = {}

    def masked(self, numbers: Numbers) -> tuple[float | str | None, ...]:
        return tuple(None if i in self.lifted else n for i, n in enumerate(exact(numbers)))


class Library:
    """Structure of a step -> its step graph. Least recently used structures are dropped."""

    def __init__(self, capacity: int = 512) -> None:
        self.capacity = capacity
        self._families: OrderedDict[Hashable, _Family] = OrderedDict()
        self._lock = RLock()

    def get(
        self, key: Hashable, numbers: Numbers, build: Callable[[tuple[int, ...]], StepGraph]
    ) -> tuple[StepGraph, tuple[int, ...], bool]:
        """The step for ``key`` and ``numbers``, which of the numbers are its inputs, and whether it is new."""
        with self._lock:
            key = (key, torch.get_default_dtype())
            family = self._families.get(key)
            if family is None:
                family = self._families[key] = _Family(numbers)
                if len(self._families) > self.capacity:
                    self._families.popitem(last=False)
            else:
                self._families.move_to_end(key)
            found = family.steps.get(family.masked(numbers))
            if found is None and family.steps:
                pairs = zip(family.first, exact(numbers), strict=True)
                family.lifted |= {i for i, (a, b) in enumerate(pairs) if a != b}
                found = family.steps.get(family.masked(numbers))
            if found is not None:
                if _log.isEnabledFor(logging.DEBUG):
                    _log.debug("found a step graph of %d operators", operator_count(found[0].graph))
                return (*found, False)
            lifted = tuple(sorted(family.lifted))
            step = build(lifted)
            family.steps[family.masked(numbers)] = (step, lifted)
            operators, structures = operator_count(step.graph), len(self._families)
            _log.info("built a step graph of %d operators, now %d", operators, structures)
            return step, lifted, True

    def find(self, key: Hashable, numbers: Numbers) -> tuple[StepGraph, tuple[int, ...]] | None:
        """The step for ``key`` and ``numbers`` and which of these are its inputs, if there is one."""
        with self._lock:
            family = self._families.get((key, torch.get_default_dtype()))
            return None if family is None else family.steps.get(family.masked(numbers))

    def step(self, key: Hashable, build: Callable[[], StepGraph]) -> StepGraph:
        """The step for ``key``, which says all there is to it."""
        return self.get(key, (), lambda _: build())[0]

    def steps(self) -> list[StepGraph]:
        """All that it holds."""
        with self._lock:
            return [step for family in self._families.values() for step, _ in family.steps.values()]

    def discard(self, key: Hashable) -> None:
        """Forget a structure (its first check failed)."""
        with self._lock:
            self._families.pop((key, torch.get_default_dtype()), None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._families.clear()


#: Of all windows and functions.
library = Library()
