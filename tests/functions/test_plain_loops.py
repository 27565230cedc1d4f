"""A plain `for` in form C: rows of tensors reach the steps that read them, and equal steps become a Loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import Made, compare, leaf, mlp
from metaoptim.compiler.ir.programs.calls import Loop
from metaoptim.compiler.ir.programs.program import Program
from metaoptim.compiler.passes.options import Options
from metaoptim.compiler.passes.pipeline import loop

Data = Callable[[Tensor, Tensor], Iterable[tuple[Tensor, Tensor]]]

#: How a step comes by its data, and whether it is a loop then.
DATA: dict[str, Data] = {
    "zip": zip,
    "zip of lists": lambda xs, ys: zip(list(xs), list(ys), strict=True),
    "enumerate": lambda xs, ys: ((x, ys[t]) for t, x in enumerate(xs)),
    "range": lambda xs, ys: ((xs[t], ys[t]) for t in range(len(xs))),
    "backwards": lambda xs, ys: ((xs[-1 - t], ys[t]) for t in range(len(xs))),
    "every other": lambda xs, ys: ((xs[t], ys[t]) for t in range(0, len(xs), 2)),
    "shuffled": lambda xs, ys: ((xs[5 * t % len(xs)], ys[t]) for t in range(len(xs))),
    "unbind": lambda xs, ys: zip(xs.unbind(), ys.unbind(0), strict=True),
    "the same": lambda xs, ys: ((xs[0], ys[0]) for _ in range(len(xs))),
    "entries of rows": lambda xs, ys: ((xs[t, :, :], ys[t, t % 5]) for t in range(len(xs))),
    "slices": lambda xs, ys: ((xs[t : t + 1].squeeze(0), ys[t]) for t in range(len(xs))),
    "floats": lambda xs, ys: ((xs[t] * (1 - t / 31), ys[t]) for t in range(len(xs))),
    "signed zeros": lambda xs, ys: ((xs[t] * (1 / (0.1 - t % 2)), ys[t]) for t in range(len(xs))),
    "a mask": lambda xs, ys: ((x * (x > 0), y) for x, y in zip(xs, ys, strict=True)),
}


def numbers(steps: int, last: int, seed: int = 1) -> Tensor:
    return torch.randn(steps, 5, last, generator=torch.Generator().manual_seed(seed))


def of_data(data: Data, steps: int, learnt: bool) -> Made:
    net, log_lr = mlp(), leaf(-1.0)
    xs, ys = numbers(steps, 3), numbers(steps, 2, seed=2)
    xs.requires_grad_(learnt)

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp(), momentum=0.9)
        with window(offline=True):
            for x, y in data(xs, ys):
                inner.step((net(x) - y).square().mean())
            return F.mse_loss(net(xs[0]), ys[0])

    return Made(of, [log_lr, *([xs] if learnt else []), *net.parameters()])


def program_of(made: Made) -> Program:
    compiled = metaoptim.compile(made.of, backend="eager")
    compiled(metaoptim.SlidingWindow)
    ((program,),) = compiled._specializations.known.values()
    return program.program


@pytest.mark.parametrize(
    ("name", "learnt"), [*((n, True) for n in DATA), *((n, False) for n in list(DATA)[::4])]
)
def test_equals_the_tape_whatever_the_steps_read(name: str, learnt: bool) -> None:
    compare(lambda: of_data(DATA[name], 10, learnt))


@pytest.mark.parametrize("name", DATA)
def test_it_is_a_loop(name: str) -> None:
    """As many calls, step graphs and registers for any number of steps."""
    sizes = set()
    for steps in (12, 24):
        program = program_of(of_data(DATA[name], steps, learnt=True))
        assert any(isinstance(c, Loop) for c in program.calls)
        assert program.horizon == len(list(DATA[name](numbers(steps, 3), numbers(steps, 2))))
        sizes.add((len(program.calls), len(program.step_graphs), program.registers))
        before = str(program)
        loop(program, Options())
        assert str(program) == before  # idempotent
    assert len(sizes) == 1


def of_list(learnt: bool, steps: int = 10) -> Made:
    net, log_lr = mlp(), leaf(-1.0)
    xs, ys = numbers(steps, 3), numbers(steps, 2, seed=2)
    batches = [x.clone().requires_grad_(learnt) for x in xs]

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaAdam([net], lr=0.01 * log_lr.exp())
        with window(offline=True):
            for x, y in zip(batches, ys, strict=True):
                inner.step(F.mse_loss(net(x), y))
            return F.mse_loss(net(batches[0]), ys[0])

    return Made(of, [log_lr, *(batches if learnt else []), *net.parameters()])


@pytest.mark.parametrize("learnt", [False, True])
def test_a_list_of_tensors(learnt: bool) -> None:
    compare(lambda: of_list(learnt))
    assert any(isinstance(c, Loop) for c in program_of(of_list(learnt)).calls)


def test_another_call_brings_other_tensors() -> None:
    """What a loop lists is looked up in every call."""

    @metaoptim.compile(backend="eager")
    def meta_loss(net: nn.Module, log_lr: Tensor, batches: list[Tensor]) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(offline=True):
            for x in batches:
                inner.step(net(x).square().mean())
            return net(batches[0]).sum()

    net, log_lr = mlp(), leaf(-1.0)
    found = []
    for seed in (1, 2):
        batches = list(numbers(8, 3, seed))
        found.append(torch.autograd.grad(meta_loss(net, log_lr, batches), log_lr)[0])
        expected = torch.autograd.grad(
            metaoptim.compile(meta_loss._fn, backend="eager")(net, log_lr, batches), log_lr
        )
        torch.testing.assert_close(found[-1], expected[0])
    assert len(meta_loss._specializations.known) == 1 and not torch.allclose(*found)


# -- rows that are more than that -------------------------------------------------------------------------------------


def _gradient_penalty(net: nn.Module, xs: Tensor, ys: Tensor, w: Tensor) -> Iterator[Tensor]:
    for x, y in zip(xs, ys, strict=True):
        x = x if x.requires_grad else x.requires_grad_()
        out = net(x)
        (slope,) = torch.autograd.grad(out.tanh().sum(), x, create_graph=True)
        yield F.mse_loss(out, y) + w * slope.square().mean()


def _hooked(net: nn.Module, xs: Tensor, ys: Tensor, w: Tensor) -> Iterator[Tensor]:
    for t in range(len(xs)):
        x = xs[t]
        x.register_hook(lambda g: 0.5 * g)
        yield F.mse_loss(net(x), ys[t]) * w.exp()


def _cut(net: nn.Module, xs: Tensor, ys: Tensor, w: Tensor) -> Iterator[Tensor]:
    for t in range(len(xs)):
        with torch.no_grad():
            cut = xs[t]
        yield F.mse_loss(net(cut + xs[t - 1]), ys[t]) * w.exp()


def _copied(net: nn.Module, xs: Tensor, ys: Tensor, w: Tensor) -> Iterator[Tensor]:
    """A row is copied and the copy is changed."""
    for x, y in zip(xs, ys, strict=True):
        mine = x.clone()
        mine[0] = x[1] * w
        yield F.mse_loss(net(mine.mul_(1.5)), y)


def _rates(net: nn.Module, xs: Tensor, ys: Tensor, w: Tensor) -> Iterator[Tensor]:
    """A row of one number."""
    weights = (w * torch.linspace(0.5, 1.5, len(xs))).unbind()
    for x, y, weight in zip(xs, ys, weights, strict=True):
        yield F.mse_loss(net(x), y) * weight


@pytest.mark.parametrize("losses", [_gradient_penalty, _hooked, _cut, _copied, _rates])
def test_rows_with_a_role_of_their_own(losses: Callable) -> None:
    def make() -> Made:
        net, w = mlp(), leaf(0.3)
        xs, ys = numbers(7, 3).requires_grad_(), numbers(7, 2, seed=2)

        def of(window: Any) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=0.2, momentum=0.5)
            with window(offline=True):
                for loss in losses(net, xs, ys, w):
                    inner.step(loss)
                return F.mse_loss(net(xs[0]), ys[0])

        return Made(of, [w, xs, *net.parameters()])

    compare(make)


def test_rows_of_a_memory_that_is_written() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("memory", torch.linspace(0.5, 1.5, 6).view(3, 2))

        def forward(self, x: Tensor, t: int) -> Tensor:
            out = self.linear(x) + self.memory[t % 3]
            with torch.no_grad():
                self.memory[(t + 1) % 3].mul_(0.5).add_(out.mean(0))
            return out

    def make() -> Made:
        torch.manual_seed(0)
        net, w = Memory(), leaf()
        xs = numbers(8, 3)

        def of(window: Any) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=0.1)
            with window():
                for t in range(len(xs)):
                    inner.step(net(xs[t], t).square().mean() * w)
                return net(xs[0], 0).square().mean()

        return Made(of, [w], lambda: [*net.parameters(), net.memory])

    compare(make)
