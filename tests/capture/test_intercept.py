"""What happens above the operators: memory given away, and histories cut in place."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metaoptim
from forms import leaf, mlp
from metaoptim.compiler.lower.library import library
from taped import RECORDED, STEPS, XS, YS, against_tape, loss_of, refused

# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["activation", "before the window"])
def test_data_of_computed_tensors_is_not_swapped(where: str) -> None:
    def run(options: dict) -> None:
        net, early = mlp(), leaf(0.5) * YS[0]
        inner = metaoptim.MetaSGD([net])
        with metaoptim.SlidingWindow(**options):
            h = net(XS[0]) if where == "activation" else early
            h.data = h.data * 0.5
            inner.step((net(XS[0]) - h).square().mean())

    refused(run, r"t\.data = \.\.\..*\(value - t\)\.detach\(\)")


def test_data_by_the_operator_that_the_message_names() -> None:
    """The values of the assignment and the history from before it."""

    def run(swap: bool, options: dict) -> list[Any]:
        net, lr = mlp(), leaf(0.1)
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
    net, w, batch = mlp(), leaf(0.5), XS[0].clone()
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
    net = mlp()
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
    net = mlp()
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
    net = mlp()
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
        net, w = mlp(), leaf([0.8, 1.2])
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
    net = mlp()
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
            net, w, x = mlp(), leaf(0.8), XS[0].clone()
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
        net, w = mlp(), leaf(0.8)
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
        net, w = mlp(), leaf(0.8)
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
        net, w = mlp(), leaf(0.8)
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
        critic, actor, w = mlp(), mlp(), leaf(0.8)
        inner = [metaoptim.MetaSGD([n], lr=0.1) for n in (critic, actor)]
        with metaoptim.SlidingWindow(**options):
            for t in range(STEPS):
                advantage = YS[t] * w - critic(XS[t])
                later = actor(XS[t])
                inner[0].step((advantage * YS[t]).sum(1).square().mean() + critic(XS[t]).square().mean())
                advantage.detach_()
                inner[1].step((later * advantage).mean() + later.square().mean())
            (loss_of(critic, STEPS) + loss_of(actor, STEPS)).backward()
        return [w.grad]

    against_tape(run)


@pytest.mark.parametrize("options", [{}, {"strategy": "full_tape"}])
def test_parameters_are_not_detached_in_place(options: dict) -> None:
    net = mlp()
    inner = metaoptim.MetaSGD([net])
    with pytest.raises(metaoptim.WindowError, match=r"p\.detach\(\) for a constant"):
        with metaoptim.SlidingWindow(**options):
            inner.step(loss_of(net, 0))
            net[0].weight.detach_()
    assert net[0].weight.requires_grad
