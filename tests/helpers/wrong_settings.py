"""Mistakes with optimizers, networks, budgets, compiled functions and optimizers of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import metaoptim
from metaoptim import LossError, MetaAdam, MetaSGD, SlidingWindow, UnreachableWarning, WindowError
from wrong_uses import X, loss_of, network, rate, wrong

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


@wrong(TypeError, "param_groups[0]['lr'] is '0.1'", "expected a number, a tensor or a schedule")
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
