"""torch.compile's backends, called with flat graphs. Importing this loads dynamo and inductor, which takes a second."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..ir.tensors import TensorSpec
from .files.artifacts import WHOLE, Settings
from .inductor.cpp import options

_LIBRARY = {"aot_inductor.enable_line_tables": False}  # of code that nobody has written


def call_backend(backend: str, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """What ``backend`` makes of ``graph``, which it may take apart, for inputs laid out like ``inputs``."""
    # inductor's graph cache is for graphs whose inputs have a ShapeEnv
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[Tensor] = [mode.from_tensor(t.detach(), static_shapes=True) for t in inputs]
    with options():
        return lookup_backend(backend)(graph, fakes)


def compile_to(path: str, graph: fx.Graph, specs: Sequence[TensorSpec], settings: Settings) -> None:
    """Compile a graph without constants with inductor, for inputs laid out like ``specs``, into a file."""
    from torch._inductor.compile_fx import compile_fx_aot  # the rest of inductor

    dtype, deterministic, threads, config = settings
    torch.use_deterministic_algorithms(deterministic)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    if config is not None:
        torch._inductor.config.load_config(config)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        inputs: list[Any] = [s.empty() for s in specs]
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder, torch.no_grad(), options():
        module = fx.GraphModule(torch.nn.Module(), graph)
        made = compile_fx_aot(module, inputs, config_patches=_LIBRARY | {"aot_inductor.output_path": folder})
        assert isinstance(made, str)
        by_name = made.removesuffix(".so") + ".json"  # operators that the library looks up by their names
        if os.path.exists(by_name):
            os.replace(by_name, path.removesuffix(".so") + ".json")
        with open(made, "ab") as file:
            file.write(WHOLE)
        os.replace(made, path)
