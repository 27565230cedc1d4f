"""From a step's graph as it is to its compiled form, which is made elsewhere while the graph runs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.step import FlatGraph
from ...ir.tensors import TensorSpec, tensor_spec
from ..files.artifacts import artifact_of, lifted, load, payload_of
from . import background

_told = False
_log = logging.getLogger("metaoptim.recompiles")


def waits() -> bool:
    """Whether calls wait for the compiler: asked for by ``METAOPTIM_WAIT=1``, or results must not depend on time."""
    return os.environ.get("METAOPTIM_WAIT", "0") != "0" or torch.are_deterministic_algorithms_enabled()


def elsewhere(inputs: Iterable[Tensor | TensorSpec]) -> bool:
    """Whether graphs with such inputs are compiled in other processes: on the CPU, and not on Windows."""
    return hasattr(os, "killpg") and all(x.device.type == "cpu" for x in inputs)


def prepare(inputs: Iterable[Tensor]) -> None:
    """A function of ``inputs`` is about to be captured: where its call will wait for the compiler, have that start."""
    if waits() and elsewhere(inputs):
        background.prepare()


class Handover:
    """A graph on its way to its compiled form.

    Args:
        graph: the graph.
        specs: how its inputs are laid out.
    """

    def __init__(self, graph: FlatGraph, specs: Sequence[TensorSpec]) -> None:
        self._flat = graph
        own, self.constants = lifted(graph)
        self._specs = [*specs, *map(tensor_spec, self.constants)]
        self.path, self.job = artifact_of(own, self._specs), None
        if not os.path.exists(self.path):
            self._ask(own)

    def _ask(self, graph: fx.Graph) -> None:
        self.job, new = background.job_for(self.path)
        try:
            if new:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                background.submit(self.job, payload_of(graph, self._specs), waits())
        except Exception as error:  # of the file system, or whatever pickling an argument raises
            self.job.end(f"{type(error).__name__}: {error}")

    @property
    def ended(self) -> bool:
        """Whether the compiled form is there, or is known not to come."""
        return self.job is None or self.job.ended

    @property
    def complaint(self) -> str | None:
        """Why there is no compiled form, once it has ended."""
        return None if self.job is None else self.job.complaint

    def wait(self) -> None:
        """Wait until it has ended."""
        if self.job is not None:
            self.job.wait()

    def program(self) -> Callable[..., Any] | None:
        """The compiled form, once it is there; None where nothing came of it."""
        self.wait()
        run = None
        for again in (False, True):
            if run is None and self.complaint is None:
                try:
                    run = load(self.path)
                except Exception as error:  # whatever reading it raises, of a file that is cut off for one
                    _log.warning("the compiled graph %s cannot be read: %s", self.path, error)
                    if not again:
                        with suppress(OSError):
                            os.unlink(self.path)
                        self._ask(lifted(self._flat)[0])
                        self.wait()
        constants = self.constants
        return run if run is None or not constants else lambda *inputs: run(*inputs, *constants)


def tell(complaint: str, asked: bool) -> None:
    """Say that a graph runs as it is; where compiling was asked for, warn, once in a process."""
    global _told
    _log.info("a graph runs as it is: %s", complaint)
    if asked and not _told:
        _told = True
        warnings.warn(
            f"a part of the inner loop could not be compiled in the background and runs as it is: {complaint}. "
            "With METAOPTIM_WAIT=1 it is compiled in this process, and errors are those of the compiler. "
            "METAOPTIM_LOGS=recompiles names further parts.",
            RuntimeWarning,
            stacklevel=2,
        )
