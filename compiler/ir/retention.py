"""What of an inner loop is kept for its derivative, as a user states it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


@dataclass(frozen=True)
class Retention:
    """How many states are kept, and where others go.

    Raises:
        ValueError: for slots below 1; a budget that is not positive, a fraction above 1, or text that is no amount of
            memory; slots beside a budget; an ``offload`` that names no place, or has nothing to do.
        TypeError: for a budget or an ``offload`` of another type.
    """

    slots: int | None = None  # how many states, at most; None for as many as fit, or all
    memory_budget: int | float | str | None = (
        None  # bytes, text such as "512MiB", or a fraction of the free memory
    )
    offload: str | os.PathLike[str] | None = None  # where others go: "host", "disk" or a directory's path

    def __post_init__(self) -> None:
        if self.memory_budget is not None:
            _check_budget(self.memory_budget, self.slots)
        if self.offload is not None:
            _check_offload(self.offload, kept=self.given)
        check_count("slots", self.slots)

    @property
    def given(self) -> bool:
        """Whether slots or a budget are given."""
        return self.slots is not None or self.memory_budget is not None

    @property
    def place(self) -> str | None:
        """`offload` as text."""
        return None if self.offload is None else os.fspath(self.offload)


def check_count(name: str, value: Any) -> None:
    """Raise for what is neither a positive integer nor None.

    Raises:
        ValueError: it names the option.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name}: got {value!r}, expected a positive integer or None")


def amount(text: str) -> int | None:
    """Bytes of ``"512MiB"`` and the like (KiB to TiB are powers of 1024, KB to TB of 1000); None for other text."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    return int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else None


def _check_budget(value: Any, slots: int | None) -> None:
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
        if not amount(value):
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


def _check_offload(value: Any, kept: bool) -> None:
    if not hasattr(value, "__fspath__") and not isinstance(value, str):
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
    if not kept:
        raise ValueError(
            f"offload={os.fspath(value)!r} without slots or memory_budget: every state is kept on the device then, and "
            "none is offloaded; say how many may stay there, for example slots=8"
        )


UNSAID = Retention()
