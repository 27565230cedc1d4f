"""Peers that run on torch: the tape by hand, torch.func with checkpointing, TorchOpt, higher; and bare products.

Each maker takes a problem and returns a function that computes its meta-gradient once, as numpy arrays.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from problems import Problem
from torch_problems import Net, Tensors, TorchProblem, batches

Gradient = Callable[[], dict[str, np.ndarray]]


class ByHand:
    """SGD and Adam as anybody would write them. The state is a flat dict of tensors."""

    def __init__(self, problem: Problem) -> None:
        self.adam, self.momentum, self.eps = problem.optimizer == "adam", problem.momentum, problem.eps

    def init(self, theta: Tensors) -> Tensors:
        """Zeros."""
        kinds = ("mean", "square") if self.adam else ("buffer",) if self.momentum else ()
        state = {f"{kind}.{name}": torch.zeros_like(p) for kind in kinds for name, p in theta.items()}
        return state | {"step": torch.zeros((), dtype=torch.float64)}

    def update(self, theta: Tensors, grads: Tensors, state: Tensors, lrs: Tensors) -> tuple[Tensors, Tensors]:
        """One step."""
        new_theta, new = {}, {"step": state["step"] + 1}
        bias1, bias2 = (1 - beta ** new["step"].item() for beta in (0.9, 0.999))
        for name, p in theta.items():
            direction = grads[name]
            if self.adam:
                mean = new[f"mean.{name}"] = 0.9 * state[f"mean.{name}"] + 0.1 * direction
                square = 0.999 * state[f"square.{name}"] + 0.001 * direction * direction
                new[f"square.{name}"] = square
                direction = (mean / bias1) / ((square / bias2).sqrt() + self.eps)
            elif self.momentum:
                direction = self.momentum * state[f"buffer.{name}"] + direction
                new[f"buffer.{name}"] = direction
            new_theta[name] = p - lrs[name] * direction
        return new_theta, new


def with_theta(net: nn.Module, theta: Tensors) -> Net:
    """The network at other parameters."""
    return lambda *inputs: functional_call(net, theta, inputs)


def over_windows(
    problem: TorchProblem,
    net: nn.Module,
    init: Callable[[Tensors], Any],
    run: Callable[[Tensors, Any, Tensors], tuple[Tensors, Any]],
    detached: Callable[[Any], Any],
) -> dict[str, np.ndarray]:
    """The meta-gradient over all windows, where ``run`` does the inner steps of one."""
    theta, state, total = problem.theta, init(problem.theta), 0.0
    for steps, outer in problem.windows:
        if not problem.online:
            theta, state = problem.theta, init(problem.theta)
        theta, state = run(theta, state, steps)
        loss = problem.outer_loss(with_theta(net, theta), outer)
        loss.backward()
        total += loss.item()
        if problem.online:
            theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
            state = detached(state)
    return problem.collect(total, problem.theta)


def eager_tape(numbers: Problem, dtype: torch.dtype = torch.float32) -> Gradient:
    """Plain eager PyTorch: gradients with create_graph, everything on autograd's tape."""
    problem, optimizer = TorchProblem(numbers, dtype), ByHand(numbers)
    net = problem.network()

    def run(theta: Tensors, state: Tensors, steps: Tensors) -> tuple[Tensors, Tensors]:
        lrs = problem.lrs(problem.meta)
        for batch in batches(steps):
            loss = problem.inner_loss(with_theta(net, theta), problem.meta, batch)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta, state = optimizer.update(theta, dict(zip(theta, grads)), state, lrs)
        return theta, state

    detach = lambda state: {name: t.detach() for name, t in state.items()}
    return partial(over_windows, problem, net, optimizer.init, run, detach)


def torch_func(numbers: Problem, segments: str) -> Gradient:
    """torch.func.grad inside torch.utils.checkpoint.

    Args:
        numbers: the problem.
        segments: "step" for a checkpoint in each step, "sqrt" for one in about √T steps.
    """
    problem, optimizer = TorchProblem(numbers), ByHand(numbers)
    net = problem.network()
    length = 1 if segments == "step" else math.isqrt(numbers.horizon)

    def segment(names: tuple[list[str], ...], steps: Tensors, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = iter(tensors)
        theta, state, meta = ({name: next(values) for name in part} for part in names)
        lrs = problem.lrs(meta)
        for batch in batches(steps):
            loss = lambda theta, batch=batch: problem.inner_loss(with_theta(net, theta), meta, batch)
            theta, state = optimizer.update(theta, grad(loss)(theta), state, lrs)
        return *(theta[name] for name in names[0]), *(state[name] for name in names[1])

    def run(theta: Tensors, state: Tensors, steps: Tensors) -> tuple[Tensors, Tensors]:
        names = list(theta), list(state), list(problem.meta)
        for begin in range(0, numbers.horizon, length):
            part = {key: a[begin : begin + length] for key, a in steps.items()}
            inputs = *theta.values(), *state.values(), *problem.meta.values()
            # Reentrant, since torch.func.grad refuses the saved-tensor hooks of the other kind.
            tensors = checkpoint(segment, names, part, *inputs, use_reentrant=True, preserve_rng_state=False)
            values = iter(tensors)
            theta, state = ({name: next(values) for name in part} for part in names[:2])
        return theta, state

    detach = lambda state: {name: t.detach() for name, t in state.items()}
    return partial(over_windows, problem, net, optimizer.init, run, detach)


def torchopt(numbers: Problem) -> Gradient:
    """TorchOpt's functional optimizers on a tape; the learning rate of a layer scales their updates."""
    import torchopt

    problem = TorchProblem(numbers)
    net = problem.network()
    if numbers.optimizer == "adam":
        optimizer = torchopt.adam(lr=1.0, eps=numbers.eps)
    else:
        optimizer = torchopt.sgd(lr=1.0, momentum=numbers.momentum)

    def run(theta: Tensors, state: Any, steps: Tensors) -> tuple[Tensors, Any]:
        lrs = problem.lrs(problem.meta)
        for batch in batches(steps):
            loss = problem.inner_loss(with_theta(net, theta), problem.meta, batch)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            updates, state = optimizer.update(dict(zip(theta, grads)), state, params=theta, inplace=False)
            theta = {name: p + lrs[name] * updates[name] for name, p in theta.items()}
        return theta, state

    def detached(state: Any) -> Any:
        torchopt.stop_gradient(state)
        return state

    return partial(over_windows, problem, net, optimizer.init, run, detached)


def higher(numbers: Problem) -> Gradient:
    """higher's patched module and differentiable torch.optim optimizers."""
    import higher

    problem = TorchProblem(numbers)
    net = problem.network()
    params = dict(net.named_parameters())

    def gradient() -> dict[str, np.ndarray]:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(problem.theta[name])
        groups = [{"params": list(layer.parameters())} for layer in net.children() if [*layer.parameters()]]
        if numbers.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(groups, lr=1.0)
        else:
            optimizer = torch.optim.SGD(groups, lr=1.0, momentum=numbers.momentum)
        total, count = 0.0, 0
        for steps, outer in problem.windows:
            override = {"lr": problem.layer_lrs()}
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False, override=override) as (
                patched,
                inner,
            ):
                for batch in batches(steps):
                    count += 1
                    # higher adds ε before the second moment's bias is corrected: as torch.optim.Adam did in 2020.
                    eps = numbers.eps * (1 - 0.999**count) ** 0.5
                    inner.step(
                        problem.inner_loss(patched, problem.meta, batch),
                        override={"eps": [eps]} if numbers.optimizer == "adam" else None,
                    )
                loss = problem.outer_loss(patched, outer)
                loss.backward()
            total += loss.item()
            if problem.online:
                carry_on(optimizer, patched, inner)
            else:
                count = 0
        return problem.collect(total, params)

    def carry_on(optimizer: torch.optim.Optimizer, patched: Any, inner: Any) -> None:
        """Parameters and optimizer state back to where the next window begins."""
        with torch.no_grad():
            for p, last in zip(net.parameters(), patched.parameters()):
                p.copy_(last)
                p.grad = None
        for group, states in zip(optimizer.param_groups, inner.state):
            for i, p in enumerate(group["params"]):
                optimizer.state[p] = {
                    key: v.detach() if isinstance(v, Tensor) else v for key, v in states[i].items()
                }

    return gradient


# -- the lower bound --------------------------------------------------------------------------------------------------

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}


class Products(TorchDispatchMode):
    """Counts matrix products and convolutions by operator, shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        if func.overloadpacket.__name__ in _PRODUCTS:
            self.found[func, tuple(_described(a) for a in args)] += 1
        return func(*args, **(kwargs or {}))


def products(numbers: Problem) -> Gradient:
    """Nothing but the matrix products and convolutions of the eager tape, on made-up matrices of the same shapes."""
    with Products() as counted:
        result = eager_tape(numbers)()
    calls = []
    for (func, described), count in counted.found.items():
        args = [_made(a) for a in described]
        if func.overloadpacket.__name__ in ("addmm", "baddbmm"):  # no bias
            func, args = torch.ops.aten.mm if args[1].dim() == 2 else torch.ops.aten.bmm, args[1:3]
        calls.append((func, args, count))

    def gradient() -> dict[str, np.ndarray]:
        with torch.no_grad():
            for func, args, count in calls:
                for _ in range(count):
                    func(*args)
        return result

    return gradient


def _described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Tensor, tuple(argument.shape), argument.stride(), argument.dtype, argument.device
    return tuple(argument) if isinstance(argument, list) else argument


def _made(described: Any) -> Any:
    if isinstance(described, tuple) and described and described[0] is Tensor:
        return torch.empty_strided(*described[1:3], dtype=described[3], device=described[4]).normal_()
    return list(described) if isinstance(described, tuple) else described
