"""Compiled graphs as files: what a graph's depends on, where it lies, and how it is made and read.

The files lie in inductor's own cache folder. Another process that has the same graph reads the file, and neither traces
nor compiles.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import pickle
import platform
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.tensors import TensorSpec


def lifted(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """A copy of a graph whose constants are its last inputs, and these constants."""
    copied, constants = fx.Graph(), dict[str, fx.Node]()
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    replaced = {n: copied.node_copy(n) for n in placeholders}
    for n in graph.graph.nodes:
        if n.op == "get_attr" and n.target not in constants:
            constants[n.target] = copied.placeholder(f"constant_{len(constants)}")
    for n in graph.graph.nodes:
        if n.op == "get_attr":
            replaced[n] = constants[n.target]
        elif n.op == "output":
            copied.output(fx.map_arg(n.args[0], replaced.__getitem__))
        elif n.op != "placeholder":
            replaced[n] = copied.node_copy(n, replaced.__getitem__)
    return fx.GraphModule(torch.nn.Module(), copied), [getattr(graph, name) for name in constants]


def artifact_of(graph: fx.GraphModule, specs: Sequence[TensorSpec]) -> str:
    """The path of the compiled form of a graph whose inputs are laid out like ``specs``."""
    facts = (
        graph.code,
        [tuple(map(str, spec)) for spec in specs],
        torch.__version__,
        torch.version.git_version,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        [torch.cuda.get_device_name(d) for d in {s.device for s in specs} if d.type == "cuda"],
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        _changed_config(),
    )
    name = hashlib.sha256(repr(facts).encode()).hexdigest()
    return os.path.join(folder(), f"{name}.pt2")


def folder() -> str:
    """Where artifacts lie: in inductor's cache folder, which need not be imported to be known."""
    inductors = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(
        tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}"
    )
    return os.path.join(os.path.abspath(inductors), "metaoptim")


def payload_of(graph: fx.GraphModule, specs: Sequence[TensorSpec]) -> bytes:
    """What a process needs to compile a graph.

    Raises:
        Exception: whatever pickling raises, for a graph that cannot be sent.
    """
    for n in graph.graph.nodes:
        n.meta = {}
    config: Any = sys.modules.get("torch._inductor.config")
    return pickle.dumps((graph, list(specs), torch.get_num_threads(), config and config.save_config()))


def _changed_config() -> str:
    """Inductor's options that differ from its defaults; it need not be imported to have none."""
    config: Any = sys.modules.get("torch._inductor.config")
    return "" if config is None else config.codegen_config()
