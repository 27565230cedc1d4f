"""Steps that differ in an index or a number share a program, whatever is written in place beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.lower.library import library
from oracle import agree, leaves

T = 6


@functools.cache
def given(*shape: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(shape[0] + len(shape)), dtype=torch.float64
    )


METAS = {
    "w": given(T).square() + 0.5,
    "xs": given(T, 5, 4),
    "rows": given(4 * T, 4),
    "a": torch.tensor(0.7).double(),
}


def net(between: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), between(), nn.Linear(6, 3)).double()


inplace = functools.partial(net, functools.partial(nn.ReLU, inplace=True))
dropout = functools.partial(net, functools.partial(nn.Dropout, 0.3))


def weighted(f: nn.Module, k: int, m: dict[str, Tensor]) -> Tensor:
    return (f(given(T, 5, 4)[k]).square() * m["w"][k]).mean()


def on(x: Callable[[int, dict[str, Tensor]], Tensor]) -> Callable:
    """The loss on ``x(k, metas)``."""
    return lambda f, k, m: f(x(k, m)).square().mean()


def on_outputs(change: Callable[[Tensor, int], Tensor]) -> Callable:
    """A loss of the changed outputs."""
    return lambda f, k, m: change(f(given(T, 5, 4)[k]), k).square().mean() * m["a"]


def indexed_after_a_write(f: nn.Module, k: int, m: dict[str, Tensor]) -> Tensor:
    w = m["w"] * 1.5
    w.mul_(2)
    return f(given(T, 5, 4)[k]).square().mean() * w[k]


CASES = {
    "weight, in-place ReLU": (inplace, weighted),
    "weight, dropout": (dropout, weighted),
    "rows of data": (inplace, on(lambda k, m: m["xs"][k])),
    "from the end": (inplace, on(lambda k, m: m["xs"][-1 - k])),
    "two indices": (inplace, on(lambda k, m: m["xs"][k][:, k % 3][:, None].expand(5, 4))),
    "slices": (inplace, on(lambda k, m: m["rows"][k : k + 4])),
    "narrow": (inplace, on(lambda k, m: m["rows"].narrow(0, 2 * k, 4))),
    "a view": (inplace, on(lambda k, m: m["xs"].flatten(0, 1)[5 * k : 5 * k + 5])),
    "another axis": (inplace, on(lambda k, m: m["xs"].transpose(0, 1)[:, k])),
    "computed": (inplace, on(lambda k, m: m["xs"].exp()[k])),
    "unbind": (inplace, on(lambda k, m: m["xs"].unbind()[k])),
    "chunk": (inplace, on(lambda k, m: m["rows"].chunk(T)[k])),
    "split": (inplace, on(lambda k, m: m["rows"].split([4] * T)[k])),
    "a list of rows": (inplace, on(lambda k, m: m["rows"][[k, 3 * k, 7]])),
    "rows one by one": (inplace, on(lambda k, m: torch.stack([m["rows"][k], m["rows"][2 * k + 1]]))),
    "columns of outputs": (inplace, on_outputs(lambda h, k: h[:, k % 3])),
    "mul_": (net, on_outputs(lambda h, k: h.mul_(1 + 0.1 * k))),
    "add_": (net, on_outputs(lambda h, k: h.add_(0.1 * k))),
    "sub_": (net, on_outputs(lambda h, k: h.sub_(0.1 * k))),
    "div_": (net, on_outputs(lambda h, k: h.div_(1 + k))),
    "number minus tensor": (net, on_outputs(lambda h, k: 0.1 * k - h)),
    "indexed after a write": (inplace, indexed_after_a_write),
}


def in_a_window(
    build: Callable, loss: Callable, strategy: str = "auto"
) -> tuple[dict[str, Tensor | None], int]:
    f, metas = build(), leaves(METAS)
    inner = metaoptim.MetaSGD([f], lr=0.1)
    torch.manual_seed(7)
    with metaoptim.SlidingWindow(offline=True, strategy=strategy) as window:
        for k in range(T):
            inner.step(loss(f, k, metas))
        f(given(T, 5, 4)[0]).square().mean().backward()
        count = 0 if strategy == "full_tape" else len(window.program.step_graphs)
    return {**{n: p.grad for n, p in f.named_parameters()}, **{n: m.grad for n, m in metas.items()}}, count


@pytest.mark.parametrize("name", CASES)
def test_steps_of_a_window_share_a_program(name: str) -> None:
    library.clear()
    got, programs = in_a_window(*CASES[name])
    expected, _ = in_a_window(*CASES[name], strategy="full_tape")
    agree(got, expected)
    assert programs <= 3, name  # as it was first, with what has differed in the second, and once more


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("weight, dropout", "a list of rows")])
def test_steps_of_a_compiled_function_share_a_program(name: str) -> None:
    build, loss = CASES[name]
    f, metas = build(), leaves(METAS)

    @metaoptim.compile(backend="eager")
    def meta_loss(f: nn.Module, metas: dict[str, Tensor]) -> Tensor:
        inner = metaoptim.MetaSGD([f], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            for k in range(T):
                inner.step(loss(f, k, metas))
            return f(given(T, 5, 4)[0]).square().mean()

    meta_loss(f, metas).backward()
    expected, _ = in_a_window(build, loss, strategy="full_tape")
    agree({**{n: p.grad for n, p in f.named_parameters()}, **{n: m.grad for n, m in metas.items()}}, expected)
    assert meta_loss.explain(f, metas).num_programs <= 3  # the steps, the first of them apart, the outer loss


def written_in_part(f: nn.Module, k: int, m: dict[str, Tensor]) -> Tensor:
    w = m["w"] * 1.5
    row = w[k : k + 2]
    w[k].mul_(3.0)  # ``row`` sees it
    return f(given(T, 5, 4)[k]).square().mean() * row.sum()


def written_through_the_index(f: nn.Module, k: int, m: dict[str, Tensor]) -> Tensor:
    w = m["w"] * 1.0
    w[k] = m["a"]
    return f(given(T, 5, 4)[k]).square().mean() * w.square().sum()


@pytest.mark.parametrize("loss", [written_in_part, written_through_the_index])
def test_an_index_into_what_is_written_later_stays_a_view(loss: Callable) -> None:
    expected, _ = in_a_window(inplace, loss, strategy="full_tape")
    agree(in_a_window(inplace, loss)[0], expected)
