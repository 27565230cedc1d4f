"""torch.compile's backends, called with flat graphs. Importing this loads dynamo and inductor, which takes a second."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import cpp_builder
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import VecISA
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..ir.tensors import TensorSpec
from .files.artifacts import WHOLE, Settings

_LIBRARY = {"aot_inductor.enable_line_tables": False}  # of code that nobody has written


def call_backend(backend: str, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """What ``backend`` makes of ``graph``, which it may take apart, for inputs laid out like ``inputs``."""
    # inductor's graph cache is for graphs whose inputs have a ShapeEnv
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[Tensor] = [mode.from_tensor(t.detach(), static_shapes=True) for t in inputs]
    with options():
        return lookup_backend(backend)(graph, fakes)


@contextmanager
def options() -> Iterator[None]:
    """Inductor's options: no asserts in every call, as graphs are compared once, and no probes that take long.

    To find out which vector instructions there are, inductor builds, links and loads a program for each kind, a third
    of a first call. On Linux the flags tell: whether PyTorch's own libraries load is known, it runs. What compilers
    make is moved to its place when it is whole: a file that is cut off would be found ever after.
    """
    moving = mock.patch.object(cpp_builder, "run_compile_cmd", partial(_whole, cpp_builder.run_compile_cmd))
    probing = mock.patch.object(VecISA, "check_build", lambda isa, code: _takes(isa._arch_flags))
    known = platform.system() == "Linux" and platform.machine() == "x86_64"
    with torch._inductor.config.patch(size_asserts=False, alignment_asserts=False), moving:
        with probing if known else nullcontext():
            yield


def _whole(run: Callable[[str, str], None], command: str, cwd: str) -> None:
    """Run a compiler, whose output lies beside its place until it has ended."""
    words = shlex.split(command)
    if "-o" not in words:
        return run(command, cwd)
    at = words.index("-o") + 1
    place = os.path.join(cwd, words[at])
    words[at] = f"{place}.{os.getpid()}"
    try:
        run(shlex.join(words), cwd)
        os.replace(words[at], place)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(words[at])


@functools.cache
def _takes(flags: str) -> bool:
    """Whether the C++ compiler takes these flags."""
    command = [get_cpp_compiler(), *flags.split(), "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


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
