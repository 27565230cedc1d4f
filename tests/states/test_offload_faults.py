"""Files that are damaged, disks that are full, and what exceptions and ended processes leave behind: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metaoptim
from forms import mlp
from metaoptim.runtime.states.disk import Files, clean
from metaoptim.runtime.states.slots import Slots
from offloading import files, loop
from problems import data

# -- faults ----------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "corrupted":
        content[len(content) // 2] ^= 1
    elif how == "truncated":
        del content[-3:]
    elif how == "longer":
        content += b"\0"
    path.write_bytes(content)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["corrupted", "truncated", "longer", "missing"])
def test_a_damaged_file_is_never_used(tmp_path: Path, how: str) -> None:
    engine, outer, own = loop(20, slots=2, offload=tmp_path)
    engine.tier.settle()
    for path in files(tmp_path):
        damage(path, how)
    with pytest.raises(
        metaoptim.StoreError, match=rf"position \d+ of the inner loop.*({how[:4]}|bytes|checksum|No such)"
    ):
        torch.autograd.grad(outer, own, retain_graph=True)
    with pytest.raises(metaoptim.StoreError, match=r"\.state, which holds.*Run the inner loop again"):
        torch.autograd.grad(outer, own)
    assert all(t.grad is None for t in own)


class Scene:
    """A network, its optimizer and gradients before a loop that fails, to compare with afterwards."""

    def __init__(self) -> None:
        self.net, self.lr = mlp(), torch.tensor(0.1, requires_grad=True)
        self.inner = metaoptim.MetaAdam([self.net], lr=self.lr)
        self.xs, self.ys = data(20)
        for p in self.net.parameters():
            p.grad = torch.ones_like(p)
        self.before = [p.detach().clone() for p in self.net.parameters()]

    def steps(self, **options: Any) -> None:
        """An online window with a backward in the middle."""
        with metaoptim.SlidingWindow(slots=1, **options):
            for t in range(20):
                self.inner.step(F.mse_loss(self.net(self.xs[t]), self.ys[t]))
                self.after(t)

    def compiled(self, **options: Any) -> Tensor:
        """The same as a compiled function."""

        @metaoptim.compile(backend="eager", slots=1, **options)
        def meta_loss(xs: Tensor, ys: Tensor) -> Tensor:
            with metaoptim.SlidingWindow() as window:
                for x, y in window.scan(xs, ys):
                    self.inner.step(F.mse_loss(self.net(x), y))
                return F.mse_loss(self.net(xs[0]), ys[0])

        return meta_loss(self.xs, self.ys)

    def after(self, t: int) -> None:
        """What happens after step t."""

    def check(self) -> None:
        """Everything is as it was."""
        for p, value in zip(self.net.parameters(), self.before, strict=True):
            assert torch.equal(p, value) and p.grad is not None and bool((p.grad == 1).all())
        assert not any(self.inner.state.values())


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk on which a file may have no more than a few bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", ["steps", "compiled"])
def test_a_full_disk(form: str, tmp_path: Path, full: None) -> None:
    scene = Scene()
    with pytest.raises(
        metaoptim.StoreError, match=r"position \d+ .* could not be written.*File too large.*Make room"
    ):
        getattr(scene, form)(offload=tmp_path)
    scene.check()
    assert not list(tmp_path.iterdir())


def test_the_last_write_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out at the end of the window, which then has not happened."""
    real, done, bad = Files.write, [0], [10**9]

    def write(self: Files, parts: Any) -> Any:
        done[0] += 1
        if done[0] == bad[0]:
            time.sleep(0.05)
            raise OSError(28, "No space left on device")
        return real(self, parts)

    monkeypatch.setattr(Files, "write", write)
    Scene().steps(offload=tmp_path)
    bad[0] = 2 * done[0]
    scene = Scene()
    with pytest.raises(metaoptim.StoreError, match="No space left on device"):
        scene.steps(offload=tmp_path)
    scene.check()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_block_removes_the_files(tmp_path: Path, error: type[BaseException]) -> None:
    scene, seen = Scene(), []

    def after(t: int) -> None:
        if t == 15:
            seen.extend(files(tmp_path))
            if error is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            raise error("in the block")

    scene.after = after  # type: ignore[method-assign]
    with pytest.raises(error) as caught:
        scene.steps(offload=tmp_path)
    assert seen and not list(tmp_path.iterdir())  # although the traceback has the block's variables still
    assert caught.traceback
    del caught
    scene.check()


def test_an_interrupt_of_a_compiled_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, real = Scene(), Slots._keep

    def keep(self: Slots, position: int, state: Any) -> None:
        real(self, position, state)
        if position == 16:
            raise KeyboardInterrupt  # a signal might be met by a finalizer, which drops it

    monkeypatch.setattr(Slots, "_keep", keep)
    with pytest.raises(KeyboardInterrupt):
        scene.compiled(offload=tmp_path)
    assert not list(tmp_path.iterdir())
    scene.check()


def test_a_loss_from_a_block_that_failed(tmp_path: Path) -> None:
    scene, kept = Scene(), []

    def after(t: int) -> None:
        if t == 12:
            kept.append(F.mse_loss(scene.net(scene.xs[0]), scene.ys[0]))
            raise ValueError("in the block")

    scene.after = after  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="in the block"):
        scene.steps(offload=tmp_path)
    with pytest.raises(metaoptim.StoreError, match="the window has ended with an exception"):
        kept[0].backward()


# -- processes -------------------------------------------------------------------------------------------------------

# One interpreter, which forks a process for each case: the folder of its files, what it does after offloading a loop.
SCRIPT = """
import os, pathlib, sys, time
import torch, metaoptim
here, *cases = sys.argv[1:]
lr = torch.tensor(0.1, requires_grad=True)

def loop(**options):
    net = torch.nn.Linear(3, 2)
    inner = metaoptim.MetaSGD([net], lr=lr, momentum=0.5)
    with metaoptim.SlidingWindow(offline=True, slots=1, **options) as window:
        for t in range(12):
            inner.step(net(torch.full((4, 3), 0.1 * t)).square().mean())
        return window._session.engine, net(torch.ones(1, 3)).square().mean()

loop()[1].backward()  # trace its steps, once
for number in range(0, len(cases), 2):
    if os.fork() == 0:
        break
else:
    for case in cases[::2]:
        os.wait()
    sys.exit()
engine, outer = loop(offload=here + "/" + cases[number])
log = pathlib.Path(here, f"{number // 2}.log")
log.write_text(f"{os.getpid()} ")

def say(text):
    with log.open("a") as file:
        file.write(text)

def wait():
    while not pathlib.Path(here, "go").exists():
        time.sleep(0.05)

exec(cases[number + 1])
"""
GO_ON = "wait(); outer.backward(); say(str(abs(float(lr.grad)) > 1e-6))"
FORK = """
if os.fork() == 0:
    try:
        outer.backward()
    except metaoptim.StoreError as error:
        say("refused " if "forked" in str(error) else str(error))
    sys.exit()
os.wait()
outer.backward()
say("differentiated")
"""
# In all cases the graph is alive in a global.
CASES = [
    ("shared", GO_ON),
    ("shared", GO_ON),
    ("exit", ""),
    ("raise", "raise RuntimeError"),
    ("interrupt", "outer.backward(); os.kill(os.getpid(), 2); wait()"),
    ("fork", FORK),
]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the processes of `CASES` are at work; each has a log, which begins with its number."""
    here = tmp_path_factory.mktemp("processes")
    driver = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(here), *(x for case in CASES for x in case)],
        env=os.environ | {"PYTHONPATH": str(Path(metaoptim.__file__).parents[1])},
        stderr=subprocess.DEVNULL,
    )
    yield here
    (here / "go").touch()
    driver.wait(60)


def until(condition: Any) -> None:
    """Wait for it."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)


def log_of(here: Path, case: int) -> list[str]:
    """What a process has said, when it has offloaded its loop."""
    log = here / f"{case}.log"
    until(lambda: log.exists() and " " in log.read_text())
    return log.read_text().split()


def owners(directory: Path) -> set[int]:
    """Processes that have files there."""
    return {int(path.parent.name.split("-")[1]) for path in files(directory)}


def ended(process: int) -> bool:
    """Whether a process is gone, with all its threads: until the last has ended, its files are open and locked."""
    try:
        states = [stat.read_text() for stat in Path(f"/proc/{process}/task").glob("*/stat")]
    except OSError:
        return True
    return all(state.rpartition(")")[2].split()[0] in "ZX" for state in states)


def test_what_a_killed_process_has_left_is_removed_by_the_next(processes: Path) -> None:
    shared = processes / "shared"
    killed, alive = (int(log_of(processes, case)[0]) for case in (0, 1))
    os.kill(killed, signal.SIGKILL)
    until(lambda: ended(killed))
    assert owners(shared) == {killed, alive}
    (shared / "metaoptim-of-somebody-else").mkdir()

    engine, outer, own = loop(12, slots=1, offload=shared)  # the next start
    assert owners(shared) == {alive, os.getpid()}
    torch.autograd.grad(outer, own)
    del engine, outer
    assert owners(shared) == {alive}

    (processes / "go").touch()
    until(lambda: ended(alive))
    assert log_of(processes, 1)[1] == "True"  # it had its files still, and has removed them at its end
    assert [p.name for p in shared.iterdir()] == ["metaoptim-of-somebody-else"]


@pytest.mark.parametrize("case", range(2, len(CASES)), ids=[name for name, _ in CASES[2:]])
def test_files_are_removed_at_exit(processes: Path, case: int) -> None:
    number = int(log_of(processes, case)[0])
    until(lambda: ended(number))
    assert not list((processes / CASES[case][0]).iterdir())
    if CASES[case][1] == FORK:  # the child, which has no thread to ask, has left its parent's files alone
        assert log_of(processes, case)[1:] == ["refused", "differentiated"]


def test_what_somebody_has_locked_is_left_alone(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    for name in ("metaoptim-1-left", "metaoptim-2-locked", "metaoptim-other"):
        (tmp_path / name).mkdir()
    (tmp_path / "metaoptim-1-left" / "lock").touch()
    with open(tmp_path / "metaoptim-2-locked" / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clean(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["metaoptim-2-locked", "metaoptim-other"]
    clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["metaoptim-other"]


def test_the_thread_ends_with_the_window(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        engine, outer, _ = loop(12, slots=1, offload=tmp_path)
        (thread,) = set(threading.enumerate()) - before
        del engine, outer
        assert not thread.is_alive()
