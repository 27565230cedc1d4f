"""Lower tiers, as `offload=` names them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from .disk import DiskTier
from .host import HostTier
from .tier import Tier


def tier_for(value: str | os.PathLike[str] | None) -> Tier | None:
    """The tier that the ``offload`` of a `Retention` names."""
    if value is None:
        return None
    if value == "host":
        return HostTier()
    directory = Path(tempfile.gettempdir() if value == "disk" else value)
    return DiskTier(directory.expanduser().absolute())


def check_device(value: str | os.PathLike[str] | None, devices: Iterable[torch.device]) -> None:
    """Raise if ``offload="host"`` would move states of ``devices`` to where they are.

    Raises:
        ValueError: for the host's memory, where all devices are the CPU.
    """
    if value == "host" and all(d.type == "cpu" for d in devices):
        raise ValueError(
            "offload='host': the networks are on the CPU, so their states are in the host's memory already; "
            "offload='disk', or a directory's path, frees memory there"
        )
