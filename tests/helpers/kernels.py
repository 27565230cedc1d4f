"""Functions compiled by inductor into a file, as graphs of steps are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from metaoptim.compiler.ir.tensors import tensor_spec
from metaoptim.compiler.lower import backends
from metaoptim.compiler.lower.files.artifacts import load


def run_by_inductor(f: Callable[..., Any], inputs: Sequence[Tensor], folder: Path) -> Sequence[Tensor]:
    """What ``f`` gives for ``inputs``, compiled for them."""
    path, graph = str(folder / "graph.so"), make_fx(f, tracing_mode="fake")(*inputs).graph
    settings = torch.get_default_dtype(), False, 1, None  # it sets them in this process
    backends.compile_to(path, graph, [tensor_spec(t) for t in inputs], settings)
    return load(path)(*inputs)
