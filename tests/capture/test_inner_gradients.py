"""Gradients asked for in mid-loop, and hooks on tensors that the window has computed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metaoptim
from forms import leaf, mlp
from metaoptim.runtime.windows.watching import oversights
from taped import STEPS, XS, YS, against_tape, loss_of, refused

# -- gradients of tensors computed in the window ----------------------------------------------------------------------


@pytest.mark.parametrize("call", ["retain_grad", "hook", "probe"])
@pytest.mark.parametrize("offline", [True, False])
def test_the_whole_gradient_of_a_tensor_computed_inside(offline: bool, call: str) -> None:
    """Its hook, though not linear, sees what all steps and the outer loss give together."""

    def run(options: dict) -> list[Any]:
        net, raw, seen = mlp(), leaf([-1.5, 0.7]), []
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=offline, **options):
            lr, scale = raw.exp().unbind()
            table = raw.sin() * torch.arange(1.0, 4.0)[:, None]
            for x in (lr, scale, table):
                if call == "retain_grad":
                    x.retain_grad()
                elif call == "hook":
                    x.register_hook(lambda g: seen.append(g.clone()) or g.tanh())
                else:
                    x.register_hook(lambda g: seen.append(g.clone()))
            inner.param_groups[0]["lr"] = lr * 0.5
            for t in range(STEPS):
                inner.step(F.mse_loss(net(XS[t]) + table[t], YS[t]) * scale)
            (loss_of(net, STEPS) * scale + lr).backward()
        kept = [lr.grad, scale.grad, table.grad] if call == "retain_grad" else seen
        assert len(kept) == 3
        return [raw.grad, *sorted(kept, key=lambda g: (g.numel(), float(g.sum())))]

    against_tape(run)


def test_hooks_on_a_product_made_for_every_step_share_a_program() -> None:
    net, w, seen = mlp(), leaf(0.9), []
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow() as window:
        for t in range(12):
            weight = w * (1.0 + t)
            weight.register_hook(lambda g: seen.append(float(g)))
            inner.step(loss_of(net, t % 3) * weight)
        loss_of(net, STEPS).backward()
    assert len(seen) == 12 and len(window.program.step_graphs) == 1
    assert sum(g * (1.0 + t) for g, t in zip(seen, reversed(range(12)), strict=True)) == pytest.approx(
        float(w.grad)  # type: ignore[arg-type]
    )


def test_hook_after_the_step_is_refused() -> None:
    for call in (lambda x: x.retain_grad(), lambda x: x.register_hook(lambda g: None)):

        def run(options: dict, act: Any = call, steps: int = 1) -> None:
            net, raw = mlp(), leaf(-1.5)
            inner = metaoptim.MetaSGD([net])
            with metaoptim.SlidingWindow(**options):
                lr = inner.param_groups[0]["lr"] = raw.exp()
                for t in range(steps):
                    inner.step(loss_of(net, t))
                act(lr)

        refused(run, "right after computing the tensor")
        refused(lambda options, run=run: run(options, steps=3), "right after computing the tensor")


def test_watched_tensor_changed_in_place_is_refused() -> None:
    def run(early: bool, options: dict) -> None:
        net, raw = mlp(), leaf([-1.5, 1.0])
        inner = metaoptim.MetaSGD([net])
        with metaoptim.SlidingWindow(**options):
            weights = raw * 1.0
            if early:
                weights[0] = 0.5
            weights.retain_grad()
            if not early:
                weights[0] = 0.5
            inner.step(F.mse_loss(net(XS[0]) * weights, YS[0]))

    for early in (True, False):
        refused(lambda options, early=early: run(early, options), "changed in place")


@pytest.mark.parametrize("where", ["inside", "after"])
@pytest.mark.parametrize("ask", ["grad", "both", "backward", "only direct", "target"])
def test_gradient_by_a_tensor_that_steps_have_read_is_refused(ask: str, where: str) -> None:
    def run(options: dict) -> None:
        net, raw = mlp(), leaf(-1.5)
        inner = metaoptim.MetaSGD([net])

        def request() -> None:
            if ask == "backward":
                outer.backward(inputs=[lr])
            else:
                torch.autograd.grad(outer, [lr, raw] if ask == "both" else [lr])

        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                lr = (
                    raw.exp()
                )  # "only direct": of the last step, which autograd would reach by the outer loss alone
                if t == 0 or ask == "only direct":
                    inner.param_groups[0]["lr"] = lr
                target = net(XS[t])
                inner.step(F.mse_loss(target, YS[t]))
                if ask != "only direct":
                    lr = inner.param_groups[0]["lr"]
            if ask == "target":
                lr = target
            outer = loss_of(net, STEPS) + lr.square().sum()
            if where == "inside":
                request()
        if where == "after":
            request()

    refused(run, "read by an inner step")


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("step", [0, 1])
def test_gradient_by_parameters_in_mid_loop_is_refused(step: int, offline: bool) -> None:
    def run(options: dict) -> None:
        net = mlp()
        inner = metaoptim.MetaSGD([net])
        with metaoptim.SlidingWindow(offline=offline, **options):
            for t in range(STEPS):
                if t == step:
                    middle = list(net.parameters())
                inner.step(loss_of(net, t))
            outer = loss_of(net, STEPS) + sum(p.square().sum() for p in middle)
        torch.autograd.grad(outer, middle)

    refused(run, "as it was before later inner steps")


def test_gradients_that_are_whole_are_given() -> None:
    """By theta_T, by meta-parameters, by what no step has read, and by what only another network's step has read."""

    def run(options: dict) -> list[Any]:
        net, other, raw = mlp(), mlp(), leaf(-1.5)
        inner, second = (metaoptim.MetaSGD([n], lr=0.1) for n in (net, other))
        with metaoptim.SlidingWindow(offline=True, **options):
            lr, weight, third = raw.exp(), raw.sin(), raw.cos()
            inner.param_groups[0]["lr"] = lr
            for t in range(STEPS):
                inner.step(loss_of(net, t))
            second.step(loss_of(other, 0) * third)
            now = list(net.parameters())
            outer = loss_of(net, STEPS) * weight + third
            found = [
                *torch.autograd.grad(outer, [raw, weight], retain_graph=True),
                *torch.autograd.grad(outer, now, retain_graph=True),
                *torch.autograd.grad(outer, third, retain_graph=True),
                *torch.autograd.grad(loss_of(other, 1), list(other.parameters())),
            ]
        return found

    against_tape(run)


def test_gradient_by_a_parameter_that_was_overwritten_since() -> None:
    """A history cut in between: the later values do not come from it."""

    def run(options: dict) -> list[Any]:
        net = mlp()
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True, **options):
            inner.step(loss_of(net, 0))
            middle = list(net.parameters())
            direct = sum(p.square().sum() for p in middle)
            with torch.no_grad():
                for p in net.parameters():
                    p.copy_(torch.full_like(p, 0.3))
            cut = list(net.parameters())
            outer = loss_of(net, STEPS)
            found = [*torch.autograd.grad(outer, cut)]
            inner.step(loss_of(net, 1))
        return [*found, direct]

    against_tape(run)


def test_torch_is_its_own_again_when_the_tape_is_gone() -> None:
    oversights.remember(None)  # a window of another test, after which no backward came
    gc.collect()
    before = torch.autograd._engine_run_backward
    net = mlp()
    inner = metaoptim.MetaSGD([net])
    with metaoptim.SlidingWindow(offline=True):
        inner.step(loss_of(net, 0))
        outer = loss_of(net, 1)
    assert torch.autograd._engine_run_backward is not before
    del outer
    with pytest.warns(metaoptim.UnreachableWarning, match="inside the window's block"):
        loss_of(net, 1).backward()  # looked at, since nobody has asked the window for a gradient
    assert torch.autograd._engine_run_backward is before


# -- hooks ------------------------------------------------------------------------------------------------------------


def _hooked(reader: str, hook: Callable[[Tensor], Any], options: dict) -> list[Any]:
    net, lr = mlp(), leaf(0.1)
    inner = metaoptim.MetaSGD([net], lr=lr)
    total: Any = 0.0
    with metaoptim.SlidingWindow(offline=True, **options):
        for t in range(STEPS):
            h = net[0].weight if reader == "parameter" else net(XS[t])
            h.register_hook(hook)
            if reader == "outer before":
                total = total + h.square().mean()
            loss = loss_of(net, t) if reader == "parameter" else F.mse_loss(h, YS[t])
            inner.step(loss)
            if reader in ("outer after", "parameter"):
                total = total + h.square().mean()
            elif reader == "step after":
                inner.step(F.mse_loss(net(XS[t]), h))
        (total + loss_of(net, STEPS)).backward()
    return [lr.grad]


@pytest.mark.parametrize("reader", ["outer before", "outer after", "step after", "parameter"])
def test_hook_that_would_act_on_parts_is_refused(reader: str) -> None:
    """Exact while it only looks."""
    refused(lambda options: _hooked(reader, torch.tanh, options), "hook that changes its gradient")
    against_tape(lambda options: _hooked(reader, lambda g: None, options))


def test_hook_on_what_one_step_reads_is_exact() -> None:
    against_tape(lambda options: _hooked("nobody", torch.tanh, options))


@pytest.mark.parametrize("returns", [True, False])
def test_hook_removed_before_the_outer_backward(returns: bool) -> None:
    """The full tape would not apply it to the meta-gradient; a probe does not matter."""

    def run(options: dict) -> list[Any]:
        net, w = mlp(), leaf(0.8)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                h = net(XS[t]) * w
                with h.register_hook(lambda g: g.tanh() if returns else None):
                    inner.step(F.mse_loss(h, YS[t]))
            loss_of(net, STEPS).backward()
        return [w.grad]

    refused(run, "remove it after that") if returns else against_tape(run)


def test_hook_removed_after_the_outer_backward() -> None:
    def run(options: dict) -> list[Any]:
        net, w, handles = mlp(), leaf(0.8), []
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                h = net(XS[t]) * w
                handles.append(h.register_hook(torch.tanh))
                inner.step(F.mse_loss(h, YS[t]))
            loss_of(net, STEPS).backward()
            for handle in handles:
                handle.remove()
        return [w.grad]

    against_tape(run)
