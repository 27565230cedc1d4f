"""Actor, critic, and the losses they learn from, differentiable by the discount and by the trace decay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rollout import Trajectory


def network(hidden: int, last: float) -> nn.Sequential:
    """Observations (..., 4) to one number each; ``last`` scales the initial weights of the last layer."""
    net = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1), nn.Flatten(-2))
    with torch.no_grad():
        net[2].weight.mul_(last)
    return net


def lambda_advantages(
    rewards: Tensor, values: Tensor, alive: Tensor, goes_on: Tensor, gamma: Tensor, lam: Tensor
) -> Tensor:
    """Generalised advantages: A_t = Σ_{j ≥ t} (γλ)^{j-t} δ_j within the episode, δ_j = r_j + γ v_{j+1} - v_j.

    A_t + v_t is the λ-return. One weighted sum over pairs of steps instead of a loop over steps: a fixed number of
    operators, whatever T.

    Args:
        rewards: (T, N).
        values: (T + 1, N), taken as constants.
        alive: (T, N), 0 where there is no value after the step.
        goes_on: (T, N), 0 where the episode ended in this step.
        gamma: scalar, the discount γ.
        lam: scalar, the trace decay λ.

    Returns:
        (T, N), differentiable by γ and λ.
    """
    steps = len(rewards)
    delta = rewards + gamma * alive * values[1:] - values[:-1]
    gap = torch.arange(steps)[None, :] - torch.arange(steps)[:, None]  # j - t
    ends = torch.cat(
        [torch.zeros_like(goes_on[:1]), (1 - goes_on).cumsum(0)]
    )  # episodes ended before each step
    reaches = (gap >= 0)[..., None] & (ends[None, :-1] == ends[:-1, None])
    weights = (gamma * lam) ** gap.clamp(min=0).to(rewards.dtype)[..., None] * reaches
    return (weights * delta[None]).sum(1)


def losses(
    actor: nn.Module, critic: nn.Module, played: Trajectory, gamma: Tensor, lam: Tensor, entropy: float
) -> tuple[Tensor, Tensor]:
    """Actor's and critic's loss (advantage actor-critic with λ-returns) on one trajectory.

    Args:
        actor: gives the logit of action 1.
        critic: gives the value.
        played: the trajectory.
        gamma: scalar, the discount.
        lam: scalar, the trace decay.
        entropy: weight of the entropy bonus.

    Returns:
        Two scalars. The advantage is a constant to both networks, and a function of ``gamma`` and ``lam``.
    """
    values = critic(played.observations)
    logits = actor(played.observations[:-1])
    fixed = values.detach()
    advantages = lambda_advantages(played.rewards, fixed, played.alive, played.goes_on, gamma, lam)
    count = played.valid.sum()
    log_right, log_left = F.logsigmoid(logits), F.logsigmoid(-logits)
    taken = torch.where(played.actions == 1, log_right, log_left)
    uncertainty = -(log_right.exp() * log_right + log_left.exp() * log_left)
    gain = taken * advantages + entropy * uncertainty
    error = advantages + fixed[:-1] - values[:-1]
    return -(gain * played.valid).sum() / count, (error.square() * played.valid).sum() / count
