"""The known limits, as docs/limits.md states them: refused by name, the dangerous ones first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metaoptim
from metaoptim.compiler.lower.library import library

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def take(net: nn.Module, loss: Callable[[], Tensor], steps: int = 1, **options: Any) -> None:
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, **options):
        for _ in range(steps):
            inner.step(loss())
        F.mse_loss(net(X), Y).backward()


def test_module_backward_hook_that_changes_the_gradient() -> None:
    net = network()
    net[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    with pytest.raises(metaoptim.CaptureError, match=r"0\.weight.*full_tape"):
        take(net, lambda: F.mse_loss(net(X), Y))
    take(net, lambda: F.mse_loss(net(X), Y), strategy="full_tape")
    assert net[0].weight.grad is not None


def test_node_hook() -> None:
    net = network()
    library.clear()  # the hook shows on the first use of a step only

    def loss() -> Tensor:
        h = net(X)
        h.grad_fn.register_hook(lambda gi, go: tuple(None if g is None else 2 * g for g in gi))
        return F.mse_loss(h, Y)

    with pytest.raises(metaoptim.CaptureError, match="hook on an autograd node"):
        take(net, loss)


def test_random_operator_with_a_gradient() -> None:
    net = network()
    with pytest.raises(metaoptim.CaptureError, match="cannot be seen"):
        take(net, lambda: torch._standard_gamma(net(X).exp()).square().mean())


def test_dropout_inside_attention() -> None:
    """On the CPU torch itself takes the unfused path here, so it is ordinary dropout, and exact."""
    found = []
    for options in ({}, {"strategy": "full_tape"}):
        torch.manual_seed(0)
        net = nn.Linear(3, 8)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True, **options):
            q = net(X).view(1, 1, 6, 8)
            inner.step(F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).square().mean())
            net(X).square().mean().backward()
        found.append(net.weight.grad)
    torch.testing.assert_close(found[0], found[1])


def test_reentrant_checkpoint() -> None:
    net = network()
    with pytest.raises(metaoptim.CaptureError, match="use_reentrant=False"):
        take(net, lambda: F.mse_loss(checkpoint(net, X.clone().requires_grad_(), use_reentrant=True), Y))


def test_function_whose_python_state_changes() -> None:
    net = network()
    state = {"scale": 1.0}

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * state["scale"]

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * state["scale"]

    def loss() -> Tensor:
        state["scale"] += 1.0
        return F.mse_loss(Scaled.apply(net(X)), Y)

    with pytest.raises(metaoptim.CaptureError, match="does not reproduce"):
        take(net, loss, steps=2)


def test_function_that_cannot_be_traced() -> None:
    net = network()

    class Numpy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.from_numpy(x.detach().numpy() * 2)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 2

    with pytest.raises(metaoptim.CaptureError, match="full_tape"):
        take(net, lambda: F.mse_loss(Numpy.apply(net(X)), Y))


def test_sparse_gradients_and_parameters_of_integers() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(metaoptim.LossError, match="sparse"):
        inner = metaoptim.MetaSGD([table])
        with metaoptim.SlidingWindow():
            inner.step(table(torch.tensor([1, 2])).square().sum())
    counts = nn.Linear(2, 2)
    counts.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int32), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"'weight' is torch.int32, expected a floating-point or complex type"
    ):
        metaoptim.MetaSGD([counts])


def _in_rank(rank: int, store: str, results: Any) -> None:
    """Two ranks: windows that share what they are told to, and nothing else."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    group = torch.distributed.group
    with pytest.raises(ValueError, match="not initialised"):
        metaoptim.SlidingWindow(sync=group.WORLD)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with pytest.raises(ValueError, match="offline"):
        metaoptim.SlidingWindow(offline=True, sync=group.WORLD)
    with pytest.raises(TypeError, match="expected a process group"):
        metaoptim.SlidingWindow(sync=True)
    net = network()
    inner = metaoptim.MetaSGD([net], lr=0.1)

    def window(**options: Any) -> list[float]:
        with metaoptim.SlidingWindow(**options):
            inner.step(F.mse_loss(net(X), Y * (rank + 1)))
        return net[2].bias.detach().tolist()

    @metaoptim.compile(backend="eager")
    def compiled(**options: Any) -> Tensor:
        with metaoptim.SlidingWindow(**options):
            inner.step(F.mse_loss(net(X), Y * (rank + 1)))
            return net(X).sum()

    alone = [window() for _ in range(1 + rank)]  # uneven counts: no rank waits for another one
    compiled()
    alone.append(net[2].bias.detach().tolist())
    only = torch.distributed.new_group([1])
    if rank:
        alone.append(window(sync=only))
    else:
        with pytest.raises(ValueError, match="this rank is not in"):
            window(sync=only)
    with pytest.raises(metaoptim.CaptureError, match="sync="):
        compiled(sync=group.WORLD)
    last = {}
    for strategy in ("auto", "full_tape"):
        last[strategy] = window(sync=group.WORLD, strategy=strategy)
    results[rank] = alone, last
    torch.distributed.destroy_process_group()


def test_ranks_share_what_they_are_told_to(tmp_path: Any) -> None:
    nets = [network() for _ in range(2)]
    inners = [metaoptim.MetaSGD([net], lr=0.1) for net in nets]

    def step(rank: int) -> Tensor:
        with metaoptim.SlidingWindow():
            inners[rank].step(F.mse_loss(nets[rank](X), Y * (rank + 1)))
        return nets[rank][2].bias.detach().clone()

    alone = [[step(rank) for _ in range(2 + 2 * rank)] for rank in range(2)]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_in_rank, args=(str(tmp_path / "store"), results), nprocs=2)
        for strategy in ("auto", "full_tape"):
            for rank in range(2):
                step(rank)
            with torch.no_grad():
                for ps in zip(*(net.parameters() for net in nets), strict=True):
                    mean = sum(ps) / 2
                    for p in ps:
                        p.copy_(mean)
            for rank in range(2):
                own, last = results[rank]
                torch.testing.assert_close(torch.tensor(own), torch.stack(alone[rank]))
                torch.testing.assert_close(torch.tensor(last[strategy]), nets[rank][2].bias.detach())


def _with_ddp(rank: int, store: str, results: Any) -> None:
    """Two ranks with a network inside DistributedDataParallel, in every form."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    def outcome(form: str, buffers: bool, static: bool) -> list[Any]:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4) if buffers else nn.Identity()
        net = nn.parallel.DistributedDataParallel(
            nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 1)), static_graph=static
        )
        lr = torch.tensor(0.1, requires_grad=True)

        def step() -> None:
            inner.step(F.mse_loss(net(X), Y * (rank + 1)))

        @metaoptim.compile(backend="eager")
        def compiled_step() -> None:
            step()

        @metaoptim.compile(backend="eager")
        def compiled(net: nn.Module, lr: Tensor) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=lr)
            with metaoptim.SlidingWindow(offline=True):
                for _ in range(2):
                    inner.step(F.mse_loss(net(X), Y * (rank + 1)))
                return net(X).sum()

        if form == "C":
            compiled(net, lr).backward()
        else:
            inner = metaoptim.MetaSGD([net], lr=lr)
            how: Any = {"strategy": "full_tape"} if form == "tape" else {"slots": 1}
            with metaoptim.SlidingWindow(offline=True, **how):
                for _ in range(2):
                    (compiled_step if form == "B" else step)()
                net(X).sum().backward()
        return [g.tolist() for g in (lr.grad, *(p.grad for p in net.parameters())) if g is not None]

    found = {}
    for buffers, static in ((False, False), (False, True), (True, False)):
        for form in ("tape", "A", "B", "C"):
            if form in "BC" and (buffers or static):
                with pytest.raises(metaoptim.CaptureError, match=r"other ranks.*ddp\.module"):
                    outcome(form, buffers, static)
            else:
                found[form, buffers, static] = outcome(form, buffers, static)
    results[rank] = found
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_networks_in_distributed_data_parallel(tmp_path: Any) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_with_ddp, args=(str(tmp_path / "store"), results), nprocs=2)
        for rank in range(2):
            found = results[rank]
            for (form, buffers, static), got in found.items():
                for g, e in zip(got, found["tape", buffers, static], strict=True):
                    torch.testing.assert_close(torch.tensor(g), torch.tensor(e), msg=form)
        first, second = (results[r]["A", False, False] for r in range(2))
        assert (
            first[0] != second[0] and first[1:] == second[1:]
        )  # the network's own are averaged, as in any backward
