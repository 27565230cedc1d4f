"""`metaoptim.vmap`: random numbers, tasks that are not finite, and what is refused or told of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.passes import batch as batching
from task_batches import INNER, TASKS, XQ, XS, YQ, YS, Fn, network, scanned

# -- random numbers ---------------------------------------------------------------------------------------------------


def noisy(net: nn.Module, lr: Tensor) -> Fn:
    def adapted(xs: Tensor, ys: Tensor) -> Tensor:
        inner = INNER["sgd"](net, lr)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x, y in window.scan(xs, ys):
                inner.step(F.mse_loss(net(F.dropout(x, 0.3)) + 0.1 * torch.randn(2), y))
            return F.mse_loss(net(xs[0]), ys[0])

    return adapted


def test_random_numbers() -> None:
    net, lr = network(), torch.tensor(0.2, requires_grad=True)
    alike = XS[:1].expand_as(XS), YS[:1].expand_as(YS)
    fn = noisy(net, lr)
    with pytest.raises(metaoptim.WindowError, match="randomness='different'"):
        metaoptim.vmap(fn)(*alike)
    compiled = metaoptim.compile(fn, backend="eager", slots=2)
    torch.manual_seed(3)
    same = metaoptim.vmap(compiled, randomness="same")(*alike)
    assert torch.equal(same, same[:1].expand_as(same))
    torch.manual_seed(3)
    torch.testing.assert_close(same[0], fn(XS[0], YS[0]))
    torch.manual_seed(3)
    different = metaoptim.vmap(compiled, randomness="different")(*alike)
    assert len(set(different.tolist())) == TASKS
    (found,) = torch.autograd.grad(different.sum(), lr)  # what is run again draws the same
    torch.manual_seed(3)
    (again,) = torch.autograd.grad(metaoptim.vmap(compiled, randomness="different")(*alike).sum(), lr)
    assert torch.equal(found, again)
    step, values = 1e-6, []
    for sign in (1, -1):
        torch.manual_seed(3)
        moved = metaoptim.compile(noisy(net, lr.detach() + sign * step), backend="eager")
        values.append(metaoptim.vmap(moved, randomness="different")(*alike).sum().item())
    torch.testing.assert_close(float(found), (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-8)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    fn = scanned()(network(), torch.tensor(0.2))
    for given, words in (
        ((XS, YS[:3], XQ, YQ), "got 5, 3, expected one number of tasks"),
        (
            (XS, YS, XQ, torch.tensor(1.0)),
            "argument 3.: got a tensor of shape \\(\\), which has no dimension 0",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            metaoptim.vmap(fn)(*given)
    with pytest.raises(ValueError, match="in_dims has 2 entries, expected one for each of the 4"):
        metaoptim.vmap(fn, (0, 0))(XS, YS, XQ, YQ)
    with pytest.raises(ValueError, match="no tensor with a dimension of tasks"):
        metaoptim.vmap(fn, None)(XS, YS, XQ, YQ)
    with pytest.raises(ValueError, match="randomness: got 'none'"):
        metaoptim.vmap(fn, randomness="none")
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        metaoptim.vmap(fn, chunk_size=0)
    with pytest.raises(TypeError, match="expected a function"):
        metaoptim.vmap(3)  # type: ignore[arg-type]


def test_a_value_for_each_task_where_there_is_room_for_one() -> None:
    net, before = network(), [p.clone() for p in network().parameters()]

    def adapted(xs: Tensor, ys: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow() as window:
            for x, y in window.scan(xs, ys):
                inner.step(F.mse_loss(net(x), y))
            return F.mse_loss(net(xs[0]), ys[0])

    with pytest.raises(
        metaoptim.WindowError, match=r"another value for each task in a tensor of shape .*offline=True"
    ):
        metaoptim.vmap(adapted)(XS, YS)
    assert all(map(torch.equal, net.parameters(), before))


def test_inside_a_window() -> None:
    net = network()
    fn = metaoptim.vmap(scanned()(net, torch.tensor(0.2)))
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow():
        inner.step(F.mse_loss(net(XQ[0]), YQ[0]))
        with pytest.raises(metaoptim.WindowError, match="call it outside"):
            fn(XS, YS, XQ, YQ)


def test_what_torch_batches_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first task of a batched step is compared with the step of one task, its derivative too."""
    vmap = torch.func.vmap
    for attempt in ("replay", "vjp"):
        calls = iter(range(100))

        def wrong(fn: Fn, *dims: Any, attempt: str = attempt, calls: Any = calls) -> Fn:
            at = next(calls)

            def run(*given: Tensor) -> Any:
                found = vmap(fn, *dims)(*given)
                bent = at % 2 == (attempt == "vjp")
                return tuple([2 * t if bent and t.is_floating_point() else t for t in found])

            return run

        monkeypatch.setattr(batching.torch.func, "vmap", wrong)
        fn = scanned()(network(), torch.tensor(0.2, requires_grad=True))
        batched = metaoptim.vmap(metaoptim.compile(fn, backend="eager"))
        for _ in range(2):
            with pytest.raises(
                metaoptim.CaptureError, match="computes something else than for the first one"
            ):
                batched(XS, YS, XQ, YQ)


def test_objects_that_may_hold_tensors_of_tasks() -> None:
    fn = scanned()(network(), torch.tensor(0.2))
    with pytest.raises(ValueError, match=r"argument 1.: got ndarray, expected tensors in dictionaries"):
        metaoptim.vmap(fn)(XS, YS.numpy(), XQ, YQ)


def test_a_task_that_is_not_finite_is_no_matter_of_the_others() -> None:
    net, lr = network(), torch.tensor(0.2, requires_grad=True)
    fn = metaoptim.vmap(metaoptim.compile(scanned()(net, lr), backend="eager"))
    ys = YS.clone()
    ys[1] = float("nan")
    losses = fn(XS, ys, XQ, YQ)
    expected = fn(XS, YS, XQ, YQ)
    assert bool(losses[1].isnan())
    torch.testing.assert_close(losses[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])


def test_the_same_numbers_for_all_chunks() -> None:
    fn = metaoptim.compile(noisy(network(), torch.tensor(0.2)), backend="eager")
    alike = XS[:1].expand_as(XS), YS[:1].expand_as(YS)
    losses = metaoptim.vmap(fn, randomness="same", chunk_size=2)(*alike)
    assert torch.equal(losses, losses[:1].expand_as(losses))


def test_an_outer_loss_after_the_block() -> None:
    net = network()

    def adapted(xs: Tensor, ys: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            inner.step(F.mse_loss(net(xs[0]), ys[0]))
        return F.mse_loss(net(xs[0]), ys[0])

    with pytest.warns(metaoptim.UnreachableWarning, match="depends on its 1 inner step"):
        metaoptim.vmap(metaoptim.compile(adapted, backend="eager"))(XS, YS)


# -- methods ----------------------------------------------------------------------------------------------------------


class Learner:
    """Has its network and its rate, and a loss after adaptation, of many tasks at once."""

    def __init__(self, net: nn.Module, lr: Tensor) -> None:
        self.net, self.lr = net, lr

    def one(self, xs: Tensor, ys: Tensor) -> Tensor:
        return scanned()(self.net, self.lr)(xs, ys, xs[0], ys[0])

    compiled = metaoptim.compile(one, backend="eager")
    many = metaoptim.vmap(compiled, in_dims=(0, 0))


@pytest.mark.parametrize("which", ["decorated", "bound", "plain"])
def test_methods(which: str) -> None:
    lr = torch.tensor(0.2, requires_grad=True)
    first, second = (Learner(network(), lr) for _ in range(2))
    with torch.no_grad():
        for p in second.net.parameters():
            p.mul_(1.5)
    for learner in (first, second):
        many = {
            "decorated": learner.many,
            "bound": metaoptim.vmap(learner.compiled),
            "plain": metaoptim.vmap(learner.one),
        }[which]
        got = many(XS, YS)
        assert torch.allclose(
            got, torch.stack([learner.one(x, y) for x, y in zip(XS, YS, strict=True)]), rtol=1e-10
        )
    assert Learner.many is vars(Learner)["many"]
