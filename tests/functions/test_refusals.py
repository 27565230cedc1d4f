"""What a compiled function refuses: with the user's line, a way out, and everything left as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import metaoptim
from metaoptim.errors import CaptureError, LossError, MetaOptimError, WindowError
from oracle import agree

X, Y = torch.linspace(-1, 1, 15).view(5, 3), torch.ones(5, 2)
BODIES: dict[str, tuple[Callable, type[Exception], str]] = {}


class World:
    """What a function may touch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.log_lr = torch.tensor(-2.0, requires_grad=True)
        self.inner = metaoptim.MetaAdam([self.net], lr=0.05)
        with metaoptim.SlidingWindow():
            self.inner.step(F.mse_loss(self.net(X), Y))  # it has a state
        self.outer = torch.optim.Adam([self.log_lr], lr=0.1)
        self.data = X.clone()
        self.alias = self.data[1:]
        self.net[0].weight.grad = torch.ones(4, 3)

    def loss(self) -> Tensor:
        return F.mse_loss(self.net(X), Y) * self.log_lr.exp()

    def snapshot(self) -> list[Tensor]:
        tensors = [*self.net.parameters(), *self.net.buffers(), self.log_lr, self.data]
        tensors += [v for s in self.inner.state.values() for v in s.values()]
        tensors += [p.grad for p in self.net.parameters() if p.grad is not None]
        return [t.detach().clone() for t in tensors]

    def identities(self) -> list[int]:
        return [id(t) for t in (*self.net.parameters(), *self.net.buffers())]


def refused(match: str, error: type[Exception] = CaptureError) -> Callable:
    """A body ``(world, loss, h)``, called in the middle of a window; the message it must raise."""

    def add(body: Callable) -> Callable:
        BODIES[body.__name__] = (body, error, match)
        return body

    return add


@refused("a value is needed")
def item(w: World, loss: Tensor, h: Tensor) -> Any:
    return loss.item()


@refused("a value is needed")
def condition(w: World, loss: Tensor, h: Tensor) -> Any:
    return 1.0 if loss > 0.5 else 2.0


@refused("a value is needed")
def float_of_a_tensor(w: World, loss: Tensor, h: Tensor) -> Any:
    return float(h.mean())


@refused("a value is needed")
def int_of_an_argument(w: World, loss: Tensor, h: Tensor) -> Any:
    return int(w.data[0, 0])


@refused("a value is needed")
def comparison_of_tensors(w: World, loss: Tensor, h: Tensor) -> Any:
    return 1.0 if torch.equal(h, h + 1) else 2.0


@refused("a value is needed")
def allclose(w: World, loss: Tensor, h: Tensor) -> Any:
    return 1.0 if torch.allclose(h, h + 1) else 2.0


@refused("Python or numpy values")
def numpy_of_a_tensor(w: World, loss: Tensor, h: Tensor) -> Any:
    return h.detach().numpy().sum()


@refused("Python or numpy values")
def array_of_an_argument(w: World, loss: Tensor, h: Tensor) -> Any:
    return np.asarray(w.data).sum()


@refused("a value is needed|Python or numpy values")
def tolist(w: World, loss: Tensor, h: Tensor) -> Any:
    return sum(h.detach().flatten().tolist())


@refused("shape depends on values")
def boolean_mask(w: World, loss: Tensor, h: Tensor) -> Any:
    return h[h > 0].sum()


@refused("shape depends on values")
def nonzero(w: World, loss: Tensor, h: Tensor) -> Any:
    return h[torch.nonzero(h[:, 0] > 0)[:, 0]].sum()


@refused("changed in place")
def argument_given_a_history(w: World, loss: Tensor, h: Tensor) -> Any:
    w.data.mul_(h.sum())


@refused("shares memory with one .* changed in place")
def argument_changed_and_read_as_another(w: World, loss: Tensor, h: Tensor) -> Any:
    w.data.mul_(2.0)
    return w.alias.sum()


@refused("changed in place")
def argument_changed_after_a_view_of_it_was_read(w: World, loss: Tensor, h: Tensor) -> Any:
    before = w.alias.sum()
    w.data.mul_(2.0)
    return before


@refused("changed in place")
def leaf_changed(w: World, loss: Tensor, h: Tensor) -> Any:
    with torch.no_grad():
        w.log_lr.add_(1.0)


@refused("changed in place")
def grad_clipped(w: World, loss: Tensor, h: Tensor) -> Any:
    w.net[0].weight.grad = None  # of what the window shows
    w.outer.param_groups[0]["params"][0].data.clamp_(-1, 1)


@refused(r"outer optimizer's step\(\)")
def outer_step(w: World, loss: Tensor, h: Tensor) -> Any:
    w.outer.step()


@refused(r"backward\(\) inside a compiled function")
def backward(w: World, loss: Tensor, h: Tensor) -> Any:
    h.square().sum().backward(retain_graph=True)


@refused(r"backward\(\) inside a compiled function")
def backward_by_function(w: World, loss: Tensor, h: Tensor) -> Any:
    torch.autograd.backward(h.sum(), retain_graph=True)


@refused(r"zero_grad\(\) inside a compiled function")
def zero_grad_of_the_outer(w: World, loss: Tensor, h: Tensor) -> Any:
    w.outer.zero_grad()


@refused(r"zero_grad\(\) inside a compiled function")
def zero_grad_of_the_inner(w: World, loss: Tensor, h: Tensor) -> Any:
    w.inner.zero_grad()


@refused(r"zero_grad\(\) inside a compiled function")
def zero_grad_of_the_network(w: World, loss: Tensor, h: Tensor) -> Any:
    w.net.zero_grad()


@refused("random numbers of Python")
def python_random(w: World, loss: Tensor, h: Tensor) -> Any:
    return random.random()


@refused("random numbers of numpy")
def numpy_random(w: World, loss: Tensor, h: Tensor) -> Any:
    return float(np.random.rand())


@refused("seeded or set")
def seeded(w: World, loss: Tensor, h: Tensor) -> Any:
    torch.manual_seed(0)


@refused("seeded or set")
def random_state_set(w: World, loss: Tensor, h: Tensor) -> Any:
    torch.set_rng_state(torch.get_rng_state())


@refused("generator of its own")
def own_generator(w: World, loss: Tensor, h: Tensor) -> Any:
    return torch.rand((), generator=GENERATOR)


@refused("given as `out`")
def drawn_into_a_tensor(w: World, loss: Tensor, h: Tensor) -> Any:
    return torch.rand(3, out=torch.empty(3)).sum()


@refused("draws random numbers on cpu and on cuda:0")
def drawn_on_two_devices(w: World, loss: Tensor, h: Tensor) -> Any:
    return torch.rand(3).sum() * torch.rand(3, device="cuda").sum().cpu()


@refused("depends on a tensor")
def integers_below_a_tensor(w: World, loss: Tensor, h: Tensor) -> Any:
    return torch.randint_like(h, torch.tensor(5)).mean()


@refused("depends on a tensor")
def poisson(w: World, loss: Tensor, h: Tensor) -> Any:
    return torch.poisson(h.detach().exp()).mean()


@refused(r"tensor\.data = ")
def data_of_an_activation(w: World, loss: Tensor, h: Tensor) -> Any:
    h.data = h.data * 2


@refused(r"tensor\.data = ")
def data_of_a_parameter(w: World, loss: Tensor, h: Tensor) -> Any:
    w.net[0].weight.data = torch.zeros(4, 3)


@refused(r"tensor\.data = ")
def data_of_an_argument(w: World, loss: Tensor, h: Tensor) -> Any:
    w.data.data = torch.zeros(5, 3)


@refused("a hook closes over a tensor")
def hook_with_a_tensor(w: World, loss: Tensor, h: Tensor) -> Any:
    scale = w.log_lr.exp()
    h.register_hook(lambda g: g * scale)


@refused("the compiled function was given")
def hook_on_an_argument(w: World, loss: Tensor, h: Tensor) -> Any:
    w.log_lr.register_hook(lambda g: g * 2)


@refused("a hook on an autograd node")
def hook_on_a_node(w: World, loss: Tensor, h: Tensor) -> Any:
    h.grad_fn.register_hook(lambda into, out: tuple(None if g is None else 2 * g for g in into))


@refused("after an inner step")
def hook_after_the_step(w: World, loss: Tensor, h: Tensor) -> Any:
    w.inner.step(loss)
    h.register_hook(lambda g: g * 2)


@refused("bound to another tensor", WindowError)
def parameter_rebound(w: World, loss: Tensor, h: Tensor) -> Any:
    w.net[0].weight = nn.Parameter(torch.zeros(4, 3))


@refused("grad mode on|leaf Variable", Exception)
def parameter_changed_with_grad(w: World, loss: Tensor, h: Tensor) -> Any:
    w.net[0].weight.mul_(2)


@refused("no graph", LossError)
def loss_without_a_graph(w: World, loss: Tensor, h: Tensor) -> Any:
    w.inner.step(loss.detach())


@refused("does not depend on", LossError)
def loss_of_something_else(w: World, loss: Tensor, h: Tensor) -> Any:
    w.inner.step(w.log_lr.exp())


@refused("needs an ordinary window|error_if_nonfinite")
def norm_that_must_be_finite(w: World, loss: Tensor, h: Tensor) -> Any:
    w.inner.reset_grad_normalizer(1.0, error_if_nonfinite=True)
    w.inner.step(loss)


@refused("division by zero", ZeroDivisionError)
def error_of_the_user(w: World, loss: Tensor, h: Tensor) -> Any:
    return 1 / 0


GENERATOR = torch.Generator()


def run(w: World, body: Callable, offline: bool) -> Callable:
    def of() -> Tensor:
        with metaoptim.SlidingWindow(offline=offline):
            w.inner.step(w.loss())
            h = w.net(X).exp()
            loss = h.mean() * w.log_lr.exp()
            scale = body(w, loss, h)
            w.inner.step(loss * 2.0 if scale is None else loss * scale)
            return w.loss() + h.sum()

    return of


@pytest.mark.parametrize("name", BODIES)
def test_refused(name: str) -> None:
    body, error, match = BODIES[name]
    world = World()
    before, objects, groups = world.snapshot(), world.identities(), dict(world.inner.param_groups[0])
    stack = _get_current_dispatch_mode_stack()
    for offline in (True, False):
        f = metaoptim.compile(run(world, body, offline), backend="eager")
        with pytest.raises(error, match=match) as caught:
            f()
        if issubclass(error, MetaOptimError):
            assert f"at {__file__}:" in str(caught.value)
            line = int(str(caught.value).rsplit(":", 1)[1])
            spans = [range(b.__code__.co_firstlineno, b.__code__.co_firstlineno + 12) for b in (body, run)]
            assert any(line in span for span in spans), line
        # everything is as before: values, objects, settings, modes
        after = world.snapshot()
        assert len(after) == len(before) and all(map(torch.equal, after, before))
        assert world.identities() == objects
        assert dict(world.inner.param_groups[0]) == groups and world.inner._normalizer is None
        assert _get_current_dispatch_mode_stack() == stack
        assert metaoptim.runtime.windows.session.current_session() is None
        assert "symbolic" not in repr(world.data) and world.data.sum().item() == X.sum().item()
    _windows_work(world)


def _windows_work(world: World) -> None:
    """An ordinary window, and a compiled function, give the tape's numbers."""
    leaves = [world.log_lr, *world.net.parameters()]

    def of(window: Any) -> Tensor:
        with window(offline=True):
            world.inner.step(world.loss())
            return F.mse_loss(world.net(X), Y)

    expected = torch.autograd.grad(of(lambda **k: metaoptim.SlidingWindow(strategy="full_tape", **k)), leaves)
    assert float(expected[0].abs()) > 1e-9
    ordinary = torch.autograd.grad(of(metaoptim.SlidingWindow), leaves)
    compiled = torch.autograd.grad(metaoptim.compile(of, backend="eager")(metaoptim.SlidingWindow), leaves)
    agree(dict(enumerate(ordinary)), dict(enumerate(expected)), rtol=1e-8)  # type: ignore[arg-type]
    agree(dict(enumerate(compiled)), dict(enumerate(expected)), rtol=1e-8)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"record_grad_tape": True}, {"pickup_step": 0}])
def test_options_of_ordinary_windows(options: dict) -> None:
    world = World()

    def of() -> Tensor:
        with metaoptim.SlidingWindow(**options):
            world.inner.step(world.loss())
            return world.loss()

    with pytest.raises(CaptureError, match="need an ordinary window") as caught:
        metaoptim.compile(of, backend="eager")()
    assert f"at {__file__}:" in str(caught.value)
    _windows_work(world)


def test_full_tape() -> None:
    world = World()

    def of() -> Tensor:
        with metaoptim.SlidingWindow(strategy="full_tape"):
            world.inner.step(world.loss())
            return world.loss()

    with pytest.raises(WindowError, match="take the decorator off"):
        metaoptim.compile(of, backend="eager")()
    _windows_work(world)


def test_printing(capsys: pytest.CaptureFixture) -> None:
    """A symbolic tensor prints as one; outside, and afterwards, tensors print their values."""
    world = World()

    def of() -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            loss = world.loss()
            print(loss, f"{loss:.3f} {loss} {world.data!r}", str(world.net[0].weight))
            world.inner.step(loss)
            return world.loss()

    f = metaoptim.compile(of, backend="eager")
    f()
    printed = capsys.readouterr().out
    assert printed.count("<symbolic float64[]>") == 3
    assert printed.count("<symbolic float64[5, 3]>") == 1 and printed.count("<symbolic float64[4, 3]>") == 1
    f()
    assert capsys.readouterr().out == ""  # captured once
    assert f"{torch.tensor(0.25):.3f} {torch.tensor(0.25)}" == "0.250 0.25"


def test_tensors_that_escape() -> None:
    """A symbolic tensor kept from the capture is named for what it is in the next call."""
    world, kept = World(), []

    def of() -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            loss = world.loss()
            kept.append(loss)
            world.inner.step(loss)
            return world.loss()

    f = metaoptim.compile(of, backend="eager")
    f()
    with pytest.raises(CaptureError, match="symbolic tensor"):
        f()


def test_a_compiled_window_inside_a_window() -> None:
    world = World()

    def whole() -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            world.inner.step(world.loss())
            return world.loss()

    f = metaoptim.compile(whole, backend="eager")
    with metaoptim.SlidingWindow(offline=True):
        with pytest.raises(WindowError, match="inside a window"):
            f()


def test_third_order() -> None:
    world = World()

    def of() -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            world.inner.step(world.loss())
            return world.loss()

    loss = metaoptim.compile(of, backend="eager")()
    with pytest.raises(MetaOptimError, match="create_graph=True"):
        torch.autograd.grad(loss, world.log_lr, create_graph=True)


def test_overwritten_before_backward() -> None:
    """Parameters are copied, data is watched."""
    world = World()

    def of(x: Tensor) -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            world.inner.step(F.mse_loss(world.net(x), Y) * world.log_lr.exp())
            return F.mse_loss(world.net(x), Y)

    f = metaoptim.compile(of, backend="eager")
    x = X.clone()
    (expected,) = torch.autograd.grad(f(x), world.log_lr)
    loss = f(x)
    with torch.no_grad():
        for p in (*world.net.parameters(), world.log_lr):
            p.add_(1.0)
    agree({"lr": torch.autograd.grad(loss, world.log_lr, retain_graph=True)[0]}, {"lr": expected})
    x.zero_()
    with pytest.raises(metaoptim.StaleInputError, match="was overwritten after the step had read it"):
        torch.autograd.grad(loss, world.log_lr)


def test_inner_steps_without_influence_are_told() -> None:
    """An outer loss after the block of an offline window: the loop would vanish without a word."""
    net = nn.Linear(3, 1)

    @metaoptim.compile(backend="eager")
    def meta_loss(net: nn.Module, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net])
        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                inner.step(net(x).square().mean())
        return net(xs[0]).square().mean()

    with pytest.warns(metaoptim.UnreachableWarning, match="its 4 inner steps, which are not run"):
        meta_loss(net, torch.ones(4, 2, 3))
