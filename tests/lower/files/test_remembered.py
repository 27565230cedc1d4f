"""Derived graphs as files: another process that has the same step does not derive it again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.derive.graphs import peak_bytes
from metaoptim.compiler.ir.step import FlatGraph
from metaoptim.compiler.lower import derivatives
from metaoptim.compiler.lower.files import remembered
from metaoptim.compiler.lower.library import library

X = torch.linspace(-1, 2, 12).reshape(4, 3)


class Recorder:
    """Counts derivations by tracing; those by mixed mode go another way."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: Any) -> FlatGraph:
        self.count += 1
        return _trace(*args)


_trace = derivatives.derived_by_tracing


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Recorder]:
    """Files go to a folder of their own, and all derivations are worth one."""
    recorder = Recorder()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(remembered, "PAYS", 0.0)
    monkeypatch.setattr(derivatives, "derived_by_tracing", recorder)
    library.clear()
    yield recorder
    library.clear()


def files(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.rglob("*.graph"))


def gradients(kind: Any = metaoptim.MetaAdam, **options: Any) -> list[Tensor]:
    """Meta-gradients of a compiled function, in what is a new process as far as step graphs go."""
    library.clear()
    torch.manual_seed(5)
    net, log_lr = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        torch.tensor(-2.0, requires_grad=True),
    )

    @metaoptim.compile(backend="eager", **options)
    def loss(xs: Tensor) -> Tensor:
        inner = kind([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                inner.step((net(x) - x.sum()).square().sum())
            return net(xs).square().sum()

    return [*torch.autograd.grad(loss(X), [log_lr, *net.parameters()])]


@pytest.mark.parametrize("options", [{}, {"hvp": "mixed"}, {"memory_budget": "1GiB"}], ids=str)
def test_a_second_process_derives_nothing(
    traced: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    first = gradients(**options)
    assert files(tmp_path)
    traced.count = 0
    monkeypatch.setattr(derivatives, "split", None)
    second = gradients(**options)
    assert traced.count == 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.abs().max() > 1e-6


def test_what_is_read_is_as_it_was_written(traced: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[FlatGraph, Any]] = []
    raw = remembered.remembered

    def noted(*args: Any) -> remembered.Derivation:
        graphs, note = raw(*args)
        found.extend((graph, note) for graph in graphs)
        return graphs, note

    monkeypatch.setattr(derivatives, "remembered", noted)
    gradients(memory_budget="1GiB")
    half = len(found)
    gradients(memory_budget="1GiB")
    assert half > 2 and len(found) == 2 * half
    for (a, of_a), (b, of_b) in zip(found[:half], found[half:], strict=True):
        assert a is not b and str(a.graph) == str(b.graph) and of_a == of_b
        assert peak_bytes(a.graph) == peak_bytes(b.graph) > 0
        names = [{s for n in f.graph.nodes for s, _ in n.meta.get("memory", ())} for f in (a, b)]
        assert names[0].isdisjoint(names[1])  # memory of other graphs has other names


def test_an_optimizer_of_the_user_s_is_derived_anew(traced: Recorder, tmp_path: Path) -> None:
    class Mine(metaoptim.MetaSGD):
        @staticmethod
        def update(param: Any, grad: Any, state: Any, hyper: Any) -> Any:
            return param - hyper["lr"] * grad * 2, state

    assert not torch.allclose(gradients(Mine)[0], gradients(metaoptim.MetaSGD)[0])
    before, traced.count = len(files(tmp_path)), 0
    gradients(Mine)
    assert traced.count and len(files(tmp_path)) == before


def test_an_update_that_says_it_is_this_package_s(traced: Recorder) -> None:
    class Mine(metaoptim.MetaSGD):
        @staticmethod
        @functools.wraps(metaoptim.MetaSGD.update)
        def update(param: Any, grad: Any, state: Any, hyper: Any) -> Any:
            return param - hyper["lr"] * grad * 2, state

    assert not torch.allclose(gradients(metaoptim.MetaSGD)[0], gradients(Mine)[0])


def test_source_that_has_changed_since_the_import_is_not_what_runs(
    traced: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_imported", 1.0)
    remembered._source.cache_clear()
    try:
        gradients()
        assert not files(tmp_path)
    finally:
        remembered._source.cache_clear()


def test_a_file_that_is_cut_off_or_changed_is_passed_over(traced: Recorder, tmp_path: Path) -> None:
    first = gradients()
    for k, path in enumerate(files(tmp_path)):
        data = path.read_bytes()
        path.write_bytes(data[:-9] if k % 2 else data[:40] + b"no" + data[42:])
    traced.count = 0
    assert all(map(torch.equal, first, gradients()))
    assert traced.count  # and written anew
    traced.count = 0
    gradients()
    assert traced.count == 0


def test_other_sources_derive_anew(traced: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients()
    traced.count = 0
    monkeypatch.setattr(remembered, "_source", lambda: "of another version")
    gradients()
    assert traced.count


def test_a_folder_that_cannot_be_written(
    traced: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    traced.count = 0
    assert all(map(torch.equal, expected, gradients()))
    assert traced.count


def test_steps_of_many_tasks_are_not_remembered(traced: Recorder, tmp_path: Path) -> None:
    """Their derivatives do not follow from their graphs: what is detached in one task's loss is gone from them."""

    def gradient(detached: bool) -> Tensor:
        library.clear()
        net, weight = nn.Linear(3, 1), torch.tensor(0.7, requires_grad=True)
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(0.3)

        @metaoptim.compile(backend="eager", memory_budget="1GiB")
        def loss(x: Tensor) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=0.1)
            with metaoptim.SlidingWindow(offline=True):
                for _ in range(3):
                    scale = (weight.detach() if detached else weight) * weight
                    inner.step((net(x) * scale - 1).square().sum())
                return net(x).square().sum()

        return torch.autograd.grad(metaoptim.vmap(loss)(X).sum(), weight)[0]

    free = gradient(detached=False)
    torch.testing.assert_close(gradient(detached=True), free / 2)
    assert gradient(detached=False) == free != 0
