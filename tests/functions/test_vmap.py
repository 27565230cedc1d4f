"""`metaoptim.vmap`: all tasks at once are what a loop over them is, against the full tape of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from task_batches import INNER, LABELS, STEPS, TASKS, XQ, XS, YQ, YS, Fn, compare, data, network, scanned


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("optimizer", INNER)
def test_optimizers(optimizer: str, backend: str) -> None:
    compare(scanned(optimizer), (XS, YS, XQ, YQ), options={"backend": backend})


@pytest.mark.parametrize(
    "options", [{"slots": 2}, {"memory_budget": "1MiB"}, {"hvp": "reverse"}, {"hvp": "mixed"}], ids=str
)
def test_options_of_compile(options: dict[str, Any]) -> None:
    compare(scanned("adam"), (XS, YS, XQ, YQ), options=options)


def test_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAOPTIM_WAIT", "1")
    compare(scanned("sgd"), (XS, YS, XQ, YQ), options={"backend": "inductor"})


@pytest.mark.filterwarnings("ignore:the loss lies more than window=2 steps:metaoptim.UnreachableWarning")
def test_truncated() -> None:
    """With the strategy of an ordinary window beside it, since a full tape has no W."""

    def build(net: nn.Module, lr: Tensor) -> Fn:
        fn = scanned("adam", window=2)(net, lr)
        return lambda *args, strategy=None: fn(*args)

    compare(build, (XS, YS, XQ, YQ))


@pytest.mark.parametrize("chunk_size", [1, 2, 7])
def test_chunks(chunk_size: int) -> None:
    compare(scanned(), (XS, YS, XQ, YQ), chunk_size=chunk_size)


def test_dimensions() -> None:
    compare(scanned(), (XS.movedim(0, 1), YS.movedim(0, -1), XQ[0], YQ), in_dims=(1, -1, None, 0))


def test_tasks_that_part_in_the_end_alone() -> None:
    compare(scanned(), (XS[0], YS[0], XQ, YQ), in_dims=(None, None, 0, 0))


def test_rows_in_a_plain_loop_and_all_of_them_after_it() -> None:
    def build(net: nn.Module, lr: Tensor) -> Fn:
        def adapted(xs: Tensor, ys: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
            inner = INNER["sgd"](net, lr)
            total = torch.zeros(())
            with metaoptim.SlidingWindow(offline=True, **more):
                for t in range(STEPS):
                    inner.step(F.mse_loss(net(xs[t]), ys[t]))
                    total = total + F.mse_loss(net(xs[0]), ys[0])
                return total, net(xs.reshape(-1, 3)).square()

        return adapted

    compare(build, (XS, YS))


@pytest.mark.parametrize("shared", [False, True])
def test_weights_that_are_learnt_for_each_step(shared: bool) -> None:
    weights = (data(STEPS) if shared else data(TASKS, STEPS)).abs().add(0.1).requires_grad_()

    def build(net: nn.Module, lr: Tensor) -> Fn:
        def adapted(weights: Tensor, xs: Tensor, ys: Tensor, **more: Any) -> Tensor:
            inner = INNER["adam"](net, lr)
            with metaoptim.SlidingWindow(offline=True, **more) as window:
                for w, x, y in window.scan(weights, xs, ys):
                    inner.step(w * F.mse_loss(net(x), y))
                return F.mse_loss(net(xs[0]), ys[0])

        return adapted

    compare(build, (weights, XS, YS), in_dims=(None if shared else 0, 0, 0), metas=[weights])


def test_rates_and_first_parameters_of_each_task() -> None:
    other = metaoptim.MetaSGD([(unstepped := network())], lr=0.1)  # is alive, and takes no step
    rates = torch.linspace(0.05, 0.3, TASKS).requires_grad_()
    first = data(TASKS, 5, 3).requires_grad_()

    def build(net: nn.Module, lr: Tensor) -> Fn:
        def adapted(rate: Tensor, first: Tensor, xs: Tensor, ys: Tensor, **more: Any) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=rate * lr)
            with metaoptim.SlidingWindow(offline=True, **more) as window:
                inner.start({"0.weight": first})
                for x, y in window.scan(xs, ys):
                    inner.step(F.mse_loss(net(x), y))
                return F.mse_loss(net(xs[0]), ys[0]) + unstepped(xs[0]).square().mean()

        return adapted

    compare(build, (rates, first, XS, YS), metas=[rates, first])
    assert not other.state


def test_tasks_of_unlike_sizes_by_a_mask() -> None:
    mask = (torch.arange(4) < torch.arange(1, TASKS + 1)[:, None]).double()

    def build(net: nn.Module, lr: Tensor) -> Fn:
        def adapted(mask: Tensor, xs: Tensor, ys: Tensor, **more: Any) -> Tensor:
            inner = INNER["sgd"](net, lr)
            with metaoptim.SlidingWindow(offline=True, **more) as window:
                for x, y in window.scan(xs, ys):
                    inner.step((mask * (net(x) - y).square().mean(1)).sum() / mask.sum())
                return F.mse_loss(net(xs[0]), ys[0])

        return adapted

    compare(build, (mask, XS, YS))


def test_two_optimizers_in_turn_and_a_network_that_nobody_trains() -> None:
    torch.manual_seed(0)
    warp = nn.Linear(3, 3)

    def build(net: nn.Module, lr: Tensor) -> Fn:
        def adapted(xs: Tensor, ys: Tensor, **more: Any) -> Tensor:
            first, last = metaoptim.MetaAdam([net[0]], lr=lr, eps=1e-2), metaoptim.MetaSGD([net[2]], lr=lr)
            with metaoptim.SlidingWindow(offline=True, **more):
                for t in range(STEPS):
                    loss = F.mse_loss(net(warp(xs[t])), ys[t])
                    first.step(loss)
                    if t % 2:
                        last.step(loss)
                return F.mse_loss(net(warp(xs[0])), ys[0])

        return adapted

    compare(build, (XS, YS), metas=list(warp.parameters()))


def test_branches_from_one_state() -> None:
    def build(net: nn.Module, lr: Tensor) -> Fn:
        def adapted(xs: Tensor, ys: Tensor, **more: Any) -> Tensor:
            inner, total = INNER["adam"](net, lr), torch.zeros(())
            with metaoptim.SlidingWindow(offline=True, **more):
                inner.step(F.mse_loss(net(xs[0]), ys[0]))
                there = metaoptim.extract_state(net, inner)
                for t in range(1, 3):
                    metaoptim.recover_state(there)
                    inner.step(F.mse_loss(net(xs[t]), ys[t]))
                    total = total + F.mse_loss(net(xs[0]), ys[0])
                return total

        return adapted

    compare(build, (XS, YS))


def test_optimizer_state_from_before() -> None:
    def build(net: nn.Module, lr: Tensor) -> Fn:
        inner = INNER["adam"](net, lr)
        with metaoptim.SlidingWindow():
            inner.step(F.mse_loss(net(XQ[0]), YQ[0]))

        def adapted(xs: Tensor, ys: Tensor, **more: Any) -> Tensor:
            with metaoptim.SlidingWindow(offline=True, **more) as window:
                for x, y in window.scan(xs, ys):
                    inner.step(F.mse_loss(net(x), y))
                return F.mse_loss(net(xs[0]), ys[0])

        return adapted

    compare(build, (XS, YS))


def test_one_tensor_as_two_arguments() -> None:
    def build(net: nn.Module, lr: Tensor) -> Fn:
        def adapted(x: Tensor, again: Tensor, **more: Any) -> Tensor:
            inner = INNER["sgd"](net, lr)
            with metaoptim.SlidingWindow(offline=True, **more):
                for _ in range(2):
                    inner.step(F.mse_loss(net(x), YQ[0]))
                return F.mse_loss(net(again), YQ[1])

        return adapted

    compare(build, (XQ, XQ))
    compare(build, (XQ, XQ[2]), in_dims=(0, None))


def test_arguments_and_results_in_dictionaries_and_lists() -> None:
    net = network()

    def adapted(data: dict[str, list[Tensor]]) -> dict[str, Any]:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x, y in window.scan(*data["support"]):
                inner.step(F.mse_loss(net(x), y))
            return {
                "loss": F.mse_loss(net(data["query"][0]), data["query"][1]),
                "count": 3,
                "same": torch.ones(2),
            }

    fn = metaoptim.compile(adapted, backend="eager")
    given = {"support": [XS, YS], "query": [XQ, YQ]}
    found = metaoptim.vmap(fn)(given)
    assert found["loss"].shape == (TASKS,) and found["count"] == 3 and found["same"].shape == (TASKS, 2)
    for other in (metaoptim.vmap(fn)(data=given), metaoptim.vmap(fn, chunk_size=2)(given)):
        torch.testing.assert_close(other["loss"], found["loss"])
    one = {k: [t[1] for t in v] for k, v in given.items()}
    torch.testing.assert_close(found["loss"][1], fn(one)["loss"])
    fewer = metaoptim.vmap(fn)({k: [t[:2] for t in v] for k, v in given.items()})
    torch.testing.assert_close(fewer["loss"], found["loss"][:2])
    shared = metaoptim.vmap(fn, ({"support": None, "query": 0},))(
        {"support": one["support"], "query": given["query"]}
    )
    torch.testing.assert_close(shared["loss"][1], found["loss"][1])


NETWORKS: dict[str, Fn] = {
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    ),
    "group norm": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(144, 3)
    ),
    "layer norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 3)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    torch.manual_seed(0)

    def build(net: nn.Module, lr: Tensor) -> Fn:
        def adapted(images: Tensor, labels: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
            inner = metaoptim.MetaSGD([net], lr=lr)
            with metaoptim.SlidingWindow(offline=True, **more):
                for _ in range(3):
                    inner.step(F.cross_entropy(net(images), labels))
                logits = net(images)
                return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).double()

        return adapted

    compare(
        build, (data(TASKS, 5, 1, 8, 8), torch.arange(5 * TASKS).view(TASKS, 5) % 3), net=NETWORKS[name]()
    )


def test_embeddings() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))

    def build(net: nn.Module, lr: Tensor) -> Fn:
        def adapted(words: Tensor, labels: Tensor, **more: Any) -> Tensor:
            inner = INNER["adam"](net, lr)
            with metaoptim.SlidingWindow(offline=True, **more) as window:
                for w, y in window.scan(words, labels):
                    inner.step(F.cross_entropy(net(w), y))
                return F.cross_entropy(net(words[0]), labels[0])

        return adapted

    words = torch.arange(TASKS * STEPS * 12).view(TASKS, STEPS, 4, 3) * 7 % 9
    compare(build, (words, LABELS), net=net)


def test_recurrent_cells() -> None:
    torch.manual_seed(0)
    net = nn.ModuleList([nn.GRUCell(3, 4), nn.Linear(4, 2)])

    def build(net: nn.Module, lr: Tensor) -> Fn:
        cell, head = net  # type: ignore[misc]

        def adapted(xs: Tensor, ys: Tensor, **more: Any) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=lr)
            with metaoptim.SlidingWindow(offline=True, **more) as window:
                for x, y in window.scan(xs, ys):
                    inner.step(F.mse_loss(head(cell(x)), y))
                return F.mse_loss(head(cell(xs[0])), ys[0])

        return adapted

    compare(build, (XS, YS), net=net)
