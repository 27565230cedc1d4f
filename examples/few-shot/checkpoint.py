"""A checkpoint from which a killed run goes on as if nothing had happened."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import torch


def save(path: str | os.PathLike, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically: whoever reads `path` finds the old one or the new one.

    Args:
        path: where to write it.
        settings: what the run depends on; compared when the checkpoint is loaded.
        state: tensors and plain values. Global random number generators are added.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "settings": settings,
        "state": state,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(partial, "wb") as file:
        torch.save(whole, file)
        file.flush()
        os.fsync(file.fileno())  # else a crash of the machine may keep the name and lose the bytes
    os.replace(partial, path)


def load(path: str | os.PathLike, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the state in a checkpoint and sets the global generators, or None without one.

    Raises:
        ValueError: the checkpoint belongs to a run with other settings.
    """
    if not os.path.exists(path):
        return None
    whole = torch.load(path, map_location="cpu", weights_only=True)
    theirs = whole["settings"]
    different = sorted(key for key in settings.keys() | theirs.keys() if settings.get(key) != theirs.get(key))
    if different:
        listed = ", ".join(f"{key}: {theirs.get(key)} there, {settings.get(key)} here" for key in different)
        raise ValueError(f"{path} belongs to a run with other settings ({listed}); --fresh starts over")
    torch.set_rng_state(whole["rng"])
    if len(whole["cuda_rng"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(whole["cuda_rng"])
    return whole["state"]
