"""Ordinary mistakes, each with what its user is told: what failed, what was got, what was expected, what to do."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import metaoptim
import wrong_settings
import wrong_windows
from metaoptim import MetaSGD, SlidingWindow
from wrong_uses import USES, loss_of, network

TABLES = (wrong_windows, wrong_settings)  # which fill USES


@pytest.mark.parametrize(("use", "kind", "parts"), USES)
def test_wrong_use(use: Callable[[], Any], kind: type, parts: tuple[str, ...]) -> None:
    raised: list[Exception] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            use()
        except Exception as error:
            raised.append(error)
    (lines, first), file = inspect.getsourcelines(use), use.__code__.co_filename
    if issubclass(kind, Warning):
        assert not raised, raised
        texts = [str(w.message) for w in told if w.category is kind]
        assert len(texts) == 1, [str(w.message) for w in told]
        (found,) = [w for w in told if w.category is kind]
        assert found.filename == file and first <= found.lineno < first + len(lines)
        text = texts[0]
    else:
        (error,) = raised
        assert type(error) is kind, repr(error)
        text = str(error)
        if isinstance(error, metaoptim.MetaOptimError):
            at = re.search(re.escape(file) + r":(\d+)", text)
            assert at is not None and first <= int(at[1]) < first + len(lines), text
    where = 0
    for part in parts:
        at_part = text.find(part, where)
        assert at_part >= 0, f"{part!r} is not in {text!r}, or not there"
        where = at_part + len(part)


@pytest.mark.parametrize("first", ["before", "grad"])
def test_a_loss_of_the_block_may_wait_for_another(first: str) -> None:
    """A loss of the network as it is has its backward first; or another one later, after `torch.autograd.grad`."""
    net = network()
    inner, own = MetaSGD([net], lr=0.1), list(net.parameters())
    with SlidingWindow(offline=True):
        inner.step(loss_of(net))
        adapted = loss_of(net)
    if first == "grad":
        assert all(g is not None for g in torch.autograd.grad(adapted, own))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(net).backward()


def test_there_are_forty() -> None:
    assert len(USES) >= 40
    assert {use.values[0].__module__ for use in USES} == {table.__name__ for table in TABLES}


@pytest.mark.parametrize("many", [False, True])
def test_training_by_a_function_after_a_window_that_only_looked_is_no_mistake(many: bool) -> None:
    """The gradient is that of the function's own window; warnings are errors here."""
    net = torch.nn.Linear(2, 1)
    inner = metaoptim.MetaSGD([net], lr=0.1)

    def adapted(x: torch.Tensor) -> torch.Tensor:
        with metaoptim.SlidingWindow(offline=True):
            inner.step(net(x).square().sum())
            return net(x).square().sum()

    compiled = metaoptim.compile(adapted, backend="eager")
    train = metaoptim.vmap(compiled) if many else compiled
    xs = torch.ones(2, 3, 2) if many else torch.ones(3, 2)
    train(xs)
    adapted(torch.ones(3, 2)).item()
    train(xs).sum().backward()
    assert net.weight.grad is not None and net.weight.grad.abs().max() > 0
