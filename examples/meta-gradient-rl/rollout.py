"""Interaction with CartPole: trajectories of a fixed shape, whatever the episodes in them do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn


class Trajectory(NamedTuple):
    """T steps of N environments side by side.

    Episodes begin and end anywhere inside. A step that only resets an environment is masked out, so that every
    trajectory has the same shapes and one compiled step serves them all.

    Attributes:
        observations: (T + 1, N, 4); the last one is where the next trajectory begins.
        actions: (T, N), 0 or 1.
        rewards: (T, N).
        alive: (T, N), 0 where the pole fell in this step: there is no value after it.
        goes_on: (T, N), 0 where the episode ended in this step, by a fall or by the time limit.
        valid: (T, N), 0 for steps that only reset.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    alive: Tensor
    goes_on: Tensor
    valid: Tensor


class CartPole:
    """N CartPoles side by side, stepped by a stochastic policy.

    Args:
        count: N.
        seed: of the environments and of the policy's choices.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.env = gymnasium.make_vec("CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point")
        self.observation, _ = self.env.reset(seed=seed)
        self._rng = np.random.default_rng(seed)
        self._ended = np.zeros(count, dtype=bool)
        self._lengths = np.zeros(count, dtype=int)
        self.steps = 0  # of all environments together
        self.finished: list[int] = []  # lengths of the episodes that have ended since this was last emptied

    @torch.no_grad()
    def play(self, actor: nn.Module, length: int) -> Trajectory:
        """``length`` steps with ``actor``, which gives the logit of pushing to the right."""
        rows: list[tuple[np.ndarray, ...]] = []
        dtype = next(actor.parameters()).dtype
        for _ in range(length):
            seen, resets = self.observation, self._ended
            right = torch.sigmoid(actor(torch.from_numpy(seen).to(dtype))).numpy()
            action = (self._rng.random(len(seen)) < right).astype(np.int64)
            self.observation, reward, fell, timeout, _ = self.env.step(action)
            self._ended = fell | timeout
            rows.append((seen, action, reward, ~fell, ~self._ended, ~resets))
            self._count(resets)
        observations, *rest = (np.stack(column) for column in zip(*rows))
        actions, *numbers = (torch.from_numpy(column) for column in rest)
        whole = torch.from_numpy(np.concatenate([observations, self.observation[None]]))
        return Trajectory(whole.to(dtype), actions, *(number.to(dtype) for number in numbers))

    def _count(self, resets: np.ndarray) -> None:
        self.steps += int((~resets).sum())
        self._lengths = np.where(resets, 0, self._lengths + 1)
        self.finished += self._lengths[self._ended].tolist()


def evaluate(policy: Callable[[Tensor], Tensor], episodes: int, seed: int) -> float:
    """Mean length of one episode in each of ``episodes`` environments, the likelier action being taken."""
    env = gymnasium.make_vec("CartPole-v1", num_envs=episodes, vectorization_mode="vector_entry_point")
    seen, _ = env.reset(seed=seed)
    lengths, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    with torch.no_grad():
        while running.any():
            action = (policy(torch.from_numpy(seen)) > 0).numpy().astype(np.int64)
            seen, _, fell, timeout, _ = env.step(action)
            lengths += running
            running &= ~(fell | timeout)
    return float(lengths.mean())
