"""The meter: exact about what it can know, and in agreement with what the kernel says a process takes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metaoptim.compiler.compat import profiling
from metaoptim.runtime.budget.meter import AllocatorMeter

KIB, MIB = 2**10, 2**20


def block(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


@pytest.mark.parametrize("noted", [False, True])
def test_the_peak_is_exact_however_often_events_are_added_up(noted: bool) -> None:
    gc.collect()
    with AllocatorMeter() as meter:

        def pause() -> None:
            if noted:
                meter.note()

        kept = block(100)
        pause()
        passing = block(30)  # 130
        pause()
        del passing
        pause()
        more = block(20)  # 120
        pause()
        last = block(9)  # 129
        pause()
        del more
    assert (meter.peak, meter.held) == (130 * KIB, 109 * KIB)
    assert kept.nbytes + last.nbytes == meter.held


def test_a_level_is_carried_from_piece_to_piece() -> None:
    kept = []
    with AllocatorMeter() as meter:
        for k in range(300):
            kept.append(block(1))
            block(k % 7)  # freed at once
            meter.watch(k, 300)
        meter.note()
        kept.clear()
        block(3)
    assert meter.peak == max(k + 1 + k % 7 for k in range(300)) * KIB
    assert meter.held == 0


def test_a_backward_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    def peak(noted: bool) -> tuple[int, int]:
        meter = AllocatorMeter()

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                ctx.save_for_backward(x)
                return x.new_empty(
                    0
                )  # as the nodes of a window: what a node is given is freed after its last event

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                kept = block(1)
                for _ in range(3):
                    kept = torch.cat([kept, block(5)])
                    if noted:
                        meter.note()
                return kept.sum() + ctx.saved_tensors[0]

        x = torch.ones(1000, requires_grad=True)
        with meter:
            y = Node.apply(x)
            for _ in range(2):
                block(2)
                y.sum().backward(retain_graph=True)  # type: ignore[union-attr]
        return meter.peak, meter.held

    assert peak(True) == peak(False)
    assert not capfd.readouterr().err


def test_what_an_earlier_meter_has_seen_is_given_back() -> None:
    with AllocatorMeter() as first:
        x = block(64)
    with AllocatorMeter() as second:
        y = block(16)
        del x
        z = block(8)
    assert (first.held, second.peak, second.held) == (64 * KIB, 16 * KIB, -40 * KIB)
    assert y.nbytes + z.nbytes == 24 * KIB


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_buffers_of_compiled_code_are_seen() -> None:
    @torch.compile
    def f(x: torch.Tensor) -> torch.Tensor:
        return ((x @ x).relu() @ x).sum(0)

    x = torch.randn(64, 64)
    f(x)
    with AllocatorMeter() as meter:
        y = f(x)
    assert meter.held == y.nbytes
    assert 2 * x.nbytes <= meter.peak <= 4 * x.nbytes


def test_observers_are_back_afterwards() -> None:
    with pytest.raises(ZeroDivisionError), AllocatorMeter() as meter:
        assert profiling()
        meter.note()
        _ = 1 / 0
    assert not profiling()
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        torch.ones(3).exp()
    assert profile is not None
    assert any(event.name == "aten::exp" for event in list(profile.function_events or ()))


# -- against the kernel ----------------------------------------------------------------------------------------------

_WINDOW = """
import sys, torch
import numpy as np
import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter

def resident(what):
    with open("/proc/self/status") as status:
        (found,) = (int(line.split()[1]) for line in status if line.startswith(what))
    return 1024 * found

torch.manual_seed(0)
torch.set_num_threads(1)
net, xs = torch.nn.Linear(1024, 1024), torch.randn(12, 4, 1024)
log_lr = torch.tensor(-5.0, requires_grad=True)
unseen = []

def loop(steps, meter=None, **options):
    inner = metaoptim.MetaSGD([net], lr=log_lr.exp(), momentum=0.9)
    with metaoptim.SlidingWindow(offline=True, **options):
        for t in range(steps):
            inner.step((net(xs[t]).tanh() - 0.1).square().mean())
            if meter is not None:
                meter.note()
            if sys.argv[2] == "unseen" and t == 1:
                unseen.append(np.ones(24 * 2**20, dtype=np.uint8))  # no tensor
        net(xs[0]).square().mean().backward()

options = {"tape": {"strategy": "full_tape"}, "budget": {"memory_budget": "112MiB"}, "states": {}}[sys.argv[1]]
loop(2, **options)
net.zero_grad()
unseen.clear()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark begins again
before = resident("VmRSS")
meter = AllocatorMeter()
with meter:
    loop(12, meter, **options)
print(meter.peak, resident("VmHWM") - before)
"""


def against_the_kernel(plan: str, what: str = "") -> tuple[int, int]:
    """The meter's peak of a window with states of 8 MiB, and by how much the process has grown; in a fresh process."""
    # every large block is the kernel's own, given back when it is freed
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = subprocess.run(
        [sys.executable, "-c", _WINDOW, plan, what], env=environment, capture_output=True, text=True
    )
    assert not found.returncode, found.stderr
    measured, grown = map(int, found.stdout.split())
    return measured, grown


def close(measured: int, grown: int) -> bool:
    """To 3%, and what Python takes meanwhile."""
    return abs(measured - grown) < 0.03 * measured + 2 * MIB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux")
def test_the_meter_agrees_with_resident_memory() -> None:
    tape, states, budget = (against_the_kernel(plan) for plan in ("tape", "states", "budget"))
    assert close(*tape) and close(*states) and close(*budget)
    assert 64 * MIB < budget[0] <= 112 * MIB < min(states[0], tape[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux")
def test_the_check_fails_for_memory_the_meter_does_not_see() -> None:
    measured, grown = against_the_kernel("states", "unseen")
    assert not close(measured, grown) and grown - measured > 20 * MIB
