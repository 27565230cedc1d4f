"""Moments that are gone back to in compiled functions, against the same loops by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from branches import LOOPS, Remembering, X, Y, by_hand, compiled, hyper, metas
from oracle import agree


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
@pytest.mark.parametrize("name", ["start-reference", "nested", "branches-detached", "stop-net inner"])
def test_in_a_compiled_function(name: str, offline: bool) -> None:
    optimizer = "MetaSGD" if offline else "MetaAdam"
    agree(compiled(LOOPS[name], optimizer, offline), by_hand(LOOPS[name], optimizer, offline))


@pytest.mark.parametrize("options", [{"slots": 2}, {"memory_budget": "4MiB"}], ids=str)
def test_with_slots_and_a_budget(options: dict[str, Any]) -> None:
    loop = LOOPS["branches-reference"]
    agree(compiled(loop, "MetaAdam", True, **options), by_hand(loop, "MetaAdam", True))


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
def test_back_in_every_iteration_of_a_scan(offline: bool) -> None:
    def by_steps(it: Any, m: dict[str, Tensor]) -> Tensor:
        it.step(Y)
        there, total = it.extract(), torch.zeros(())
        for k in range(1, 8):
            it.recover(there)
            it.step(Y * k)
            total = total + k * it.loss(Y - k)
        return total

    @metaoptim.compile(backend="eager")
    def whole(net: nn.Module, m: dict[str, Tensor], ks: Tensor) -> Tensor:
        inner = metaoptim.MetaAdam([net], **hyper("MetaAdam", m))
        total = torch.zeros(())
        with metaoptim.SlidingWindow(offline=offline) as window:
            inner.step(F.mse_loss(net(X), Y))
            there = metaoptim.extract_state(net, inner)
            for k in window.scan(ks):
                metaoptim.recover_state(there)
                inner.step(F.mse_loss(net(X), Y * k))
                total = total + k * F.mse_loss(net(X), Y - k)
            return total

    net, m = Remembering(), metas()
    whole(net, m, torch.arange(1.0, 8.0)).backward()
    found = {k: p.grad for k, p in (*net.named_parameters(), *m.items())}
    agree(found, by_hand(by_steps, "MetaAdam", offline))


def test_what_is_left_after_an_online_window() -> None:
    def run(compiles: bool) -> list[Tensor]:
        net, m = Remembering(), metas()
        inner = metaoptim.MetaAdam([net], **hyper("MetaAdam", m))

        def whole(net: nn.Module) -> Tensor:
            with metaoptim.SlidingWindow():
                inner.step(F.mse_loss(net(X), Y))
                there = metaoptim.extract_state(net, inner)
                inner.step(F.mse_loss(net(X), Y))
                metaoptim.recover_state(there)
                inner.step(F.mse_loss(net(X), Y * 2))
                metaoptim.recover_state(there)
                return F.mse_loss(net(X), Y)

        (metaoptim.compile(whole, backend="eager") if compiles else whole)(net).backward()
        states = [v for p in net.parameters() for v in inner.state[p].values()]
        return [*net.parameters(), *net.buffers(), *states]

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_a_state_does_not_cross_the_edge_of_a_capture() -> None:
    net = Remembering(carries=False)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    outside = metaoptim.extract_state(net)
    kept: list[Any] = []

    def extracting() -> None:
        inner.step(F.mse_loss(net(X), Y))
        kept.append(metaoptim.extract_state(net, by="detached"))

    def recovering() -> None:
        metaoptim.recover_state(outside)
        inner.step(F.mse_loss(net(X), Y))

    def whole() -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            recovering()
            return F.mse_loss(net(X), Y)

    with pytest.raises(metaoptim.WindowError, match="one side of a compiled function"):
        metaoptim.compile(whole, backend="eager")()
    for function in (extracting, recovering):
        step = metaoptim.compile(function, backend="eager")
        with (
            pytest.raises(metaoptim.WindowError, match="compiled"),
            metaoptim.SlidingWindow(offline=True),
        ):
            step()
            metaoptim.recover_state(kept[0])


def test_a_compiled_step_leaves_no_gradient_in_a_buffer() -> None:
    net = Remembering()
    inner = metaoptim.MetaSGD([net], lr=0.1)
    step = metaoptim.compile(lambda: inner.step(F.mse_loss(net(X), Y)), backend="eager")
    with (
        pytest.raises(metaoptim.CaptureError, match="a value with a gradient in the buffer 'trace'"),
        metaoptim.SlidingWindow(offline=True),
    ):
        step()


def test_a_compiled_step_that_looks_ahead_and_goes_back() -> None:
    def run(compiles: bool, optimizer: str) -> dict[str, Tensor | None]:
        net, m = Remembering(carries=False), metas()
        inner = getattr(metaoptim, optimizer)([net], **hyper(optimizer, m))

        def step(target: Tensor) -> Tensor:
            there = metaoptim.extract_state(net, inner)
            inner.step(F.mse_loss(net(X), 2 * target))
            ahead = F.mse_loss(net(X), target)
            metaoptim.recover_state(there)
            inner.step(F.mse_loss(net(X), target))
            return ahead

        taken = metaoptim.compile(step, backend="eager") if compiles else step
        with metaoptim.SlidingWindow(offline=True):
            total = sum(taken(Y * k + m["shift"]) for k in (1, 2, 3)) + F.mse_loss(net(X), Y)
        total.backward()
        return {k: p.grad for k, p in (*net.named_parameters(), *m.items())}

    for optimizer in ("MetaSGD", "MetaAdam"):
        agree(run(True, optimizer), run(False, optimizer))


def test_states_that_pass_from_iteration_to_iteration_of_a_scan() -> None:
    def run(compiles: bool, first: bool) -> dict[str, Tensor | None]:
        net, m = Remembering(carries=False), metas()

        def whole(net: nn.Module, m: dict[str, Tensor], ks: Tensor) -> Tensor:
            inner = metaoptim.MetaAdam([net], **hyper("MetaAdam", m))
            kept = None
            with metaoptim.SlidingWindow(offline=True) as window:
                there = metaoptim.extract_state(net, inner)
                for k in window.scan(ks):
                    before = there
                    inner.step(F.mse_loss(net(X), Y * k + m["shift"]))
                    there = metaoptim.extract_state(net, inner)
                    kept = there if kept is None else kept
                    inner.step(F.mse_loss(net(X), Y * k))
                    metaoptim.recover_state(before)
                    inner.step(F.mse_loss(net(X), Y * k + 1))
                metaoptim.recover_state(kept if first else there)
                return F.mse_loss(net(X), Y)

        (metaoptim.compile(whole, backend="eager") if compiles else whole)(
            net, m, torch.arange(1.0, 8.0)
        ).backward()
        return {k: p.grad for k, p in (*net.named_parameters(), *m.items())}

    agree(run(True, first=False), run(False, first=False))
    with pytest.raises(metaoptim.CaptureError, match="a value from the middle of a scan is used after it"):
        run(True, first=True)
