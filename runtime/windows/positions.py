"""Moments of an inner loop: what networks and optimizers are then is taken out, and put back later.

How a window's loop goes on from values that have a history, its session says (`Session._hold`, `Session._go_on`).
Which tensors these are, and what holds in every kind of window and outside, is here.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metaoptim.errors import WindowError

from ..engine.engine import Held
from .session import Place, Session
from .updates.update import InnerOptimizer, parameters_of

_Buffers: TypeAlias = Sequence[tuple[nn.Module, str, Tensor]]


@dataclass(eq=False, repr=False)
class InnerState:
    """What networks and inner optimizers were at one moment; `metaoptim.extract_state` makes it."""

    by: str  # "reference", "copy" or "detached"
    session: weakref.ref[Session] | None  # the window that it was extracted in
    symbolic: bool  # whether that was captured, so that there are no values
    places: list[Place]
    held: Held  # what was in these places
    states: list[Place]  # whose optimizer states are among them; a parameter may have had none
    counts: list[tuple[InnerOptimizer, Any, dict[str, Tensor]]]  # optimizer states that are of no parameter
    buffers: _Buffers

    def __repr__(self) -> str:
        return f"InnerState(by={self.by!r}, {len(self.places) + len(self.buffers)} tensors)"


def extract(
    session: Session | None, networks: Sequence[nn.Module], optimizers: Sequence[InnerOptimizer], by: str
) -> InnerState:
    """What there is now; ``session`` is the window that is open."""
    states = [Place(p, o) for o in optimizers for p in parameters_of(o)]
    counts = [(o, key, dict(o.state[key])) for o in optimizers for key in _counts(o)]
    if session is not None:
        places = _places(session, "extract_state", networks, states)
        buffers = _copies(session.networks.buffers_of(networks), linked=by != "detached")
        with session.recorder.paused():
            held = session._hold(places, linked=by != "detached", copied=by != "reference")
        own = weakref.ref(session), session.recorder.symbolic
        return InnerState(by, *own, places, held, states, counts, buffers)
    places = [Place(p) for p in dict.fromkeys(p for n in networks for p in n.parameters())]
    places += [place._replace(name=name) for place in states for name in place.all]
    values = [(p.parameter if p.optimizer is None else p.all[p.name]).detach().clone() for p in places]
    modules = dict.fromkeys(m for n in networks for m in n.modules())
    buffers = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
    return InnerState(
        by, None, False, places, Held(values, values), states, counts, _copies(buffers, linked=False)
    )


def recover(session: Session | None, state: InnerState) -> None:
    """Put back what there was."""
    _check_origin(session, state)
    places, held, buffers = state.places, state.held, state.buffers
    if session is None:
        with torch.no_grad():
            for place, value in zip(places, held.values, strict=True):
                if place.optimizer is None:
                    place.parameter.copy_(value)
    else:
        _join(session, [p.parameter for p in places if p.optimizer is None], state.states)
        if state.session is None or state.session() is not session:
            places, held = _trained(session, places, held.values)
            buffers = _of_window(session, buffers)
    for place in state.states:
        if place.optimizer is not None:
            place.optimizer.state.pop(place.parameter, None)
    for optimizer in {place.optimizer for place in state.states if place.optimizer is not None}:
        for key in _counts(optimizer):
            del optimizer.state[key]
    for optimizer, key, count in state.counts:
        optimizer.state[key] = dict(count)
    if session is None:
        for place, value in zip(places, held.values, strict=True):
            place.put(value.clone())
    else:
        with session.recorder.paused():
            session._go_on(places, held)
    for module, name, copy in _copies(buffers, linked=state.by != "detached"):
        now = module._buffers.get(name)
        if session is None and now is not None and now.shape == copy.shape:
            now.detach().copy_(copy)
        else:
            module._buffers[name] = copy


def cut(session: Session, networks: Sequence[nn.Module], optimizers: Sequence[InnerOptimizer]) -> None:
    """Let the loop go on from where it is, without what has led there."""
    states = [Place(p, o) for o in optimizers for p in parameters_of(o)]
    places = _places(session, "stop_gradient", networks, states)
    with session.recorder.paused():
        session._go_on(places, session._hold(places, linked=False, copied=False))
    for module, name, buffer in session.networks.buffers_of(networks):
        if buffer.requires_grad:
            module._buffers[name] = buffer.detach()


def displacement(session: Session, networks: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """The user's own parameters that inner steps train, each with θ₀ - θ: the way back from what is shown for it."""
    places = _places(session, "reptile", networks, [])
    with session.recorder.paused(), torch.no_grad():
        return [(p.parameter, p.parameter - session.tensor_at(p)) for p in places]


def _check_origin(session: Session | None, state: InnerState) -> None:
    """Raise where a state cannot be put back: it has a history that the window does not know, or no values."""
    if session is not None and state.session is not None and state.session() is session:
        return
    if state.symbolic or (session is not None and session.recorder.symbolic):
        raise WindowError(
            "recover_state: the state was extracted on one side of a compiled function or step, and is recovered on "
            "the other; do both inside of it or both outside"
        )
    if state.session is not None and state.by != "detached":
        raise WindowError(
            f"recover_state: the state was extracted by {state.by} in a window, and only that window can go on from "
            "it; extract it by='detached' to use its values elsewhere"
        )


def _places(
    session: Session, what: str, networks: Sequence[nn.Module], states: Sequence[Place]
) -> list[Place]:
    """The places of what the window's inner steps change: parameters of networks, and optimizer states."""
    own, index_of = session.networks.original, session.networks.index_of
    _join(session, [own(p) for n in networks for p in n.parameters()], states)
    found: dict[int, Place] = {}
    for network in networks:
        mine = [p for p in map(own, network.parameters()) if index_of(p) is not None]
        if not mine:
            raise WindowError(
                f"{what}: no inner optimizer of this window trains a parameter of this {type(network).__name__}; "
                "give a network that one of them was built from"
            )
        found.update((id(p), Place(p)) for p in mine)
    trained = [place for place in states if index_of(place.parameter) is not None]
    return [*found.values(), *(place._replace(name=name) for place in trained for name in place.all)]


def _join(session: Session, parameters: Sequence[Tensor], states: Sequence[Place]) -> None:
    """The optimizers behind these belong to the window from now on, as if they stepped."""
    named = {id(p.optimizer): p.optimizer for p in states}
    wanted = set(map(id, parameters))
    for member in list(session.members.values()):
        if not wanted.isdisjoint(map(id, parameters_of(member.optimizer))):
            named[id(member.optimizer)] = member.optimizer
    for optimizer in named.values():
        if optimizer is not None and not session.joined(optimizer):
            session.join(optimizer)


def _trained(session: Session, places: list[Place], values: list[Tensor]) -> tuple[list[Place], Held]:
    """Those places that inner steps change; the others, which are not touched, must be as they were."""
    index_of, found = session.networks.index_of, []
    for place, value in zip(places, values, strict=True):
        if index_of(place.parameter) is not None:
            found.append((place, value))
        elif place.optimizer is None:
            _check_equal("parameter", place.parameter, value)
    kept = [value.clone() for _, value in found]
    return [place for place, _ in found], Held(kept, kept)


def _of_window(session: Session, buffers: _Buffers) -> _Buffers:
    """Those buffers that the window puts back, or leaves; the others must be as they were."""
    known = {(id(m), name) for m, name, _ in session.networks.buffers_of([m for m, *_ in buffers])}
    for module, name, value in buffers:
        if (id(module), name) not in known:
            _check_equal("buffer", module._buffers.get(name), value)
    return [b for b in buffers if (id(b[0]), b[1]) in known]


def _check_equal(what: str, now: Tensor | None, value: Tensor) -> None:
    if now is None or not torch.equal(now, value):
        raise WindowError(
            f"recover_state: a {what} of shape {tuple(value.shape)} has another value than in the state, and no inner "
            "step changes it in this window, where it is a constant or a meta-parameter; recover the state outside, or "
            "give extract_state the networks that are trained"
        )


def _counts(optimizer: InnerOptimizer) -> list[Any]:
    """Under which keys an optimizer has a state that is of no parameter; no gradient flows through it."""
    return [key for key in optimizer.state if not isinstance(key, Tensor)]


def _copies(buffers: _Buffers, linked: bool) -> _Buffers:
    """Copies of buffers, with their history if ``linked``; what is one tensor remains one."""
    copies: dict[int, Tensor] = {}
    with torch.enable_grad():
        for _, _, b in buffers:
            if id(b) not in copies:
                copies[id(b)] = (b if linked and b.requires_grad else b.detach()).clone()
    return [(module, name, copies[id(b)]) for module, name, b in buffers]
