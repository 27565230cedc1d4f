"""Memory budgets as users state them, in bytes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from metaoptim.compiler.ir.retention import amount
from metaoptim.compiler.ir.text import readable_bytes
from metaoptim.errors import warn


def budget_bytes(value: int | float | str, device: torch.device) -> int:
    """A budget in bytes: as many, text such as ``"512MiB"``, or a fraction of the memory that is free on ``device``."""
    if isinstance(value, str):
        found = amount(value)
        assert found is not None
        return found
    if not isinstance(value, float):
        return value
    free = free_bytes(device)
    if free is None:
        raise ValueError(
            f"memory_budget: a fraction of the free memory is not known for {device.type} on this system; give bytes"
        )
    return int(value * free)


def default_budget(device: torch.device) -> int:
    """Where no budget is stated: half of the memory that is free now; without bound where that is not known."""
    free = free_bytes(device)
    return sys.maxsize if free is None else free // 2


def tell_default(who: str, budget: int) -> None:
    """Warn that states are given up although nobody has asked for it."""
    warn(
        f"{who} would need more than {readable_bytes(budget)} to keep every state, half of the memory that was free: "
        "some are given up, and a backward runs their steps again. To choose, say memory_budget= or slots="
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory of ``device`` that can be had now; None where that is not known."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    available = Path("/proc/meminfo")
    if device.type != "cpu" or not available.exists():
        return None
    (kibibytes,) = re.findall(r"MemAvailable:\s+(\d+) kB", available.read_text())
    return 1024 * int(kibibytes)
