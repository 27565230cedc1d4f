"""Random numbers of a step, drawn again alike whenever the step is run again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GENERATOR_BYTES = 5056  # of the CPU generator's state


def generator_of(device: torch.device) -> Any:
    """The module that holds a device's generator state."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


def draw(given: Sequence[Any], state: Tensor) -> tuple[list[Tensor], Tensor]:
    """The inputs of a step, its random ones drawn from the generator in ``state``; the generator's state after.

    The user's own generator stays where it is.
    """
    device = next(g.device for g in given if g.random)
    generator = generator_of(device)
    before = generator.get_rng_state()
    generator.set_rng_state(state)
    try:
        values = [g.get() for g in given]
        return values, generator.get_rng_state()
    finally:
        generator.set_rng_state(before)


class Drawn:
    """An input that is drawn: an operator, with specs in the place of tensors whose values it does not look at."""

    random = True

    def __init__(self, noise: Any) -> None:
        self.noise = noise
        self.device: torch.device = noise.spec[3]

    def get(self) -> Tensor:
        """Draw."""
        out = self.noise.op(*map(_stand_in, self.noise.args), **self.noise.kwargs)
        return out if self.noise.index is None else out[self.noise.index]


def _stand_in(a: Any) -> Any:
    if isinstance(a, tuple) and a[:1] == ("spec",):
        _, shape, dtype, stride, device = a
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return a


class _Draw:
    """What a step drew, and the generator's state before."""

    def __init__(self, noises: Sequence[Any]) -> None:
        self.drawn = [Drawn(n) for n in noises]
        self.state = generator_of(self.drawn[0].device).get_rng_state()
        self.values: list[Tensor] | None = [d.get() for d in self.drawn]  # now, from the user's generator

    def get(self, k: int) -> Tensor:
        if self.values is None:
            self.values, _ = draw(self.drawn, self.state)
        value = self.values[k]
        if k == len(self.drawn) - 1:
            self.values = None  # all have been asked for
        return value


class Redrawn:
    """One of the random inputs of a step that has been taken: kept as the generator's state, drawn again on replay."""

    def __init__(self, of: _Draw, k: int) -> None:
        self.of, self.k = of, k

    def get(self) -> Tensor:
        """The numbers that were drawn."""
        return self.of.get(self.k)


def redrawn(noises: Sequence[Any]) -> list[Redrawn]:
    """Draw the random inputs of a step, in order."""
    of = _Draw(noises) if noises else None
    return [] if of is None else [Redrawn(of, k) for k in range(len(noises))]
