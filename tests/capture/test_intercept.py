"""What happens above the operators: memory given away, histories cut in place, gradients asked for in mid-loop."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.lower.library import library
from metaoptim.runtime.windows import oversights
from problems import data

STEPS = 3
XS, YS = data(STEPS)
RECORDED = ({}, {"slots": 1}, {"window": 99})


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def leaf(value: Any) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def loss_of(net: Any, t: int) -> Tensor:
    return F.mse_loss(net(XS[t]), YS[t])


def against_tape(run: Callable[[dict], list[Any]]) -> None:
    """The same numbers from every recorded window as from the full tape."""
    expected = run({"strategy": "full_tape"})
    for options in RECORDED:
        got = run(options)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def refused(run: Callable[[dict], Any], match: str) -> None:
    """Refused by every recorded window, and taken by the full tape."""
    for options in RECORDED:
        with pytest.raises(metaoptim.CaptureError, match=match):
            run(options)
    run({"strategy": "full_tape"})


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["activation", "before the window"])
def test_data_of_computed_tensors_is_not_swapped(where: str) -> None:
    def run(options: dict) -> None:
        net, early = network(), leaf(0.5) * YS[0]
        inner = metaoptim.MetaSGD([net])
        with metaoptim.SlidingWindow(**options):
            h = net(XS[0]) if where == "activation" else early
            h.data = h.data * 0.5
            inner.step((net(XS[0]) - h).square().mean())

    refused(run, r"t\.data = \.\.\..*\(value - t\)\.detach\(\)")


def test_data_by_the_operator_that_the_message_names() -> None:
    """The values of the assignment and the history from before it."""

    def run(swap: bool, options: dict) -> list[Any]:
        net, lr = network(), leaf(0.1)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                h = net(XS[t])
                if swap:
                    h.data = h.data.round(decimals=1)
                else:
                    h = h + (h.data.round(decimals=1) - h).detach()
                inner.step(F.mse_loss(h, YS[t]))
            loss_of(net, STEPS).backward()
        return [lr.grad]

    expected = run(True, {"strategy": "full_tape"})
    for options in RECORDED:
        torch.testing.assert_close(run(False, options), expected)


def test_data_elsewhere_is_as_ever() -> None:
    """Leaves and plain inputs of the user's own, other threads, and all of torch after the window."""
    net, w, batch = network(), leaf(0.5), XS[0].clone()
    inner = metaoptim.MetaSGD([net])
    before = {name: vars(torch.Tensor).get(name) for name in ("data", "numpy", "detach_", "retain_grad")}
    h = leaf(2.0) * 1.0

    def elsewhere() -> None:
        h.data = torch.tensor(7.0)

    with metaoptim.SlidingWindow():
        assert vars(torch.Tensor).get("data") is not before["data"]
        w.data = torch.tensor(3.0)
        batch.data = XS[1]
        inner.step(F.mse_loss(net(batch) * w, YS[0]))
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
    assert (w.item(), h.item(), torch.equal(batch, XS[1])) == (3.0, 7.0, True)
    assert {name: vars(torch.Tensor).get(name) for name in before} == before


@pytest.mark.parametrize("make", ["numpy", "asarray", "no_grad", "view"])
def test_activations_are_read_only_through_numpy(make: str) -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    with metaoptim.SlidingWindow():
        h = net(XS[0])
        if make == "no_grad":
            with torch.no_grad():
                array = h.detach().numpy()
        elif make == "view":
            array = h.detach()[1:].numpy()
        else:
            array = h.detach().numpy() if make == "numpy" else np.asarray(h.detach())
        np.testing.assert_array_equal(array, h.tolist()[-len(array) :])
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0.0
        inner.step(F.mse_loss(h, YS[0]))


@pytest.mark.parametrize("what", ["parameter", "earlier parameter", "optimizer state"])
def test_what_the_tape_holds_is_read_only_through_numpy(what: str) -> None:
    net = network()
    inner = metaoptim.MetaSGD([net], momentum=0.9)
    with metaoptim.SlidingWindow():
        early = net[0].weight
        inner.step(loss_of(net, 0))
        own = next(iter(inner.state))
        shown = {"parameter": net[0].weight, "earlier parameter": early}.get(what)
        array = (inner.state[own]["momentum_buffer"] if shown is None else shown.detach()).numpy()
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0.0
    net[0].weight.detach().numpy()[...] = 0.0  # the user's own again
    assert not net[0].weight.any()


def test_numpy_of_what_no_step_relies_on_is_writable() -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    with metaoptim.SlidingWindow():
        with torch.no_grad():
            action = net(XS[0])
        action.numpy()[...] = 1.0
        copy = net(XS[0]).detach().numpy().copy()
        copy[...] = 2.0
        XS[0].clone().numpy()[...] = 3.0
        inner.step(F.mse_loss(net(XS[0]), action))
    assert action.eq(1).all() and (copy == 2).all()


@pytest.mark.parametrize("known", [True, False])
def test_meta_parameters_may_be_written_through_numpy(known: bool) -> None:
    """Also where views of them are known: they are read anew."""

    def run(options: dict) -> list[Any]:
        net, w = network(), leaf([0.8, 1.2])
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                part = w[1]
                with torch.set_grad_enabled(known):
                    w.detach().numpy()[...] *= 0.9
                inner.step(loss_of(net, t) + net(XS[t]).mean() * part)
            loss_of(net, STEPS).backward()
        return [w.grad]

    against_tape(run)


def test_dlpack() -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    with metaoptim.SlidingWindow():
        h = net(XS[0])
        with pytest.raises(metaoptim.CaptureError, match=r"DLPack.*clone"):
            torch.from_dlpack(h.detach())
        for hand_out in (torch.to_dlpack, torch.utils.dlpack.to_dlpack):
            with pytest.raises(metaoptim.CaptureError, match=r"DLPack.*clone"):
                hand_out(h.detach())
        with torch.no_grad():
            torch.testing.assert_close(torch.from_dlpack(h.clone()), h)
        torch.from_dlpack(XS[0])
        inner.step(F.mse_loss(h, YS[0]))


@pytest.mark.parametrize("seen", [False, True], ids=["new step", "known step"])
@pytest.mark.parametrize("what", ["meta", "meta set", "meta numpy", "input", "activation", "parameter"])
def test_what_autograd_has_saved_changed_between_loss_and_step(what: str, seen: bool) -> None:
    """Autograd does not notice and its gradient is that of neither value: refused, also where the step is known."""
    for options in RECORDED:
        for interfere in (False, True) if seen else (True,):
            library.clear() if not seen else None
            net, w, x = network(), leaf(0.8), XS[0].clone()
            inner = metaoptim.MetaSGD([net])
            window = metaoptim.SlidingWindow(**options)

            def step(
                net: Any = net, w: Tensor = w, x: Tensor = x, inner: Any = inner, act: bool = interfere
            ) -> None:
                h = net(x)
                loss = (h * w).square().mean() + h.pow(3).mean()
                if act and what == "meta set":
                    w.data = w.data * 0.5
                elif act and what == "meta numpy":
                    w.detach().numpy()[...] *= 0.5
                elif act:
                    named = {"meta": w, "input": x, "activation": h, "parameter": net[2].weight}
                    named[what].data.mul_(0.5)
                inner.step(loss)

            if interfere:
                with (
                    pytest.raises(metaoptim.CaptureError, match="between its use in the loss and the step"),
                    window,
                ):
                    step()
            else:
                with window:
                    step()


def test_writing_through_data_where_autograd_has_saved_nothing() -> None:
    def run(options: dict) -> list[Any]:
        net, w = network(), leaf(0.8)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                h = net(XS[t]) + w
                h.data[1] = 0.3
                for p in net.parameters():
                    assert p.data.shape == p.shape
                loss = F.mse_loss(h, YS[t])
                w.data.mul_(0.9)
                inner.step(loss)
            loss_of(net, STEPS).backward()
        return [w.grad]

    against_tape(run)


# -- detach_ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["method", "Tensor", "torch"])
@pytest.mark.parametrize("kind", ["real", "complex", "conjugate"])
def test_detach_in_place_is_a_cut(kind: str, call: str) -> None:
    def run(options: dict) -> list[Any]:
        net, w = network(), leaf(0.8)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                h = net(XS[t]) * w
                if kind != "real":
                    h = torch.complex(h, 0.3 * h)
                if kind == "conjugate":
                    h = h.conj().resolve_conj()
                before = h * 0.5
                if call == "method":
                    h.detach_()
                else:
                    (torch.detach_ if call == "torch" else torch.Tensor.detach_)(h)
                assert not h.requires_grad
                inner.step((net(XS[t]) * h - before - YS[t]).abs().square().mean())
            loss_of(net, STEPS).backward()
        return [w.grad]

    against_tape(run)


def test_detach_in_place_of_a_tensor_from_outside() -> None:
    def run(options: dict) -> list[Any]:
        net, w = network(), leaf(0.8)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        carried = w * YS[0]
        with metaoptim.SlidingWindow(**options):
            first = (net(XS[0]) * 0.5 - carried).square().mean()
            carried.detach_()
            inner.step(first)
            inner.step(F.mse_loss(net(XS[1]), carried))
            loss_of(net, STEPS).backward()
        return [w.grad]

    against_tape(run)


def test_detach_in_place_between_the_steps_of_two_optimizers() -> None:
    def run(options: dict) -> list[Any]:
        critic, actor, w = network(), network(), leaf(0.8)
        inner = [metaoptim.MetaSGD([n], lr=0.1) for n in (critic, actor)]
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                advantage = YS[t] * w - critic(XS[t])
                later = actor(XS[t])
                inner[0].step((advantage * YS[t]).mean() + critic(XS[t]).square().mean())
                advantage.detach_()
                inner[1].step((later * advantage).mean() + later.square().mean())
            (loss_of(critic, STEPS) + loss_of(actor, STEPS)).backward()
        return [w.grad]

    against_tape(run)


@pytest.mark.parametrize("options", [{}, {"strategy": "full_tape"}])
def test_parameters_are_not_detached_in_place(options: dict) -> None:
    net = network()
    inner = metaoptim.MetaSGD([net])
    with pytest.raises(metaoptim.WindowError, match=r"p\.detach\(\) for a constant"):
        with metaoptim.SlidingWindow(**options):
            inner.step(loss_of(net, 0))
            net[0].weight.detach_()
    assert net[0].weight.requires_grad


# -- gradients of tensors computed in the window ----------------------------------------------------------------------


@pytest.mark.parametrize("call", ["retain_grad", "hook", "probe"])
@pytest.mark.parametrize("offline", [True, False])
def test_the_whole_gradient_of_a_tensor_computed_inside(offline: bool, call: str) -> None:
    """Its hook, though not linear, sees what all steps and the outer loss give together."""

    def run(options: dict) -> list[Any]:
        net, raw, seen = network(), leaf([-1.5, 0.7]), []
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
    net, w, seen = network(), leaf(0.9), []
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
            net, raw = network(), leaf(-1.5)
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
        net, raw = network(), leaf([-1.5, 1.0])
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
        net, raw = network(), leaf(-1.5)
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
        net = network()
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
        net, other, raw = network(), network(), leaf(-1.5)
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
        net = network()
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
    net = network()
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
    net, lr = network(), leaf(0.1)
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
        net, w = network(), leaf(0.8)
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
        net, w, handles = network(), leaf(0.8), []
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
