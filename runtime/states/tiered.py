"""Lower tiers, as `offload=` names them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .disk import DiskTier
from .host import HostTier
from .tier import Tier


def check_offload(value: str | os.PathLike[str] | None, slots: int | None, budget: Any) -> None:
    """Raise for what is no place to offload states to.

    Raises:
        ValueError: for a name that is none, for a path of something else than a directory, and where every state is
            kept on the device anyway.
        TypeError: for another type.
    """
    if value is None:
        return
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            f"offload: got {type(value).__name__}, expected 'host', 'disk', or the path of a directory"
        )
    if value not in ("host", "disk"):
        path = Path(value).expanduser()
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"offload: {path} is not a directory; expected 'host', 'disk', or a directory's path"
            )
        if isinstance(value, str) and not path.exists() and len(path.parts) < 2:
            raise ValueError(
                f"offload: got {value!r}, expected 'host', 'disk' (a temporary directory), or the path of a directory; "
                f"for a new directory of that name, {'./' + value!r} or a pathlib.Path"
            )
    if slots is None and budget is None:
        raise ValueError(
            f"offload={os.fspath(value)!r} without slots or memory_budget: every state is kept on the device then, and "
            "none is offloaded; say how many may stay there, for example slots=8"
        )


def tier_for(value: str | os.PathLike[str] | None) -> Tier | None:
    """The tier that an ``offload=`` names, as `check_offload` lets it pass."""
    if value is None:
        return None
    if value == "host":
        return HostTier()
    directory = Path(tempfile.gettempdir() if value == "disk" else value)
    return DiskTier(directory.expanduser().absolute())


def check_device(value: str | os.PathLike[str] | None, devices: Iterable[torch.device]) -> None:
    """Raise if ``offload="host"`` would move states of ``devices`` to where they are.

    Raises:
        ValueError: likewise.
    """
    if value == "host" and all(d.type == "cpu" for d in devices):
        raise ValueError(
            "offload='host': the networks are on the CPU, so their states are in the host's memory already; "
            "offload='disk', or a directory's path, frees memory there"
        )
