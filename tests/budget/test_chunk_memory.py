"""A step in chunks, its replay and its derivative take the memory of a chunk; and what such steps refuse."""

from __future__ import annotations

import copy
import gc
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.errors import LossError, WindowError
from metaoptim.runtime.budget.meter import AllocatorMeter


def peak(chunks: int, compiled: bool, width: int = 32, examples: int = 512) -> int:
    """Bytes that a loop and its backward hold at their peak, when its graphs are known."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())]
    net, lr = nn.Sequential(*layers), torch.tensor(0.1, requires_grad=True)
    xs, w = torch.randn(3, examples, width), torch.randn(examples, requires_grad=True)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return (w.sigmoid() * net(x).square().mean(1)).mean()

    def meta_loss(net: nn.Module, lr: Tensor, xs: Tensor, w: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                inner.step_in_chunks(loss, x, w, chunks=chunks)
            return net(xs[0, :8]).square().mean()

    run: Any = metaoptim.compile(backend="eager")(meta_loss) if compiled else meta_loss
    for _ in range(2):
        with AllocatorMeter() as forward:
            outer = run(net, lr, xs, w)
        with AllocatorMeter() as backward:
            outer.backward()
        del outer
        gc.collect()
    most = max(forward.peak, forward.held + backward.peak)
    if compiled:
        assert abs(run.explain(net, lr, xs, w).predicted_peak_bytes - most) < 0.02 * most
    return most


@pytest.mark.parametrize("compiled", [False, True], ids=["window", "compiled"])
def test_the_peak_falls_with_the_size_of_a_chunk(compiled: bool) -> None:
    whole, quarter, sixteenth = (peak(chunks, compiled) for chunks in (1, 4, 16))
    states = peak(1, compiled, examples=16)  # what does not depend on the batch
    assert quarter - states < 0.4 * (whole - states)
    assert sixteenth - states < 0.15 * (whole - states)


NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
X, Y = torch.randn(6, 3), torch.randint(2, (6,))


def mean(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(NET(x), y)


WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a loss": (
        lambda inner: inner.step_in_chunks(mean(X, Y), chunks=2),
        TypeError,
        r"got a tensor, expected a function .* stepped by with step\(loss\)",
    ),
    "no batch": (
        lambda inner: inner.step_in_chunks(mean, chunks=2),
        ValueError,
        "got no batch, expected tensors",
    ),
    "an empty batch": (
        lambda inner: inner.step_in_chunks(mean, X[:0], Y[:0], chunks=1),
        ValueError,
        "got an empty batch, expected tensors",
    ),
    "None": (
        lambda inner: inner.step_in_chunks(mean, X, Y, chunks=None),
        ValueError,
        r"chunks: got None, expected a positive integer; for one chunk take step\(loss\)",
    ),
    "unlike sizes": (
        lambda inner: inner.step_in_chunks(mean, X, Y[:4], chunks=2),
        ValueError,
        r"shapes \[\(6, 3\), \(4,\)\], expected the same number of examples",
    ),
    "too many": (
        lambda inner: inner.step_in_chunks(mean, X, Y, chunks=7),
        ValueError,
        "chunks=7 for a batch of 6, expected at most 6",
    ),
    "no number": (
        lambda inner: inner.step_in_chunks(mean, X, Y, chunks=0),
        ValueError,
        "chunks: got 0, expected a positive integer",
    ),
    "reduction": (
        lambda inner: inner.step_in_chunks(mean, X, Y, chunks=2, reduction="none"),
        ValueError,
        "reduction: got 'none', expected 'mean' or 'sum'",
    ),
    "an object": (
        lambda inner: inner.step_in_chunks(mean, X, {"y": {1, 2}}, chunks=2),
        TypeError,
        r"got a set in the batch, expected tensors",
    ),
    "no scalar": (
        lambda inner: inner.step_in_chunks(lambda x: NET(x), X, chunks=2),
        LossError,
        r"got a loss of shape \(3, 2\), expected a scalar",
    ),
    "no loss": (lambda inner: inner.step_in_chunks(lambda x: None, X, chunks=2), LossError, "got no loss"),
    "no graph": (
        lambda inner: inner.step_in_chunks(lambda x: NET(x).sum().detach(), X, chunks=2),
        LossError,
        "the loss has no graph",
    ),
    "unused": (
        lambda inner: inner.step_in_chunks(lambda x: NET[0](x).sum(), X, chunks=2),
        LossError,
        "the loss does not depend on '2.weight', '2.bias'",
    ),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["window", "compiled"])
@pytest.mark.parametrize("which", WRONG)
def test_refused(which: str, compiled: bool) -> None:
    wrong, kind, text = WRONG[which]
    before = copy.deepcopy(NET.state_dict())

    def loop() -> Tensor:
        inner = metaoptim.MetaSGD([NET], lr=0.1)
        with metaoptim.SlidingWindow():
            wrong(inner)
            return NET(X).sum()

    with pytest.raises(kind, match=text):
        (metaoptim.compile(backend="eager")(loop) if compiled else loop)()
    for name, value in NET.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("compiled", [False, True], ids=["window", "compiled"])
def test_what_was_computed_before_is_refused_unless_no_gradient_goes_through_it(compiled: bool) -> None:
    """It would be there for the whole batch; of meta-parameters alone, it may be read."""

    def loop(outside: str) -> Tensor:
        inner = metaoptim.MetaSGD([NET], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            h, scale = NET[0](X), 2 * torch.ones(6, requires_grad=True)
            with torch.no_grad():
                target = NET(X)
            given = {
                "the network's": h,
                "a meta-parameter's": scale[:, None] * X,
                "a constant": X + target.mean(),
            }
            inner.step_in_chunks(lambda x: NET[2](NET[0](X[:2]) + x.sum()).sum(), given[outside], chunks=2)
            return NET(X).sum()

    run = metaoptim.compile(backend="eager")(loop) if compiled else loop
    for outside in ("a meta-parameter's", "a constant"):
        run(outside).backward()
    with pytest.raises(LossError, match="a value that was computed from the network's parameters before"):
        run("the network's")


def test_outside_a_window() -> None:
    with pytest.raises(WindowError, match=r"MetaSGD.step_in_chunks was called outside a window"):
        metaoptim.MetaSGD([NET], lr=0.1).step_in_chunks(mean, X, Y, chunks=2)


def test_a_failing_chunk_leaves_all_as_it_was() -> None:
    """An exception of the user's own, after some chunks: the step has not been taken, and the loop may go on."""
    net = nn.Linear(3, 2).double()
    x, lr = torch.randn(6, 3).double(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    grads = []
    for failing in (False, True):
        inner, calls = metaoptim.MetaSGD([net], lr=lr, momentum=0.9), 0

        def loss(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyError("mine")
            return net(x).square().mean()

        lr.grad = None
        with metaoptim.SlidingWindow(offline=True):
            if failing:
                with pytest.raises(KeyError, match="mine"):
                    inner.step_in_chunks(loss, x, chunks=3)
            for _ in range(2):
                inner.step_in_chunks(lambda x: net(x).square().mean(), x, chunks=3)
            net(x).square().mean().backward()
        assert lr.grad is not None and lr.grad != 0
        grads.append(lr.grad)
    assert torch.equal(*grads)


def test_the_batch_of_a_tokenizer() -> None:
    """It is a mapping, and no dict."""

    def gradients(batch: Any) -> list[Tensor]:
        NET.zero_grad()
        with metaoptim.SlidingWindow(offline=True):
            inner = metaoptim.MetaSGD([NET], lr=0.1)
            inner.step_in_chunks(lambda b: mean(b["x"], b["y"]), batch, chunks=2)
            mean(X, Y).backward()
        return [p.grad.clone() for p in NET.parameters() if p.grad is not None]

    given = {"x": X, "y": Y}
    assert all(map(torch.equal, gradients(UserDict(given)), gradients(given)))
