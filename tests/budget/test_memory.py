"""Memory of a window in T: activations for the tape, one state per step for all states, nothing for slots."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metaoptim
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine.engine import Engine
from metaoptim.runtime.engine.inputs import Inputs

BATCHES = [
    (torch.randn(16, 8, generator=torch.Generator().manual_seed(t)), torch.arange(16) % 4) for t in range(120)
]


def measure(steps: int, **options: Any) -> tuple[int, int, int]:
    """(bytes held after the loop, peak with backward, bytes of one state)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    lr = torch.tensor(0.1, requires_grad=True)
    inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.9)
    state = 2 * sum(p.numel() * p.element_size() for p in net.parameters())

    def loop() -> torch.Tensor:
        with metaoptim.SlidingWindow(offline=True, **options):
            for x, y in BATCHES[:steps]:
                inner.step(F.cross_entropy(net(x), y))
            return F.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1])

    if options.get("strategy") != "full_tape":
        for x, y in BATCHES[:3]:  # trace the programs first
            with metaoptim.SlidingWindow(offline=True, slots=1):
                for _ in range(3):
                    inner.step(F.cross_entropy(net(x), y))
                F.cross_entropy(net(x), y).backward()
    with AllocatorMeter() as forward:
        outer = loop()
    with AllocatorMeter() as backward:
        outer.backward()
    return forward.held, forward.held + backward.peak, state


def growth(**options: Any) -> tuple[float, float]:
    """States per step that the loop holds, and that the peak grows by."""
    held, peak, state = zip(*(measure(steps, **options) for steps in (40, 120)), strict=True)
    return (held[1] - held[0]) / 80 / state[0], (peak[1] - peak[0]) / 80 / state[0]


def test_memory_in_T() -> None:
    tape, _ = growth(strategy="full_tape")
    states, states_peak = growth()
    slots, slots_peak = growth(slots=8)
    assert tape > 1.5
    assert 0.8 < states < 1.3 and states_peak < 1.3
    assert abs(slots) < 0.05 and slots_peak < 0.05


def test_the_check_fails_when_a_state_per_step_is_leaked(monkeypatch: pytest.MonkeyPatch) -> None:
    real, leaked = Engine.append, []

    def append(self: Engine, call: Any, changes: Any, **read: Any) -> None:
        real(self, call, changes, **read)
        leaked.append(list(self.state))

    monkeypatch.setattr(Engine, "append", append)
    slots, _ = growth(slots=8)
    assert slots > 0.8


def test_what_a_step_is_recorded_by_is_small() -> None:
    """Python objects of a step: its call, and where its inputs lie; not the views it was given."""

    def objects(steps: int) -> int:
        xs = torch.randn(steps, 16, 8)
        net = nn.Linear(8, 4)
        inner = metaoptim.MetaSGD([net], lr=torch.tensor(0.1, requires_grad=True), momentum=0.9)
        with metaoptim.SlidingWindow(offline=True, slots=8):
            tracemalloc.start()
            for t in range(steps):
                inner.step(net(xs[t]).square().mean())
            gc.collect()
            found, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return found

    objects(4)
    assert (objects(150) - objects(50)) / 100 < 1000


def test_views_are_held_by_their_place() -> None:
    inputs = Inputs(lambda t: False)
    xs = torch.randn(300, 4, 5)
    held = [inputs.hold(x.T) for x in xs]
    assert len({id(h.memory) for h in held}) == 1 and len({id(h.layout) for h in held[1:]}) == 1
    assert all(
        torch.equal(h.get(), x.T) and h.tensor.stride() == (1, 5) for h, x in zip(held, xs, strict=True)
    )
    expected = xs.clone()
    inputs.preserve([xs])
    xs.zero_()
    assert all(torch.equal(h.get(), x.T) for h, x in zip(held, expected, strict=True))
    again = inputs.hold(xs[3])
    xs.data.add_(1)
    with pytest.raises(metaoptim.StaleInputError, match=r"shape \(4, 5\)"):
        again.get()


@pytest.mark.parametrize("kind", ["other dtype", "conjugate", "subclass"])
def test_what_differs_by_more_than_its_place_is_held_itself(kind: str) -> None:
    class Marked(torch.Tensor):
        pass

    inputs, base = Inputs(lambda t: False), torch.randn(6, dtype=torch.complex128)
    first = inputs.hold(base)
    other = {
        "other dtype": torch.view_as_real(base),
        "conjugate": base.conj(),
        "subclass": base.as_subclass(Marked),
    }
    held = inputs.hold(other[kind])
    assert held.memory is not first.memory and held.layout is None
    assert torch.equal(held.get(), other[kind]) and type(held.get()) is type(other[kind])
