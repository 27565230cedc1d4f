"""The profile of a meta-gradient: its parts add up, runs of graphs are counted, and gradients stay as they were."""

from __future__ import annotations

from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor, nn

import metaoptim
from metaoptim.runtime.windows.recording_session import RecordedSession
from metaoptim.runtime.windows.session import current_session

matplotlib.use("Agg")
X = torch.linspace(-1, 2, 24).reshape(8, 3)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def in_window(net: nn.Module, **options: Any) -> Tensor:
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.5)
    with metaoptim.SlidingWindow(offline=True, **options):
        for x in X:
            inner.step((net(x) - 1).square().sum())
        return net(X).square().sum()


def compiled(net: nn.Module, **options: Any) -> Any:
    inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.5)

    @metaoptim.compile(backend="eager", **options)
    def loss(xs: Tensor) -> Tensor:
        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                inner.step((net(x) - 1).square().sum())
            return net(xs).square().sum()

    return loss


def test_parts_of_a_window() -> None:
    net = network()
    in_window(net).backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    with metaoptim.profile() as found:
        in_window(net).backward()
    assert sum(found.seconds.values()) == pytest.approx(found.total, rel=0.05)
    assert found.runs == {"derivative": 8}  # every state was kept
    for part in ("step", "derivative", "lower", "sweep", "data", "else"):
        assert found.seconds[part] > 0
    assert found.seconds["forward"] == found.seconds["loop"] == found.seconds["again"] == 0
    assert found.products is not None and 0 < found.products < found.total
    assert all(map(torch.equal, [p.grad for p in net.parameters() if p.grad is not None], expected))


@pytest.mark.parametrize("slots", [3, 5])
def test_recomputation_is_counted_as_the_engine_counts_it(slots: int) -> None:
    net = network()
    with metaoptim.profile() as found:
        with metaoptim.SlidingWindow(offline=True, slots=slots):
            inner = metaoptim.MetaSGD([net], lr=0.1)
            for x in X:
                inner.step((net(x) - 1).square().sum())
            session = current_session()
            net(X).square().sum().backward()
    assert isinstance(session, RecordedSession)
    assert found.runs["derivative"] == session.engine.vjps == 8
    assert found.runs["again"] == session.engine.replays > 0
    assert found.seconds["again"] > 0


def test_parts_of_a_compiled_function() -> None:
    net = network()
    loss = compiled(net, slots=3)
    loss(X).backward()
    with metaoptim.profile() as found:
        loss(X).backward()
    assert found.runs["forward"] == found.runs["derivative"] and found.runs["again"] > 0
    assert found.runs["derivative"] >= 8
    for part in ("forward", "again", "derivative", "loop", "sweep", "data", "else"):
        assert found.seconds[part] > 0
    assert found.seconds["step"] == 0
    assert sum(found.seconds.values()) == pytest.approx(found.total, rel=0.05)


def test_saved_residuals_are_no_recomputation() -> None:
    loss = compiled(network(), memory_budget="1GiB")
    loss(X).backward()
    with metaoptim.profile() as found:
        loss(X).backward()
    assert "again" not in found.runs and found.products is not None


def test_products_are_those_of_the_steps() -> None:
    """Without an inner step there is no graph, and no product of one."""
    with metaoptim.profile() as found:
        (X @ X.T).sum()
    assert found.products == 0 and found.runs == {}
    big, small = (nn.Linear(n, n) for n in (384, 8))
    times = []
    for net in (big, small):
        x = torch.ones(64, net.in_features)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.profile() as found, metaoptim.SlidingWindow(offline=True):
            inner.step(net(x).square().mean())
            net(x).square().mean().backward()
        times.append(found.products)
    assert times[0] > 3 * times[1] > 0


def test_text_and_picture() -> None:
    net = network()
    with metaoptim.profile() as found:
        in_window(net, slots=2).backward()
    text = str(found)
    assert "graphs, run again for the backward" in text and "8 runs" in text and "100." not in text
    axes = found.plot()
    assert len(axes.patches) == sum(s > 0 for s in found.seconds.values())


def test_one_profile_at_a_time() -> None:
    with metaoptim.profile() as outer:
        with pytest.raises(RuntimeError, match="another profile is being taken"):
            with metaoptim.profile():
                raise AssertionError
    assert outer.total > 0
    with metaoptim.profile():  # and it can be taken again
        pass


def test_layouts_of_all_kinds_and_no_random_numbers_drawn() -> None:
    net = nn.Linear(3, 2)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with metaoptim.profile() as found, metaoptim.SlidingWindow(offline=True):
        inner.step(net(X[:1].expand(8, 3)).sum() ** 2)
        net(X).sum().backward()
    assert found.products is not None and found.products > 0
    assert torch.equal(torch.rand(3), expected)
