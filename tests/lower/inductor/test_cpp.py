"""What is left out of inductor's C++: a release of torch that writes it otherwise is noticed here."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._inductor import cpp_builder

from metaoptim.compiler.ir.tensors import tensor_spec
from metaoptim.compiler.lower import backends
from metaoptim.compiler.lower.files.artifacts import load


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")  # by inductor
def test_a_graphs_own_source_has_neither_interface_nor_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = dict[str, str]()
    run = cpp_builder.run_compile_cmd

    def spy(command: str, cwd: str) -> None:
        for word in shlex.split(command):
            if word.endswith(".cpp"):
                sources[word.partition(".")[2]] = Path(cwd, word).read_text()
        run(command, cwd)

    monkeypatch.setattr(cpp_builder, "run_compile_cmd", spy)
    monkeypatch.setattr("metaoptim.compiler.lower.inductor.cpp.default_cache_dir", lambda: str(tmp_path))
    x, y = torch.randn(3, 4), torch.randn(4)
    specs = [tensor_spec(t) for t in (x, y)]
    for n in (1, 2):
        graph = fx.Graph()
        a, b = graph.placeholder("a"), graph.placeholder("b")
        graph.output((graph.call_function(torch.ops.aten.add.Tensor, (a, b), {"alpha": n}),))
        path = str(tmp_path / f"{n}.so")
        sources.clear()
        backends.compile_to(path, graph, specs, (torch.get_default_dtype(), False, 1, None))
        (own,) = [text for name, text in sources.items() if name.endswith("own.cpp")]
        assert "run_impl" in own and "ContainerRun" not in own and "check_input_" not in own
        assert not any(name.endswith("wrapper.cpp") for name in sources)
        assert any("ContainerRun" in text for text in sources.values()) == (n == 1)  # once for all graphs
        torch.testing.assert_close(load(path)(x, y)[0], x + n * y)
