"""Derived graphs as files, beside the compiled ones: another process that has the same step does not derive it again.

A graph is remembered where all that it depends on is known: torch's operators, this package's own optimizers, and the
source of both. The user's own Python (hooks, custom Functions, updates) may have changed; such steps are derived anew.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import operator
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from metaoptim.compiler.compat import OpOverload

from ...ir.step import FlatGraph, StepGraph, again, gradient, show
from ...ir.update import HyperRef, UpdatePlan, is_ours
from .artifacts import folder
from .pickled import read, written

_log = logging.getLogger("metaoptim.recompiles")
#: Seconds of deriving that are worth a file.
PAYS = 0.05
_OURS: tuple[Any, ...] = (gradient, show, again, operator.getitem)
_PLAIN = (bool, int, float, str, type(None))
_imported = time.time()

#: Graphs of a step, and what is to be said of them.
Derivation = tuple[Sequence[FlatGraph], Any]


def remembered(step: StepGraph, kind: str, derive: Callable[[], Derivation]) -> Derivation:
    """What is derived from a step, of this kind: from a file, or derived now, and then written."""
    path = _path_of(step, kind)
    if path is None:
        return derive()
    try:
        with open(path, "rb") as file:
            data = file.read()
        digest, data = data[:32], data[32:]
        if hashlib.sha256(data).digest() == digest:
            graphs, note = pickle.loads(data)
            return [FlatGraph(*read(graph)) for graph in graphs], note
    except OSError:  # for one, there is none yet
        pass
    begun = time.perf_counter()
    graphs, note = derive()
    if time.perf_counter() - begun > PAYS:
        _write(path, graphs, note)
    return graphs, note


def _write(path: str, graphs: Sequence[FlatGraph], note: Any) -> None:
    """Write what was derived; where that cannot be, the next process derives it, as this one has."""
    try:
        data = pickle.dumps(([written(flat.graph, flat.constants) for flat in graphs], note))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        place = f"{path}.{os.getpid()}"
        with open(place, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        os.replace(place, path)
    except Exception as error:  # of the file system, or whatever pickling an argument raises
        _log.info("a derived graph is not remembered: %s: %s", type(error).__name__, error)


def _path_of(step: StepGraph, kind: str) -> str | None:
    """Where a graph of a step lies; None where it depends on what has no name that holds in another process."""
    if step.opaque or step.dynamic or step.hooked or step.given or step.graph.find_nodes(op="get_attr"):
        return None
    source, plans = _source(), list[str]()
    if source is None:
        return None
    target: Any
    for target in [n.target for n in step.graph.nodes if n.op == "call_function"]:
        if isinstance(target, UpdatePlan):
            name = _name_of(target)
            if name is None:
                return None
            plans.append(name)
        elif not (isinstance(target, OpOverload) and target.namespace == "aten") and target not in _OURS:
            return None
    facts = (
        kind,
        str(step),
        [(p.role.value, *map(str, p.spec), p.active) for p in (*step.inputs, *step.outputs)],
        plans,
        step.first_order,
        step.default_dtype,
        torch.__version__,
        torch.version.git_version,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        source,
    )
    name = hashlib.sha256(repr(facts).encode()).hexdigest()
    return os.path.join(folder(), f"{name}.graph")


def _name_of(plan: UpdatePlan) -> str | None:
    """What an update does, if it is one of this package's own and all else in its plan is plain."""
    own: list[Any] = [plan.update, *([plan.init] if plan.init else ())]
    values = [v for group in plan.groups for _, v in group]
    flat = [w for v in values for w in (v if isinstance(v, tuple) else (v,))]
    if (
        not all(is_ours(f) and not f.__closure__ for f in own)
        or plan.transforms
        or not all(isinstance(v, (*_PLAIN, HyperRef)) for v in flat)
    ):
        return None
    names = [(f.__globals__["__name__"], f.__code__.co_firstlineno) for f in own]
    return repr((names, plan.groups, plan.group_of, plan.states))


def _package() -> str:
    return __name__.partition(".")[0] + "."


@functools.cache
def _source() -> str | None:
    """A digest of this package's source: of what derives, and of the optimizers.

    None where that is not what runs: there is none, or it has changed since this module was imported.
    """
    digest, changed = hashlib.sha256(), 0.0
    for package in (_package()[:-1], __name__.rpartition(".lower")[0]):
        for root in sys.modules[package].__path__:
            for place, folders, files in os.walk(root):
                folders.sort()
                for name in sorted(files):
                    if name.endswith(".py"):
                        with open(os.path.join(place, name), "rb") as file:
                            digest.update(file.read())
                            changed = max(changed, os.fstat(file.fileno()).st_ctime)
    return digest.hexdigest() if 0 < changed < _imported else None
