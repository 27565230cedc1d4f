"""torch.distributed: parameters averaged over ranks at the end of an online window."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def average_over_ranks(values: list[Tensor]) -> list[Tensor]:
    """The mean over ranks of each tensor; ``values`` themselves where no process group is initialised."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    means = [v.clone() for v in values]
    for mean in means:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return means
