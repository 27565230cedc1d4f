"""One agent's life: windows of inner steps, each judged by the trajectory that the next window begins with."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import metaoptim
from agent import losses, network
from rollout import CartPole, Trajectory, evaluate

CURVES = ("steps", "length", "gamma", "lam")


@dataclass(frozen=True)
class Settings:
    """What a run depends on.

    Attributes:
        gamma, lam: discount and trace decay at the start.
        learn: whether their logits follow the meta-gradient.
        seed: of networks, environments and choices.
        env_steps: length of the run, in steps of all environments together.
        envs, length: shape of a trajectory.
        inner_steps: inner steps in a window.
        hidden: units of actor and critic.
        actor_lr, critic_lr, meta_lr: learning rates.
        entropy: weight of the entropy bonus.
        judge_gamma, judge_lam: the fixed yardstick of the outer loss.
        points: how often the curves are written down.
    """

    gamma: float
    lam: float
    learn: bool
    seed: int
    env_steps: int
    envs: int
    length: int
    inner_steps: int
    hidden: int
    actor_lr: float
    critic_lr: float
    meta_lr: float
    entropy: float
    judge_gamma: float
    judge_lam: float
    points: int

    def as_dict(self) -> dict[str, Any]:
        """For files."""
        return asdict(self)


class Agent:
    """Actor and critic in CartPole, with γ and λ as sigmoids of two logits.

    Args:
        settings: of the run.
        backend: what the inner step is compiled with, or None for ordinary inner steps (form A).
    """

    def __init__(self, settings: Settings, backend: str | None) -> None:
        self.settings = s = settings
        torch.manual_seed(s.seed)
        self.actor, self.critic = network(s.hidden, last=0.01), network(s.hidden, last=1.0)
        self.logits = torch.tensor([_logit(s.gamma), _logit(s.lam)], requires_grad=s.learn)
        self.actor_optim = metaoptim.MetaAdam([self.actor], lr=s.actor_lr)
        self.critic_optim = metaoptim.MetaAdam([self.critic], lr=s.critic_lr)
        self.outer = torch.optim.Adam([self.logits], lr=s.meta_lr)
        self.env = CartPole(s.envs, s.seed)
        self.played: Trajectory | None = None
        self.inner_step = self._inner_step(backend)

    def _inner_step(self, backend: str | None) -> Any:
        # What guards watch is what the function refers to itself: networks and optimizers by name, not behind self.
        actor, critic, logits, entropy = self.actor, self.critic, self.logits, self.settings.entropy
        actor_optim, critic_optim = self.actor_optim, self.critic_optim

        def inner_step(played: Trajectory) -> None:
            gamma, lam = logits.sigmoid().unbind()
            actor_loss, critic_loss = losses(actor, critic, played, gamma, lam, entropy)
            critic_optim.step(critic_loss)
            actor_optim.step(actor_loss)

        return inner_step if backend is None else metaoptim.compile(inner_step, backend=backend)

    def play(self) -> Trajectory:
        """A trajectory of the actor as it is."""
        return self.env.play(self.actor, self.settings.length)

    def outer_loss(self, played: Trajectory) -> Tensor:
        """Policy gradient loss of the actor as it is, with the yardstick's γ and λ."""
        gamma, lam = torch.tensor([self.settings.judge_gamma, self.settings.judge_lam]).unbind()
        return losses(self.actor, self.critic, played, gamma, lam, entropy=0.0)[0]

    def window(self) -> None:
        """Some inner steps, and one outer step on γ and λ."""
        with metaoptim.SlidingWindow(offline=False):
            for _ in range(self.settings.inner_steps):
                self.inner_step(self.played or self.play())
                self.played = None
            self.played = (
                self.play()
            )  # judges the steps taken, then is learnt from: no experience is spent on judging
            if self.settings.learn:
                self.outer.zero_grad()
                self.outer_loss(self.played).backward()
                self.outer.step()


def train(settings: Settings, backend: str | None, progress: Any = None) -> dict[str, Any]:
    """Runs one agent.

    Args:
        settings: of the run.
        backend: see `Agent`.
        progress: called with the number of environment steps taken since the last call, and the curves so far.

    Returns:
        Curves as lists of equal length (``steps``, ``length``: mean length of the last 20 episodes, ``gamma``,
        ``lam``), and ``final``: mean episode length of the greedy policy at the end.
    """
    agent = Agent(settings, backend)
    recent: deque[int] = deque(maxlen=20)
    curves: dict[str, list[float]] = {key: [] for key in CURVES}
    every, taken = settings.env_steps / settings.points, 0
    while agent.env.steps < settings.env_steps:
        agent.window()
        recent += agent.env.finished
        agent.env.finished.clear()
        if agent.env.steps >= every * (len(curves["steps"]) + 1):
            gamma, lam = agent.logits.detach().sigmoid().tolist()
            values = (agent.env.steps, sum(recent) / max(1, len(recent)), gamma, lam)
            for key, value in zip(CURVES, values):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{key} is {value} after {agent.env.steps} steps; lower the learning rates"
                    )
                curves[key].append(value)
        if progress is not None:
            progress(agent.env.steps - taken, curves)
        taken = agent.env.steps
    return {**curves, "final": evaluate(agent.actor, 50, seed=10_000 + settings.seed)}


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
