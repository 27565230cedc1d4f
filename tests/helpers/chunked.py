"""Inner loops whose steps may be taken in chunks, in every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim

EXAMPLES, STEPS = 10, 3
Values = dict[str, Tensor | None]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def drawing() -> nn.Module:
    """A network that draws, and keeps statistics; what a bias before it has for a gradient is rounding."""
    linear = nn.Linear(3, 5, bias=False)
    return nn.Sequential(linear, nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))


def weighted(net: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (w.sigmoid() * F.cross_entropy(net(x), y, reduction="none")).mean()


Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def run(
    chunks: int | None,
    form: str = "A",
    *,
    build: Callable[[], nn.Module] = mlp,
    loss: Loss = weighted,
    optimizer: Any = metaoptim.MetaAdam,
    by_hand: int = 1,
    reduction: str = "mean",
    scan: bool = False,
    allow_unused: bool = False,
    compile: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **window: Any,
) -> Values:
    """All that comes of an inner loop of steps in ``chunks``; with None, by the sum of ``by_hand`` losses."""
    torch.manual_seed(0)
    net = build().double()
    log_lr = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    w = torch.randn(EXAMPLES, dtype=torch.float64, requires_grad=True)
    xs = torch.randn(STEPS, EXAMPLES, 3, dtype=torch.float64)
    ys = torch.randint(2, (STEPS, EXAMPLES))

    def step(inner: Any, x: Tensor, y: Tensor) -> Tensor:
        def of_chunk(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return loss(net, x, y, w)

        if chunks is not None:
            return inner.step_in_chunks(
                of_chunk, x, y, w, chunks=chunks, reduction=reduction, allow_unused=allow_unused
            )
        parts = list(zip(*(t.tensor_split(by_hand) for t in (x, y, w)), strict=True))
        weights = [len(x) / EXAMPLES if reduction == "mean" else 1.0 for x, _, _ in parts]
        total: Any = sum(k * of_chunk(*part) for k, part in zip(weights, parts, strict=True))
        inner.step(total, allow_unused=allow_unused)
        return total.detach()

    window = {"offline": True, **window}
    torch.manual_seed(1)
    inner = optimizer([net], lr=log_lr.exp(), **(options or {}))
    taken = step
    if form == "B":
        compiled: Any = metaoptim.compile(**{"backend": "eager", **(compile or {})})(
            lambda x, y: step(inner, x, y)
        )
        taken = lambda inner, x, y: compiled(x, y)

    def outer(inner: Any, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        last: Any = None
        with metaoptim.SlidingWindow(**window) as opened:
            for x, y in opened.scan(xs, ys) if scan else zip(xs, ys, strict=True):
                last = taken(inner, x, y)
            return F.cross_entropy(net(xs[0]), ys[0]), last

    if form == "C":
        outer = metaoptim.compile(**{"backend": "eager", **(compile or {})})(outer)  # type: ignore[assignment]
    found, last = outer(inner, xs, ys)
    found.backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    values = {f"{name}'": p.detach() for name, p in (*net.named_parameters(), *net.named_buffers())}
    return {
        **{"outer": found.detach(), "loss": last.detach(), "lr": log_lr.grad, "w": w.grad},
        **grads,
        **values,
        "drawn": torch.get_rng_state(),
    }


def agree(got: Values, expected: Values, rtol: float = 1e-9) -> None:
    """Raise unless all is there that is expected, and alike."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        have = got[name]
        assert (have is None) == (want is None), name
        if have is not None and want is not None:
            torch.testing.assert_close(
                have, want, rtol=rtol, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )
