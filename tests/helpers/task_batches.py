"""Tasks for `metaoptim.vmap` in tests: data, inner loops, and the comparison with a loop over full tapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim

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
