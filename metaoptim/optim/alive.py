"""The optimizers that are alive: who may step in a window, and who is put back after a capture."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .optimizer import MetaOptimizer

#: Optimizers alive, with the thread that made them: those of its own thread may step in a window.
live_optimizers: weakref.WeakSet[MetaOptimizer] = weakref.WeakSet()


def refresh_optimizers() -> bool:
    """`MetaOptimizer.refresh` the optimizers alive that this thread has made; whether any has changed."""
    here, changed = threading.get_ident(), False
    for o in live_optimizers:
        if o.thread == here and o._session is None:
            changed |= o.refresh()
    return changed


@contextmanager
def preserved() -> Iterator[None]:
    """Put this thread's optimizers back after the block, and forget those made in it."""
    kept = []
    for o in list(live_optimizers):
        if o.thread == threading.get_ident():
            groups = [(g, {**g, "params": list(g["params"])}) for g in o.param_groups]
            states = [(p, s, dict(s)) for p, s in o.state.items()]
            rest = {
                "_normalizer": o._normalizer,
                "_networks": list(o._networks),
                "_whole": list(o._whole),
                "defaults": dict(o.defaults),
            }
            kept.append((o, o.param_groups, groups, o.state, states, rest))

    try:
        yield
    finally:
        known = {id(o) for o, *_ in kept}
        for o in [o for o in live_optimizers if o.symbolic and id(o) not in known]:
            live_optimizers.discard(o)
        for o, all_groups, groups, state, states, rest in kept:
            all_groups[:] = [g for g, _ in groups]
            for g, values in groups:
                g.clear()
                g.update(values)
            state.clear()
            for p, s, values in states:
                s.clear()
                s.update(values)
                state[p] = s
            o.param_groups, o.state = all_groups, state
            o.__dict__.update(rest)
