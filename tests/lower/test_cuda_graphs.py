"""CUDA graphs: what is captured, and that replays compute with the values of their own call.

There is no GPU here. What stands for one: tensors of float64 and booleans are "on it", and a capture is a list of
operators on fixed memory, which a replay runs again. `tests/users/test_gpu.py` has the same on a real one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metaoptim
from forms import run_compiled
from metaoptim.compiler.ir.step import FlatGraph
from metaoptim.compiler.ir.tensors import spanned
from metaoptim.compiler.ir.text import operator_count
from metaoptim.compiler.lower import cuda_graphs
from oracle import agree, run_oracle
from problems import problem


class Recorder(TorchDispatchMode):
    """Notes operators with the very tensors they were given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class ListCapture:
    """Operators on fixed memory, in the place of a `Capture`."""

    made: list[ListCapture]

    def __init__(self) -> None:
        self.replays = 0
        self.made.append(self)

    @staticmethod
    def of(run: Callable[[], Sequence[Any]], device: torch.device) -> tuple[ListCapture, Sequence[Any]]:
        made, made.recorder = ListCapture(), Recorder()
        with made.recorder:
            results = run()
        return made, results

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.recorder.calls:
            if func.is_view or func is torch.ops.aten._unsafe_view.default:
                continue
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    spanned(old).copy_(spanned(new))

    def in_order(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ListCapture]]:
    """The captures that a test makes on what stands for a GPU."""
    monkeypatch.setattr(cuda_graphs, "on_gpu", lambda t: t.dtype in (torch.float64, torch.bool))
    monkeypatch.setattr(cuda_graphs, "Capture", ListCapture)
    monkeypatch.setattr("metaoptim.functions.specialization.check_captured", lambda *_: None)
    monkeypatch.setattr(cuda_graphs, "_told", set())
    ListCapture.made = []
    yield ListCapture.made


@pytest.mark.parametrize("network", ["linear", "lstm", "dropout"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("slots", [None, 2])
def test_replays_give_the_gradient(
    captures: list[ListCapture], network: str, optimizer: str, slots: int | None
) -> None:
    case = problem(network, optimizer, 6, True)
    got = run_compiled(case, mode="reduce-overhead", slots=slots)
    agree(got, run_oracle(case), rtol=1e-8)
    assert captures and max(c.replays for c in captures) >= 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_call_has_values_of_its_own(captures: list[ListCapture], backend: str) -> None:
    """Another learning rate, other parameters, other data; and results of earlier calls stay what they are."""

    def loss_of(mode: str | None) -> Any:
        @metaoptim.compile(backend=backend, mode=mode)
        def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
            inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
            with metaoptim.SlidingWindow(offline=True) as window:
                for x in window.scan(xs):
                    inner.step((net(x) - 0.5).square().mean())
                return net(xs[0]).sin().mean()

        return meta_loss

    net, replayed, plain = nn.Linear(3, 2).double(), loss_of("reduce-overhead"), loss_of(None)
    held: list[tuple[Tensor, Tensor]] = []
    for k in range(4):
        torch.manual_seed(k)
        nn.init.normal_(net.weight)
        log_lr = torch.tensor(-2.0 + 0.3 * k, dtype=torch.float64, requires_grad=True)
        xs = torch.randn(3, 5, 3, dtype=torch.float64)
        leaves = [log_lr, *net.parameters()]
        losses = replayed(net, log_lr, xs), plain(net, log_lr, xs)
        held.append(losses)
        got, expected = (torch.autograd.grad(loss, leaves) for loss in losses)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert sum(c.replays for c in captures) > 20
    for got, expected in held:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_a_compiled_step_is_captured(captures: list[ListCapture]) -> None:
    def grads(mode: str | None) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        net, log_lr = nn.Linear(3, 2).double(), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
        inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
        xs = torch.randn(8, 5, 3, dtype=torch.float64)

        @metaoptim.compile(backend="eager", mode=mode)
        def step(x: Tensor) -> None:
            inner.step((net(x) - 0.5).square().mean())

        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                step(x)
            loss = net(xs[0]).sin().mean()
        return torch.autograd.grad(loss, [log_lr, *net.parameters()])

    expected = grads(None)
    assert not captures
    torch.testing.assert_close(grads("reduce-overhead"), expected, rtol=1e-12, atol=0)
    assert max(c.replays for c in captures) >= 4


def test_the_parts_of_a_graph(captures: list[ListCapture]) -> None:
    """What is computed on the CPU runs in every call; what lies in one memory is copied once."""

    def step(count: Tensor, x: Tensor, wide: Tensor) -> tuple[Any, ...]:
        after = torch.ops.aten.add.Tensor(count, 1)
        scaled = torch.ops.aten.mul.Tensor(x, after)
        return after, torch.ops.aten.add.Tensor(scaled, wide), None, count, x

    graph = FlatGraph(fx.symbolic_trace(step).graph, {})
    number = functools.partial(torch.tensor, dtype=torch.float32)
    inputs = [number(1.0), torch.ones(2, 3, dtype=torch.float64), torch.rand(3).double().expand(2, 3)]
    parts: list[FlatGraph] = []

    def lower(part: FlatGraph, given: Sequence[Tensor], cotangents: int) -> Any:
        parts.append(part)
        assert len(given) == 3 and cotangents == 1
        return part

    program = cuda_graphs.captured(graph, inputs, 1, lower)
    for k in range(4):
        count, x = number(float(k)), torch.full((2, 3), 2.0 + k).double()
        after, total, none, same, given = program(count, x, inputs[2])
        assert none is None and torch.equal(same, count) and float(after) == k + 1
        torch.testing.assert_close(total, x * (k + 1) + inputs[2])
        assert torch.equal(given, x) and (given is not x or k == 0)
    (part,), (capture,) = parts, captures
    assert capture.replays == 3 and operator_count(part.graph) == 2


def test_what_is_not_captured_says_so(captures: list[ListCapture], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lambda part, given, cotangents: part
    x, count = torch.rand(3, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float32)

    def reads_back(count: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        cast = torch.ops.aten._to_copy.default(x, dtype=torch.float32)
        return (torch.ops.aten.mul.Tensor(cast, count),)

    graph = FlatGraph(fx.symbolic_trace(reads_back).graph, {})
    with pytest.warns(RuntimeWarning, match="runs as it is: aten._to_copy.default reads on the CPU what was"):
        program = cuda_graphs.captured(graph, [count, x], 0, whole)
    torch.testing.assert_close(program(count, x)[0], 2 * x.float())

    graph = FlatGraph(fx.symbolic_trace(lambda x: (torch.ops.aten.nonzero.default(x),)).graph, {})
    with pytest.warns(RuntimeWarning, match="it cannot be run on fake tensors"):
        assert cuda_graphs.captured(graph, [x], 0, whole) is graph

    def refuses(run: Any, device: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(ListCapture, "of", refuses)
    graph = FlatGraph(fx.symbolic_trace(lambda x: (torch.ops.aten.sin.default(x),)).graph, {})
    program = cuda_graphs.captured(graph, [x], 0, whole)
    program(x)
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing$"):
        program(x)
    torch.testing.assert_close(program(x)[0], x.sin())
    assert not captures


def test_a_backward_hook_is_called_in_every_step(captures: list[ListCapture]) -> None:
    seen: list[float] = []

    @metaoptim.compile(backend="eager", mode="reduce-overhead")
    def meta_loss(net: nn.Module, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(
            offline=True, backward_hook=lambda g: seen.append(float(g.sum()))
        ) as window:
            for x in window.scan(xs):
                inner.step((net(x) - 0.5).square().mean())
            return net(xs[0]).square().mean()

    net, xs = nn.Linear(3, 2).double(), torch.randn(6, 5, 3, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="it calls the window's backward_hook"):
        meta_loss(net, xs).backward()
    assert len(seen) == 6 * 2 and len(set(seen)) == len(seen)


# -- without what stands for a GPU -------------------------------------------------------------------------------------


def test_on_the_cpu_it_is_refused() -> None:
    @metaoptim.compile(backend="eager", mode="reduce-overhead")
    def meta_loss(net: nn.Module) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            inner.step(net(torch.ones(1, 3)).square().mean())
            return net(torch.ones(1, 3)).mean()

    net = nn.Linear(3, 2)
    with pytest.raises(
        metaoptim.CaptureError, match=r"captures CUDA graphs, and all tensors of .*meta_loss are on cpu"
    ):
        meta_loss(net)
    with pytest.raises(ValueError, match="mode: got 'max-autotune', expected 'default' or 'reduce-overhead'"):
        metaoptim.compile(mode="max-autotune")
    with pytest.raises(metaoptim.CaptureError, match="which no budget counts"):
        cuda_graphs.check_captured([_spec("cuda")], "1GiB", "f")
    cuda_graphs.check_captured([_spec("cpu"), _spec("cuda")], None, "f")


def _spec(device: str) -> Any:
    return cuda_graphs.TensorSpec((2,), torch.float32, (1,), torch.device(device))
