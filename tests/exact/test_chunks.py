"""Steps in chunks are exact: in every form, with every optimizer, under every option of a window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from chunked import STEPS, agree, drawing, mlp, run, weighted
from metaoptim import transforms
from metaoptim.errors import CaptureError

FORMS = [
    {"form": "A"},
    {"form": "A", "slots": 2},
    {"form": "A", "strategy": "full_tape"},
    {"form": "A", "backend": "aot_eager"},
    {"form": "B"},
    {"form": "C"},
    {"form": "C", "scan": True},
    {"form": "C", "compile": {"backend": "aot_eager", "slots": 2}},
]


def named(case: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" if k != "form" else v for k, v in case.items())


@pytest.mark.parametrize("case", FORMS, ids=named)
@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
def test_a_mean_over_examples_is_that_of_the_whole_batch(case: dict[str, Any], offline: bool) -> None:
    expected = run(None, strategy="full_tape", offline=offline)
    assert all(g is not None and g.abs().max() > 1e-6 for g in (expected["lr"], expected["w"]))
    agree(run(4, offline=offline, **case), expected)


@pytest.mark.parametrize("case", [FORMS[0], FORMS[5]], ids=named)
def test_one_chunk_and_one_for_each_example(case: dict[str, Any]) -> None:
    expected = run(None, strategy="full_tape")
    for chunks in (1, 10):
        agree(run(chunks, **case), expected)


@pytest.mark.parametrize("case", FORMS, ids=named)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_each_chunk_draws_and_has_statistics_of_its_own(case: dict[str, Any], reduction: str) -> None:
    """As gradients that a training loop adds up; the last chunk is smaller, and the random stream ends alike."""
    common: dict[str, Any] = {
        "build": drawing,
        "optimizer": metaoptim.MetaSGD,
        "options": {"momentum": 0.9},
        "reduction": reduction,
        "offline": False,
    }
    agree(run(3, **case, **common), run(None, by_hand=3, strategy="full_tape", **common), rtol=1e-7)


def test_finite_differences() -> None:
    def outer(log_lr: float) -> tuple[float, float]:
        torch.manual_seed(0)
        net, x = nn.Linear(3, 1).double(), torch.randn(7, 3, dtype=torch.float64)
        rate = torch.tensor(log_lr, dtype=torch.float64, requires_grad=True)
        inner = metaoptim.MetaAdam([net], lr=rate.exp())
        with metaoptim.SlidingWindow(offline=True):
            for _ in range(3):
                inner.step_in_chunks(lambda x: (net(x) - x.sum()).pow(4).mean(), x, chunks=3)
            loss = net(x).square().mean()
        loss.backward()
        assert rate.grad is not None
        return loss.item(), rate.grad.item()

    _, grad = outer(-2.0)
    numeric = (outer(-2.0 + 1e-6)[0] - outer(-2.0 - 1e-6)[0]) / 2e-6
    assert abs(grad - numeric) < 1e-6 * abs(numeric)


OPTIMIZERS = {
    "SGD, momentum": (metaoptim.MetaSGD, {"momentum": 0.9, "nesterov": True}),
    "RMSprop": (metaoptim.MetaRMSprop, {}),
    "wrapped NAdam": (metaoptim.MetaNAdam, {}),
    "clipped": (metaoptim.MetaAdam, {"transforms": [transforms.clip_global_norm(0.05)]}),
    "first order": (metaoptim.MetaAdam, {"first_order": True}),
}


@pytest.mark.parametrize("case", [FORMS[0], FORMS[5]], ids=named)
@pytest.mark.parametrize("which", OPTIMIZERS)
def test_optimizers(case: dict[str, Any], which: str) -> None:
    optimizer, options = OPTIMIZERS[which]
    common: dict[str, Any] = {"optimizer": optimizer, "options": options}
    agree(run(4, **case, **common), run(None, strategy="full_tape", **common))


def in_place(net: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    h = net(x).clone()
    h[:, 0].mul_(w)
    return F.cross_entropy(h.add_(0.1).sigmoid_(), y)


def penalised(net: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    loss = weighted(net, x, y, w)
    grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    return loss + sum(g.square().sum() for g in grads)


def with_hook(net: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    h = net(x)
    h.register_hook(lambda g: 3 * g)
    return F.cross_entropy(w[:, None] * h, y)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 5 * ctx.saved_tensors[0] * grad


def own_function(net: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (w * Squared.apply(net(x)).sum(1)).mean()  # type: ignore[union-attr]


@pytest.mark.parametrize("case", [FORMS[0], FORMS[4], FORMS[5]], ids=named)
@pytest.mark.parametrize("loss", [in_place, penalised, with_hook, own_function])
def test_constructs(case: dict[str, Any], loss: Any) -> None:
    """A gradient penalty is of each chunk's loss, so the plain loop adds up three losses as well."""
    if loss is with_hook and case["form"] == "A":
        with pytest.raises(CaptureError, match="a tensor hook in the loss of a chunk"):
            run(3, loss=loss, **case)
        return
    agree(run(3, loss=loss, **case), run(None, loss=loss, by_hand=3, strategy="full_tape"), rtol=1e-8)


class Experts(nn.Module):
    """Its second half is used where examples are many: by some chunks and not by others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x) if len(x) > 3 else self.one(x)


@pytest.mark.parametrize("case", [FORMS[0], FORMS[2], FORMS[5]], ids=named)
def test_a_parameter_that_some_chunks_do_not_use(case: dict[str, Any]) -> None:
    agree(run(3, build=Experts, **case), run(None, build=Experts, by_hand=3, strategy="full_tape"))


@pytest.mark.parametrize(
    "window",
    [{"window": 2}, {"memory_budget": "1MiB"}, {"slots": 1}, {"gradient": "first_order"}, {"hvp": "reverse"}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:the loss lies more than")
def test_options_of_windows(window: dict[str, Any]) -> None:
    agree(run(4, **window), run(None, **window))


def test_a_backward_hook_sees_the_cotangent_of_the_whole_gradient() -> None:
    hook = {"backward_hook": lambda g: 2 * g.sin()}
    agree(run(4, **hook), run(None, strategy="full_tape", **hook))


def test_gradients_carried_forward() -> None:
    def grads(chunks: int | None) -> Tensor | None:
        torch.manual_seed(0)
        net, x = nn.Linear(2, 1).double(), torch.randn(6, 2, dtype=torch.float64)
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.9)
        with metaoptim.SlidingWindow(gradient="forward"):
            for _ in range(3):
                if chunks is None:
                    inner.step(net(x).square().mean())
                else:
                    inner.step_in_chunks(lambda x: net(x).square().mean(), x, chunks=chunks)
            net(x).square().mean().backward()
        return lr.grad

    torch.testing.assert_close(grads(4), grads(None), rtol=1e-12, atol=0)


def test_many_tasks_at_once() -> None:
    torch.manual_seed(0)
    net, log_lr = mlp(), torch.tensor(-1.0, requires_grad=True)
    xs, ys = torch.randn(3, 8, 3), torch.randint(2, (3, 8))

    def adapted(chunks: int) -> Any:
        def loss(x: Tensor, y: Tensor) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
            with metaoptim.SlidingWindow(offline=True):
                for _ in range(2):
                    inner.step_in_chunks(lambda x, y: F.cross_entropy(net(x), y), x, y, chunks=chunks)
                return F.cross_entropy(net(x), y)

        return loss

    whole, parts = (metaoptim.vmap(metaoptim.compile(backend="eager")(adapted(k)))(xs, ys) for k in (1, 4))
    torch.testing.assert_close(parts, whole)
    of = [log_lr, *net.parameters()]
    for got, want in zip(
        torch.autograd.grad(parts.sum(), of), torch.autograd.grad(whole.sum(), of), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_one_step_is_one_step() -> None:
    """One call of one graph, whatever the number of chunks; schedules and reports count it once."""
    net = mlp()
    inner = metaoptim.MetaSGD([net], lr=metaoptim.schedules.linear(0.1, 0.2, STEPS))
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    with metaoptim.SlidingWindow(offline=True, record_grad_tape=True) as window:
        for _ in range(STEPS):
            inner.step_in_chunks(lambda x, y: F.cross_entropy(net(x), y), x, y, chunks=4)
        report = window.explain()
        assert report.horizon == STEPS and report.num_programs == 1
        assert f"step_{STEPS - 1}:0.weight" in dict(inner.named_parameters())
        assert f"step_{STEPS}:0.weight" not in dict(inner.named_parameters())


def test_a_batch_of_any_structure() -> None:
    torch.manual_seed(0)
    net = mlp()
    inner = metaoptim.MetaSGD([net], lr=0.1)
    batch = {"x": torch.randn(8, 3), "labels": [torch.randint(2, (8,)), None], "scale": torch.tensor(2.0)}
    seen: list[int] = []

    def loss(batch: dict[str, Any], power: int) -> Tensor:
        seen.append(len(batch["x"]))
        assert batch["labels"][1] is None and power == 2
        return batch["scale"] * F.cross_entropy(net(batch["x"]), batch["labels"][0]) ** power

    with metaoptim.SlidingWindow(offline=True):
        value = inner.step_in_chunks(loss, batch, 2, chunks=3)
    assert seen == [3, 3, 2] and not value.requires_grad and value.shape == ()
