"""What a window inside a window refuses, what it leaves after an exception, and steps of other kinds in it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metaoptim
from metaoptim.errors import WindowError
from nested_loops import Setting, agree


def test_refused() -> None:
    s = Setting()
    inner, meta = metaoptim.MetaSGD([s.net], lr=0.1), metaoptim.MetaSGD([s.net], lr=0.1)
    for option in (
        {"slots": 2},
        {"window": 1},
        {"memory_budget": "1MiB"},
        {"gradient": "forward"},
        {"hvp": "mixed"},
    ):
        with (
            metaoptim.SlidingWindow(offline=True),
            pytest.raises(WindowError, match="of a window inside another"),
        ):
            metaoptim.SlidingWindow(offline=True, **option).__enter__()  # type: ignore[arg-type]
    with metaoptim.SlidingWindow(offline=True):
        meta.step(s.loss(0, 0))
        with metaoptim.SlidingWindow(offline=True):
            with pytest.raises(WindowError, match="has taken steps in the window around this one"):
                meta.step(s.loss(0, 0))
            inner.step(s.loss(0, 0))
        meta.step(s.loss(0, 1))
        with pytest.raises(WindowError, match="was written into inside a window that is inside another"):
            with metaoptim.SlidingWindow(offline=True):
                inner.step(s.loss(0, 0))
                with torch.no_grad():
                    s.net[0].weight.zero_()  # type: ignore[union-attr, operator]
                inner.step(s.loss(0, 0))
        assert bool(s.net[0].weight.any())  # type: ignore[union-attr]
        meta.step(s.loss(0, 2))

    @metaoptim.compile(backend="eager")
    def compiled() -> Tensor:
        meta = metaoptim.MetaSGD([s.net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            with metaoptim.SlidingWindow(offline=True):
                loss = s.loss(0, 0)
            meta.step(loss)
            return s.loss(0, 0)

    with pytest.raises(WindowError, match="a window was opened inside a window of a compiled function"):
        compiled()


@pytest.mark.parametrize("window", [{}, {"strategy": "full_tape"}], ids=str)
@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
def test_an_exception_inside_leaves_the_window_around_as_it_was(
    window: dict[str, Any], offline: bool
) -> None:
    def run(failing: bool) -> list[Any]:
        s = Setting()
        inner, meta = metaoptim.MetaAdam([s.net], lr=0.1), metaoptim.MetaAdam([s.net], lr=s.log_meta_lr.exp())
        with metaoptim.SlidingWindow(offline=True, **window):
            meta.step(s.loss(0, 0))
            if failing:
                with pytest.raises(KeyError), metaoptim.SlidingWindow(offline=offline):
                    inner.step(s.loss(1, 0))
                    raise KeyError
                assert not inner.state
            meta.step(s.loss(0, 1))
            outer = s.loss(0, 2)
            outer.backward()
        return [outer.detach(), *(p.grad for p in s.leaves()[1:])]

    agree(run(True), run(False))


def test_compiled_steps_and_steps_in_chunks_inside() -> None:
    """A compiled step of a window inside another runs as it is: it is a part of the outer step."""

    def run(kind: str) -> list[Any]:
        s = Setting()
        inner, meta = (metaoptim.MetaSGD([s.net], lr=r.exp()) for r in (s.log_lr, s.log_meta_lr))

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(s.net(x), y)

        def step(x: Tensor, y: Tensor) -> None:
            inner.step(loss(x, y))

        compiled: Any = metaoptim.compile(backend="eager")(step)
        with metaoptim.SlidingWindow(offline=True):
            for t in range(2):
                x, y = s.xs[t, 0], s.ys[t, 0]
                with metaoptim.SlidingWindow(offline=True):
                    if kind == "chunks":
                        inner.step_in_chunks(loss, x, y, chunks=2)
                    else:
                        (compiled if kind == "compiled" else step)(x, y)
                    of_task = s.loss(t, 1)
                meta.step(of_task)
            outer = s.loss(2, 0)
            outer.backward()
        return [outer.detach(), *(p.grad for p in s.leaves())]

    expected = run("plain")
    agree(run("compiled"), expected)
    agree(run("chunks"), expected)


@pytest.mark.parametrize("window", [{}, {"strategy": "full_tape"}], ids=str)
def test_inner_optimizers_of_past_tasks_are_let_go(window: dict[str, Any]) -> None:
    s = Setting()
    meta = metaoptim.MetaSGD([s.net], lr=0.1)
    past: list[Any] = []
    again = metaoptim.MetaSGD([s.net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True, **window):
        for t in range(3):
            inner = metaoptim.MetaAdam([s.net], lr=s.log_lr.exp())
            past.append(weakref.ref(inner))
            with metaoptim.SlidingWindow(offline=True):
                inner.step(s.loss(t, 0))
                again.step(s.loss(t, 1))
                loss = s.loss(t, 2)
            meta.step(loss)
        del inner
        gc.collect()
        assert [ref() for ref in past] == [None] * 3
        s.loss(0, 0).backward()
    assert s.log_lr.grad is not None and s.log_lr.grad != 0


def test_the_outer_step_inside_the_inner_block_is_told_of() -> None:
    """It is undone with the inner window. Another optimizer that is alive, and may step in both, has not."""
    s, another = Setting(), metaoptim.MetaSGD([Setting().net], lr=0.1)
    inner, meta = metaoptim.MetaSGD([s.net], lr=0.1), metaoptim.MetaSGD([s.net], lr=0.1)
    with pytest.warns(
        UserWarning, match="took no step of its own.*take the outer step by it after the block"
    ):
        with metaoptim.SlidingWindow(offline=True):
            with metaoptim.SlidingWindow(offline=True):
                inner.step(s.loss(0, 0))
                meta.step(s.loss(0, 1))
    assert not another.state
