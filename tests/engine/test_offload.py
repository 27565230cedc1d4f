"""States below the device's slots: the same gradients, in bounded memory of the device."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import mlp, run_compiled, run_step
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine.engine import Engine
from metaoptim.runtime.states.disk import DiskTier, Files
from offloading import files, loop, same, watch_writes
from oracle import agree, run_oracle, run_window
from problems import data, problem

FORMS: dict[str, Any] = {"window": run_window, "step": run_step, "function": run_compiled}


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """[steps replayed, steps pulled back] by every sweep; the forward pass of a compiled function is not counted."""
    found: list[list[int]] = []
    real = Engine.pull_back

    def pull_back(self: Engine, sweep: Any, bottom: int) -> None:
        before = self.replays, self.vjps
        real(self, sweep, bottom)
        if not hasattr(sweep, "tally"):
            sweep.tally = [0, 0]
            found.append(sweep.tally)
        sweep.tally[0] += self.replays - before[0]
        sweep.tally[1] += self.vjps - before[1]

    monkeypatch.setattr(Engine, "pull_back", pull_back)
    return found


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every file that was written."""
    return watch_writes(monkeypatch)


# -- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 20])
def test_the_gradient_is_that_of_the_full_tape(
    form: str, steps: int, tmp_path: Path, sweeps: list[list[int]], written: list[int]
) -> None:
    for optimizer in ("momentum", "adam") if steps in (1, 7) else ("adam",):
        for offline in (True, False):
            loop = problem("linear", optimizer, steps, offline)
            expected = run_oracle(loop)
            for slots in (1, 2, 3):
                agree(FORMS[form](loop, slots=slots, offload=tmp_path), expected)
                assert not files(tmp_path)
    assert all(replayed <= pulled for replayed, pulled in sweeps)
    assert (
        bool(written) == (steps >= 2) or steps == 2
    )  # which is at the edge of a segment, if there is one slot


@pytest.mark.parametrize("form", ["window", "function"])
@pytest.mark.parametrize("slots", [1, 2])
def test_truncated_windows(form: str, slots: int, tmp_path: Path, written: list[int]) -> None:
    for offline in (True, False):
        loop = problem("linear", "momentum", 13, offline, window=3, per_step=not offline)
        with pytest.warns(metaoptim.UnreachableWarning) if offline else nullcontext():
            found = FORMS[form](loop, slots=slots, offload=tmp_path)
        agree(found, run_oracle(loop))
    assert written and not files(tmp_path)


@pytest.mark.parametrize("form", ["window", "step", "function"])
def test_random_numbers(form: str, tmp_path: Path, written: list[int]) -> None:
    """States of the generator go down and come back like all others."""
    loop = problem("dropout", "sgd", 11, True)
    agree(FORMS[form](loop, slots=2, offload=tmp_path), run_oracle(loop))
    assert written


def test_tied_parameters_buffers_and_frozen_ones(tmp_path: Path, written: list[int]) -> None:
    for network in ("tied", "conv_bn", "unused"):
        loop = problem(network, "adam", 9, False)
        agree(run_window(loop, slots=2, offload=tmp_path), run_oracle(loop))
        agree(run_compiled(loop, slots=2, offload=tmp_path), run_oracle(loop))
    assert written


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
def test_every_step_is_replayed_once_at_most(slots: int, tmp_path: Path) -> None:
    for steps in (slots, slots + 3, 17, 40):
        _, outer, own = loop(steps, strategy="full_tape")
        expected = torch.autograd.grad(outer, own)
        engine, outer, own = loop(steps, slots=slots, offload=tmp_path)
        for call in (1, 2):  # a second backward needs no more: what was offloaded stays
            same(torch.autograd.grad(outer, own, retain_graph=True), expected)
            assert engine.replays <= call * steps and engine.vjps == call * steps
            assert len(engine.store) <= slots
        assert bool(files(tmp_path)) == (engine.position > slots + 1)
        del engine, outer
        assert not list(tmp_path.iterdir())


def test_backward_in_the_block_and_steps_after_it(tmp_path: Path) -> None:
    def run(**options: Any) -> list[Tensor | None]:
        net, lr = mlp(), torch.tensor(0.1, requires_grad=True)
        inner = metaoptim.MetaAdam([net], lr=lr)
        xs, ys = data(15)
        with metaoptim.SlidingWindow(**options):
            for t in range(15):
                inner.step(F.mse_loss(net(xs[t]), ys[t]))
                if t % 4 == 2:
                    F.mse_loss(net(xs[15]), ys[15]).backward(retain_graph=True)
        return [lr.grad, *(p.detach() for p in net.parameters())]

    expected = run(strategy="full_tape")
    for slots in (1, 2, 4):
        same(run(slots=slots, offload=tmp_path), expected)
        same(run(slots=slots, offload=tmp_path, window=15), expected)


def test_two_optimizers_on_one_trunk(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        torch.manual_seed(0)
        trunk, a, b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        lr = torch.tensor(0.1, requires_grad=True)
        first, second = metaoptim.MetaSGD([trunk, a], lr=lr), metaoptim.MetaAdam([b], lr=lr)
        xs, ys = data(9)
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(9):
                features = torch.tanh(trunk(xs[t]))
                losses = F.mse_loss(a(features), ys[t]), F.mse_loss(b(features), ys[t])
                first.step(losses[0])
                second.step(losses[1])
            outer = F.mse_loss(a(torch.tanh(trunk(xs[9]))) + b(torch.tanh(trunk(xs[9]))), ys[9])
            return torch.autograd.grad(outer, [*trunk.parameters(), *a.parameters(), lr])

    expected = run(strategy="full_tape")
    for slots in (1, 2, 5):
        same(run(slots=slots, offload=tmp_path), expected)


# -- what is being written does not change ---------------------------------------------------------------------------


def test_a_state_that_waits_to_be_written_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters and aliases of earlier ones are changed in place while a slow disk has yet to write them."""

    def run(**options: Any) -> Any:
        net, lr = mlp(), torch.tensor(0.1, requires_grad=True)
        inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.5)
        xs, ys = data(12)
        aliases = []
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(12):
                inner.step(F.mse_loss(net(xs[t]), ys[t]))
                aliases.append(net[0].weight.detach())
                with torch.no_grad():
                    net[2].weight.mul_(0.9)
                    if t > 2:
                        aliases[-1 - t % 3].add_(0.1)  # its own parameter, or one that the tape alone has
                        inner.state[own[1]]["momentum_buffer"].mul_(0.5)
            outer = F.mse_loss(net(xs[12]), ys[12])
            return torch.autograd.grad(outer, [lr])

        return outer

    own: list[Any] = []
    real_init = metaoptim.MetaSGD.__init__

    def init(self: Any, nets: Any, **options: Any) -> None:
        own[:] = list(nets[0].parameters())
        real_init(self, nets, **options)

    monkeypatch.setattr(metaoptim.MetaSGD, "__init__", init)
    expected = run()
    real = Files.write

    def write(self: Files, parts: Any) -> Any:
        time.sleep(0.02)
        return real(self, parts)

    monkeypatch.setattr(Files, "write", write)
    for slots in (1, 2):
        same(run(slots=slots, offload=tmp_path), expected)


# -- memory ----------------------------------------------------------------------------------------------------------

BATCHES = [
    (torch.randn(16, 8, generator=torch.Generator().manual_seed(t)), torch.arange(16) % 4) for t in range(120)
]


def measured(steps: int, directory: Path) -> tuple[int, int, int]:
    """(bytes of device memory at the peak, of one state, files at the end of the loop)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    lr = torch.tensor(0.1, requires_grad=True)
    inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.9)
    state = 2 * sum(p.nbytes for p in net.parameters())

    def run(steps: int) -> Tensor:
        with metaoptim.SlidingWindow(offline=True, slots=3, offload=directory):
            for x, y in BATCHES[:steps]:
                inner.step(F.cross_entropy(net(x), y))
            return F.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1])

    run(3).backward()  # trace the programs first
    with AllocatorMeter() as forward:
        outer = run(steps)
    count = len(files(directory))
    with AllocatorMeter() as backward:
        outer.backward()
    return max(forward.peak, forward.held + backward.peak), state, count


@pytest.mark.parametrize("seconds", [0, 0.01])
def test_memory_of_the_device_does_not_depend_on_the_horizon(
    tmp_path: Path, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on how slow the disk is: the loop waits for it."""
    real = Files.write

    def write(self: Files, parts: Any) -> Any:
        time.sleep(seconds)
        return real(self, parts)

    monkeypatch.setattr(Files, "write", write)
    few, state, some = measured(40, tmp_path)
    many, _, more = measured(120, tmp_path)
    assert (
        many - few < state and many < 12 * state
    )  # 3 slots, 2 being written, 1 read ahead, and the step itself
    assert (more - some) == 80 // 4 and not list(tmp_path.iterdir())


def test_a_sliding_window_removes_what_it_has_passed(tmp_path: Path) -> None:
    net, log_lr = mlp(), torch.tensor(-3.0, requires_grad=True)
    inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
    xs, ys = data(120)
    most = 0
    with metaoptim.SlidingWindow(window=4, slots=1, offload=tmp_path) as window:
        engine: Any = window._session.engine  # type: ignore[union-attr]
        for t in range(120):
            inner.step(F.mse_loss(net(xs[t]), ys[t]))
            if t % 5 == 4:
                F.mse_loss(net(xs[t]), ys[t]).backward(retain_graph=True)
            engine.tier.settle()
            most = max(most, len(engine.store.far))
        assert engine.store.base > 100
    assert log_lr.grad is not None and most <= 8


def test_budgets_and_predictions(tmp_path: Path, sweeps: list[list[int]]) -> None:
    xs, ys = data(60)

    def meta_loss(net: nn.Module, log_lr: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp(), momentum=0.9)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x, y in window.scan(xs, ys):
                inner.step(F.mse_loss(net(x), y))
            return F.mse_loss(net(xs[0]), ys[0])

    def run(**options: Any) -> tuple[Any, int, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2))
        log_lr = torch.tensor(-3.0, requires_grad=True)
        compiled = metaoptim.compile(meta_loss, backend="eager", **options)
        for call in range(2):
            log_lr.grad = None
            net.zero_grad()
            if call:
                with AllocatorMeter() as meter:
                    compiled(net, log_lr).backward()
            else:
                compiled(net, log_lr).backward()
        found = [log_lr.grad, *(p.grad for p in net.parameters())]
        report = metaoptim.explain(compiled, measure=True)(net, log_lr)
        assert abs(report.measured_peak_bytes - meter.peak) < report.state_bytes
        return found, meter.peak, report

    expected, *_ = run()
    got, peak, report = run(slots=2, offload=tmp_path)
    same(got, expected)
    assert report.plan == "tiered" and report.offload == str(tmp_path) and str(tmp_path) in str(report)
    assert sweeps[-1][0] == report.extra_forwards <= 60
    assert abs(peak - report.predicted_peak_bytes) < report.state_bytes
    with pytest.raises(metaoptim.BudgetError) as refused:
        run(memory_budget=100, offload=tmp_path)
    for budget in (refused.value.minimum, 2 * refused.value.minimum):
        got, peak, report = run(memory_budget=budget, offload=tmp_path)
        same(got, expected)
        assert peak <= budget and report.plan == "tiered" and sweeps[-1][0] <= 61
    got, _, report = run(memory_budget="1GiB", offload=tmp_path)
    same(got, expected)
    assert report.plan == "unrolled" and not list(tmp_path.iterdir())


def test_a_window_within_a_budget(tmp_path: Path, written: list[int]) -> None:
    _, outer, own = loop(40)
    expected = torch.autograd.grad(outer, own)
    with pytest.raises(metaoptim.BudgetError) as refused:
        loop(40, memory_budget=100, offload=tmp_path)
    budget, batches = 2 * refused.value.minimum, data(40)  # held until the backward
    del refused  # and with its traceback the network, which other windows would take for an inner one
    engine, outer, own = loop(40, batches, memory_budget=budget, offload=tmp_path)
    same(torch.autograd.grad(outer, own), expected)
    assert written and engine.replays <= 40


# -- what can be asked for -------------------------------------------------------------------------------------------


def test_offload_needs_slots_and_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for make in (metaoptim.SlidingWindow, metaoptim.compile):
        for value, error, message in (
            (3, TypeError, "got int, expected 'host', 'disk', or the path"),
            ("hots", ValueError, "got 'hots', expected 'host', 'disk'"),
            (file, ValueError, "is not a directory"),
        ):
            with pytest.raises(error, match=message):
                make(slots=3, offload=value)
        with pytest.raises(ValueError, match="every state is kept on the device"):
            make(offload="disk")
    with pytest.raises(ValueError, match="full_tape"):
        metaoptim.SlidingWindow(memory_budget="1GiB", offload="disk", strategy="full_tape")
    assert "offload='disk'" in repr(metaoptim.SlidingWindow(slots=2, offload="disk"))


def test_host_memory_is_no_other_memory_for_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"on the CPU.*offload='disk'"):
        loop(3, slots=2, offload="host")

    @metaoptim.compile(backend="eager", slots=2, offload="host")
    def meta_loss(net: nn.Module, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net])
        with metaoptim.SlidingWindow(offline=True) as window:
            for x in window.scan(xs):
                inner.step(net(x).square().mean())
            return net(xs[0]).square().mean()

    with pytest.raises(ValueError, match=r"on the CPU.*offload='disk'"):
        meta_loss(nn.Linear(3, 1), torch.randn(6, 4, 3))


def test_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schedule and bookkeeping, on the CPU; copies between devices need one."""
    monkeypatch.setattr("metaoptim.runtime.windows.theta_view.check_device", lambda *_: None)
    _, outer, own = loop(25)
    expected = torch.autograd.grad(outer, own)
    engine, outer, own = loop(25, slots=2, offload="host")
    assert engine.tier is not None and not isinstance(engine.tier, DiskTier) and len(engine.store.far) == 9
    same(torch.autograd.grad(outer, own), expected)


def test_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine, outer, own = loop(9, slots=1, offload="disk")
    engine.tier.settle()
    assert files(tmp_path)
    torch.autograd.grad(outer, own)
    new = tmp_path / "made" / "by it"
    engine, outer, _ = loop(9, slots=1, offload=str(new))
    engine.tier.settle()
    assert files(new)


def test_a_compiled_step_does_not_say_where(tmp_path: Path) -> None:
    net = nn.Linear(3, 1)
    inner = metaoptim.MetaSGD([net])
    step = metaoptim.compile(
        lambda x: inner.step(net(x).square().mean()), backend="eager", slots=2, offload=tmp_path
    )
    with (
        pytest.raises(metaoptim.WindowError, match="give offload to SlidingWindow"),
        metaoptim.SlidingWindow(),
    ):
        step(torch.randn(4, 3))


def test_the_window_inside_says_where(tmp_path: Path, written: list[int]) -> None:
    @metaoptim.compile(backend="eager", slots=9)
    def meta_loss(net: nn.Module, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net])
        with metaoptim.SlidingWindow(offline=True, slots=1, offload=tmp_path) as window:
            for x in window.scan(xs):
                inner.step(net(x).square().mean())
            return net(xs[0]).square().mean()

    meta_loss(nn.Linear(3, 1), torch.randn(6, 4, 3)).backward()
    assert (
        len(written) == 3
    )  # the initial state is a copy of what the caller has: nothing is in the registers yet


def test_reads_that_are_given_up_give_their_memory_back(tmp_path: Path) -> None:
    """A truncated loop with losses at many steps reads ahead what it then does not need, again and again."""
    steps = 41

    def setting() -> tuple[Any, ...]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        return net, torch.tensor(0.7, requires_grad=True), torch.randn(steps, 40, 3)

    def truncated(**options: Any) -> Any:
        @metaoptim.compile(backend="eager", window=2, offload=tmp_path, **options)
        def meta_loss(net: nn.Module, gain: Tensor, xs: Tensor) -> Tensor:
            inner = metaoptim.MetaAdam([net], lr=0.02)
            carried = torch.zeros(40, 2)
            with metaoptim.SlidingWindow(offline=True):
                for x in xs:
                    inner.step((net(x) + carried).square().mean())
                    carried = carried * 0.5 + net(x) * gain
                return net(xs[0]).square().sum() + carried.sum()

        return meta_loss

    with pytest.raises(metaoptim.BudgetError) as refused:
        truncated(memory_budget=100)(*setting())
    budget = refused.value.minimum
    meta_loss = truncated(memory_budget=budget)
    with pytest.warns(metaoptim.UnreachableWarning):
        meta_loss(*setting()).backward()
    given = setting()
    gc.collect()
    with AllocatorMeter() as meter, pytest.warns(metaoptim.UnreachableWarning):
        meta_loss(*given).backward()
    assert meter.peak <= budget
