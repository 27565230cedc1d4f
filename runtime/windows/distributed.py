"""torch.distributed: `SlidingWindow(sync=group)` averages the last parameters of an online window over its ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def check_sync(group: Any, offline: bool) -> None:
    """Raise unless ``sync=group`` names a process group of this rank; False is no group.

    Raises:
        TypeError: for something else than a process group.
        ValueError: where there is nothing to average, or nobody to average with.
    """
    if group is False:
        return
    if group is None or not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"sync={group!r}: torch.distributed is not initialised; call torch.distributed.init_process_group first "
            "(until then torch.distributed.group.WORLD is None), or leave sync out"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("sync: this rank is not in the process group; leave sync out on ranks outside of it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"sync: got {group!r}, expected a process group, such as torch.distributed.group.WORLD"
        )
    if offline:
        raise ValueError(
            "sync= with offline=True: offline, the networks return to where they began, so there is nothing to "
            "average; average the meta-gradients instead, or use offline=False"
        )


def average(values: list[Tensor], group: Any) -> list[Tensor]:
    """The mean of each tensor over the ranks of ``group``."""
    means = [v.clone() for v in values]
    for mean in means:
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
    return means
