"""Logs of compiled functions: which guard failed, by name; METAOPTIM_LOGS; and the warning about recompilations."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from metaoptim import logs
from metaoptim.compiler.lower import compile_graph
from metaoptim.compiler.passes.pipeline import PIPELINE


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logs.configure("")
    yield
    logs.configure("")


factor = 1.0


class World:
    """Everything a call depends on, each piece of which a test changes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Linear(4, 2))
        self.inner = metaoptim.MetaSGD([self.net], lr=0.1)
        self.inner.state[self.net[0].weight]["momentum_buffer"] = torch.zeros(4, 3)
        self.x = torch.ones(5, 3)
        self.weights = {"a": torch.ones(()), "b": [torch.ones(2), torch.ones(2)]}
        self.scale = 1.0
        self.positional: tuple[Any, ...] = ()
        net, inner = self.net, self.inner

        @metaoptim.compile(backend="eager")
        def loss(x: Tensor, weights: dict[str, Any], *rest: Any, scale: float = 1.0) -> Tensor:
            with metaoptim.SlidingWindow(offline=True):
                inner.step((net(x) * weights["b"][0] * scale * factor).square().mean())
                return net(x).square().mean()

        self.loss = loss

    def __call__(self) -> None:
        self.loss(self.x, self.weights, *self.positional, scale=self.scale)


def _replace_layer(w: World) -> None:
    w.net[2] = nn.Linear(4, 2)


CHANGES: dict[str, tuple[Callable[[World], Any], str]] = {
    "shape": (lambda w: setattr(w, "x", torch.ones(6, 3)), "x: shape was (5, 3), is (6, 3)"),
    "dtype": (
        lambda w: w.weights["b"].__setitem__(0, torch.ones(2, dtype=torch.float32)),
        "weights['b'][0]: dtype was torch.float64, is torch.float32",
    ),
    "strides": (lambda w: setattr(w, "x", torch.ones(3, 5).T), "x: strides was (3, 1), is (1, 5)"),
    "requires_grad": (
        lambda w: w.weights["a"].requires_grad_(),
        "weights['a']: requires_grad was False, is True",
    ),
    "keyword": (lambda w: setattr(w, "scale", 2.5), "scale: was 1.0, is 2.5"),
    "type": (lambda w: setattr(w, "scale", torch.ones(())), "scale: was 1.0, is a tensor of shape ()"),
    "length": (
        lambda w: w.weights["b"].append(torch.ones(2)),
        "the length of weights['b']: was 2, is 3",
    ),
    "keys": (lambda w: w.weights.update(c=torch.ones(())), "the keys of weights: others than before"),
    "arguments": (
        lambda w: setattr(w, "positional", (1,)),
        "the number of positional arguments: was 2, is 3",
    ),
    "activation": (
        lambda w: w.net.__setitem__(1, nn.Sigmoid()),
        "net.1: its class, or its hooks, are others than before",
    ),
    "training": (lambda w: w.net[1].eval(), "net.1.training: was True, is False"),
    "state": (
        lambda w: w.inner.state[w.net[2].bias].update(momentum_buffer=torch.zeros(2)),
        "inner's state of 2.bias: others than before, or in another order",
    ),
    "dtype of a state": (
        lambda w: w.inner.state[w.net[0].weight].update(momentum_buffer=torch.zeros(4, 3).float()),
        "inner's momentum_buffer of 0.weight: dtype was torch.float64, is torch.float32",
    ),
    "hook": (
        lambda w: w.net[2].bias.register_hook(lambda g: g * 2),
        "inner's parameter 2.bias: has other hooks than before",
    ),
    "frozen": (
        lambda w: w.net[2].bias.requires_grad_(False),
        "inner's parameter 2.bias: requires_grad was True, is False",
    ),
    "hyper-parameter": (
        lambda w: w.inner.param_groups[0].update(lr=0.3),
        "inner.param_groups[0]['lr']: was 0.1, is 0.3",
    ),
    "global": (lambda w: globals().update(factor=2.0), "factor: was 1.0, is 2.0"),
    "default dtype": (
        lambda w: torch.set_default_dtype(torch.float32),
        "torch.get_default_dtype(): was torch.float64, is torch.float32",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_failed_guard_is_named(what: str, caplog: pytest.LogCaptureFixture) -> None:
    change, expected = CHANGES[what]
    world = World()
    caplog.set_level(logging.INFO, "metaoptim.recompiles")
    try:
        world()
        world()
        assert [r.getMessage() for r in caplog.records if "recompiled" in r.getMessage()] == []
        change(world)
        world()
    finally:
        globals()["factor"] = 1.0
        torch.set_default_dtype(torch.float64)
    (message,) = [r.getMessage() for r in caplog.records if "recompiled" in r.getMessage()]
    assert "loss recompiled in" in message
    assert message.endswith(f"since a guard failed: {expected}") or f"guard failed: {expected}" in message


def test_another_object_is_named(caplog: pytest.LogCaptureFixture) -> None:
    @metaoptim.compile(backend="eager")
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).square().mean()

    caplog.set_level(logging.INFO, "metaoptim.recompiles")
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    for net in nets:
        loss(net, torch.ones(5, 3))
    assert caplog.records[-1].getMessage().endswith("net: another module than before")


def test_a_compiled_step_names_its_guards(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(3, 2)
    inner = metaoptim.MetaSGD([net], lr=0.1)

    @metaoptim.compile(backend="eager")
    def step(x: Tensor) -> None:
        inner.step(net(x).square().mean())

    caplog.set_level(logging.INFO, "metaoptim.recompiles")
    with metaoptim.SlidingWindow():
        step(torch.ones(5, 3))
        step(torch.ones(5, 3))
        step(torch.ones(4, 3))
    with metaoptim.SlidingWindow(backward_hook=metaoptim.zero_nan_hook):
        step(torch.ones(4, 3))
    found = [r.getMessage().partition("guard failed: ")[2] for r in caplog.records]
    assert found == ["", "x: shape was (5, 3), is (4, 3)", "the window: with a backward_hook"]


def test_recompiling_again_and_again_warns_once() -> None:
    @metaoptim.compile(backend="eager")
    def loss(x: Tensor, temperature: float) -> Tensor:
        return (x * temperature).sum()

    for k in range(8):
        loss(torch.ones(2), float(k))
    with pytest.warns(
        UserWarning,
        match=r"loss has been recompiled 8 times.*temperature: was 7\.0, is 8\.0\..*torch\.tensor\(value\)",
    ):
        loss(torch.ones(2), 8.0)
    loss(torch.ones(2), 9.0)  # warnings are errors here: none follows


def test_artifacts_and_levels(capsys: pytest.CaptureFixture[str]) -> None:
    net, x = nn.Linear(3, 2), torch.ones(5, 3)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            inner.step(net(x).square().mean())
            return net(x).square().mean()

    def lines(spec: str) -> list[str]:
        logs.configure(spec)
        metaoptim.compile(loss, backend="eager")(net, x)
        return capsys.readouterr().err.splitlines()

    assert lines("") == []
    assert len(lines("recompiles")) == 1
    passes = lines("passes")
    assert [line.split()[1] for line in passes] == ["capture", *(p.name for p in PIPELINE[:-1]), "verify"]
    graphs, operators = lines("graphs"), lines("+graphs")
    assert all(line.startswith("[graphs] ") for line in graphs + operators)
    assert "program of 1 inner step" in graphs[0] and len(operators) > len(graphs)
    assert any("aten.addmm.default" in line for line in operators)
    assert not any("aten.addmm.default" in line for line in graphs)
    assert not lines("cache") and len(lines("+cache")) == 2  # both step graphs have been built before
    assert {line.split()[0] for line in lines("all")} == {"[recompiles]", "[passes]", "[graphs]"}


def test_unknown_names_are_refused_with_a_list() -> None:
    with pytest.raises(ValueError, match=r"METAOPTIM_LOGS: got 'guards', expected names.*\n  recompiles .*"):
        logs.configure("recompiles,guards")


def test_the_environment_variable() -> None:
    script = (
        "import torch, metaoptim\n"
        "f = metaoptim.compile(lambda x, k: (x * k).sum(), backend='eager')\n"
        "f(torch.ones(2), 1.0)\n"
        "f(torch.ones(2), 2.0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"METAOPTIM_LOGS": "recompiles"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = (line for line in done.stderr.splitlines() if line.startswith("[recompiles]"))
    assert "<lambda> compiled in" in first
    assert second.endswith("since a guard failed: k: was 1.0, is 2.0")


# -- whoever waits is told --------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stderr, told", [(Terminal(), True), (io.StringIO(), False)])
def test_a_terminal_is_told_what_takes_long_while_it_does(
    monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, told: bool
) -> None:
    monkeypatch.setattr(compile_graph, "SECONDS", 0.01)
    monkeypatch.setattr(sys, "stderr", stderr)
    with compile_graph.waiting("compiling ..."):
        end = time.monotonic() + (20 if told else 0.2)
        while not stderr.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        assert stderr.getvalue() == ("metaoptim: compiling ...\n" if told else "")
    with compile_graph.waiting("nothing that takes long"):
        pass
    assert "nothing" not in stderr.getvalue()


def test_a_progress_bar_of_the_user_makes_nothing_compile_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.fx runs graphs under bars of tqdm, among them the step of an optimizer of torch while it is captured."""
    tqdm = pytest.importorskip("tqdm")
    net = torch.nn.Linear(7, 3)
    x = torch.linspace(-1, 1, 14).view(2, 7)

    @metaoptim.compile(backend="eager")
    def loss(rate: Tensor) -> Tensor:
        inner = metaoptim.MetaAdamW([net], lr=rate, amsgrad=True)
        with metaoptim.SlidingWindow(offline=True):
            inner.step(net(x).square().mean())
            return net(x).square().mean()

    rate = torch.tensor(0.1, requires_grad=True)
    loss(rate)
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # each bar shown changes what is kept there
    loss(rate)
    assert sum(map(len, loss._specializations.known.values())) == 1
