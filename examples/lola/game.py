"""The iterated prisoner's dilemma between two policies with a memory of one round, valued exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: What a policy remembers: nothing yet, or its own last move and the other's (C cooperates, D defects).
MEMORIES = ("start", "CC", "CD", "DC", "DD")
#: What a player gets in a round that ends CC, CD, DC or DD, her own move first.
PAYOFFS = (-1.0, -3.0, 0.0, -2.0)
#: Each round counts this much of the one before. A value times 1 - GAMMA is what a round brings on average.
GAMMA = 0.96


class Policies(nn.Module):
    """A policy for each of several matches, which are played side by side and know nothing of one another.

    Attributes:
        logits: (matches, 5), of the probabilities to cooperate after each of `MEMORIES`.
    """

    def __init__(self, matches: int, generator: torch.Generator) -> None:
        super().__init__()
        logits = torch.randn(matches, len(MEMORIES), dtype=torch.float64, generator=generator)
        self.logits = nn.Parameter(logits)

    def forward(self) -> Tensor:
        """Returns the probabilities to cooperate, (matches, 5)."""
        return self.logits.sigmoid()


def value(mine: Tensor, theirs: Tensor) -> Tensor:
    """Returns the discounted sum of a player's payoffs in each match, (matches,).

    The rounds are a Markov chain with four states. Its first distribution p, its transitions P and the payoffs r give
    the sum p (I - γP)⁻¹ r.

    Args:
        mine: the player's probabilities to cooperate, (matches, 5).
        theirs: the other player's, who sees the two moves the other way round.
    """
    c, d = mine, theirs[:, [0, 1, 3, 2, 4]]
    joint = torch.stack([c * d, c * (1 - d), (1 - c) * d, (1 - c) * (1 - d)], -1)
    first, moves = joint[:, 0], joint[:, 1:]
    rewards = torch.tensor(PAYOFFS, dtype=c.dtype).expand(len(c), 4)
    return (first * torch.linalg.solve(torch.eye(4, dtype=c.dtype) - GAMMA * moves, rewards)).sum(1)
