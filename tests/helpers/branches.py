"""Inner loops that go back to where they were: written once, run by a window and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim
from forms import leaf

torch.manual_seed(5)
X, Y = torch.randn(6, 3), torch.randn(6, 2)


class Remembering(nn.Module):
    """A network with a buffer that changes in each call, and ``carries`` a gradient to the next."""

    def __init__(self, carries: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.carries = carries
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("trace", torch.full((4,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x) + 0.5 * self.trace)
        if self.training:
            self.trace = 0.7 * self.trace + (h if self.carries else h.detach()).mean(0)
        return self.head(h)


def metas() -> dict[str, Tensor]:
    return {"lr": leaf(0.2), "shift": leaf([0.3, -0.4]), "momentum": leaf(0.6)}


class ByHand:
    """The loop by `functional_call` and `create_graph=True`."""

    def __init__(self, net: nn.Module, m: dict[str, Tensor], optimizer: str, offline: bool) -> None:
        self.net, self.m = net, m
        cls = getattr(metaoptim, optimizer)
        own = {k: p if offline else p.detach().requires_grad_() for k, p in net.named_parameters()}
        self.theta = {k: p * 1.0 for k, p in own.items()}
        self.buffers = {k: b.clone() for k, b in net.named_buffers()}
        self.update, self.hyper = cls.update, cls([nn.Linear(1, 1)], **hyper(optimizer, m)).defaults
        self.state = {k: cls.init_state(p.detach(), self.hyper) for k, p in self.theta.items()}

    def loss(self, target: Tensor) -> Tensor:
        return F.mse_loss(functional_call(self.net, {**self.theta, **self.buffers}, (X,)), target)

    def step(self, target: Tensor) -> None:
        tensors = {**self.theta, **self.buffers}
        loss = F.mse_loss(functional_call(self.net, tensors, (X,)), target)
        self.buffers = {k: tensors[k] for k in self.buffers}  # as the call has left them
        grads = torch.autograd.grad(loss, list(self.theta.values()), create_graph=True)
        for (k, p), g in zip(list(self.theta.items()), grads, strict=True):
            self.theta[k], self.state[k] = self.update(p, g, self.state[k], self.hyper)

    def extract(self, of: str = "net inner", by: str = "reference") -> Any:
        detach: Callable[[Tensor], Tensor] = (lambda t: t.detach()) if by == "detached" else (lambda t: t)
        found = {}
        if "net" in of:
            found["theta"] = {k: detach(p) for k, p in self.theta.items()}
            found["buffers"] = {k: detach(b) for k, b in self.buffers.items()}
        if "inner" in of:
            found["state"] = {k: {n: detach(v) for n, v in s.items()} for k, s in self.state.items()}
        return found

    def recover(self, state: Any) -> None:
        if "theta" in state:
            self.theta = {
                k: p * 1.0 if p.requires_grad else p.clone().requires_grad_()
                for k, p in state["theta"].items()
            }
            self.buffers = dict(state["buffers"])
        if "state" in state:
            self.state = {k: dict(s) for k, s in state["state"].items()}

    def stop(self, of: str = "net inner") -> None:
        self.recover(self.extract(of, "detached"))


class ByWindow:
    """The same loop in the window that is open."""

    def __init__(self, net: nn.Module, m: dict[str, Tensor], optimizer: str) -> None:
        self.net, self.inner = net, getattr(metaoptim, optimizer)([net], **hyper(optimizer, m))

    def loss(self, target: Tensor) -> Tensor:
        trace, self.net.training = self.net.trace, True  # as by hand: an outer loss leaves no trace
        loss = F.mse_loss(self.net(X), target)
        self.net.trace = trace
        return loss

    def step(self, target: Tensor) -> None:
        self.inner.step(F.mse_loss(self.net(X), target))

    def _of(self, of: str) -> list[Any]:
        return [{"net": self.net, "inner": self.inner}[name] for name in of.split()]

    def extract(self, of: str = "net inner", by: str = "reference") -> Any:
        return metaoptim.extract_state(*self._of(of), by=by)

    def recover(self, state: Any) -> None:
        metaoptim.recover_state(state)

    def stop(self, of: str = "net inner") -> None:
        metaoptim.stop_gradient(*self._of(of))


def hyper(optimizer: str, m: dict[str, Tensor]) -> dict[str, Any]:
    if optimizer == "MetaSGD":
        return {"lr": m["lr"], "momentum": m["momentum"]}
    return {"lr": m["lr"] * 0.2, "betas": (m["momentum"], 0.9)}


Loop = Callable[[Any, dict[str, Tensor]], Tensor]
Gradients = dict[str, Tensor | None]


def by_hand(loop: Loop, optimizer: str, offline: bool, carries: bool = True) -> Gradients:
    net, m = Remembering(carries), metas()
    loop(ByHand(net, m, optimizer, offline), m).backward()
    return {k: p.grad for k, p in (*net.named_parameters(), *m.items())}


def by_window(
    loop: Loop, optimizer: str, offline: bool, *, carries: bool = True, compiles: bool = False, **window: Any
) -> Gradients:
    """``compiles``: each step is a compiled one."""
    net, m = Remembering(carries), metas()
    it: Any = ByWindow(net, m, optimizer)
    if compiles:
        it.step = metaoptim.compile(it.step, backend="eager")
    with metaoptim.SlidingWindow(offline=offline, **window):
        total = loop(it, m)
    total.backward()
    return {k: p.grad for k, p in (*net.named_parameters(), *m.items())}


def compiled(loop: Loop, optimizer: str, offline: bool, **options: Any) -> Gradients:
    net, m = Remembering(), metas()

    @metaoptim.compile(**{"backend": "eager", **options})
    def whole(net: nn.Module, m: dict[str, Tensor]) -> Tensor:
        with metaoptim.SlidingWindow(offline=offline):
            return loop(ByWindow(net, m, optimizer), m)

    whole(net, m).backward()
    return {k: p.grad for k, p in (*net.named_parameters(), *m.items())}


# -- loops -----------------------------------------------------------------------------------------------------------


def two_branches(by: str, of: str = "net inner") -> Loop:
    """From theta_2 on in two ways, each with its own outer loss, and one before them."""

    def loop(it: Any, m: dict[str, Tensor]) -> Tensor:
        it.step(Y)
        it.step(Y + m["shift"])
        there = it.extract(of, by)
        total = it.loss(Y * 0.5)
        for k in (1.0, 2.0, 3.0):
            it.recover(there)
            it.step(Y * k)
            if k == 2.0:
                it.step(m["shift"].exp() + Y)
            total = total + k * it.loss(Y - k)
        return total

    return loop


def from_the_start(by: str) -> Loop:
    """Back to theta_0, where optimizers have no state."""

    def loop(it: Any, m: dict[str, Tensor]) -> Tensor:
        start = it.extract(by=by)
        it.step(Y + m["shift"])
        total = it.loss(Y)
        it.recover(start)
        it.step(Y * 2)
        it.step(Y * 2 + m["shift"])
        return total + it.loss(Y * 0.1)

    return loop


def nested(it: Any, m: dict[str, Tensor]) -> Tensor:
    """Back within a branch, then further back, by turns."""
    it.step(Y)
    one = it.extract()
    it.step(Y + m["shift"])
    two = it.extract(by="copy")
    it.step(Y * 2)
    it.recover(one)
    it.step(Y - m["shift"])
    total = it.loss(Y)
    it.recover(two)
    three = it.extract()
    it.step(Y * 3)
    total = total + it.loss(Y * 2)
    it.recover(three)
    it.step(Y * 0.3)
    it.recover(one)
    return total + 2 * it.loss(Y + 1)


def stopped(of: str) -> Loop:
    """Cut off in the middle, with losses before it, there, and after it."""

    def loop(it: Any, m: dict[str, Tensor]) -> Tensor:
        it.step(Y + m["shift"])
        it.step(Y)
        total = it.loss(Y)
        it.stop(of)
        total = total + it.loss(Y * 3)
        it.step(Y * 2)
        it.step(Y)
        return total + 2 * it.loss(Y * 0.5)

    return loop


LOOPS = {
    **{f"branches-{by}": two_branches(by) for by in ("reference", "copy", "detached")},
    "branches-net": two_branches("reference", "net"),
    "branches-inner": two_branches("reference", "inner"),
    "branches-inner-detached": two_branches("detached", "inner"),
    **{f"start-{by}": from_the_start(by) for by in ("reference", "detached")},
    "nested": nested,
    **{f"stop-{of}": stopped(of) for of in ("net inner", "net", "inner")},
}
