"""Finished runs on disk, so that a killed experiment goes on with the first one missing."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from training import Settings


class Results:
    """A JSON file of finished runs, by settings and the way they were run.

    Args:
        path: of the file, or None to keep nothing.
        fresh: forget what the file holds.
    """

    def __init__(self, path: pathlib.Path | None, fresh: bool = False) -> None:
        self.path = path
        self._runs: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists() and not fresh:
            try:
                self._runs = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} is no file of results ({error}); remove it, or use --fresh"
                ) from error

    def find(self, settings: Settings, backend: str | None) -> dict[str, Any] | None:
        """The run with these very settings, if it is there."""
        return self._runs.get(_key(settings, backend))

    def add(self, settings: Settings, backend: str | None, run: dict[str, Any]) -> None:
        """Adds a run and writes the file, whole or not at all."""
        self._runs[_key(settings, backend)] = run
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        partial.write_text(json.dumps(self._runs))
        os.replace(partial, self.path)


def _key(settings: Settings, backend: str | None) -> str:
    return json.dumps({**settings.as_dict(), "backend": backend}, sort_keys=True)
