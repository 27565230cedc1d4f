"""metaoptim in its forms: an ordinary window, compiled steps inside one, a compiled function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import metaoptim
from problems import Problem
from torch_problems import Tensors, TorchProblem, batches

Gradient = Callable[[], dict[str, np.ndarray]]


class Ours:
    """A network and its inner optimizer, which every meta-gradient begins with anew."""

    def __init__(self, numbers: Problem) -> None:
        self.problem = problem = TorchProblem(numbers)
        self.net = problem.network()
        self.params = dict(self.net.named_parameters())
        layers = [{"params": layer} for layer in self.net.children() if [*layer.parameters()]]
        if numbers.optimizer == "adam":
            self.inner: metaoptim.MetaOptimizer = metaoptim.MetaAdam(layers, eps=numbers.eps)
        else:
            self.inner = metaoptim.MetaSGD(layers, momentum=numbers.momentum)
        self.at_start = copy.deepcopy(self.inner.state_dict())

    def gradient(self, window_loss: Callable[[Tensors, Tensors], Tensor]) -> dict[str, np.ndarray]:
        """The meta-gradient over all windows, where ``window_loss`` is the outer loss of one."""
        if self.problem.online:
            self.inner.load_state_dict(self.at_start)
            with torch.no_grad():
                for name, p in self.params.items():
                    p.copy_(self.problem.theta[name])
        total = 0.0
        for steps, outer in self.problem.windows:
            for group, lr in zip(self.inner.param_groups, self.problem.layer_lrs()):
                group["lr"] = lr
            loss = window_loss(steps, outer)
            loss.backward()
            total += loss.item()
        return self.problem.collect(total, self.params)


def window(numbers: Problem, **options: Any) -> Gradient:
    """An ordinary window with some of its options."""
    ours = Ours(numbers)
    problem, net, inner = ours.problem, ours.net, ours.inner

    def window_loss(steps: Tensors, outer: Tensors) -> Tensor:
        with metaoptim.SlidingWindow(offline=not problem.online, **options):
            for batch in batches(steps):
                inner.step(problem.inner_loss(net, problem.meta, batch))
            return problem.outer_loss(net, outer)

    return lambda: ours.gradient(window_loss)


def compiled_step(numbers: Problem, **options: Any) -> Gradient:
    """An ordinary window whose steps are compiled; options are those of `metaoptim.compile`."""
    ours = Ours(numbers)
    problem, net, inner = ours.problem, ours.net, ours.inner
    inner_loss, meta = problem.inner_loss, problem.meta

    @metaoptim.compile(**options)
    def inner_step(batch: Tensors) -> None:
        inner.step(inner_loss(net, meta, batch))

    def window_loss(steps: Tensors, outer: Tensors) -> Tensor:
        with metaoptim.SlidingWindow(offline=not problem.online):
            for batch in batches(steps):
                inner_step(batch)
            return problem.outer_loss(net, outer)

    return lambda: ours.gradient(window_loss)


def compiled(numbers: Problem, **options: Any) -> Gradient:
    """A compiled function that holds the window; options are those of `metaoptim.compile`."""
    ours = Ours(numbers)
    problem, net, inner = ours.problem, ours.net, ours.inner
    inner_loss, outer_loss, meta, offline = (
        problem.inner_loss,
        problem.outer_loss,
        problem.meta,
        not problem.online,
    )

    @metaoptim.compile(**options)
    def window_loss(steps: Tensors, outer: Tensors) -> Tensor:
        with metaoptim.SlidingWindow(offline=offline) as window:
            for row in window.scan(*steps.values()):
                inner.step(inner_loss(net, meta, dict(zip(steps, row))))
            return outer_loss(net, outer)

    return lambda: ours.gradient(window_loss)
