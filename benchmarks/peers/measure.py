"""Measure one peer on one problem in this process. run.py starts it, in the environment of the peer.

    python benchmarks/peers/measure.py PEER PROBLEM.npz REFERENCE.npz OUT.json --repeats 5

OUT.json is written after the first call and again at the end, so that something is left if time runs out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from problems import Problem

Gradient = Callable[[], dict[str, np.ndarray]]
#: Calls after the first that do not count as steady: a window's steps run by compiled graphs from the second to the
#: sixth call on, by the problem.
WARM_UP = 7


@dataclass(frozen=True)
class Peer:
    """How a meta-gradient is made.

    Attributes:
        environment: "main" (the one of the project), "torch" or "jax".
        module, maker, options: ``module.maker(problem, **options)`` gives the function that is measured.
        label: how tables name it.
        packages: whose versions are written down.
    """

    label: str
    environment: str
    module: str
    maker: str
    options: dict[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ("torch",)


def _compiled(label: str, maker: str, **options: Any) -> Peer:
    return Peer(label, "main", "ours", maker, {"backend": "inductor", **options})


PEERS: dict[str, Peer] = {
    "products": Peer("bare matrix products (lower bound)", "main", "torch_peers", "products"),
    "eager-tape": Peer("eager tape", "main", "torch_peers", "eager_tape"),
    "func-step": Peer(
        "torch.func, a checkpoint per step", "main", "torch_peers", "torch_func", {"segments": "step"}
    ),
    "func-sqrt": Peer(
        "torch.func, √T checkpoints", "main", "torch_peers", "torch_func", {"segments": "sqrt"}
    ),
    "torchopt": Peer("TorchOpt", "torch", "torch_peers", "torchopt", packages=("torch", "torchopt")),
    "higher": Peer("higher", "torch", "torch_peers", "higher", packages=("torch", "higher")),
    "jax": Peer("JAX, scan", "jax", "jax_peer", "scan", packages=("jax", "optax")),
    "jax-remat": Peer(
        "JAX, scan with remat", "jax", "jax_peer", "scan", {"remat": "step"}, packages=("jax", "optax")
    ),
    "jax-sqrt": Peer(
        "JAX, √T remat", "jax", "jax_peer", "scan", {"remat": "sqrt"}, packages=("jax", "optax")
    ),
    "ours-window": Peer("window", "main", "ours", "window"),
    "ours-window-inductor": _compiled("window, derivatives compiled", "window"),
    "ours-step": _compiled("compiled step in a window", "compiled_step"),
    "ours-compiled": _compiled("compiled", "compiled"),
    "ours-64MiB": _compiled("compiled, 64 MiB", "compiled", memory_budget="64MiB"),
    "ours-256MiB": _compiled("compiled, 256 MiB", "compiled", memory_budget="256MiB"),
    "ours-graphs": _compiled("compiled, CUDA graphs", "compiled", mode="reduce-overhead"),
    "ours-4GiB": _compiled("compiled, 4 GiB", "compiled", memory_budget="4GiB"),
}


def resident(line: str) -> float:
    """MiB of a line of /proc/self/status."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(line):
            return int(text.split()[1]) / 1024
    raise OSError(f"no {line} in /proc/self/status")


class Clock:
    """Seconds of a call: by the wall clock, of this process, of processes that it has started and that have ended."""

    def __enter__(self) -> Clock:
        self.begun = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.took = {key: now - self.begun[key] for key, now in self._now().items()}

    def _now(self) -> dict[str, float]:
        _wait_for_gpu()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "wall": time.perf_counter(),
            "cpu": time.process_time(),
            "children": children.ru_utime + children.ru_stime,
        }


def _on_gpu() -> bool:
    """Whether this process has used a GPU, by torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _wait_for_gpu() -> None:
    if _on_gpu():
        sys.modules["torch"].cuda.synchronize()


def errors(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Relative error of each part of a meta-gradient, in the 2-norm; None where something is not finite."""
    if found.keys() != reference.keys():
        raise ValueError(f"gradients for {sorted(found)}, expected them for {sorted(reference)}")
    by_name: dict[str, float | None] = {}
    for name, expected in reference.items():
        error = float(np.linalg.norm(found[name] - expected) / np.linalg.norm(expected))
        by_name[name] = error if np.isfinite(error) else None
    return by_name


def build(peer: Peer, problem: Problem, backend: str | None) -> Gradient:
    """What is measured; its data and parameters are made."""
    options = {**peer.options, **({"backend": backend} if backend and "backend" in peer.options else {})}
    gradient = getattr(importlib.import_module(peer.module), peer.maker)(problem, **options)
    gc.collect()
    return gradient


def measure(
    peer: Peer, gradient: Gradient, reference: Path, repeats: int, result: dict[str, Any]
) -> Iterator[None]:
    """The first call, `WARM_UP` more, `repeats` that are steady, one for memory; yields when ``result`` has grown."""
    result["versions"] = {name: importlib.metadata.version(name) for name in peer.packages}
    baseline, known = resident("VmRSS"), set(sys.modules)
    with Clock() as clock:
        found = gradient()
    result["first"] = clock.took
    result["imported"] = [name for name in sys.modules if name not in known]
    if reference.exists():
        with np.load(reference) as file:
            result["errors"] = errors(found, dict(file))
    yield
    if not repeats:
        return
    took = []
    for _ in range(WARM_UP + repeats):
        with Clock() as clock:
            gradient()
        took.append(clock.took)
    took = took[WARM_UP:]
    result["steady"] = {key: statistics.median(t[key] for t in took) for key in took[0]}
    result["calls"] = took
    gc.collect()
    if _on_gpu():
        result["memory"] = {"above": on_device(gradient)}
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        gradient()
        peak = resident("VmHWM")
        result["memory"] = {"baseline": baseline, "before": before, "peak": peak, "above": peak - baseline}
    yield


def on_device(gradient: Gradient) -> float:
    """Most MiB of a GPU that are allocated in a call; what it keeps from call to call counts."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    gradient()
    return torch.cuda.max_memory_allocated() / 2**20


def imports(names: list[str]) -> float:
    """MiB that modules take which a peer imports in its first call only: memory is counted above all imports."""
    before = resident("VmRSS")
    for name in names:
        with contextlib.suppress(ImportError):  # some are made by other modules, not by files
            importlib.import_module(name)
    return resident("VmRSS") - before


def main() -> None:
    """Measure, or make the reference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=[*PEERS, "reference"])
    parser.add_argument("problem", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", help="in place of inductor, for ours")
    parser.add_argument(
        "--imports-of", type=Path, help="measure what importing took in the run that wrote this"
    )
    args = parser.parse_args()
    problem = Problem.load(args.problem)
    if args.peer == "reference":  # the eager tape in float64
        import torch

        from torch_peers import eager_tape

        np.savez(args.reference, **eager_tape(problem, torch.float64)())
    elif args.imports_of:
        gradient = build(PEERS[args.peer], problem, args.backend)  # held: what is measured lies above it
        args.out.write_text(json.dumps(imports(json.loads(args.imports_of.read_text())["imported"])))
    else:
        result: dict[str, Any] = {}
        try:
            gradient = build(PEERS[args.peer], problem, args.backend)
            for _ in measure(PEERS[args.peer], gradient, args.reference, args.repeats, result):
                args.out.write_text(json.dumps(result))
        except Exception as error:
            result["failure"] = f"{type(error).__name__}: {error}".partition("\n")[0]
            args.out.write_text(json.dumps(result))
            raise


if __name__ == "__main__":
    main()
