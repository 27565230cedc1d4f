"""Forms B and C in tests: problems and functions under `metaoptim.compile`, compared with the full tape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from oracle import Problem, agree, leaves
from problems import data

full_tape = functools.partial(metaoptim.SlidingWindow, strategy="full_tape")


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def leaf(value: Any = 0.5) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def in_form_c(problem: Problem, **compile_options: Any) -> Any:
    """The compiled function ``(net, meta-parameters) -> outer loss`` of a problem."""

    @metaoptim.compile(**{"backend": "eager", **compile_options})
    def meta_loss(net: nn.Module, metas: dict[str, Tensor]) -> Any:
        inner = problem.optimizer_class([net], **problem.hyper(metas), **problem.options)
        carried: dict[str, Any] = {}
        total: Any = 0.0
        with metaoptim.SlidingWindow(offline=problem.offline, window=problem.window):
            for t in range(problem.steps):
                if problem.per_step is not None:
                    total = total + problem.per_step(net, t, metas)
                inner.step(problem.loss(net, t, metas, carried), allow_unused=problem.allow_unused)
            return total + problem.outer(net, metas)

    return meta_loss


def run_compiled(problem: Problem, **compile_options: Any) -> dict[str, Tensor | None]:
    """The gradients that the compiled function gives; arguments as of `metaoptim.compile`."""
    torch.manual_seed(3)
    net = problem.build()
    metas = leaves(problem.metas)
    meta_loss = in_form_c(problem, **compile_options)
    torch.manual_seed(11)
    return _ended(meta_loss(net, metas), net, metas)


def _ended(total: Any, net: nn.Module, metas: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradients of an outer loss."""
    if total.requires_grad:
        total.backward()
    return {**{n: p.grad for n, p in net.named_parameters()}, **{k: v.grad for k, v in metas.items()}}


def _in_window(
    problem: Problem, net: nn.Module, metas: dict[str, Tensor], step: Callable[[int], None], **window: Any
) -> dict[str, Tensor | None]:
    """The gradients that ``step(t)``, called in an ordinary window, gives."""
    total: Any = 0.0
    torch.manual_seed(11)
    with metaoptim.SlidingWindow(offline=problem.offline, window=problem.window, **window):
        for t in range(problem.steps):
            if problem.per_step is not None:
                total = total + problem.per_step(net, t, metas)
            step(t)
        total = total + problem.outer(net, metas)
    return _ended(total, net, metas)


def run_step(problem: Problem, *, backend: str = "eager", **window: Any) -> dict[str, Tensor | None]:
    """Form B: the gradients of a problem of `problems.problem`, its inner step compiled once for all t.

    The learnt weight is found in the closure, the row of learnt targets is an argument, the learning rate sits in the
    optimizer's groups.
    """
    torch.manual_seed(3)
    net, metas = problem.build(), leaves(problem.metas)
    weight = metas["weight"]
    xs, ys = (t.to(weight) for t in data(problem.steps))
    inner = problem.optimizer_class([net], **problem.hyper(metas), **problem.options)

    @metaoptim.compile(backend=backend)
    def step(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> None:
        loss = F.mse_loss(net(x), y + shift) * scale * weight.sigmoid()
        inner.step(loss, allow_unused=problem.allow_unused)

    def at(t: int) -> None:
        step(xs[t], ys[t], metas["shift"][t % 3], torch.tensor(1 + 0.1 * t).to(weight))

    return _in_window(problem, net, metas, at, **window)


def run_any_step(problem: Problem, backend: str = "eager", **window: Any) -> dict[str, Tensor | None]:
    """Form B: the gradients of any problem. Its loss is given t as a number, so every t is compiled."""
    torch.manual_seed(3)
    net, metas = problem.build(), leaves(problem.metas)
    inner = problem.optimizer_class([net], **problem.hyper(metas), **problem.options)

    @metaoptim.compile(backend=backend)
    def step(t: int, carried: dict[str, Any]) -> dict[str, Any]:
        carried = dict(carried)
        inner.step(problem.loss(net, t, metas, carried), allow_unused=problem.allow_unused)
        return carried

    carried: dict[str, Any] = {}

    def at(t: int) -> None:
        carried.update(step(t, carried))

    return _in_window(problem, net, metas, at, **window)


class Made:
    """A function ``of(window)`` with one window or more, the leaves it is differentiated by, and what it changes."""

    def __init__(
        self, of: Callable, leaves: list[Tensor], changed: Callable[[], list[Tensor]] = lambda: []
    ) -> None:
        self.of, self.leaves, self.changed = of, leaves, changed


def outcome(made: Made, f: Callable, window: Any, calls: int = 2) -> Iterator[tuple[str, Tensor | None]]:
    """What calls give, one after the other: losses, gradients, what is left in tensors, and the random stream."""
    torch.manual_seed(7)
    for call in range(calls):
        loss = f(window)
        yield f"loss {call}", loss.detach()
        for i, grad in enumerate(torch.autograd.grad(loss, made.leaves, allow_unused=True)):
            yield f"gradient {call}.{i}", grad
        for i, value in enumerate(made.changed()):
            yield f"value {call}.{i}", value.detach().clone()
    yield "random state", torch.get_rng_state().double()


def compare(make: Callable[[], Made], oracle: Any = full_tape, **compile_options: Any) -> None:
    """Form C equals ``oracle``, a window, in every result of several calls."""
    torch.manual_seed(5)
    made = make()
    expected = dict(outcome(made, made.of, oracle))
    assert any(v is not None and float(v.abs().max()) > 1e-4 for k, v in expected.items() if "grad" in k)
    torch.manual_seed(5)
    made = make()
    compiled = metaoptim.compile(made.of, **{"backend": "eager", "slots": 2, **compile_options})
    got = dict(outcome(made, compiled, metaoptim.SlidingWindow))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        agree({key: got[key]}, {key: value}, rtol=1e-9)
