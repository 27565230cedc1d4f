"""How inductor's C++ is compiled: without what takes most of the time, and is no use here."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch._inductor import codegen, cpp_builder
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import VecISA
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._inductor.virtualized import V

from .rewrites import Rewrites
from .vector_functions import vector_functions

Run = Callable[[str, str], None]

#: What a compiled graph is called by. Inductor copies it into the source of each.
_INTERFACE = Path(codegen.__path__[0], "aoti_runtime", "interface.cpp")
_of_one_thread = threading.RLock()  # what inductor is made of is replaced, and put back
_HEADER = "#include <torch/csrc/inductor/aoti_include/cpu.h>\n"
_MODEL = "template class torch::aot_inductor::AOTInductorModelBase<torch::aot_inductor::AOTInductorModel>;\n"


@contextmanager
def options() -> Iterator[None]:
    """Inductor's options: no asserts in every call, as graphs are compared once, and little C++.

    To find out which vector instructions there are, inductor builds, links and loads a program for each kind, a third
    of a first call. On Linux the flags tell: whether PyTorch's own libraries load is known, it runs. Of a graph's own
    source most is the interface, and checks of the inputs that run where an environment variable asks for them.
    """
    with _of_one_thread, _replaced():
        yield


@contextmanager
def _replaced() -> Iterator[None]:
    passes: dict[str, Any] = {}
    if torch._inductor.config.post_grad_custom_pre_pass is None:  # otherwise the user has one
        passes["post_grad_custom_pre_pass"] = Rewrites()
    probed = platform.system() == "Linux" and platform.machine() == "x86_64"
    checks = CppWrapperCpu.generate_input_output_runtime_checks
    with (
        vector_functions(),
        torch._inductor.config.patch(size_asserts=False, alignment_asserts=False, **passes),
        mock.patch.object(cpp_builder, "run_compile_cmd", partial(_compile, cpp_builder.run_compile_cmd)),
        mock.patch.object(CppWrapperCpu, checks.__name__, lambda wrapper: _without_inputs(checks, wrapper)),
        mock.patch.object(VecISA, "check_build", lambda isa, code: _takes(isa._arch_flags))
        if probed
        else nullcontext(),
    ):
        yield


def _without_inputs(generate: Callable[[CppWrapperCpu], None], wrapper: CppWrapperCpu) -> None:
    """Write the check of no inputs: whoever calls a graph has checked their shapes and types."""
    with mock.patch.object(V.graph, "graph_inputs", {}):
        generate(wrapper)


@functools.cache
def _takes(flags: str) -> bool:
    """Whether the C++ compiler takes these flags."""
    command = [get_cpp_compiler(), *flags.split(), "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _compile(run: Run, command: str, cwd: str) -> None:
    """Run a compiler: of a graph's source it compiles the interface once for all graphs."""
    words = shlex.split(command)
    source = next((word for word in words if word.endswith(".wrapper.cpp")), None)
    if source is None or "-c" not in words:
        return _whole(run, words, cwd)
    interface, text = _INTERFACE.read_text().strip(), Path(cwd, source).read_text()
    if interface not in text:  # of a release of torch that is not known: it takes longer
        return _whole(run, words, cwd)
    made = words[words.index("-o") + 1]
    own, mine = source.replace(".wrapper.cpp", ".own.cpp"), f"{made}.own.o"
    Path(cwd, own).write_text(text.replace(interface, f"extern {_MODEL}"))
    _whole(run, [{source: own, made: mine}.get(word, word) for word in words], cwd)
    shared = _shared(run, words, source, made, f"{_HEADER}{interface}\n{_MODEL}")
    _whole(run, [words[0], "-r", "-nostdlib", mine, shared, "-o", made], cwd)


def _shared(run: Run, words: list[str], source: str, made: str, text: str) -> str:
    """The path of the compiled interface, beside inductor's compiled headers; another process may be making it."""
    import fcntl  # not on Windows

    facts = [word for word in words if word not in (source, made)], text, torch.version.git_version
    folder = os.path.join(default_cache_dir(), "metaoptim-interfaces")
    path = os.path.join(folder, hashlib.sha256(repr(facts).encode()).hexdigest())
    os.makedirs(folder, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(f"{path}.o"):
            Path(f"{path}.cpp").write_text(text)
            replaced = {source: f"{path}.cpp", made: f"{path}.o"}
            _whole(run, [replaced.get(word, word) for word in words], folder)
    return f"{path}.o"


def _whole(run: Run, words: list[str], cwd: str) -> None:
    """Run a compiler, whose output lies beside its place until it has ended: a file that is cut off would be found."""
    if "-o" not in words:
        return run(shlex.join(words), cwd)
    at = words.index("-o") + 1
    place = os.path.join(cwd, words[at])
    words = [*words[:at], f"{place}.{os.getpid()}", *words[at + 1 :]]
    try:
        run(shlex.join(words), cwd)
        os.replace(words[at], place)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(words[at])
