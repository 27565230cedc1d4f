"""When a compiled function compiles again, and that its results are right in either case."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from oracle import agree

full_tape = functools.partial(metaoptim.SlidingWindow, strategy="full_tape")
X, Y = torch.linspace(-1, 1, 15).view(5, 3), torch.linspace(0, 1, 10).view(5, 2)
GLOBAL = torch.tensor(0.3, requires_grad=True)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))


def leaf(value: float = 0.5) -> Tensor:
    return torch.tensor(value, requires_grad=True)


class World:
    """A function, and everything it depends on as attributes that tests change."""

    def __init__(self) -> None:
        self.net = mlp().eval()
        self.inner = metaoptim.MetaSGD([self.net], lr=0.1, momentum=0.5)
        self.x, self.y, self.w = X.clone(), Y.clone(), leaf()
        self.scale: Any = 1.5
        self.extra: Any = {"a": [leaf(0.2), 2.0]}
        self.programs = 0
        self.offline = True
        bound = leaf(0.7)

        def of(
            window: Any, net: Any, inner: Any, x: Tensor, y: Tensor, w: Tensor, scale: Any, extra: Any
        ) -> Any:
            with window(offline=self.offline):
                for _ in range(2):
                    loss = F.mse_loss(net(x), y) * w * bound + extra["a"][0] * extra["a"][1]
                    inner.step(loss * scale * GLOBAL)
                return F.mse_loss(net(x).square(), y)

        def rebind(value: Tensor) -> None:
            nonlocal bound
            bound = value

        self.of, self.rebind = of, rebind
        self.bound: Callable[[], Tensor] = lambda: bound
        self.compiled = metaoptim.compile(of, backend="eager")

    def _arguments(self) -> tuple:
        return self.net, self.inner, self.x, self.y, self.w, self.scale, self.extra

    def _leaves(self) -> list[Tensor]:
        found = [self.w, self.bound(), GLOBAL, self.x, self.y, *self.net.parameters()]
        return [t for t in found if t.requires_grad]

    def check(self, recompiles: bool) -> None:
        """Equal to the tape, with one more program or none."""
        torch.manual_seed(3)
        expected = torch.autograd.grad(
            self.of(full_tape, *self._arguments()), self._leaves(), allow_unused=True
        )
        torch.manual_seed(3)
        loss = self.compiled(metaoptim.SlidingWindow, *self._arguments())
        got = torch.autograd.grad(loss, self._leaves(), allow_unused=True)
        rtol = 1e-9 if loss.dtype is torch.float64 else 1e-4
        agree(dict(enumerate(got)), dict(enumerate(expected)), rtol=rtol)  # type: ignore[arg-type]
        programs = sum(map(len, self.compiled._specializations.known.values()))
        assert programs == self.programs + recompiles, f"{programs} programs, had {self.programs}"
        self.programs = programs


def _new_values(w: World) -> None:
    with torch.no_grad():
        for t in (w.x, w.y, w.w, w.bound(), *w.net.parameters()):
            t.add_(0.1)


def _other_tensors(w: World) -> None:
    w.x, w.y, w.w = w.x + 0.1, w.y * 1.1, leaf(0.8)


def _rebound(w: World) -> None:
    w.rebind(leaf(0.9))


def _global_rebound(w: World) -> None:
    global GLOBAL
    GLOBAL = leaf(0.4)


def _equal_number(w: World) -> None:
    w.scale = float("1.5")


def _equal_containers(w: World) -> None:
    w.extra = {"a": [leaf(0.3), 2.0]}


def _parameter_replaced(w: World) -> None:
    w.net[0] = nn.Linear(3, 4)  # modules are known by identity of the whole
    w.inner = metaoptim.MetaSGD([w.net], lr=0.1, momentum=0.5)


SAME = [_new_values, _other_tensors, _rebound, _global_rebound, _equal_number, _equal_containers]


@pytest.mark.parametrize("change", SAME)
def test_no_recompilation(change: Callable) -> None:
    world = World()
    world.check(recompiles=True)
    world.check(recompiles=False)
    change(world)
    world.check(recompiles=False)


def _shape(w: World) -> None:
    w.x, w.y = torch.cat([w.x, w.x + 1]), torch.cat([w.y, w.y + 1])


def _stride(w: World) -> None:
    w.x = w.x.t().contiguous().t()


def _dtype(w: World) -> None:
    w.net.float()
    w.x, w.y = w.x.float(), w.y.float()


def _requires_grad(w: World) -> None:
    w.x.requires_grad_()


def _grad_no_more(w: World) -> None:
    w.w = torch.tensor(0.5)


def _bound_needs_no_grad(w: World) -> None:
    w.rebind(torch.tensor(0.9))


def _training(w: World) -> None:
    w.net.train()


def _one_module_trains(w: World) -> None:
    w.net[2].train()


def _learning_rate(w: World) -> None:
    w.inner.param_groups[0]["lr"] = 0.2


def _learning_rate_a_tensor(w: World) -> None:
    w.inner.param_groups[0]["lr"] = torch.tensor(0.2)


def _clipping(w: World) -> None:
    w.inner.reset_grad_normalizer(0.01)


def _first_order(w: World) -> None:
    w.inner.first_order = True


def _number(w: World) -> None:
    w.scale = 2.5


def _integer(w: World) -> None:
    w.scale = 2


def _truth(w: World) -> None:
    w.scale = True


def _tensor_for_number(w: World) -> None:
    w.scale = torch.tensor(2.5)


def _number_in_a_dict(w: World) -> None:
    w.extra["a"][1] = 3.0


def _another_network(w: World) -> None:
    w.net = mlp(1).eval()
    w.inner = metaoptim.MetaSGD([w.net], lr=0.1, momentum=0.5)


def _another_optimizer(w: World) -> None:
    w.inner = metaoptim.MetaAdam([w.net], lr=0.1)


def _frozen(w: World) -> None:
    w.net[0].weight.requires_grad_(False)
    w.inner = metaoptim.MetaSGD([w.net], lr=0.1, momentum=0.5)


def _hook(w: World) -> None:
    w.net[0].weight.register_hook(lambda g: g * 0.5)


def _another_activation(w: World) -> None:
    w.net[1] = nn.Sigmoid()


def _option_of_a_module(w: World) -> None:
    w.net[2] = nn.Dropout(0.3)  # eval


def _module_hook(w: World) -> None:
    w.net[0].register_forward_hook(lambda module, args, out: 2 * out)


def _module_pre_hook(w: World) -> None:
    w.net[3].register_forward_pre_hook(lambda module, args: (0.5 * args[0],))


def _forward_replaced(w: World) -> None:
    w.net[1].forward = torch.sin


def _same_tensor_twice(w: World) -> None:
    w.rebind(w.w)


DIFFERENT = [
    _shape,
    _stride,
    _dtype,
    _requires_grad,
    _grad_no_more,
    _bound_needs_no_grad,
    _training,
    _one_module_trains,
    _learning_rate,
    _learning_rate_a_tensor,
    _clipping,
    _first_order,
    _number,
    _integer,
    _truth,
    _tensor_for_number,
    _number_in_a_dict,
    _another_network,
    _another_optimizer,
    _frozen,
    _hook,
    _another_activation,
    _option_of_a_module,
    _module_hook,
    _module_pre_hook,
    _forward_replaced,
    _same_tensor_twice,
    _parameter_replaced,
]


@pytest.mark.parametrize("change", DIFFERENT)
def test_recompilation(change: Callable) -> None:
    world = World()
    world.check(recompiles=True)
    change(world)
    world.check(recompiles=True)
    world.check(recompiles=False)


def test_earlier_programs_serve_again() -> None:
    world = World()
    world.check(recompiles=True)
    for scale, recompiles in ((2.0, True), (1.5, False), (2.0, False), (-0.0, True), (0.0, True)):
        world.scale = scale
        world.check(recompiles)


def test_parameters_rebound_outside() -> None:
    """Other parameters of the same kind in the same module: the same program, their values, their gradients."""
    net, w = mlp().eval(), leaf()

    def of(window: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with window(offline=True):
            inner.step(F.mse_loss(net(X), Y) * w)
            return F.mse_loss(net(X), Y)

    f = metaoptim.compile(of, backend="eager")
    for _ in range(2):
        leaves = [w, *net.parameters()]
        expected = torch.autograd.grad(of(full_tape), leaves)
        got = torch.autograd.grad(f(metaoptim.SlidingWindow), leaves)
        agree(dict(enumerate(got)), dict(enumerate(expected)))  # type: ignore[arg-type]
        net[0].weight = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))
    assert len(f._specializations.known) == 1


@pytest.mark.parametrize("optimizer", [metaoptim.MetaAdam, metaoptim.MetaRMSprop])
def test_state_from_call_to_call(optimizer: Any) -> None:
    """Online, with an optimizer from outside: no state, then a state, then the same kind of state."""
    found = []
    for window in (full_tape, metaoptim.SlidingWindow):
        net, w = mlp().eval(), leaf()
        inner = optimizer([net], lr=0.02)

        def of(window: Any, net: Any = net, w: Tensor = w, inner: Any = inner) -> Tensor:
            with window():
                inner.step(F.mse_loss(net(X), Y) * w)
                return F.mse_loss(net(X), Y)

        f = of if window is full_tape else metaoptim.compile(of, backend="eager")
        values: list[Tensor] = []
        for _ in range(4):
            values += torch.autograd.grad(f(window), w)
        values += [v for p in net.parameters() for v in (p.detach(), *inner.state[p].values())]
        found.append(dict(enumerate(values)))
    agree(found[1], found[0], rtol=1e-9)  # type: ignore[arg-type]
    assert sum(map(len, f._specializations.known.values())) == 2


def test_another_object_at_the_same_address() -> None:
    """Ids are given again when objects die; programs know theirs."""
    w, losses = leaf(), []

    def of(window: Any, net: Any) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with window(offline=True):
            inner.step(F.mse_loss(net(X), Y) * w)
            return F.mse_loss(net(X), Y)

    f = metaoptim.compile(of, backend="eager")
    for seed in range(4):
        net = mlp(seed).eval()
        expected = torch.autograd.grad(of(full_tape, net), w)
        agree({"w": torch.autograd.grad(f(metaoptim.SlidingWindow, net), w)[0]}, {"w": expected[0]})
        losses.append(expected[0])
        del net
        gc.collect()
    assert len({float(v) for v in losses}) == 4


def test_optimizers_made_inside_end_with_the_call() -> None:
    """They do not make their networks inner in later windows."""
    net, other, w = mlp().eval(), mlp(1).eval(), leaf()

    def of() -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.9)
        with metaoptim.SlidingWindow():
            inner.step(F.mse_loss(net(X), Y) * w)
            return F.mse_loss(net(X), Y)

    metaoptim.compile(of, backend="eager")()
    outside = metaoptim.MetaSGD([other], lr=0.1)
    with metaoptim.SlidingWindow():
        outside.step(F.mse_loss(other(X), net(X)))
        F.mse_loss(other(X), Y).backward()
    assert net[0].weight.grad is not None and float(net[0].weight.grad.abs().max()) > 1e-6


class _Annealed(nn.Module):
    """Has a temperature, and counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.temperature, self.runs, self._cache = nn.Linear(3, 2), 1.5, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.linear(x) / self.temperature


@pytest.mark.parametrize("form", ["B", "C"])
def test_plain_attributes_of_modules(form: str) -> None:
    """Those that the function reads are guarded; those it writes itself make nothing compile anew."""
    torch.manual_seed(0)
    net, w = _Annealed(), leaf()
    inner = metaoptim.MetaSGD([net], lr=0.1)

    def step() -> None:
        inner.step(F.mse_loss(net(X), Y) * w)

    def of(take: Callable, window: Any) -> Tensor:
        with window(offline=True):
            for _ in range(3):
                take()
            return F.mse_loss(net(X), Y)

    taken = metaoptim.compile(step, backend="eager")
    whole = metaoptim.compile(of, backend="eager")
    compiled = taken if form == "B" else whole
    for temperature, programs in ((1.5, 1), (1.5, 1), (0.7, 2), (0.7, 2), (1.5, 2)):
        net.temperature = temperature
        (expected,) = torch.autograd.grad(of(step, full_tape), w)
        loss = of(taken, metaoptim.SlidingWindow) if form == "B" else whole(step, metaoptim.SlidingWindow)
        torch.testing.assert_close(torch.autograd.grad(loss, w)[0], expected, rtol=1e-9, atol=1e-12)
        assert sum(map(len, compiled._specializations.known.values())) == programs


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_while_a_function_is_captured(enabled: bool) -> None:
    """And is as before afterwards, also where the capture fails."""
    seen = []

    @metaoptim.compile(backend="eager")
    def loss(net: Any, x: Tensor, fails: bool) -> Tensor:
        seen.append(gc.isenabled())
        if fails:
            raise KeyError("mine")
        return net(x).square().mean()

    net, x = mlp(), torch.ones(5, 3)
    try:
        if not enabled:
            gc.disable()
        loss(net, x, False)
        assert gc.isenabled() is enabled
        with pytest.raises(KeyError, match="mine"):
            loss(net, x, True)
        assert gc.isenabled() is enabled and seen == [False, False]
    finally:
        gc.enable()
