"""A `Problem` in form C: the whole window inside a function under `metaoptim.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import metaoptim
from oracle import Problem, leaves


def in_form_c(problem: Problem, metas: dict[str, Tensor], **compile_options: Any) -> Any:
    """The compiled function ``net -> outer loss`` of a problem."""

    @metaoptim.compile(**{"backend": "eager", **compile_options})
    def meta_loss(net: nn.Module, metas: dict[str, Tensor]) -> Any:
        inner = problem.optimizer_class([net], **problem.hyper(metas), **problem.options)
        carried: dict[str, Any] = {}
        total: Any = 0.0
        with metaoptim.SlidingWindow(offline=problem.offline):
            for t in range(problem.steps):
                if problem.per_step is not None:
                    total = total + problem.per_step(net, t, metas)
                inner.step(problem.loss(net, t, metas, carried), allow_unused=problem.allow_unused)
            return total + problem.outer(net, metas)

    return lambda net: meta_loss(net, metas)


def run_compiled(problem: Problem, **compile_options: Any) -> dict[str, Tensor | None]:
    """The gradients that the compiled function gives; arguments as of `metaoptim.compile`."""
    torch.manual_seed(3)
    net = problem.build()
    metas = leaves(problem.metas)
    meta_loss = in_form_c(problem, metas, **compile_options)
    torch.manual_seed(11)
    total = meta_loss(net)
    if total.requires_grad:
        total.backward()
    return {**{n: p.grad for n, p in net.named_parameters()}, **{k: v.grad for k, v in metas.items()}}
