"""The optimizers that are alive: a thread's own may step in its windows, and are put back after its captures."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from metaoptim.runtime.windows.updates.schedule import Schedule
from metaoptim.runtime.windows.updates.transform import Transform

if TYPE_CHECKING:
    from ..optimizer import MetaOptimizer

live_optimizers: weakref.WeakSet[MetaOptimizer] = weakref.WeakSet()


def optimizers_here() -> list[MetaOptimizer]:
    """The optimizers alive that this thread has made, oldest first."""
    here = threading.get_ident()
    return sorted((o for o in live_optimizers if o.thread == here), key=lambda o: o.number)


def refresh_optimizers() -> bool:
    """`MetaOptimizer.refresh` them, but for those in use by a window; whether any has changed."""
    changed = [o.refresh() for o in optimizers_here() if o._session is None]
    return any(changed)


_PRESERVED = ("param_groups", "state", "defaults", "_transforms", "_normalizer", "_networks", "_whole")


@contextmanager
def preserved() -> Iterator[None]:
    """Put this thread's optimizers back after the block, and forget those made in it."""
    kept = [(o, {name: o.__dict__[name] for name in _PRESERVED}) for o in optimizers_here()]
    fillings = [_filling(attributes) for _, attributes in kept]

    try:
        yield
    finally:
        known = {id(o) for o, _ in kept}
        for o in [o for o in live_optimizers if o.symbolic and id(o) not in known]:
            live_optimizers.discard(o)
        for (o, attributes), fill in zip(kept, fillings, strict=True):
            fill()
            o.__dict__.update(attributes)


def _filling(container: Any) -> Callable[[], None]:
    """What fills lists and dictionaries, and those in them, with what is in them now."""
    if isinstance(container, (Transform, Schedule)):
        container = container.hyper
    if not isinstance(container, (dict, list)):
        return lambda: None
    content: Any = container.copy()
    inner = [_filling(v) for v in (content.values() if isinstance(container, dict) else content)]

    def fill() -> None:
        container.clear()
        if isinstance(container, dict):
            container.update(content)
        else:
            container.extend(content)
        for f in inner:
            f()

    return fill
