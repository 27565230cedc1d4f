"""The benchmark beside other libraries, at tiny sizes: our forms, the eager tape, and what reports say of faults."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
MODULES = ("measure", "ours", "problems", "report", "torch_peers", "torch_problems")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The benchmark's modules by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def worst(peers: dict[str, Any], found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest relative error; infinite where something is not finite."""
    by_name = peers["measure"].errors(found, expected)
    return max(float("inf") if error is None else error for error in by_name.values())


@pytest.mark.parametrize("name", ["digits-sgd", "digits-adam", "actor-critic", "conv4", "gpt"])
def test_the_eager_tape_and_a_window_have_the_same_gradient(peers: dict[str, Any], name: str) -> None:
    """Again in the second call: nothing of the first is left in networks, optimizers and gradients."""
    make, _, horizon = peers["problems"].PROBLEMS[name]
    problem = make(horizon, "tiny")
    expected = peers["torch_peers"].eager_tape(problem, torch.float64)()
    assert all(np.linalg.norm(g) > 0 for g in expected.values())
    for gradient in (peers["torch_peers"].eager_tape(problem), peers["ours"].window(problem, slots=2)):
        assert worst(peers, gradient(), expected) < 1e-3
        assert worst(peers, gradient(), expected) < 1e-3


@pytest.mark.parametrize("name", ["digits-sgd", "actor-critic"])
@pytest.mark.parametrize("form", ["compiled_step", "compiled"])
def test_compiled_forms_have_that_gradient_too(peers: dict[str, Any], name: str, form: str) -> None:
    make, _, horizon = peers["problems"].PROBLEMS[name]
    problem = make(horizon, "tiny")
    expected = peers["torch_peers"].eager_tape(problem, torch.float64)()
    gradient = getattr(peers["ours"], form)(problem, backend="eager")
    assert worst(peers, gradient(), expected) < 1e-3
    assert worst(peers, gradient(), expected) < 1e-3


def test_a_problem_survives_its_file(peers: dict[str, Any], tmp_path: Path) -> None:
    problem = peers["problems"].gpt(3, "tiny")
    problem.save(tmp_path / "problem.npz")
    loaded = peers["problems"].Problem.load(tmp_path / "problem.npz")
    assert (loaded.model, loaded.heads, loaded.horizon, loaded.windows) == ("gpt", 2, 3, 1)
    for part in ("theta", "meta", "steps", "outer"):
        before, after = getattr(problem, part), getattr(loaded, part)
        assert list(before) == list(after)
        assert all(np.array_equal(before[key], after[key]) for key in before)


def test_on_a_gpu_the_clock_on_the_wall_counts(peers: dict[str, Any]) -> None:
    result = {
        "problem": "gpt",
        "T": 4,
        "peer": "ours-graphs",
        "device": "cuda",
        "failure": None,
        "imports": 9.0,
    }
    measured = {"first": {"wall": 2.0}, "steady": {"cpu": 1.0, "wall": 3.0}, "memory": {"above": 5.0}}
    found = peers["report"].numbers({**result, "cold": measured})
    assert (found["steady"], found["memory"]) == (3.0, 5.0)
    found = peers["report"].numbers({**result, "device": "cpu", "cold": measured, "imports": 1.0})
    assert (found["steady"], found["memory"]) == (1.0, 4.0)


def test_faults_are_shown(peers: dict[str, Any]) -> None:
    report = peers["report"]
    result = {"problem": "gpt", "T": 4, "peer": "jax", "failure": None, "unchecked": None, "imports": 1.0}
    measured = {"first": {"wall": 2.0}, "steady": {"cpu": 1.0}, "memory": {"above": 5.0}}
    for errors, said in (
        ({"loss": 1e-7, "log_lr": 1e-5}, ""),
        ({"loss": 1e-7, "log_lr": 0.5}, "WRONG: the gradient of log_lr is off"),
        ({"loss": 1e-7, "log_lr": None}, "WRONG: the gradient of log_lr is not finite"),
    ):
        one = {**result, "warm": {**measured, "errors": errors}, "cold": {**measured, "errors": errors}}
        assert report.remark(one) == said
        assert report.numbers(one)["memory"] == 4.0
    late = {**result, "cold": measured, "failure": "more than 300 s", "unchecked": "ended by SIGKILL"}
    table = report.tables({"machine": _machine(), "small": False, "results": [late]})
    row = next(line for line in table.splitlines() if line.startswith("| JAX, scan |"))
    assert "| 2.00 | – |" in row
    assert "failed: more than 300 s; not checked, as the reference failed: ended by SIGKILL" in row


def _machine() -> dict[str, Any]:
    return {"cpu": "?", "cores": 1, "python": "3", "date": "today", "commit": "?"}


@pytest.mark.slow
def test_a_run_writes_numbers_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    def run(*arguments: str) -> list[dict[str, Any]]:
        command = [sys.executable, str(FOLDER / "run.py"), "--small", "--out", str(tmp_path), *arguments]
        path = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}  # with a lock of its own
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "results.json").read_text())["results"]

    (first,) = run("--problem", "digits-sgd", "--peer", "eager-tape", "--T", "2")
    assert first["failure"] is None and first["unchecked"] is None
    assert max(first["cold"]["errors"].values()) < 1e-3
    assert first["cold"]["first"]["wall"] > 0 and first["cold"]["memory"]["peak"] > 0
    both = run("--peer", "eager-tape,ours-window", "--T", "2", "--resume", "--limit", "0.01")
    assert both[0] == first
    assert both[1]["failure"] == "more than 0.01 s"
    assert "more than 0.01 s" in (tmp_path / "table.md").read_text()
