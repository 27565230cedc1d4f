"""`metaoptim.progress`: what is told while long loops run, and the bar."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from forms import leaf, mlp


def loop(net: nn.Module, w: Tensor, xs: Tensor, **window: Any) -> Tensor:
    inner = metaoptim.MetaSGD([net], lr=0.1 * w)
    with metaoptim.SlidingWindow(offline=True, **window) as opened:
        for x in opened.scan(xs):
            inner.step(net(x).square().mean())
        return net(xs[0]).square().mean()


@pytest.mark.parametrize("options", [{}, {"slots": 2}, {"window": 3}])
@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_a_compiled_function_forward_and_back(options: dict[str, Any]) -> None:
    seen: list[tuple[int, int]] = []
    meta_loss = metaoptim.compile(loop, backend="eager", **options)
    net, w, xs = mlp(), leaf(), torch.randn(9, 5, 3)
    with metaoptim.progress(lambda done, total: seen.append((done, total))):
        loss = meta_loss(net, w, xs)
        calls = meta_loss.explain(net, w, xs).calls
        assert seen == [(k, 2 * calls) for k in range(1, calls + 1)]
        loss.backward()
    assert seen == [(k, 2 * calls) for k in range(1, 2 * calls + 1)]
    meta_loss(net, w, xs).backward()  # outside the block nobody watches
    assert len(seen) == 2 * calls


def test_an_ordinary_window_back() -> None:
    seen: list[tuple[int, int]] = []
    with metaoptim.progress(lambda done, total: seen.append((done, total))):
        loss = loop(mlp(), leaf(), torch.randn(9, 5, 3), slots=2)
        assert not seen
        loss.backward()
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)} and len(seen) >= 9


def test_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    real, made = tqdm.tqdm, []

    def bar(*args: Any, **kwargs: Any) -> Any:
        made.append(real(*args, **{**kwargs, "disable": False}))
        return made[-1]

    monkeypatch.setattr(tqdm, "tqdm", bar)
    with metaoptim.progress():
        loop(mlp(), leaf(), torch.randn(9, 5, 3)).backward()
    assert made[0].n == made[0].total >= 9
    assert "inner steps" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"), metaoptim.progress():
        pass
