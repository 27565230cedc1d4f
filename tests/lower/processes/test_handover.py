"""Compiled forms are made in other processes, and taken over while a loop goes on."""

from __future__ import annotations

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import cpp_builder
from torch._inductor.exc import CppCompileError

import metaoptim
from metaoptim.compiler.ir.step import FlatGraph, StepGraph
from metaoptim.compiler.ir.tensors import tensor_spec
from metaoptim.compiler.lower import backends, derivatives
from metaoptim.compiler.lower.files import artifacts
from metaoptim.compiler.lower.files.artifacts import artifact_of, lifted
from metaoptim.compiler.lower.library import library
from metaoptim.compiler.lower.processes import background, handover
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine.engine import Engine
from oracle import agree

STEPS = 8
XS = torch.randn(STEPS, 4, 3, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nobody waits, and the cache folder is empty."""
    monkeypatch.delenv("METAOPTIM_WAIT")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(handover, "_told", False)
    pool = background._pool
    monkeypatch.setattr(background, "_pool", None)
    library.clear()
    yield tmp_path
    library.clear()
    if background._pool is not None:
        background._pool.close()
    background._pool = pool


def problem(wrap: Callable, **options: Any) -> Callable[[], dict[str, Tensor]]:
    torch.manual_seed(0)
    net, rate = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        torch.tensor(0.3, requires_grad=True),
    )

    @wrap
    def meta_loss(net: nn.Module, rate: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=rate, momentum=0.9)
        with metaoptim.SlidingWindow(offline=True, **options) as window:
            for x in xs if options else window.scan(xs):
                inner.step(net(x).square().mean())
            return net(xs[0]).square().mean()

    def gradients() -> dict[str, Tensor]:
        leaves = [*net.parameters(), rate]
        return dict(zip("abcde", torch.autograd.grad(meta_loss(net, rate, XS), leaves), strict=True))

    gradients.of = meta_loss  # type: ignore[attr-defined]
    gradients.explain = lambda: meta_loss.explain(net, rate, XS)  # type: ignore[attr-defined]
    gradients.now = lambda: meta_loss.compile_now(net, rate, XS)  # type: ignore[attr-defined]
    return gradients


def expected() -> dict[str, Tensor]:
    return problem(lambda fn: fn, strategy="full_tape")()


def graph_of(program: Callable[[fx.Graph], Any], inputs: int) -> FlatGraph:
    graph = fx.Graph()
    graph.output((program(graph, *[graph.placeholder(f"input_{i}") for i in range(inputs)]),))  # type: ignore[call-arg]
    return FlatGraph(graph, {"constant": torch.tensor([2.0, 3.0])})


def doubled(graph: fx.Graph, x: fx.Node) -> fx.Node:
    made = graph.call_function(torch.ops.aten.ones.default, ([2],), {"dtype": torch.float64})
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, graph.get_attr("constant")))
    return graph.call_function(torch.ops.aten.add.Tensor, (product, made))


def steps_of(fn: Any) -> list[StepGraph]:
    return [g for known in fn._specializations.known.values() for s in known for g in s.program.step_graphs]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_first_call_does_not_wait_and_later_ones_run_compiled(meanwhile: Path) -> None:
    gradients = problem(metaoptim.compile(backend="inductor"))
    agree(gradients(), expected())
    steps = steps_of(gradients.of)  # type: ignore[attr-defined]
    assert not any(lowering.backend == "inductor" for s in steps for _, lowering in s.derived.lowered)
    coming = {key: c for s in steps for key, c in s.derived.coming.items()}
    assert {kind for kind, _ in coming} == {"replay", "vjp"}
    for c in coming.values():
        assert isinstance(c, handover.Handover) and c.job is not None
        c.job.wait()
        assert c.complaint is None
    agree(gradients(), expected())
    assert {k for s in steps for k, lowering in s.derived.lowered if lowering.backend == "inductor"} == {
        "replay",
        "vjp",
    }
    assert re.search(
        r"compiled +step_.: (vjp|replay) since ..:..:.., (vjp|replay) since", str(gradients.explain())
    )  # type: ignore[attr-defined]
    assert len(list((meanwhile / "metaoptim-3").glob("*.so"))) == len(coming)


def test_compile_now_waits(meanwhile: Path) -> None:
    gradients = problem(metaoptim.compile(backend="inductor"))
    gradients.now()  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # by inductor
        agree(gradients(), expected())
    steps = steps_of(gradients.of)  # type: ignore[attr-defined]
    repeated = [s for s in steps if s.derived.coming]
    assert repeated and {how.backend for s in repeated for _, how in s.derived.lowered} == {"inductor"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("budget", [150_000, 600_000])
def test_a_budget_holds_while_compiled_forms_are_taken_over(meanwhile: Path, budget: int) -> None:
    """To check one takes memory: that is planned, between calls."""
    torch.manual_seed(0)
    net, rate = (
        nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 1)),
        torch.tensor(0.3, requires_grad=True),
    )
    xs = torch.randn(40, 8, 20)

    @metaoptim.compile(memory_budget=budget)
    def meta_loss(net: nn.Module, rate: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaAdam([net], lr=rate)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x in window.scan(xs):
                inner.step(net(x).square().mean())
            return net(xs[0]).square().mean()

    def peak() -> int:
        forward, backward = AllocatorMeter(), AllocatorMeter()
        with forward:
            loss = meta_loss(net, rate, xs)
        with backward:
            loss.backward()
        return max(forward.peak, forward.held + backward.peak)

    meta_loss(net, rate, xs).backward()
    assert peak() <= budget
    for s in steps_of(meta_loss):
        for coming in s.derived.coming.values():
            coming.wait()
    assert peak() <= budget and peak() <= budget
    compiled = any(how.backend == "inductor" for s in steps_of(meta_loss) for _, how in s.derived.lowered)
    assert compiled == (budget > 500_000)  # where there is room to check


def test_a_compiler_that_is_killed_leaves_no_file_that_is_cut_off(tmp_path: Path) -> None:
    with backends.options():
        for ends in (1, 0):
            place = tmp_path / f"made{ends}"
            command = shlex.join(["sh", "-c", f'printf half > "$2"; exit {ends}', "x", "-o", str(place)])
            with pytest.raises(CppCompileError) if ends else nullcontext():
                cpp_builder.run_compile_cmd(command, str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["made0"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_derivatives_of_an_ordinary_window_are_compiled_once_that_pays(
    meanwhile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = problem(lambda fn: fn, slots=STEPS)
    agree(gradients(), expected())
    assert not any(s.derived.coming for s in library.steps())
    monkeypatch.setattr(derivatives, "PAYS", 100)
    agree(gradients(), expected())
    for coming in [c for s in library.steps() for c in s.derived.coming.values()]:
        coming.wait()
        assert coming.complaint is None
    agree(gradients(), expected())
    kinds = {kind for s in library.steps() for kind, how in s.derived.lowered if how.backend == "inductor"}
    assert kinds == {"vjp"}
    library.clear()
    for _ in range(2):
        agree(problem(lambda fn: fn, memory_budget="1MiB")(), expected())
    assert not any(how.backend == "inductor" for s in library.steps() for _, how in s.derived.lowered)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_graphs_that_run_once_a_call_are_compiled_once_that_pays(
    meanwhile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(ids: set[int], steps: list[StepGraph]) -> set[str]:
        return {k for s in steps if id(s) in ids for k, how in s.derived.lowered if how.backend == "inductor"}

    gradients = problem(metaoptim.compile(backend="inductor"))
    agree(gradients(), expected())
    steps = steps_of(gradients.of)  # type: ignore[attr-defined]
    once = {id(s) for s in steps} - {id(s) for s in steps if s.derived.coming}
    assert once and not any(s.derived.coming for s in steps if id(s) in once)
    monkeypatch.setattr(derivatives, "ASKED", 1)
    assert not run(once, steps)
    for _ in range(2):  # each graph when it has run twice
        agree(gradients(), expected())
        for coming in [c for s in steps for c in s.derived.coming.values()]:
            coming.wait()
            assert coming.complaint is None
    agree(gradients(), expected())
    assert run(once, steps) == {"replay", "vjp"}
    library.clear()
    budget = problem(metaoptim.compile(backend="inductor", memory_budget="1MiB"))
    for _ in range(2):
        agree(budget(), expected())
    steps = steps_of(budget.of)  # type: ignore[attr-defined]
    assert sum(bool(s.derived.coming) for s in steps) == len(steps) - len(once)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_goes_over_within_a_window(meanwhile: Path) -> None:
    """What a call has run with, its replay runs with too."""

    def gradients(wrap: Callable, waiting: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net, w = (
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
            torch.tensor(0.3, requires_grad=True),
        )
        inner = metaoptim.MetaSGD([net], lr=0.1)
        step = wrap(lambda x: inner.step(net(x).square().mean() * w))
        with metaoptim.SlidingWindow(slots=2):
            for t, x in enumerate(XS):
                step(x)
                if t == STEPS // 2 and waiting:
                    (found,) = [s for s in library.steps() if s.derived.coming]
                    for c in found.derived.coming.values():
                        c.wait()
            net(XS[0]).square().mean().backward()
        return [w.grad, *(p.grad for p in net.parameters())]  # type: ignore[list-item]

    found = gradients(metaoptim.compile(backend="inductor"), True)
    for a, b in zip(found, gradients(lambda fn: fn, False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    kinds = {kind for s in library.steps() for kind, how in s.derived.lowered if how.backend == "inductor"}
    assert kinds == {"replay", "vjp"}


@pytest.mark.parametrize("at", range(STEPS + 1))
def test_a_replay_runs_what_its_position_has_run_with(at: int, meanwhile: Path, monkeypatch: Any) -> None:
    """The compiled form, here one that is a little off, is taken over at every position in turn."""
    forward, replayed, replays = dict[int, Tensor](), list[int](), [0]
    after = Engine._after

    class Stub:
        complaint = None

        def __init__(self, graph: FlatGraph, specs: Any) -> None:
            pass

        @property
        def ended(self) -> bool:
            return replays[0] > at

    def seen(self: Engine, position: int, *args: Any) -> Any:
        replays[0] += 1
        state = after(self, position, *args)
        value = torch.cat([t.flatten() for t in state if isinstance(t, Tensor)])
        if position in forward:
            replayed.append(position)
            assert torch.equal(forward[position], value), position
        forward.setdefault(position, value)
        return state

    def off(flat: FlatGraph, *args: Any) -> Callable:
        return lambda *inputs: [t if t is None else t + 1e-3 for t in flat(*inputs)]

    monkeypatch.setattr(derivatives, "Handover", Stub)
    monkeypatch.setattr(derivatives, "compiled", off)
    monkeypatch.setattr(Engine, "_after", seen)
    problem(metaoptim.compile(backend="inductor", slots=2))()
    assert len(replayed) > STEPS / 2


def test_constants_and_factories_are_sent(meanwhile: Path) -> None:
    """A graph's constants are inputs of its compiled form; what it makes anew is made anew."""
    flat = graph_of(doubled, 1)
    x = torch.rand(2)
    given = handover.Handover(flat, [tensor_spec(x)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # by inductor
        program = given.program()
    assert program is not None
    for _ in range(2):
        torch.testing.assert_close(program(x)[0], x * torch.tensor([2.0, 3.0]) + 1)
    again = handover.Handover(flat, [tensor_spec(x)])
    assert again.job is None and again.path == given.path
    assert artifact_of(lifted(flat)[0], [tensor_spec(x.float())]) != given.path


def test_a_cache_folder_that_cannot_be_written(meanwhile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call goes on with graphs as they are, and says so once."""
    (meanwhile / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(meanwhile / "file"))
    gradients = problem(metaoptim.compile(backend="inductor"))
    with pytest.warns(
        RuntimeWarning, match=r"could not be compiled in the background .*NotADirectoryError"
    ) as told:
        agree(gradients(), expected())
        agree(gradients(), expected())
    assert len(told) == 1


def test_a_full_disk(meanwhile: Path) -> None:
    """The process that compiles can write small files alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, hard))
    try:
        background.prepare()
        while background._pool is None or background._pool._processes[0] is None:
            time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gradients = problem(metaoptim.compile(backend="inductor"))
    agree(gradients(), expected())
    for coming in [c for s in steps_of(gradients.of) for c in s.derived.coming.values()]:  # type: ignore[attr-defined]
        coming.wait()
        assert coming.complaint is not None
    with pytest.warns(RuntimeWarning, match="could not be compiled in the background and runs as it is"):
        agree(gradients(), expected())
    assert not [*(meanwhile / "metaoptim-3").glob("*.so")]


ALONE = """
import torch
from metaoptim.compiler.ir.step import FlatGraph
from metaoptim.compiler.ir.tensors import tensor_spec
from metaoptim.compiler.lower.processes.handover import Handover
graph, x = torch.fx.Graph(), torch.arange(3.0)
graph.output((graph.call_function(torch.ops.aten.sin.default, (graph.placeholder("x"),)),))
print(Handover(FlatGraph(graph, {}), [tensor_spec(x)]).program()(x)[0].equal(x.sin()))
"""


def test_two_processes_with_one_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", ALONE], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0] for process in both] == ["True\n"] * 2
    assert not any(process.returncode for process in both)
    assert len([*(tmp_path / "metaoptim-3").iterdir()]) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ctrl_c_while_a_call_waits(meanwhile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAOPTIM_WAIT", "1")

    def waits() -> bool:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        while frame is not None and frame.f_code is not background.Job.wait.__code__:
            frame = frame.f_back  # type: ignore[assignment]
        return frame is not None

    def interrupt() -> None:
        while not (waits() or over.wait(0.01)):
            pass
        if not over.is_set():  # or another test would be interrupted
            os.kill(os.getpid(), signal.SIGINT)

    gradients, over = problem(metaoptim.compile(backend="inductor")), threading.Event()
    # a shell has its background commands ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            gradients()
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)
    agree(gradients(), expected())  # what had begun to be compiled goes on
    kinds = {kind for s in library.steps() for kind, how in s.derived.lowered if how.backend == "inductor"}
    assert kinds == {"forward", "backward"}


def test_a_process_that_is_killed(meanwhile: Path) -> None:
    job = background.Job(str(meanwhile / "never"))
    background.submit(job, b"", waiting=False)
    pool = background._pool
    assert pool is not None
    while not pool._processes or pool._processes[0] is None:
        time.sleep(0.01)
    os.killpg(pool._processes[0].pid, signal.SIGKILL)
    job.wait()
    assert job.complaint is not None and "has ended" in job.complaint
    after = background.Job(str(meanwhile / "never"))
    background.submit(after, b"no graph", waiting=False)
    after.wait()  # by a process that was started anew
    assert after.complaint is not None and "UnpicklingError" in after.complaint


def test_a_fork_does_not_wait_for_its_parents_processes(meanwhile: Path) -> None:
    job = background.Job(str(meanwhile / "never"))
    child = os.fork()
    if not child:
        job.wait()
        os._exit(0 if job.complaint and "forked" in job.complaint and background._pool is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and not job.ended


SCRIPT = """
import atexit, sys, time
atexit.register(time.sleep, 0.5)  # after all else
from metaoptim.compiler.lower.processes import background
for _ in range(2):  # the second one waits
    background.submit(background.Job("never"), b"", waiting=False)
while not background._pool._processes or background._pool._processes[0] is None:
    time.sleep(0.01)
print(background._pool._processes[0].pid, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_nothing_is_left_running(how: str) -> None:
    environment = {**os.environ, "OF_THIS_TEST": str(uuid.uuid4())}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        worker = int(process.stdout.readline())
        assert worker in processes_with(environment["OF_THIS_TEST"])
        if how == "killed":
            process.kill()
        process.communicate("")
    for _ in range(600 if how == "killed" else 1):
        if not processes_with(environment["OF_THIS_TEST"]):
            return
        time.sleep(0.1)
    pytest.fail("the process that compiles goes on, or another one")


def processes_with(mark: str) -> list[int]:
    """The processes that have ``mark`` in their environment, and go on."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inputs_that_are_laid_out_in_memory_with_gaps(meanwhile: Path) -> None:
    """A compiled graph reads by their strides: what it is checked with has these strides too. And negated views."""
    torch.manual_seed(0)
    net, rate = nn.Linear(3, 2), torch.tensor(0.1, requires_grad=True)

    def loss(net: nn.Module, rate: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=rate)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x in window.scan(xs) if fn is not loss else xs:
                inner.step((net(x) * x.sum(1, keepdim=True)).square().mean())
            return net(xs[0]).square().mean()

    for xs in (
        torch.randn(5, 3, 8000).permute(2, 0, 1)[:8],
        torch.randn(8, 5, 3, dtype=torch.complex128).conj().imag,
    ):
        fn: Any = loss
        (want,) = torch.autograd.grad(fn(net, rate, xs), rate)
        fn = metaoptim.compile(loss, self_check=xs.is_contiguous() or not xs.is_neg())
        fn.compile_now(net, rate, xs)
        (got,) = torch.autograd.grad(fn(net, rate, xs), rate)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_that_is_cut_off_is_made_again(meanwhile: Path) -> None:
    flat, x = graph_of(doubled, 1), torch.rand(2)
    path = Path(handover.Handover(flat, [tensor_spec(x)]).path)
    first = handover.Handover(flat, [tensor_spec(x)])
    first.wait()
    whole = path.read_bytes()
    for left in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:left])
        with pytest.raises(ValueError, match="cut off"):
            artifacts.load(str(path))
    again = handover.Handover(flat, [tensor_spec(x)]).program()
    assert again is not None and path.stat().st_size > len(whole) // 2
    torch.testing.assert_close(again(x)[0], x * torch.tensor([2.0, 3.0]) + 1)
