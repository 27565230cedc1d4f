"""Ordinary constructs in form C, and what is done with a function's results."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from constructs import CASES, construct
from forms import full_tape, leaf, mlp, run_compiled
from oracle import agree
from whole_functions import XS, YS, query, support


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by torch.func.jvp
@pytest.mark.parametrize("name", CASES)
def test_construct(name: str) -> None:
    """The constructs of the other forms, offline and online by turns, with slots and without."""
    turn = list(CASES).index(name) % 4
    case, expected = construct(name, offline=turn < 2)
    agree(run_compiled(case, slots=2 if turn % 2 else None), expected, rtol=1e-9)


# -- what is done with the results -----------------------------------------------------------------------------------


def _inner(window: Any, net: nn.Module, w: Tensor) -> None:
    inner = metaoptim.MetaSGD([net], lr=0.05 * w.exp(), momentum=0.9)
    for t in range(3):
        inner.step(support(net, t) * w)


def _results(window: Any, net: nn.Module, w: Tensor) -> dict[str, Any]:
    with window(offline=True):
        _inner(window, net, w)
        out = net(XS[6])
        return {
            "losses": (F.mse_loss(out, YS[6]), out.abs().mean()),
            "aux": [out.detach(), out.argmax(1), "text", 3],
            "weights": net[2].weight,
        }


def test_outputs_of_all_kinds() -> None:
    """Several differentiable outputs in a pytree, auxiliary ones, each pulled back alone and together, repeatedly."""
    net, w = mlp(), leaf()
    leaves = [w, *net.parameters()]
    expected = _results(full_tape, net, w)
    got = metaoptim.compile(_results, backend="eager")(metaoptim.SlidingWindow, net, w)
    assert got["aux"][2:] == ["text", 3]
    assert torch.equal(got["aux"][1], expected["aux"][1]) and not got["aux"][1].requires_grad
    assert not got["aux"][0].requires_grad
    torch.testing.assert_close(got["aux"][0], expected["aux"][0], rtol=1e-12, atol=0)
    for combine in (
        lambda r: r["losses"][0],
        lambda r: r["losses"][1] * 3,
        lambda r: r["weights"].square().sum(),
        lambda r: (r["losses"][0] / r["losses"][1]).log() + r["weights"].mean(),
        lambda r: r["losses"][0],
    ):
        want = torch.autograd.grad(combine(expected), leaves, retain_graph=True)
        have = torch.autograd.grad(combine(got), leaves, retain_graph=True)
        agree(dict(enumerate(have)), dict(enumerate(want)))  # type: ignore[arg-type]


def test_scaled_and_accumulated() -> None:
    """`.backward()` of a scaled loss, twice, adds up in .grad; autograd.grad leaves .grad alone."""
    net, w = mlp(), leaf()
    leaves = [w, *net.parameters()]
    f = metaoptim.compile(_results, backend="eager")
    loss = f(metaoptim.SlidingWindow, net, w)["losses"][0]
    expected = torch.autograd.grad(_results(full_tape, net, w)["losses"][0], leaves)
    torch.autograd.grad(loss, leaves)
    assert all(t.grad is None for t in leaves)
    (loss * 0.5).backward()
    (loss * 0.25).backward()
    agree({str(i): t.grad for i, t in enumerate(leaves)}, {str(i): 0.75 * g for i, g in enumerate(expected)})


def test_meta_parameter_computed_outside() -> None:
    """Arguments need not be leaves: their own graph goes on."""
    net, raw = mlp(), leaf()
    f = metaoptim.compile(_results, backend="eager")
    (got,) = torch.autograd.grad(f(metaoptim.SlidingWindow, net, raw.sin() * 2)["losses"][0], raw)
    (want,) = torch.autograd.grad(_results(full_tape, net, raw.sin() * 2)["losses"][0], raw)
    agree({"raw": got}, {"raw": want})


def test_under_no_grad() -> None:
    net, w = mlp(), leaf()
    f = metaoptim.compile(_results, backend="eager")
    with torch.no_grad():
        got = f(metaoptim.SlidingWindow, net, w)
    expected = _results(full_tape, net, w)
    assert not got["losses"][0].requires_grad and not got["weights"].requires_grad
    for a, b in zip(got["losses"], expected["losses"], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=0)
    again = f(metaoptim.SlidingWindow, net, w)  # the same program, now with gradients
    assert len(f._specializations.known) == 1
    (want,) = torch.autograd.grad(expected["losses"][0], w)
    (have,) = torch.autograd.grad(again["losses"][0], w)
    agree({"w": have}, {"w": want})


def test_method() -> None:
    """A method sees its object's networks and tensors as they are at each call."""

    class Learner:
        def __init__(self) -> None:
            self.net, self.w = mlp(), leaf()

        @functools.partial(metaoptim.compile, backend="eager")
        def loss(self, window: Any, k: int) -> Tensor:
            with window(offline=True):
                _inner(window, self.net, self.w)
                return query(self.net) * k

    learner = Learner()
    for k in (1, 2):
        with torch.no_grad():
            learner.w += 0.1
        expected = torch.autograd.grad(Learner.loss.__wrapped__(learner, full_tape, k), learner.w)
        got = torch.autograd.grad(learner.loss(metaoptim.SlidingWindow, k), learner.w)
        agree({"w": got[0]}, {"w": expected[0]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "off"])
def test_autocast(dtype: Any) -> None:
    """Around the loss inside, and around the call; casts of weights are not remembered across the capture."""
    torch.manual_seed(0)
    net, teacher = mlp().float(), nn.Linear(3, 2).float()
    w = torch.tensor(0.5, dtype=torch.float32, requires_grad=True)
    xs = XS.float()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.05)
        with window(offline=True):
            for t in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None or t == 0):
                    out, target = net(xs[t]), teacher(xs[t])
                inner.step((out.float() - target.float()).square().mean() * w)
            return net(xs[6]).float().square().mean()

    leaves = [w, *net.parameters(), *teacher.parameters()]
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            teacher(xs[0])  # the casts of these weights are remembered to the end of the block
            expected = torch.autograd.grad(of(full_tape), leaves)
            got = torch.autograd.grad(metaoptim.compile(of, backend="eager")(metaoptim.SlidingWindow), leaves)
            after = teacher(xs[0])
            assert type(after) is Tensor and after.dtype == (dtype or torch.float32)
        agree(dict(enumerate(got)), dict(enumerate(expected)), rtol=2e-2)  # type: ignore[arg-type]
