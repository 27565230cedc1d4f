"""`metaoptim.vmap`: all tasks at once are what a loop over them is, against the full tape of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.passes import batch as batching

TASKS, STEPS = 5, 6
Fn = Callable[..., Any]


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


XS, YS = data(TASKS, STEPS, 4, 3), data(TASKS, STEPS, 4, 2)
XQ, YQ = data(TASKS, 4, 3), data(TASKS, 4, 2)
LABELS = torch.arange(TASKS * STEPS * 4).view(TASKS, STEPS, 4) % 2
INNER: dict[str, Fn] = {
    "sgd": lambda net, lr: metaoptim.MetaSGD([net], lr=lr, momentum=0.5),
    "adam": lambda net, lr: metaoptim.MetaAdam([net], lr=lr, eps=1e-2),
    "adamw": lambda net, lr: metaoptim.MetaAdamW([net], lr=lr, eps=1e-2),
    "scheduled": lambda net, lr: metaoptim.MetaSGD([net], lr=metaoptim.schedules.exponential(lr, 3, 0.9)),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def compare(
    build: Callable[[nn.Module, Tensor], Fn],
    args: Sequence[Tensor],
    in_dims: Any = 0,
    net: nn.Module | None = None,
    metas: Sequence[Tensor] = (),
    options: dict[str, Any] | None = None,
    **vmap: Any,
) -> None:
    """Results and gradients of ``build(net, lr)`` for all tasks at once, and in a loop over full tapes."""
    net, lr = net or network(), torch.tensor(0.2, requires_grad=True)
    learnt = [lr, *metas, *net.parameters()]
    fn = build(net, lr)
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
    batched = metaoptim.vmap(
        metaoptim.compile(fn, **{"backend": "eager", **(options or {})}), in_dims, **vmap
    )

    def by_turns() -> tuple[Tensor, ...]:
        found = []
        for b in range(TASKS):
            of_task = [a if d is None else a.select(d, b) for a, d in zip(args, dims, strict=True)]
            result = fn(*of_task, strategy="full_tape")
            found.append(result if isinstance(result, tuple) else (result,))
        return tuple(map(torch.stack, zip(*found, strict=True)))

    def gradients(run: Fn) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
        found = run()
        results = found if isinstance(found, tuple) else (found,)
        weights = torch.linspace(0.5, 1.5, TASKS)
        loss = sum((r * weights.view(-1, *[1] * (r.dim() - 1))).sum() for r in results if r.requires_grad)
        assert isinstance(loss, Tensor)
        return results, list(torch.autograd.grad(loss, learnt, allow_unused=True))

    expected, wanted = gradients(by_turns)
    assert max(float(g.abs().max()) for g in wanted if g is not None) > 1e-3
    for _ in range(2):
        got, found = gradients(lambda: batched(*args))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        for g, w in zip(found, wanted, strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-13)


def scanned(optimizer: str = "sgd", **window: Any) -> Callable[[nn.Module, Tensor], Fn]:
    def build(net: nn.Module, lr: Tensor) -> Fn:
        def adapted(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor, **more: Any) -> Tensor:
            inner = INNER[optimizer](net, lr)
            with metaoptim.SlidingWindow(offline=True, **window, **more) as opened:
                for x, y in opened.scan(xs, ys):
                    inner.step(F.mse_loss(net(x), y))
                return F.mse_loss(net(xq), yq)

        return adapted

    return build


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


def test_an_outer_loss_after_the_block() -> None:
    net = network()

    def adapted(xs: Tensor, ys: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            inner.step(F.mse_loss(net(xs[0]), ys[0]))
        return F.mse_loss(net(xs[0]), ys[0])

    with pytest.warns(metaoptim.UnreachableWarning, match="depends on its 1 inner step"):
        metaoptim.vmap(metaoptim.compile(adapted, backend="eager"))(XS, YS)
