"""Ordinary mistakes, each with what its user is told: what failed, what was got, what was expected, what to do."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from metaoptim import LossError, MetaAdam, MetaSGD, SlidingWindow, UnreachableWarning, WindowError

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(net: nn.Module, x: Tensor = X) -> Tensor:
    return net(x).square().mean()


def rate() -> Tensor:
    return torch.tensor(-2.0, requires_grad=True)


Wrong = tuple[Callable[[], Any], type, str]
USES: list[Any] = []


def wrong(kind: type, *parts: str) -> Callable:
    """The decorated function is a wrong use; its user gets ``kind``, with a text that holds ``parts`` in order."""

    def note(use: Callable[[], Any]) -> Callable[[], Any]:
        USES.append(pytest.param(use, kind, parts, id=use.__name__))
        return use

    return note


@pytest.mark.parametrize(("use", "kind", "parts"), USES)
def test_wrong_use(use: Callable[[], Any], kind: type, parts: tuple[str, ...]) -> None:
    raised: list[Exception] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            use()
        except Exception as error:
            raised.append(error)
    lines, first = inspect.getsourcelines(use)
    if issubclass(kind, Warning):
        assert not raised, raised
        texts = [str(w.message) for w in told if w.category is kind]
        assert len(texts) == 1, [str(w.message) for w in told]
        (found,) = [w for w in told if w.category is kind]
        assert found.filename == __file__ and first <= found.lineno < first + len(lines)
        text = texts[0]
    else:
        (error,) = raised
        assert type(error) is kind, repr(error)
        text = str(error)
        if isinstance(error, metaoptim.MetaOptimError):
            at = re.search(re.escape(__file__) + r":(\d+)", text)
            assert at is not None and first <= int(at[1]) < first + len(lines), text
    where = 0
    for part in parts:
        at_part = text.find(part, where)
        assert at_part >= 0, f"{part!r} is not in {text!r}, or not there"
        where = at_part + len(part)


@pytest.mark.parametrize("first", ["before", "grad"])
def test_a_loss_of_the_block_may_wait_for_another(first: str) -> None:
    """A loss of the network as it is has its backward first; or another one later, after `torch.autograd.grad`."""
    net = network()
    inner, own = MetaSGD([net], lr=0.1), list(net.parameters())
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))
        adapted = loss_of(net)
    if first == "grad":
        assert all(g is not None for g in torch.autograd.grad(adapted, own))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(net).backward()


def test_there_are_forty() -> None:
    assert len(USES) >= 40


# -- which window, and where the outer loss is ------------------------------------------------------------------------


@wrong(UnreachableWarning, "Adam.step", "'0.weight'", "no gradient", "online", "offline=True")
def offline_forgotten() -> None:
    net, log_lr = network(), rate()
    outer = torch.optim.Adam([*net.parameters(), log_lr])
    inner = MetaSGD([net], lr=log_lr.exp())
    with SlidingWindow():
        for _ in range(2):
            inner.step(loss_of(net))
        loss_of(net).backward()
    outer.step()


@wrong(UnreachableWarning, "'0.weight'", "window has ended", "inside the window's block")
def outer_loss_after_an_offline_block() -> None:
    net = network()
    inner = MetaSGD([net], lr=0.1)
    with SlidingWindow(offline=True):
        for _ in range(2):
            inner.step(loss_of(net))
    loss_of(net).backward()


@wrong(UnreachableWarning, "cut off from its history", "inside the window's block")
def outer_loss_after_an_online_block() -> None:
    net, log_lr = network(), rate()
    inner = MetaSGD([net], lr=log_lr.exp())
    with SlidingWindow():
        for _ in range(2):
            inner.step(loss_of(net))
    loss_of(net).backward()


@wrong(UserWarning, "SGD.step", "'0.weight'", "no inner optimizer has stepped", "inner.step(loss)")
def torch_optimizer_steps_instead() -> None:
    net = network()
    inner, other = MetaSGD([net]), torch.optim.SGD(net.parameters(), lr=0.1)
    with SlidingWindow(offline=True):
        loss_of(net).backward()
        other.step()
    del inner


@wrong(WindowError, "MetaSGD.step", "outside a window", "with metaoptim.SlidingWindow")
def step_outside() -> None:
    net = network()
    MetaSGD([net]).step(loss_of(net))


@wrong(WindowError, "window was opened inside a window", "several optimizers")
def window_in_a_window() -> None:
    with SlidingWindow(), SlidingWindow():
        pass


@wrong(WindowError, "Adam was built inside a window", "before the block")
def outer_optimizer_built_inside() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))
        torch.optim.Adam(net.parameters())


@wrong(WindowError, "pickup_step=1", "offline=True", "offline=False")
def pickup_offline() -> None:
    SlidingWindow(offline=True, pickup_step=1)


# -- the loss ---------------------------------------------------------------------------------------------------------


@wrong(LossError, "MetaSGD.step", "no loss", "MetaSGD.step(loss)", "loss.backward()")
def torchs_habit() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        loss_of(net).backward()
        inner.step()


@wrong(LossError, "freed by a backward", "inner.step(loss)", "Take loss.backward()")
def backward_and_then_step() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        loss = loss_of(net)
        loss.backward()
        inner.step(loss)


@wrong(UserWarning, "loss.backward() at", "test_wrong_uses.py:", ".grad", "MetaSGD.step(loss)", "Take that")
def inner_gradients_in_grad() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        loss = loss_of(net)
        loss.backward(retain_graph=True)
        inner.step(loss)
        loss_of(net).backward()


@wrong(LossError, "left over from before a step", "inside the block")
def loss_of_long_ago() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        loss = loss_of(net)
        for _ in range(4):
            inner.step(loss_of(net))
        inner.step(loss)


@wrong(LossError, "not computed inside this window", "inside the block")
def loss_from_before_the_block() -> None:
    net = network()
    inner, loss = MetaSGD([net]), loss_of(net)
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))
        inner.step(loss)


@wrong(LossError, "got a loss of shape (5, 2)", "expected a scalar", ".mean()")
def loss_per_example() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow():
        inner.step(net(X).square())


@wrong(LossError, "has no graph", "torch.no_grad()")
def loss_without_a_graph() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(), torch.no_grad():
        inner.step(loss_of(net))


@wrong(LossError, "got float", "expected the inner loss as a tensor")
def loss_as_a_number() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow():
        inner.step(float(loss_of(net).detach()))  # type: ignore[arg-type]


@wrong(LossError, "got function", "closure=")
def closure_as_a_loss() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow():
        inner.step(lambda: loss_of(net))  # type: ignore[arg-type]


@wrong(LossError, "does not depend on the parameters")
def loss_of_another_network() -> None:
    net, other = network(), network()
    inner = MetaSGD([net])
    with SlidingWindow():
        inner.step(loss_of(other))


@wrong(LossError, "'2.weight'", "allow_unused=True")
def part_of_the_network_unused() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow():
        inner.step(net[0](X).square().mean())


@wrong(UserWarning, "MetaSGD.step 1 (counted from 0)", "nan", "check_finite=True")
def loss_that_is_nan() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))
        inner.step((net(X).sum() - 1e9).log())


@wrong(LossError, "MetaSGD.step 1 (counted from 0)", "nan", "expected a finite number", "learning rate")
def loss_that_is_nan_where_it_is_checked() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True, check_finite=True):
        inner.step(loss_of(net))
        inner.step((net(X).sum() - 1e9).log())


@wrong(UserWarning, "no longer finite after inner step 2", "check_finite=True")
def parameters_that_overflow() -> None:
    net = network()
    inner = MetaSGD([net], lr=0.1)
    with SlidingWindow():
        for t in range(3):
            root = (0 * net(X).sum()).abs().sqrt()  # 0, with a gradient that is not a number
            inner.step(loss_of(net) + (root if t == 2 else 0.0))


@wrong(UserWarning, "clipped at", "test_wrong_uses.py:", "reset_grad_normalizer")
def clipping_inner_gradients() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        loss = loss_of(net)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        inner.step(loss)
        loss_of(net).backward()


# -- meta-parameters --------------------------------------------------------------------------------------------------


@wrong(UnreachableWarning, "SGD.step: 'log_lr' has no gradient", ".detach()", "Hand the tensor itself on")
def learning_rate_detached() -> None:
    net, log_lr = network(), rate()
    outer = torch.optim.SGD([*net.parameters(), log_lr], lr=0.1)
    inner = MetaSGD([net], lr=log_lr.exp().detach())
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))
        loss_of(net).backward()
    outer.step()


@wrong(UnreachableWarning, "SGD.step: 'log_weight' has no gradient", "float()")
def loss_weight_as_a_number() -> None:
    net, log_weight = network(), rate()
    outer = torch.optim.SGD([*net.parameters(), log_weight], lr=0.1)
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        inner.step(loss_of(net) * log_weight.exp().item())
        loss_of(net).backward()
    outer.step()


@wrong(
    UnreachableWarning, "Adam.step: none of its 2 parameters", "shape (1, 1)", "has a gradient", ".detach()"
)
def weights_of_a_network_detached() -> None:
    net, weigh = network(), nn.Linear(1, 1)
    outer = torch.optim.Adam(weigh.parameters())
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        loss = loss_of(net)
        inner.step(loss * weigh(loss.detach().view(1, 1)).sum().detach())
        loss_of(net).backward()
    outer.step()


@wrong(UnreachableWarning, "'weight' requires grad", "no_grad")
def loss_weight_under_no_grad() -> None:
    net, weight = network(), rate()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        with torch.no_grad():
            scale = weight.exp()
        inner.step(loss_of(net) * scale)
        loss_of(net).backward()


# -- optimizers and networks ------------------------------------------------------------------------------------------


@wrong(TypeError, "MetaSGD", "'wd'", "expected some of 'lr'", "did you mean 'weight_decay'")
def option_misspelt() -> None:
    MetaSGD([{"params": network(), "wd": 0.1}])


@wrong(TypeError, "'learning_rate'", "did you mean 'lr'")
def option_of_another_library() -> None:
    MetaAdam([{"params": network(), "learning_rate": 0.1}])


@wrong(TypeError, "MetaSGD", "'learning_rate'", "expected some of 'lr'", "did you mean 'lr'")
def option_misspelt_afterwards() -> None:
    net, log_lr = network(), rate()
    inner = MetaSGD([net])
    with SlidingWindow():
        inner.param_groups[0]["learning_rate"] = log_lr.exp()
        inner.step(loss_of(net))


@wrong(TypeError, "param_groups[0]['lr'] is '0.1'", "expected a number or a tensor")
def learning_rate_as_text() -> None:
    net = network()
    inner = MetaSGD([net])
    inner.param_groups[0]["lr"] = "0.1"
    with SlidingWindow():
        inner.step(loss_of(net))


@wrong(ValueError, "lr: got -0.1", "not negative")
def negative_learning_rate() -> None:
    MetaSGD([network()], lr=-0.1)


@wrong(TypeError, "expected networks", "MetaSGD([net])")
def parameters_for_networks() -> None:
    MetaSGD(network().parameters())


@wrong(ValueError, "expected networks, as in MetaSGD([net])")
def no_networks() -> None:
    MetaSGD([])


@wrong(ValueError, "'0.weight' is in more than one place")
def network_twice() -> None:
    net = network()
    MetaSGD([net, net])


@wrong(LossError, "none of its networks' parameters requires grad", "requires_grad_(True)")
def frozen_network() -> None:
    net, weight = network().requires_grad_(False), rate()
    inner = MetaSGD([net])
    with SlidingWindow():
        inner.step(loss_of(net) * weight)


@wrong(LossError, "none of its networks' parameters requires grad", "requires_grad_(True)")
def frozen_network_on_plain_data() -> None:
    net = network().requires_grad_(False)
    inner = MetaSGD([net])
    with SlidingWindow():
        inner.step(loss_of(net))


@wrong(WindowError, "'2.weight'", "inside the window", "before the window")
def layer_replaced_inside() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow():
        inner.step(loss_of(net))
        net[2] = nn.Linear(4, 2)
        inner.step(loss_of(net))


@wrong(WindowError, "net.to(...)", "torch.float32", "outside the window")
def network_moved_inside() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow():
        inner.step(loss_of(net))
        net.to(torch.float32)


@wrong(TypeError, "cannot be copied or pickled", "state_dict()")
def optimizer_copied() -> None:
    import copy

    copy.deepcopy(MetaSGD([network()]))


# -- budgets and compiled functions -----------------------------------------------------------------------------------


@wrong(metaoptim.BudgetError, "2000 bytes", "too small at inner step", "smallest feasible budget so far is")
def budget_too_small() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True, memory_budget=2000):
        for _ in range(5):
            inner.step(loss_of(net))


@wrong(ValueError, "memory_budget: got '12 parsecs'", "such as '512MiB'")
def budget_without_a_unit() -> None:
    SlidingWindow(memory_budget="12 parsecs")


@wrong(ValueError, "memory_budget=1000 with slots=2", "give one of the two")
def budget_and_slots() -> None:
    SlidingWindow(memory_budget=1000, slots=2)


@wrong(ValueError, "backend: got 'indutcor'", "expected one of")
def backend_misspelt() -> None:
    SlidingWindow(backend="indutcor")


@wrong(TypeError, "compile: got str", "expected a function", "backend='eager'")
def backend_for_the_function() -> None:
    metaoptim.compile("eager")  # type: ignore[arg-type]


@wrong(metaoptim.CaptureError, "a DataLoader", "window.scan", "ordinary window")
def loader_in_a_compiled_function() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=5)

    @metaoptim.compile(backend="eager")
    def meta_loss(net: nn.Module) -> Tensor:
        inner = MetaSGD([net])
        with SlidingWindow(offline=True):
            for (x,) in loader:
                inner.step(loss_of(net, x))
            return loss_of(net)

    meta_loss(network())


@wrong(WindowError, "check_finite=True", "in a compiled function", "take the decorator off")
def check_finite_in_a_compiled_function() -> None:
    net = network()

    @metaoptim.compile(backend="eager")
    def meta_loss(net: nn.Module) -> Tensor:
        inner = MetaSGD([net])
        with SlidingWindow(offline=True, check_finite=True):
            inner.step(loss_of(net))
            return loss_of(net)

    meta_loss(net)


@wrong(metaoptim.CaptureError, "value is needed while the function is captured", "torch.where")
def value_in_a_compiled_function() -> None:
    @metaoptim.compile(backend="eager")
    def meta_loss(net: nn.Module) -> Tensor:
        inner = MetaSGD([net])
        with SlidingWindow(offline=True):
            loss = loss_of(net)
            if loss > 1:
                loss = loss / 2
            inner.step(loss)
            return loss_of(net)

    meta_loss(network())


@wrong(UnreachableWarning, "inner step", "computed inside the window's block")
def outer_loss_after_the_block_of_a_compiled_function() -> None:
    @metaoptim.compile(backend="eager")
    def meta_loss(net: nn.Module) -> Tensor:
        inner = MetaSGD([net])
        with SlidingWindow(offline=True):
            inner.step(loss_of(net))
        return loss_of(net)

    meta_loss(network()).backward()


# -- containers, and optimizers of one's own ---------------------------------------------------------------------------


@wrong(TypeError, "window.scan: got list", "window.scan(xs, ys)", "torch.stack")
def list_for_a_scan() -> None:
    with SlidingWindow() as window:
        list(window.scan([X, X], X))  # type: ignore[arg-type]


@wrong(TypeError, "MetaSGD.start: got list", "name of a parameter")
def list_for_a_start() -> None:
    inner = MetaSGD([network()])
    with SlidingWindow():
        inner.start([X])  # type: ignore[arg-type]


class Own(metaoptim.MetaOptimizer):
    def __init__(self, networks: list[nn.Module], lr: Any = 0.1) -> None:
        super().__init__(networks, dict(lr=lr))

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    @staticmethod
    def update(param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]) -> Any:
        return param - hyper["lr"] * grad, state


def step_by(kind: Callable[..., Any], **options: Any) -> None:
    net = network()
    inner = kind([net], **options)
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))


@wrong(TypeError, "Method.update: got a method", "@staticmethod")
def update_with_self() -> None:
    class Method(Own):
        def update(self, param: Tensor, grad: Tensor, state: Any, hyper: Any) -> Any:  # type: ignore[override]
            return param, state


@wrong(TypeError, "Half states no init_state", "write it")
def optimizer_without_init_state() -> None:
    class Half(metaoptim.MetaOptimizer):
        update = staticmethod(Own.update)

    Half([network()], {})


@wrong(
    TypeError, "Counter.init_state: got {'count': 0}", "expected a dictionary of tensors", "torch.zeros(())"
)
def state_that_is_a_number() -> None:
    class Counter(Own):
        @staticmethod
        def init_state(param: Tensor, hyper: dict[str, Any]) -> Any:
            return {"count": 0}

    step_by(Counter)


@wrong(TypeError, "Single.update: got a tensor of shape (4, 3)", "expected two results")
def update_without_state() -> None:
    class Single(Own):
        @staticmethod
        def update(param: Tensor, grad: Tensor, state: Any, hyper: Any) -> Any:
            return param - grad

    step_by(Single)


@wrong(WindowError, "MetaSGD.update: a parameter of shape (4,)", "of shape (4, 4)", "lr (4, 1)")
def rate_that_makes_parameters_grow() -> None:
    """Weights of a layer take a rate for each row; its biases would become a matrix."""
    step_by(MetaSGD)
    net = network()
    inner = MetaSGD([net[0]], lr=torch.full((4, 1), 0.1))
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))


@wrong(ValueError, "max_norm: got a tensor of shape (3,)", "expected one number")
def norm_for_each_column() -> None:
    MetaSGD([network()]).reset_grad_normalizer(torch.ones(3))
