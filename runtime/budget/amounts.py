"""Memory budgets as users state them, in bytes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

from metaoptim.compiler.ir.program import readable_bytes
from metaoptim.errors import warn

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*")


def check_budget(value: int | float | str | None, slots: int | None) -> None:
    """Raise for what is no budget.

    Raises:
        ValueError: for a budget that is not positive, a fraction above 1, text that is no amount of memory, or a number
            of slots beside it.
        TypeError: for another type.
    """
    if value is None:
        return
    if slots is not None:
        raise ValueError(
            f"memory_budget={value!r} with slots={slots}: a budget says how many states to keep; give one of the two"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(
            f"memory_budget: got {type(value).__name__}, expected bytes, text such as '512MiB', or a fraction of the "
            "free memory"
        )
    if isinstance(value, str):
        found = _AMOUNT.fullmatch(value)
        if found is None or found[2] not in _UNITS or int(float(found[1]) * _UNITS[found[2]]) < 1:
            raise ValueError(
                f"memory_budget: got {value!r}, expected an amount with a unit, such as '512MiB' or '2GiB'; for a "
                "fraction of the free memory, a float"
            )
    elif isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(
            f"memory_budget: got {value}, expected a fraction of the free memory between 0 and 1; for bytes, an integer"
        )
    elif value <= 0:
        raise ValueError(f"memory_budget: got {value}, expected a positive number of bytes")


def check_count(name: str, value: Any) -> None:
    """Raise for what is neither a positive integer nor None.

    Raises:
        ValueError: it names the option.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name}: got {value!r}, expected a positive integer or None")


def budget_bytes(value: int | float | str, device: torch.device) -> int:
    """A budget in bytes.

    Args:
        value: bytes; text such as ``"512MiB"`` (KiB, MiB, GiB, TiB are powers of 1024, KB, MB, GB, TB of 1000); or a
            fraction, a float, of the memory that is free on ``device`` now.
        device: of the inner state.
    """
    if isinstance(value, str):
        found = _AMOUNT.fullmatch(value)
        assert found is not None
        return int(float(found[1]) * _UNITS[found[2]])
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
