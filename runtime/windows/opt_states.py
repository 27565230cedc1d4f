"""Optimizer states of a window on its tape: where they lie in the state, and how they come there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metaoptim.compiler.ir.programs.calls import Assign
from metaoptim.compiler.ir.update import initial_state
from metaoptim.errors import WindowError

from ..engine.engine import Engine
from .networks import Networks
from .theta_view import ThetaView
from .updates.hyper import Scheduled
from .updates.update import InnerOptimizer, Update

#: The id of an optimizer, the ordinal of a parameter (-1: the count of schedules), the name of a state.
Key: TypeAlias = tuple[int, int, str]


class OptStates:
    """Where optimizer states lie: ``at`` has their state indices."""

    def __init__(self, engine: Engine, networks: Networks, view: ThetaView) -> None:
        self._engine, self._networks, self._view = engine, networks, view
        self.at: dict[Key, int] = {}

    def key(self, optimizer: InnerOptimizer, holder: Any, name: str) -> Key:
        """How the state ``name`` of a parameter, or the count of schedules, is known."""
        ordinal = self._networks.index_of(holder) if isinstance(holder, Tensor) else -1
        if ordinal is None:
            raise WindowError("a compiled step trains a network that is no part of this window")
        return id(optimizer), ordinal, name

    def sync(self, optimizer: InnerOptimizer, schedules: Scheduled, ordinals: list[int]) -> bool:
        """Bring optimizer state that is not on the tape (new, from before the window, or just loaded) onto it.

        Returns whether there are initial states that depend on their parameter: those must be part of the step.
        """
        inside = False
        for i in ordinals:
            p = self._networks.originals[i]
            state = optimizer.state[p]
            if not state:
                group = next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))
                value = self._engine.state[self._view.indices[i]].detach().requires_grad_()
                with torch.enable_grad():
                    hyper = {name: schedules.at(group[name]) for name in optimizer.defaults}
                    initial = initial_state(optimizer.init_state, value, hyper)
                if any(v.requires_grad for v in initial.values()):
                    inside = True
                else:
                    state.update(initial)
        self.bring(optimizer, [self._networks.originals[i] for i in ordinals])
        return inside

    def bring(self, optimizer: InnerOptimizer, holders: Iterable[Any]) -> None:
        """Put optimizer state that is not on the tape onto it: of parameters, or the count of schedules."""
        engine, known = self._engine, self.at
        new: dict[Key, int] = {}
        changes: list[tuple[int, Tensor]] = []
        for holder in holders:
            if not (states := optimizer.state.get(holder)):
                continue
            number, ordinal, _ = self.key(optimizer, holder, "")
            for name, value in states.items():
                key = number, ordinal, name
                if key in known and engine.state[known[key]] is value:
                    continue
                if value.requires_grad:
                    owner = self._networks.names[key[1]]
                    raise WindowError(
                        f"the optimizer state {name!r} of {owner!r} requires grad; detach it, or open the window with "
                        "strategy='full_tape' to differentiate by it"
                    )
                if key not in known:
                    new[key] = len(engine.state) + len(new)
                changes.append((known[key] if key in known else new[key], value))
        if changes:
            call = Assign(tuple(i for i, _ in changes), [v for _, v in changes])
            engine.append(call, changes, read=self._view.versions.read)
            known.update(new)
            self._view.recording.epoch.position = engine.position  # theta is the same here

    def indices(
        self, optimizer: InnerOptimizer, update: Update, after: Sequence[Iterable[str]]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """State indices of the optimizer state before a step and after; what is new is put at the end."""
        known, end, inputs, outputs = self.at, len(self._engine.state), [], []
        for i, before, state in zip(update.ordinals, update.states, after, strict=True):
            inputs += [known[id(optimizer), i, name] for name in before]
            for name in state:
                index = known.get((id(optimizer), i, name), end)
                end += index == end
                outputs.append(index)
        return tuple(inputs), tuple(outputs)


def names_of(
    thetas: dict[int, int], indices: list[int], states: dict[tuple[int, int, str], int]
) -> dict[int, Any]:
    """What entries of the state are, in any window: a parameter's id, or an optimizer's, a parameter's and a name."""
    own = [thetas.get(index, 0) for index in indices]
    of_states = {i: (optimizer, own[k] if k >= 0 else -1, name) for (optimizer, k, name), i in states.items()}
    return {**thetas, **of_states}
