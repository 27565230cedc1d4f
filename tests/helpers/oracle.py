"""The oracle: inner loops by `functional_call` with explicit theta, `create_graph=True`, and no window.

A `Problem` is written once, against a small interface, and run twice: by the oracle here, by a window in `run_window`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim


@dataclass
class Problem:
    """An inner loop.

    Attributes:
        build: () -> network.
        metas: name -> initial value of the meta-parameters.
        hyper: metas -> keyword arguments of the optimizer (computed from other graphs, outside the loop).
        loss: (net, t, metas, carried) -> inner loss of step t; ``carried`` is a dict that survives steps.
        outer: (net, metas) -> outer loss at the end.
        per_step: (net, t, metas) -> a term of the outer loss read at theta_t, or None.
        steps, offline, window, optimizer: the grid.
    """

    build: Callable[[], nn.Module]
    optimizer: str | type
    steps: int
    offline: bool
    loss: Callable[[Any, int, dict[str, Tensor], dict], Tensor]
    outer: Callable[[Any, dict[str, Tensor]], Tensor]
    hyper: Callable[[dict[str, Tensor]], dict[str, Any]]
    metas: dict[str, Tensor] = field(default_factory=dict)
    window: int | None = None
    per_step: Callable[[Any, int, dict[str, Tensor]], Tensor] | None = None
    allow_unused: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def optimizer_class(self) -> Any:
        return getattr(metaoptim, self.optimizer) if isinstance(self.optimizer, str) else self.optimizer


def leaves(metas: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fresh leaves of the meta-parameters."""
    return {k: v.detach().clone().requires_grad_() for k, v in metas.items()}


def run_window(problem: Problem, **window: Any) -> dict[str, Tensor | None]:
    """The gradients a metaoptim window gives."""
    torch.manual_seed(3)
    net = problem.build()
    metas = leaves(problem.metas)
    inner = problem.optimizer_class([net], **problem.hyper(metas), **problem.options)
    carried: dict[str, Any] = {}
    total: Any = 0.0
    torch.manual_seed(11)
    with metaoptim.SlidingWindow(offline=problem.offline, window=problem.window, **window):
        for t in range(problem.steps):
            if problem.per_step is not None:
                total = total + problem.per_step(net, t, metas)
            inner.step(problem.loss(net, t, metas, carried), allow_unused=problem.allow_unused)
        total = total + problem.outer(net, metas)
    if total.requires_grad:
        total.backward()
    return {**{n: p.grad for n, p in net.named_parameters()}, **{k: v.grad for k, v in metas.items()}}


class _Shown:
    """A network with explicit parameters: what `functional_call` makes of it, as a callable."""

    def __init__(self, net: nn.Module, theta: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        self._net, self._theta, self._buffers = net, theta, buffers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._net, {**self._theta, **self._buffers}, args, kwargs)

    def named_parameters(self) -> Any:
        return iter(self._theta.items())

    def parameters(self) -> Any:
        return iter(self._theta.values())


def run_oracle(problem: Problem) -> dict[str, Tensor | None]:
    """The same gradients from the full tape; with ``window``, from one truncated tape per outer term."""
    torch.manual_seed(3)
    net = problem.build()
    metas = leaves(problem.metas)
    terms = outer_terms(problem, net, metas)
    total: Any = sum(terms) if terms else 0.0
    inputs = {**dict(net.named_parameters()), **metas}
    if not isinstance(total, Tensor) or not total.requires_grad:
        return dict.fromkeys(inputs)
    grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return dict(zip(inputs, grads, strict=True))


def outer_terms(problem: Problem, net: nn.Module, metas: dict[str, Tensor]) -> list[Tensor]:
    """Terms of the outer loss, each with the history it may see."""
    # The random stream is that of one pass over the loop: every pass replays it.
    tape = _Tape(problem, net, metas)
    terms: list[Tensor] = []
    for t in range(problem.steps) if problem.per_step is not None else ():
        shown = tape.read(t)
        torch.set_rng_state(tape.rng[t])
        terms.append(problem.per_step(shown, t, metas))
    shown = tape.read(problem.steps)
    torch.set_rng_state(tape.rng[problem.steps])
    return [*terms, problem.outer(shown, metas)]


class _Tape:
    """Values of every theta_t, and theta_t with the last W steps (or all) as its history."""

    def __init__(self, problem: Problem, net: nn.Module, metas: dict[str, Tensor]) -> None:
        self.problem, self.net, self.metas = problem, net, metas
        self.update = problem.optimizer_class.update
        self.init = problem.optimizer_class.init_state
        self.hyper = {
            **problem.optimizer_class([nn.Linear(1, 1)]).defaults,
            **problem.hyper(metas),
            **problem.options,
        }
        self.rng: dict[Any, Tensor] = {}
        self.states: list[tuple[dict, dict, dict]] = []  # theta, optimizer state, buffers: with whole history
        torch.manual_seed(11)
        ordinary = (
            problem.offline or not problem.steps
        )  # no optimizer steps: the network is one like any other
        theta = {
            n: (p * 1.0 if ordinary else p.detach().clone().requires_grad_())
            for n, p in net.named_parameters()
        }
        buffers = {n: b.detach().clone() for n, b in net.named_buffers()}
        opt: dict[str, dict[str, Tensor]] = {}
        self.carried: dict[str, Any] = {}
        self.states.append((theta, opt, buffers))
        for t in range(problem.steps):
            self.rng[t] = torch.get_rng_state()
            if problem.per_step is not None:
                problem.per_step(_Shown(net, theta, {n: b.clone() for n, b in buffers.items()}), t, metas)
            self.rng["step", t] = torch.get_rng_state()
            theta, opt, buffers = self.step(t, theta, opt, buffers, self.carried)
            self.states.append((theta, opt, buffers))
        self.rng[problem.steps] = torch.get_rng_state()

    def step(self, t: int, theta: dict, opt: dict, buffers: dict, carried: dict) -> tuple[dict, dict, dict]:
        torch.set_rng_state(self.rng["step", t])
        buffers = {n: b.clone() for n, b in buffers.items()}
        loss = self.problem.loss(_Shown(self.net, theta, buffers), t, self.metas, carried)
        grads = torch.autograd.grad(
            loss, list(theta.values()), create_graph=True, allow_unused=self.problem.allow_unused
        )
        new_theta, new_opt = {}, {}
        for (n, p), g in zip(theta.items(), grads, strict=True):
            if g is None:
                new_theta[n], new_opt[n] = p, opt.get(n, {})
                continue
            state = opt.get(n) or self.init(p, self.hyper)
            new_theta[n], new_opt[n] = self.update(p, g, state, self.hyper)
        return new_theta, new_opt, buffers

    def read(self, t: int) -> _Shown:
        theta, _, buffers = self.states[t]
        window = self.problem.window
        if window is None or window >= t:
            return _Shown(self.net, theta, {n: b.clone() for n, b in buffers.items()})
        theta, opt, buffers = self.states[t - window]
        theta = {n: v.detach().requires_grad_() for n, v in theta.items()}
        opt = {n: {k: v.detach() for k, v in s.items()} for n, s in opt.items()}
        for s in range(t - window, t):
            theta, opt, buffers = self.step(s, theta, opt, buffers, dict(self.carried))
        return _Shown(self.net, theta, {n: b.clone() for n, b in buffers.items()})


def agree(got: dict[str, Tensor | None], expected: dict[str, Tensor | None], rtol: float = 1e-10) -> None:
    """Equal, where None and all zeros are the same."""
    assert got.keys() == expected.keys()
    scale = max([float(v.abs().max()) for v in expected.values() if v is not None and v.numel()], default=0.0)
    for name, e in expected.items():
        g = got[name]
        if e is None and g is None:
            continue
        e = torch.zeros_like(g) if e is None else e
        g = torch.zeros_like(e) if g is None else g
        worst = float((g - e).abs().max()) if e.numel() else 0.0
        size = float(e.abs().max()) if e.numel() else 0.0
        assert worst <= rtol * size + rtol * 1e-3 * scale, (
            f"{name}: off by {worst:.3g}, largest entry {size:.3g}"
        )
