"""torch.compile's backends, called with flat graphs. Importing this loads dynamo and inductor, which takes a second."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch._inductor.config
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import VecAVX2, VecAVX512
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def call_backend(backend: str, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """What ``backend`` makes of ``graph``, which it may take apart, for inputs laid out like ``inputs``."""
    # inductor's graph cache is for graphs whose inputs have a ShapeEnv
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    return lookup_backend(backend)(graph, [mode.from_tensor(t.detach(), static_shapes=True) for t in inputs])


def options() -> AbstractContextManager[Any]:
    """Inductor's options: no probes that are not needed, and no asserts in every call, as graphs are compared once."""
    changed: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}
    if torch._inductor.config.cpp.vec_isa_ok is None and _knows_vectors():
        changed["cpp.vec_isa_ok"] = True
    return torch._inductor.config.patch(changed)


@functools.cache
def _knows_vectors() -> bool:
    """Whether the C++ compiler takes the flags for the processor's vector instructions.

    Inductor builds and loads programs to find that out, which is a third of a first call.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    flags = [flag for isa in (VecAVX2, VecAVX512) for flag in isa._arch_flags.split()]
    command = [get_cpp_compiler(), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
