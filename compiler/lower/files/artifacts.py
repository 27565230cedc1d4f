"""Compiled graphs as files: what a graph's file depends on, and where it lies.

The files lie in inductor's own cache folder. Another process that has the same graph reads the file, and does not
compile it.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from metaoptim.compiler.compat import AOTIModelContainerRunnerCpu

from ...ir.step import FlatGraph
from ...ir.tensors import TensorSpec
from .pickled import read, written

#: The end of a file that is not cut off; the linker reads past it.
WHOLE = b"metaoptim, whole"


def lifted(flat: FlatGraph) -> tuple[fx.Graph, list[Tensor]]:
    """A graph whose last inputs are the constants of ``flat``, and these constants."""
    graph, constants = fx.Graph(), dict[str, fx.Node]()
    replaced = {n: graph.node_copy(n) for n in flat.graph.find_nodes(op="placeholder")}
    for n in flat.graph.find_nodes(op="get_attr"):
        if n.target not in constants:
            constants[n.target] = graph.placeholder(f"constant_{len(constants)}")
        replaced[n] = constants[n.target]
    graph.output(graph.graph_copy(flat.graph, replaced))
    return graph, [flat.constants[name] for name in constants]


def artifact_of(graph: fx.Graph, specs: Sequence[TensorSpec]) -> str:
    """The path of the compiled form of a graph whose inputs are laid out like ``specs``."""
    facts = (
        str(graph),
        [tuple(map(str, spec)) for spec in specs],
        torch.get_default_dtype(),
        torch.__version__,
        torch.version.git_version,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        [torch.cuda.get_device_name(d) for d in {s.device for s in specs} if d.type == "cuda"],
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        _changed_options(),
    )
    name = hashlib.sha256(repr(facts).encode()).hexdigest()
    return os.path.join(folder(), f"{name}.so")


def folder() -> str:
    """Where artifacts lie. Inductor, whose folder it is in, need not be imported to know it."""
    inductors = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(
        tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}"
    )
    return os.path.join(os.path.abspath(inductors), "metaoptim-3")  # the number is that of the format


def load(path: str) -> Callable[..., Any]:
    """The compiled graph of a file. Neither inductor nor dynamo, which take a second to import, is needed.

    Raises:
        ValueError: the file is cut off. To load it would end the process.
        Exception: what loading a library raises.
    """
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - len(WHOLE)))
        if file.read() != WHOLE:
            raise ValueError("it is cut off")
    run = AOTIModelContainerRunnerCpu(path, 1).run
    return lambda *inputs: run(list(inputs))


def payload_of(graph: fx.Graph, specs: Sequence[TensorSpec]) -> bytes:
    """What a process needs to compile a graph. A pickled module would not do: it is traced anew, which runs factories.

    Raises:
        Exception: what pickling raises, for arguments that cannot be sent.
    """
    config = None if _config() is None else _config().save_config()
    settings = (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        config,
    )
    return written(graph, (list(specs), settings))


#: The default dtype, whether algorithms are deterministic, threads of kernels, inductor's options.
Settings = tuple[torch.dtype, bool, int, "bytes | None"]


def read_payload(payload: bytes) -> tuple[fx.Graph, list[TensorSpec], Settings]:
    """The graph, how its inputs are laid out, and what else it depends on."""
    graph, (specs, settings) = read(payload)
    return graph, specs, settings


def _changed_options() -> list[str]:
    """Inductor's options that somebody has changed, but for those that loading and `backends.options` change."""
    lines = [] if _config() is None else _config().codegen_config().splitlines()
    ours = ("size_asserts", "alignment_asserts", "unsafe_skip_cache_dynamic_shape_guards")
    return sorted(
        line for line in lines if not line.startswith(tuple(f"torch._inductor.config.{o} " for o in ours))
    )


def _config() -> Any:
    """Inductor's options; None where it has not been imported, and they are its defaults."""
    return sys.modules.get("torch._inductor.config")
