"""What must hold on a GPU: run by `make gpu-check`, and rehearsed on the CPU with METAOPTIM_TEST_DEVICE=cpu."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn.attention import SDPBackend, sdpa_kernel

import metaoptim
from forms import run_compiled, run_step
from metaoptim.runtime.budget.meter import AllocatorMeter
from oracle import Problem, agree, run_oracle, run_window
from problems import NETWORKS, OPTIMIZERS, problem

DEVICE = torch.device(os.environ.get("METAOPTIM_TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(network: str, optimizer: str, steps: int, offline: bool, window: int | None = None) -> Problem:
    """A problem of the grid, on the device."""
    return problem(network, optimizer, steps, offline, window, device=DEVICE)


@pytest.mark.parametrize("network", [n for n in NETWORKS if n != "dropout"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_the_grid_in_ordinary_windows(network: str, optimizer: str) -> None:
    for offline, window, slots in itertools.product((True, False), (None, 3), (None, 2)):
        case = on_device(network, optimizer, 7, offline, window)
        agree(run_window(case, slots=slots), run_oracle(case), rtol=1e-8)


@pytest.mark.parametrize("form", ["B", "C"])
@pytest.mark.parametrize("network", ["linear", "conv_bn", "lstm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_compiled_forms_without_a_compiler(form: str, network: str, optimizer: str) -> None:
    case = on_device(network, optimizer, 5, True)
    got = (run_step if form == "B" else run_compiled)(case, backend="eager", slots=2)
    agree(got, run_oracle(case), rtol=1e-8)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the CPU has no CUDA graphs")
@pytest.mark.parametrize("network", ["linear", "conv_bn", "lstm", "dropout"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("error:mode='reduce-overhead'")
def test_cuda_graphs(network: str, optimizer: str) -> None:
    for slots in (None, 2):
        case = on_device(network, optimizer, 7, True)
        got = run_compiled(case, backend="eager", mode="reduce-overhead", slots=slots)
        agree(got, run_oracle(case), rtol=1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@inductor_config.patch({"cpp.simdlen": 1, "compile_threads": 1})
@pytest.mark.parametrize(
    "form, network, optimizer",
    [("A", "linear", "adam"), ("B", "linear", "momentum"), ("C", "conv_bn", "adam")],
)
def test_inductor(form: str, network: str, optimizer: str) -> None:
    case = on_device(network, optimizer, 5, True)
    run = {"A": run_window, "B": run_step, "C": run_compiled}[form]
    agree(run(case, backend="inductor"), run_oracle(case), rtol=1e-8)
    if form == "C" and DEVICE.type == "cuda":
        agree(run_compiled(case, backend="inductor", mode="reduce-overhead"), run_oracle(case), rtol=1e-8)


# -- what is held -----------------------------------------------------------------------------------------------------


def wide(steps: int, **window: Any) -> Tensor:
    """A meta-gradient of a network whose states are large beside everything else."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 8)).to(DEVICE)
    log_lr = torch.tensor(-3.0, device=DEVICE, requires_grad=True)
    inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
    x = torch.randn(16, 64, device=DEVICE)
    with metaoptim.SlidingWindow(offline=True, **window):
        for t in range(steps):
            inner.step((net(x) - 0.1 * t).square().mean())
        net(x).square().mean().backward()
    assert log_lr.grad is not None
    return log_lr.grad


class Peak:
    """Bytes allocated at most inside a block, beyond what was there."""

    def __enter__(self) -> Peak:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._meter = AllocatorMeter().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if DEVICE.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        else:
            self._meter.__exit__(*error)
            self.bytes = self._meter.peak


def test_a_budget_is_kept_by_the_allocators_own_count() -> None:
    budget = 8 << 20
    expected = wide(40)
    with Peak() as every:
        wide(40)
    with Peak() as kept:
        got = wide(40, memory_budget=budget)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    assert every.bytes > 2 * budget  # else it bounds nothing
    assert kept.bytes <= budget + (1 << 20)  # the network, its data and the optimizer's are the caller's


def test_slots_bound_memory_whatever_the_horizon() -> None:
    with Peak() as short:
        wide(30, slots=3)
    with Peak() as long:
        wide(90, slots=3)
    assert long.bytes <= 1.05 * short.bytes


@pytest.mark.parametrize("place", ["host", "disk"])
def test_offloaded_states_come_back(place: str, tmp_path: Path) -> None:
    if DEVICE.type == "cpu" and place == "host":
        pytest.skip("states on the CPU lie on the host")
    got = wide(40, slots=2, offload="host" if place == "host" else tmp_path)
    torch.testing.assert_close(got, wide(40), rtol=1e-9, atol=0)


# -- precision and random numbers -------------------------------------------------------------------------------------


def tuned(draws: Any, dtype: torch.dtype | None = None, **window: Any) -> tuple[Tensor, Tensor]:
    """The gradient by a learning rate through six steps, and the device's next random number."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), draws, nn.Linear(32, 4)).to(
        DEVICE, torch.float32
    )
    log_lr = torch.tensor(-2.0, device=DEVICE, requires_grad=True, dtype=torch.float32)
    x = torch.randn(8, 16, device=DEVICE, dtype=torch.float32)
    inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
    with metaoptim.SlidingWindow(offline=True, **window):
        for _ in range(6):
            with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
                loss = F.smooth_l1_loss(net(x), 0.5 * torch.ones(8, 4, device=DEVICE))
            inner.step(loss.float())
        net.eval()
        net(x).square().mean().backward()
    assert log_lr.grad is not None
    return log_lr.grad, torch.rand(3, device=DEVICE)


@pytest.mark.parametrize("window", [{"slots": 1}, {"slots": 2}, {}])
def test_replays_draw_what_the_forward_drew(window: dict[str, Any]) -> None:
    expected, following = tuned(nn.Dropout(0.4), strategy="full_tape")
    got, then = tuned(nn.Dropout(0.4), **window)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    assert torch.equal(following, then) and float(expected.abs()) > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    expected, _ = tuned(nn.GELU(), dtype, strategy="full_tape")
    got, _ = tuned(nn.GELU(), dtype, slots=2)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=0)


class _SelfAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(0, 1)[None]
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
)
def test_fused_attention(kernel: SDPBackend, dtype: torch.dtype | None) -> None:
    """Each kernel that serves the type is taken apart; where none does, plain attention is taken."""
    expected, _ = tuned(_SelfAttention(), dtype, strategy="full_tape")
    with sdpa_kernel([kernel, SDPBackend.MATH]):
        got, _ = tuned(_SelfAttention(), dtype, slots=2)
    torch.testing.assert_close(got, expected, rtol=5e-2 if dtype else 1e-4, atol=0)
