"""Places that a capture has read: an attribute, a name in a dict of globals, a closure's variable; or an object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .guards import Dependencies, Fact
from .surroundings import contents, reference

MISSING = object()


class Place:
    """Where something was read: an attribute, a name in a dict of globals, a closure's variable; or an object."""

    __slots__ = ("kind", "holder", "name", "path")

    def __init__(self, kind: str, holder: Any, name: str, path: str) -> None:
        self.kind, self.name, self.path = kind, name, path
        self.holder: Any = holder if kind in ("global", "cell") else reference(holder)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two places that are one."""
        return self.kind, id(self.holder) if self.kind in ("global", "cell") else id(self.holder()), self.name

    def value(self) -> Any:
        """What is there now."""
        if self.kind == "global":
            return self.holder.get(self.name, MISSING)
        if self.kind == "cell":
            return contents(self.holder)
        holder = self.holder()
        if self.kind == "own":
            return dict_of(holder).get(self.name, MISSING)
        if self.kind == "names":
            return tuple(dict_of(holder))
        if self.kind == "attribute":
            try:
                return object.__getattribute__(holder, self.name)
            except AttributeError:
                return MISSING
        return getattr(holder, self.name, MISSING) if self.kind == "class" else holder

    def describe(self, dependencies: Dependencies) -> None:
        """Extend ``dependencies`` by what is there now."""
        value = self.value()
        if value is MISSING:
            dependencies.fact(self.path, ("missing",))
        else:
            dependencies.describe(value, self.path)


def look(dependencies: Dependencies, places: Sequence[Place]) -> Iterator[tuple[Fact, ...]]:
    """What is at each of the places now, as facts; ``dependencies`` is extended by them."""
    for place in places:
        mark = dependencies.mark()
        place.describe(dependencies)
        yield dependencies.since(mark)


def dict_of(o: Any) -> dict[str, Any]:
    """The attributes that an object has by itself."""
    try:
        return object.__getattribute__(o, "__dict__")
    except AttributeError:  # it has slots
        return {}
