"""Bad input: a message that names the thing and the fix, and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim

X, Y = (
    torch.randn(6, 3, generator=torch.Generator().manual_seed(1)),
    torch.randn(6, 2, generator=torch.Generator().manual_seed(2)),
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def unchanged(
    net: nn.Module, inner: Any, act: Callable[[], None], error: type[Exception], match: str, **options: Any
) -> str:
    """``act`` inside a window raises, and everything is as at entry."""
    net.zero_grad()
    F.mse_loss(net(X), Y).backward()
    own, before = list(net.parameters()), copy.deepcopy(net.state_dict())
    grads, state = (
        [p.grad.clone() for p in own if p.grad is not None],
        copy.deepcopy(inner.state_dict()["state"]),
    )
    with pytest.raises(error, match=match) as caught, metaoptim.SlidingWindow(**options):
        inner.step(F.mse_loss(net(X), Y), allow_unused=True)
        act()
    assert all(p is q for p, q in zip(net.parameters(), own, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(own, grads, strict=True))  # type: ignore[arg-type]
    now = inner.state_dict()["state"]
    assert now.keys() == state.keys()
    with metaoptim.SlidingWindow():  # and a new window opens as if nothing had been
        pass
    return str(caught.value)


def test_step_outside_a_window_names_the_line() -> None:
    inner = metaoptim.MetaSGD([network()])
    with pytest.raises(
        metaoptim.WindowError, match=r"outside a window.*SlidingWindow[\s\S]*test_bad_input.py:\d+"
    ):
        inner.step(torch.ones((), requires_grad=True))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda net: F.mse_loss(net(X), Y, reduction="none"), r"shape \(6, 2\), expected a scalar"),
        (lambda net: F.mse_loss(net(X), Y).detach(), "no graph"),
        (lambda net: F.mse_loss(net(X), Y).item(), "got float"),
        (lambda net: None, "got no loss"),
        (lambda net: (torch.ones(3, requires_grad=True) * 2).sum(), "does not depend on the parameters"),
        (
            lambda net: F.mse_loss(nn.Sequential(*list(net)[2:])(torch.ones(6, 4)), Y),
            "'0.weight', '0.bias'.*allow_unused",
        ),
    ],
    ids=["non-scalar", "graph-less", "number", "none", "independent", "unused"],
)
def test_losses(make: Callable, match: str) -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    unchanged(net, inner, lambda: inner.step(make(net)), metaoptim.LossError, match)


def test_loss_from_before_the_window() -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    loss = F.mse_loss(net(X), Y)
    with pytest.raises(metaoptim.LossError, match="inside"), metaoptim.SlidingWindow():
        inner.step(loss)


@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_rebound_parameter(strategy: str) -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])

    def act() -> None:
        net[0].weight = nn.Parameter(torch.ones(4, 3))
        inner.step(F.mse_loss(net(X), Y), allow_unused=True)

    unchanged(net, inner, act, metaoptim.WindowError, "'0.weight' was bound", strategy=strategy)
    with (
        pytest.raises(metaoptim.WindowError, match=r"'2\.bias' was bound"),
        metaoptim.SlidingWindow(strategy=strategy),
    ):
        inner.step(F.mse_loss(net(X), Y))
        net[2].bias = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("strategy", ["auto", "full_tape"])
def test_in_place_with_grad_mode(strategy: str) -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    unchanged(net, inner, lambda: net[0].weight.mul_(2), metaoptim.WindowError, "no_grad", strategy=strategy)


def test_constructors() -> None:
    net = network()
    for make, error, match in [
        (lambda: metaoptim.MetaSGD(net.parameters()), TypeError, r"MetaSGD\(\[net\]\)"),
        (lambda: metaoptim.MetaSGD([net, net]), ValueError, "more than one"),
        (lambda: metaoptim.MetaAdam([net, net[0]]), ValueError, "more than one"),
        (lambda: metaoptim.MetaSGD([net], lr=-0.1), ValueError, "lr: got -0.1"),
        (lambda: metaoptim.MetaAdam([net], betas=(1.0, 0.9)), ValueError, r"betas\[0\]"),
        (lambda: metaoptim.MetaRMSprop([net], eps=-1.0), ValueError, "eps"),
        (lambda: metaoptim.MetaSGD([net], nesterov=True), ValueError, "momentum"),
        (lambda: metaoptim.MetaSGD(None), ValueError, "got None, expected networks"),
        (lambda: metaoptim.MetaSGD([network()], lr="0.1"), TypeError, "lr: got '0.1', expected a number"),
        (lambda: metaoptim.MetaSGD([]), ValueError, r"got \[\], expected networks"),
        (
            lambda: metaoptim.SlidingWindow(offline=True, pickup_step=2),
            metaoptim.WindowError,
            "pickup_step=2",
        ),
        (lambda: metaoptim.SlidingWindow(strategy="tape"), ValueError, "'full_tape'"),
        (lambda: metaoptim.SlidingWindow(slots=0), ValueError, "slots: got 0"),
        (lambda: metaoptim.SlidingWindow(window=1.5), ValueError, "window: got 1.5"),  # type: ignore[arg-type]
        (lambda: metaoptim.SlidingWindow(strategy="full_tape", slots=2), ValueError, "full_tape"),
        (lambda: metaoptim.SlidingWindow(backward_hook=3), TypeError, "backward_hook"),  # type: ignore[arg-type]
        (
            lambda: metaoptim.MetaSGD([net]).load_state_dict(
                torch.optim.SGD(
                    [{"params": net[0].parameters()}, {"params": net[2].parameters()}]
                ).state_dict()
            ),
            ValueError,
            "different number",
        ),
    ]:
        with pytest.raises(error, match=match):
            make()


def test_pickup_step_that_never_came() -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    before = copy.deepcopy(net.state_dict())
    with (
        pytest.raises(metaoptim.WindowError, match="took only 1 steps"),
        metaoptim.SlidingWindow(pickup_step=3),
    ):
        inner.step(F.mse_loss(net(X), Y))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_non_finite_under_anomaly_mode() -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    with torch.autograd.set_detect_anomaly(True):
        unchanged(
            net, inner, lambda: inner.step(net(X).sum() / 0.0 * 0.0), metaoptim.LossError, "inner loss is nan"
        )
    inner.reset_grad_normalizer(1.0, error_if_nonfinite=True)
    unchanged(
        net, inner, lambda: inner.step(net(X).sum() * float("inf")), metaoptim.LossError, "error_if_nonfinite"
    )


def test_hyper_parameter_of_the_wrong_shape_names_the_update() -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])

    def act() -> None:
        inner.param_groups[0]["lr"] = torch.ones(7)
        inner.step(F.mse_loss(net(X), Y))

    unchanged(net, inner, act, metaoptim.WindowError, r"MetaSGD.update failed.*\(7,\)")


def test_function_in_place_of_the_loss() -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    unchanged(net, inner, lambda: inner.step(lambda: net(X).sum()), metaoptim.LossError, "closure=")


def test_hook_that_changes_its_gradient_in_place() -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])

    def act() -> None:
        h = net(X) * 1.0
        h.register_hook(lambda g: [g.mul_(2)].clear())
        inner.step(h.square().mean())

    unchanged(net, inner, act, metaoptim.CaptureError, "in place")


# -- inputs overwritten before their backward -------------------------------------------------------------------------


def _overwrite(how: str, t: Tensor) -> None:
    if how == "in-place":
        with torch.no_grad():
            t.add_(1.0)
    elif how == ".data":
        t.data.add_(1.0)
    elif how == "numpy":
        t.detach().numpy()[...] += 1.0
    elif how == "permuted":
        t.data.copy_(t.data.flip(0))
    elif how == "signs":
        t.detach().numpy()[...] *= -1.0  # changes one and the same bit everywhere
    elif how == "fused":
        t.grad = torch.ones_like(t)
        torch.optim.Adam([t], lr=0.5, fused=True).step()
        t.grad = None


@pytest.mark.parametrize("slots", [None, 1])
@pytest.mark.parametrize("when", ["before the step", "in the window", "after it"])
@pytest.mark.parametrize("how", ["in-place", ".data", "numpy", "permuted", "signs"])
def test_overwritten_data(how: str, when: str, slots: int | None) -> None:
    """Right where the window sees the operator that overwrites, stale where it cannot."""
    expected = None
    for interfere in (False, True):
        net, x = network(), X.clone()
        lr = torch.tensor(0.1, requires_grad=True)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(slots=slots):
            loss = net(x * 2.0).square().mean() + (net(X) + x[:, :2]).mean()
            if interfere and when == "before the step":
                _overwrite(how, x)
            inner.step(loss)
            inner.step(F.mse_loss(net(X), Y))
            outer = F.mse_loss(net(X), Y)
            if interfere and when == "in the window":
                _overwrite(how, x)
        if interfere and when == "after it":
            _overwrite(how, x)
        if interfere and (how in ("numpy", "signs") or when == "after it"):
            with pytest.raises(metaoptim.StaleInputError, match=r"test_bad_input.py:\d+: .*shape \(6, \d\)"):
                outer.backward()
            assert lr.grad is None
        else:
            outer.backward()
            expected = lr.grad if expected is None else expected
            torch.testing.assert_close(lr.grad, expected)


@pytest.mark.parametrize("slots", [None, 1])
@pytest.mark.parametrize("how", ["in-place", ".data", "numpy", "signs", "fused"])
def test_overwritten_meta_parameters_are_right_by_snapshot(how: str, slots: int | None) -> None:
    expected = None
    for interfere in (False, True):
        net, w = network(), torch.full((3,), 0.7, requires_grad=True)
        inner = metaoptim.MetaSGD([net], lr=0.2)
        with metaoptim.SlidingWindow(slots=slots):
            inner.step(F.mse_loss(net(X * w), Y))
            inner.step(F.mse_loss(net(X * w.cos()), Y))
            outer = F.mse_loss(net(X), Y)
            if interfere:
                _overwrite(how, w)
            outer.backward()
        if expected is None:
            expected = w.grad
    torch.testing.assert_close(w.grad, expected)


def test_what_no_gradient_reaches_is_named() -> None:
    net = network()
    gamma = torch.tensor(0.9, requires_grad=True)
    inner = metaoptim.MetaSGD([net])
    with (
        pytest.warns(metaoptim.UnreachableWarning, match="'gamma' requires grad") as caught,
        metaoptim.SlidingWindow(),
    ):
        for _ in range(3):
            with torch.no_grad():
                target = torch.zeros(6, 2)
                target[1] = Y[1] * gamma
            inner.step(F.mse_loss(net(X), target))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_offline_truncation_warns_and_leaves_none() -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    with (
        pytest.warns(metaoptim.UnreachableWarning, match="window=2"),
        metaoptim.SlidingWindow(offline=True, window=2),
    ):
        for _ in range(3):
            inner.step(F.mse_loss(net(X), Y))
        F.mse_loss(net(X), Y).backward()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: metaoptim.compile("eager"), TypeError, "did you mean backend='eager'"),
        (lambda: metaoptim.compile(3), TypeError, "got int, expected a function"),
        (lambda: metaoptim.compile(slots="a"), ValueError, "slots: got 'a', expected a positive integer"),
        (lambda: metaoptim.compile(window=0), ValueError, "window: got 0"),
        (
            lambda: metaoptim.SlidingWindow(offline="yes"),
            TypeError,
            "offline: got str, expected True or False",
        ),
        (
            lambda: metaoptim.SlidingWindow(memory_budget="0.5"),
            ValueError,
            "fraction of the free memory, a float",
        ),
    ],
)
def test_options_that_are_none(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
