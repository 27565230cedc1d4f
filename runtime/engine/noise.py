"""Random numbers of steps: drawn from the process's generator once, and again alike whenever a step is run again.

Every draw has a generator of its own, set to a state. The process's, which all threads draw from, only says what that
state is when numbers are drawn for the first time: what is drawn again depends on nothing that others do.

``given`` are inputs of a step: tensors, and a `Noise` for each that is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from threading import RLock

import torch
from torch import Tensor

from metaoptim.compiler.ir.operators import op_info
from metaoptim.compiler.ir.values import Noise

Given = Sequence[Tensor | Noise]

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


def draw(given: Given) -> tuple[list[Tensor], Tensor, Tensor]:
    """Values of ``given``, drawn as eager would from the process's generator; its state before and after."""
    generator = generator_of(_device(given))
    with _turn:
        before = generator.get_state()
        values, after = redraw(given, before)
        generator.set_state(after)
    return values, before, after


def redraw(given: Given, state: Tensor) -> tuple[list[Tensor], Tensor]:
    """Values of ``given``, drawn from a generator in ``state``, and its state after."""
    generator = torch.Generator(_device(given))
    generator.set_state(state)
    values = [drawn(g, generator) if isinstance(g, Noise) else g for g in given]
    return values, generator.get_state()


def drawn(noise: Noise, generator: torch.Generator) -> Tensor:
    """Random numbers of ``generator``."""
    if noise.tasks is not None:
        one = replace(noise, spec=noise.spec.row, tasks=None)
        return torch.stack([drawn(one, generator) for _ in range(noise.tasks)])
    if not op_info(noise.op).writes:
        return noise.op(*noise.args, **noise.kwargs, generator=generator)
    return noise.op(noise.spec.empty(), *noise.args, **noise.kwargs, generator=generator)


def _device(given: Given) -> torch.device:
    return next(g.spec.device for g in given if isinstance(g, Noise))


class Stream:
    """The random numbers of a program's steps, each of which goes on where the last has left the generator."""

    def __init__(self) -> None:
        self.first = False  # whether they are drawn from the process's generator, for the first time
        self._moved: dict[
            int, Tensor
        ] = {}  # position -> its state, where another thread had moved it by then

    def draw(self, given: Given, position: int, state: Tensor) -> tuple[list[Tensor], Tensor]:
        """Values for the step at a position, the generator's ``state`` before it being known; its state after."""
        if not self.first:
            return redraw(given, self._moved.get(position, state))
        values, before, after = draw(given)
        if not torch.equal(before, state):
            self._moved[position] = before
        return values, after


class Redrawn:
    """One of the random inputs of a step that has been taken: kept as the generator's state, drawn again on replay.

    The inputs of a step share ``values``, which are there until all have been asked for.
    """

    def __init__(self, k: int, noises: Sequence[Noise], state: Tensor, values: list[Tensor]) -> None:
        self.k, self.noises, self.state, self.values = k, noises, state, values

    def get(self) -> Tensor:
        """The numbers that were drawn."""
        if not self.values:
            self.values += redraw(self.noises, self.state)[0]
        value = self.values[self.k]
        if self.k == len(self.noises) - 1:
            self.values.clear()
        return value


def redrawn(noises: Sequence[Noise]) -> list[Redrawn]:
    """Draw the random inputs of a step, in order."""
    values, state, _ = draw(noises) if noises else ([], torch.empty(0), None)
    return [Redrawn(k, noises, state, values) for k in range(len(noises))]
