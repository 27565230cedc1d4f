"""Mistakes with windows, inner losses and meta-parameters."""

from __future__ import annotations

import torch
from torch import nn

from metaoptim import (
    Implicit,
    LossError,
    MetaSGD,
    SlidingWindow,
    UnreachableWarning,
    WindowError,
    extract_state,
    recover_state,
)
from wrong_uses import X, loss_of, network, rate, wrong

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


@wrong(UnreachableWarning, "SGD.step", "'0.weight'", "no gradient", "Implicit", "pull towards them")
def implicit_without_a_pull() -> None:
    net = network()
    outer = torch.optim.SGD(net.parameters(), lr=0.1)
    inner = MetaSGD([net], lr=0.1)
    with SlidingWindow(offline=True, gradient=Implicit("neumann", tolerance=1.0)):
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


@wrong(WindowError, "recover_state", "extracted by reference in a window", "by='detached'")
def adapted_network_kept_by_reference() -> None:
    net = network()
    inner = MetaSGD([net], lr=0.1)
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))
        adapted = extract_state(net, inner)
    recover_state(adapted)


@wrong(WindowError, "extract_state", "no inner optimizer", "Linear")
def state_of_a_network_that_nobody_trains() -> None:
    net = network()
    inner = MetaSGD([net], lr=0.1)
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))
        extract_state(nn.Linear(2, 2), inner)


@wrong(WindowError, "MetaSGD.step", "outside a window", "with metaoptim.SlidingWindow")
def step_outside() -> None:
    net = network()
    MetaSGD([net]).step(loss_of(net))


@wrong(WindowError, "slots=2 of a window inside another", "the outer window")
def window_with_slots_in_a_window() -> None:
    with SlidingWindow(), SlidingWindow(slots=2):
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


@wrong(UserWarning, "loss.backward() at", "wrong_windows.py:", ".grad", "MetaSGD.step(loss)", "Take that")
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


@wrong(WindowError, "clip_grad_norm_", "never there", "transforms = [metaoptim.transforms.clip_global_norm(")
def clipping_inner_gradients() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        loss = loss_of(net)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        inner.step(loss)


@wrong(WindowError, "clip_grad_value_", "never there", "transforms = [metaoptim.transforms.clip_value(")
def clipping_values_of_inner_gradients() -> None:
    net = network()
    inner = MetaSGD([net])
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))
        torch.nn.utils.clip_grad_value_(net.parameters(), 1.0)


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
