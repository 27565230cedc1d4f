"""Logs of compiled functions, chosen by the environment variable METAOPTIM_LOGS, in the manner of TORCH_LOGS."""

from __future__ import annotations

import logging
import os
import sys

ARTIFACTS = {
    "recompiles": "why a compiled function was compiled anew: which guard failed",
    "passes": "what each pass did to the program, and how long it took",
    "graphs": "the program that came out; with +, the operators of its step graphs",
    "plans": "how a memory budget is kept",
    "cache": "step graphs that were built; with +, also those found again",
}
_ROOT = "metaoptim"


def configure(spec: str) -> None:
    """Switch logs on, on stderr; logs that are not named are off.

    The loggers are Python's, ``metaoptim.recompiles`` and so on, so that an application can also configure them by
    `logging` as it does its own, and leave this alone.

    Args:
        spec: names separated by commas: ``recompiles``, ``passes``, ``graphs``, ``plans``, ``cache`` or ``all``; ``+``
            before a name for more of it. Empty for none.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> metaoptim.logs.configure("recompiles,+cache")
        >>> metaoptim.logs.configure("")
    """
    levels: dict[str, int] = {}
    for word in filter(None, (w.strip() for w in spec.split(","))):
        level = logging.DEBUG if word.startswith("+") else logging.INFO
        name = word.removeprefix("+")
        if name != "all" and name not in ARTIFACTS:
            known = "\n".join([*(f"  {n:<12}{what}" for n, what in ARTIFACTS.items()), "  all"])
            raise ValueError(f"METAOPTIM_LOGS: got {word!r}, expected names separated by commas, of\n{known}")
        levels.update(dict.fromkeys(ARTIFACTS if name == "all" else [name], level))
    others = logging.CRITICAL if levels else logging.NOTSET
    for name in ARTIFACTS:
        logging.getLogger(f"{_ROOT}.{name}").setLevel(levels.get(name, others))
    root = logging.getLogger(_ROOT)
    for handler in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(handler)
    if levels:
        root.addHandler(_Handler())
    root.propagate = not levels  # said once


class _Handler(logging.Handler):
    """Lines on stderr, whatever that is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        name = record.name.removeprefix(_ROOT + ".")
        text = record.getMessage().replace("\n", f"\n[{name}] ")
        print(f"[{name}] {text}", file=sys.stderr)


def configure_from_environment() -> None:
    """Act on METAOPTIM_LOGS, if it is set."""
    spec = os.environ.get("METAOPTIM_LOGS", "")
    if spec:
        configure(spec)
