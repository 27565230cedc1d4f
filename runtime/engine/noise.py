"""Random numbers of steps: drawn from the process's generator once, and again alike whenever a step is run again.

Every draw has a generator of its own, set to a state. The process's, which all threads draw from, only says what that
state is when numbers are drawn for the first time: what is drawn again depends on nothing that others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from metaoptim.compiler.ir.operators import op_info
from metaoptim.compiler.ir.values import Noise

GENERATOR_BYTES = 5056  # of the CPU generator's state
_turn = RLock()  # to draw from a process's generator: its state must not be taken by two


def generator_of(device: torch.device) -> torch.Generator:
    """The process's generator, which eager PyTorch draws from on a device."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    if hasattr(module, "default_generators"):
        return module.default_generators[device.index or 0]
    return module._get_default_mps_generator()


def draw(given: Sequence[Any]) -> tuple[list[Tensor], Tensor, Tensor]:
    """What a step is given, its random inputs drawn as eager would: from the process's generator, which moves on.

    Returns:
        The values, and the generator's state before and after.
    """
    generator = generator_of(_device(given))
    with _turn:
        before = generator.get_state()
        values, after = redraw(given, before)
        generator.set_state(after)
    return values, before, after


def redraw(given: Sequence[Any], state: Tensor) -> tuple[list[Tensor], Tensor]:
    """What a step is given, its random inputs drawn from a generator in ``state``, and its state after."""
    generator = torch.Generator(_device(given))
    generator.set_state(state)
    return [g.draw(generator) if g.random else g.get() for g in given], generator.get_state()


def _device(given: Sequence[Any]) -> torch.device:
    return next(g.noise.spec.device for g in given if g.random)


class Drawn:
    """An input that is drawn."""

    random = True

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def draw(self, generator: torch.Generator) -> Tensor:
        """Random numbers of ``generator``."""
        noise = self.noise
        if not op_info(noise.op).writes:
            return noise.op(*noise.args, **noise.kwargs, generator=generator)
        shape, dtype, stride, device = noise.spec
        room = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return noise.op(room, *noise.args, **noise.kwargs, generator=generator)


class Stream:
    """The random numbers of a program's steps, each of which goes on where the last has left the generator.

    Attributes:
        first: whether they are drawn from the process's generator, for the first time. Where another thread has moved
            it since the last step, the state that was found is kept for that position.
    """

    def __init__(self) -> None:
        self.first = False
        self._moved: dict[int, Tensor] = {}

    def draw(self, given: Sequence[Any], position: int, state: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the step at a position is given, and the generator's state after.

        Args:
            given: its inputs.
            position: where it is in the program.
            state: of the generator after the last step.
        """
        if not self.first:
            return redraw(given, self._moved.get(position, state))
        values, before, after = draw(given)
        if not torch.equal(before, state):
            self._moved[position] = before
        return values, after


class _Draw:
    """What a step drew, and the generator's state before."""

    def __init__(self, noises: Sequence[Noise]) -> None:
        self.drawn = [Drawn(n) for n in noises]
        self.values: list[Tensor] | None
        self.values, self.state, _ = draw(self.drawn)

    def get(self, k: int) -> Tensor:
        if self.values is None:
            self.values, _ = redraw(self.drawn, self.state)
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


def redrawn(noises: Sequence[Noise]) -> list[Redrawn]:
    """Draw the random inputs of a step, in order."""
    of = _Draw(noises) if noises else None
    return [] if of is None else [Redrawn(of, k) for k in range(len(noises))]
