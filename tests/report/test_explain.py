"""explain: its numbers against runs, its names against the caller's, and that it touches nothing."""

from __future__ import annotations

import copy
import io
import itertools
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.optim.base.alive import live_optimizers
from metaoptim.report.report import Report
from metaoptim.runtime.budget.meter import AllocatorMeter
from metaoptim.runtime.engine import function as runtime
from metaoptim.runtime.states.schedule import extra_forwards

KEYS = {
    "function", "form", "horizon", "calls", "num_programs", "window", "offline", "slots",
    "memory_budget", "minimum_budget", "offload", "plan", "kept_states", "saved_calls",
    "extra_forwards", "recompute_factor", "state_bytes", "transient_bytes", "predicted_peak_bytes",
    "predicted_forward_bytes", "measured_peak_bytes", "gradient_targets", "unreachable", "paths",
    "passes", "shapes", "program",
}  # fmt: skip


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(*sizes: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def scanned(slots: int | None = None, optimizer: Any = metaoptim.MetaAdam, **window: Any) -> Any:
    """A compiled function of (net, log_lr, xs, ys): T steps, then the loss on the first batch."""

    @metaoptim.compile(backend="eager", slots=slots)
    def meta_loss(net: Any, log_lr: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        inner = optimizer([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(**{"offline": True, **window}) as w:
            for x, y in w.scan(xs, ys):
                inner.step(F.mse_loss(net(x), y))
            return F.mse_loss(net(xs[0]), ys[0])

    return meta_loss


def arguments(steps: int, net: nn.Module | None = None) -> tuple[Any, ...]:
    net = network(3, 4, 2) if net is None else net
    return net, torch.tensor(-3.0, requires_grad=True), numbers(steps, 5, 3), numbers(steps, 5, 2, seed=2)


# -- a run confirms it -----------------------------------------------------------------------------------------------


class _Watched(runtime.Engine):
    made: ClassVar[list[Any]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made.append(self)


@pytest.mark.parametrize(("slots", "window"), [(None, None), (3, None), (2, 4)])
def test_prediction_equals_what_a_run_takes(
    slots: int | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes by the allocator's own count, to a few scalars; replays and derivatives exactly."""
    fn = scanned(slots, window=window)
    net = network(16, 64, 64, 4)
    lr, xs, ys = torch.tensor(-6.0, requires_grad=True), numbers(6, 32, 16), numbers(6, 32, 4, seed=2)
    report = fn.explain(net, lr, xs, ys)
    with pytest.warns(metaoptim.UnreachableWarning) if window else nullcontext():
        fn(net, lr, xs, ys).backward()  # compiles
    net.zero_grad()
    lr.grad = None
    monkeypatch.setattr(runtime, "Engine", _Watched)
    _Watched.made.clear()
    with AllocatorMeter() as forward:
        loss = fn(net, lr, xs, ys)
    (engine,) = _Watched.made
    assert report.calls == engine.replays
    del loss, engine
    _Watched.made.clear()
    with AllocatorMeter() as meter, pytest.warns(metaoptim.UnreachableWarning) if window else nullcontext():
        loss = fn(net, lr, xs, ys)
        loss.backward()
    (engine,) = _Watched.made
    assert engine.replays - report.calls == report.extra_forwards
    assert report.predicted_peak_bytes == pytest.approx(meter.peak, rel=0.002)
    assert report.predicted_forward_bytes == pytest.approx(forward.peak, rel=0.002)
    assert report.predicted_peak_bytes > report.predicted_forward_bytes > report.state_bytes


@pytest.mark.parametrize("slots", [None, 1, 2, 5])
def test_extra_forwards_are_those_of_the_schedule(slots: int | None) -> None:
    report = scanned(slots).explain(*arguments(20))
    assert report.horizon == 20 and report.calls == 22  # with what comes before and after
    expected = 0 if slots is None else extra_forwards(22, slots)
    assert report.extra_forwards == expected
    assert report.recompute_factor == 1 + expected / 22
    assert report.kept_states == (22 if slots is None else slots)
    drawing = report.schedule()
    assert (drawing.count(">"), drawing.count("<")) == (22 + expected, 22)
    assert report.plan == ("all states" if slots is None else "scheduled")


def test_programs_do_not_depend_on_the_horizon_and_memory_not_on_it_under_slots() -> None:
    reports = [scanned(4).explain(*arguments(steps)) for steps in (10, 100, 1000)]
    assert [r.horizon for r in reports] == [10, 100, 1000]
    assert len({r.num_programs for r in reports}) == 1
    assert len({r.state_bytes for r in reports}) == 1
    assert len({tuple(s["operators"]) for r in reports for s in [r.shapes["step_c"]]}) == 1
    assert reports[2].predicted_peak_bytes == reports[1].predicted_peak_bytes
    assert "loop 997 times" in reports[2].program


def test_bytes_by_hand() -> None:
    """Plain SGD on a linear map of n inputs: a state is its weights, n numbers."""
    n = 50
    net, data = nn.Linear(n, 1, bias=False), numbers(6, 4, n)

    @metaoptim.compile(backend="eager")
    def meta_loss(net: Any, data: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.01)
        with metaoptim.SlidingWindow(offline=True) as w:
            for x in w.scan(data):
                inner.step(net(x).square().mean())
            return net(data[0]).square().mean()

    report = meta_loss.explain(net, data)
    assert report.state_bytes == 8 * n  # the loss takes the place of a state that is read no more
    assert report.shapes["step_b"]["inputs"]["theta"] == {
        "count": 1,
        "bytes": 8 * n,
        "shapes": f"float64 1×{n}",
    }
    assert report.shapes["step_b"]["inputs"]["scan"] == {
        "count": 1,
        "bytes": 32 * n,
        "shapes": f"float64 4×{n}",
    }
    assert report.shapes["step_b"]["calls"] == 6 and report.shapes["step_b"]["steps"] == 1
    # a copy of theta_0 and six further states, at the end of the forward pass
    assert 7 * 8 * n < report.predicted_forward_bytes < 7 * 8 * n + 40 * n


# -- names -----------------------------------------------------------------------------------------------------------

weight_of_the_module = torch.tensor(0.2, requires_grad=True)


def test_gradient_targets_and_unreachable_have_the_callers_names() -> None:
    another = metaoptim.MetaSGD([nn.Linear(2, 2)])  # alive, and none of this function's
    assert another.param_groups
    net, head = network(3, 4, 2), nn.Linear(2, 2)
    closed = torch.tensor(0.5, requires_grad=True)
    idle = torch.ones((), requires_grad=True)

    @metaoptim.compile(backend="eager")
    def meta_loss(
        net: Any, learnt: dict[str, Tensor], pair: list[Tensor], xs: Tensor, *rest: Tensor, **more: Tensor
    ) -> Any:
        inner = metaoptim.MetaSGD([net], lr=closed.exp())
        with metaoptim.SlidingWindow(offline=True):
            for t in range(2):
                out = head(net(xs[t])) * learnt["scale"]
                aside = out * pair[1]  # never used
                with torch.no_grad():
                    shift = learnt["shift"] * 2
                inner.step((out + shift).square().mean() * weight_of_the_module.exp() + rest[0].detach())
                aside.sum()
            return net(xs[0]).square().mean() * more["factor"]

    learnt = {"scale": torch.ones(2, requires_grad=True), "shift": torch.ones(2, requires_grad=True)}
    pair = [torch.ones(2), torch.ones(2, requires_grad=True)]
    more = {"factor": torch.ones((), requires_grad=True), "idle": idle}
    rest = torch.ones((), requires_grad=True)
    report = metaoptim.explain(meta_loss)(net, learnt, pair, numbers(2, 5, 3), rest, **more)
    own = [f"net.{n}" for n, _ in net.named_parameters()]
    assert set(report.gradient_targets) == {
        *own, "learnt['scale']", "factor", "closed", "head.weight", "head.bias", "weight_of_the_module",
    }  # fmt: skip
    reasons = {name: report.paths[name] for name in report.unreachable}
    assert reasons.pop("idle") == "not read"
    assert reasons.pop("pair[1]") == "read, but no result depends on it"
    assert set(reasons) == {"learnt['shift']", "rest[0]"}
    assert all("no_grad" in reason for reason in reasons.values())
    # and so it comes out
    meta_loss(net, learnt, pair, numbers(2, 5, 3), rest, **more).backward()
    given = {
        **{f"net.{n}": p for n, p in net.named_parameters()},
        **{f"head.{n}": p for n, p in head.named_parameters()},
        "learnt['scale']": learnt["scale"], "learnt['shift']": learnt["shift"], "pair[1]": pair[1], "idle": idle,
        "rest[0]": rest, "factor": more["factor"], "closed": closed, "weight_of_the_module": weight_of_the_module,
    }  # fmt: skip
    moved = {n for n, t in given.items() if t.grad is not None and bool((t.grad != 0).any())}
    assert moved == set(report.gradient_targets)
    weight_of_the_module.grad = None


def test_online_parameters_and_those_beyond_the_window_are_told_apart() -> None:
    online = scanned(offline=False).explain(*arguments(4))
    assert online.gradient_targets == ["log_lr"] and not online.offline
    assert {online.paths[n] for n in online.unreachable} == {
        "the window is online: its networks' own parameters are cut off at entry"
    }
    short = scanned(window=2).explain(*arguments(4))
    with pytest.raises(metaoptim.WindowError, match="truncated to window=2"):
        short.schedule()
    assert short.gradient_targets == ["log_lr"] and short.window == 2
    assert {short.paths[n] for n in short.unreachable} == {
        "only read more than window=2 super-steps before the loss"
    }
    whole = scanned(window=4).explain(*arguments(4))
    assert len(whole.gradient_targets) == 5 and not whole.unreachable


def test_methods_and_plain_functions() -> None:
    class Learner:
        def __init__(self) -> None:
            self.net = network(3, 2)

        @metaoptim.compile(backend="eager")
        def loss(self, lr: Tensor, xs: Tensor) -> Tensor:
            inner = metaoptim.MetaSGD([self.net], lr=lr)
            with metaoptim.SlidingWindow(offline=False) as w:
                for x in w.scan(xs):
                    inner.step(self.net(x).square().mean())
                return self.net(xs[0]).square().mean()

    learner, lr = Learner(), torch.tensor(0.1, requires_grad=True)
    report = learner.loss.explain(lr, numbers(3, 5, 3))
    assert report.gradient_targets == ["lr"] and report.horizon == 3
    assert metaoptim.explain(learner.loss)(lr, numbers(3, 5, 3)).gradient_targets == ["lr"]
    assert metaoptim.explain(learner.loss, verbose=True)(lr, numbers(3, 5, 3)).verbose
    assert learner.loss(lr, numbers(3, 5, 3)).requires_grad

    def plain(net: Any, xs: Tensor) -> Tensor:
        return net(xs).square().mean()

    report = metaoptim.explain(plain)(learner.net, numbers(5, 3))
    assert report.horizon == 0 and report.gradient_targets == ["net.0.weight", "net.0.bias"]


# -- nothing is touched ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [True, False])
def test_nothing_is_touched(offline: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    inner = metaoptim.MetaAdam([net], lr=0.1)
    xs, w = numbers(3, 5, 3), torch.ones((), requires_grad=True)
    with metaoptim.SlidingWindow():
        inner.step(net(xs[0]).square().mean())  # so that the optimizer has a state
    net(xs[0]).sum().backward()
    own = list(net.parameters())
    before = copy.deepcopy((net.state_dict(), inner.state_dict(), [p.grad for p in own]))
    stream = torch.get_rng_state()

    @metaoptim.compile(backend="eager")
    def meta_loss(w: Tensor) -> Tensor:
        with metaoptim.SlidingWindow(offline=offline) as window:
            for x in window.scan(xs):
                inner.step(net(x).square().mean() * w)
            return net(xs[0]).square().mean()

    report = meta_loss.explain(w)
    assert report.horizon == 3 and "w" in report.gradient_targets
    assert all(p is q for p, q in zip(net.parameters(), own, strict=True))
    after = (net.state_dict(), inner.state_dict(), [p.grad for p in own])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), stream) and w.grad is None


# -- form B ----------------------------------------------------------------------------------------------------------


def test_a_compiled_step_is_explained_inside_its_window() -> None:
    net, log_lr = network(3, 4, 2), torch.tensor(-2.0, requires_grad=True)
    inner = metaoptim.MetaSGD([net], momentum=0.5)

    @metaoptim.compile(backend="eager")
    def step(x: Tensor, weight: Tensor, unused: Tensor) -> Tensor:
        inner.param_groups[0]["lr"] = log_lr.exp()
        loss = (net(x) * weight + unused.detach()).square().mean()
        inner.step(loss)
        return loss

    x, weight, unused = numbers(5, 3), torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    def loop(look: bool) -> list[Tensor]:
        with metaoptim.SlidingWindow(offline=True, slots=3):
            for t in range(3):
                if look:
                    report = step.explain(x, weight, unused)
                    assert report.form == "step" and report.plan == "streaming" and report.slots == 3
                    assert report.horizon == report.num_programs == 1
                    assert set(report.gradient_targets) == {"weight", "log_lr"}
                    assert report.unreachable == ["unused"] and report.predicted_peak_bytes is None
                    momentum = report.shapes["step"]["inputs"].get("opt_state", {"count": 0})
                    assert momentum["count"] == (4 if t else 0)
                step(x, weight, unused)
            return list(torch.autograd.grad(net(x).square().mean(), [log_lr, weight]))

    for looked, not_looked in zip(loop(True), loop(False), strict=True):
        assert torch.equal(looked, not_looked)


def test_a_full_tape_window_compilesnullcontext() -> None:
    fn = scanned()
    with pytest.raises(metaoptim.WindowError, match="full_tape window, where nothing is compiled"):
        with metaoptim.SlidingWindow(strategy="full_tape"):
            metaoptim.MetaSGD([network(3, 2)])
            fn.explain(*arguments(2))


# -- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> Report:
    return scanned(3).explain(*arguments(12))


def test_every_key_is_documented_and_plain(report: Report) -> None:
    values = report.to_dict()
    assert values.keys() == KEYS
    assert json.loads(json.dumps(values)) == values
    for key in KEYS:
        assert f"``{key}``" in (Report.to_dict.__doc__ or ""), key


def test_text_shows_what_matters_at_a_glance(report: Report) -> None:
    text = str(report)
    for part in (
        "12 inner steps in 14 calls of 4 step graphs, offline",
        "scheduled: at most 3 states kept",
        "net.0.weight, net.0.bias, net.2.weight, net.2.bias, log_lr: through step_a",
        "calls are not needed",
        "in all",
        "explain(fn, verbose=True)",
    ):
        assert part in text, part
    assert len(text.splitlines()) < 25 and "after capture" not in text and "takes " not in text
    assert sum(line.startswith("  capture ") for line in text.splitlines()) == 1


def test_passes_say_how_long_they_took(report: Report) -> None:
    took = {p["name"]: p["milliseconds"] for p in report.passes}
    assert took["capture"] > 1 and took["verify"] > 0 and took["roll"] > 0
    (line,) = (line for line in str(report).splitlines() if line.startswith("  capture "))
    assert float(line.split()[1]) == pytest.approx(took["capture"], rel=0.1)


def test_programs_show_every_stage_once(report: Report) -> None:
    text = report.programs()
    for part in (
        "after capture: ", "after mode: no change", "after rows: ", "after split: ", "after enter: ",
        "after canonicalize: ",
        "after prune: ", "after roll: program of 12", "after loop: no change", "after differentiate: no change",
        "parts 2-4: C, ",
        "loop 9 times, t = 0, 1, ...: ",
        "xs[3 + t], ys[3 + t])  # test_explain.py:",
        "takes   4 theta          208 B  float64 4×3, 4, 2×4, 2",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("program of 12 inner steps") == 1 and "what runs" not in text
    assert str(replace(report, verbose=True)).endswith(text)
    assert [p["name"] for p in report.passes] == [
        "capture", "mode", "rows", "split", "enter", "canonicalize", "prune", "roll", "loop", "differentiate",
        "lower", "verify", "checkpoint",
    ]  # fmt: skip
    texts = {p["name"]: p["text"] for p in report.to_dict()["passes"]}
    assert texts["capture"] == texts["mode"] != texts["roll"] == texts["differentiate"] == report.program


def test_long_programs_are_cut_short_in_the_text_alone() -> None:
    """A plain `for`, before it is a loop."""

    @metaoptim.compile(backend="eager")
    def meta_loss(net: Any, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True):
            for x in xs:
                inner.step(net(x).square().mean())
            return net(xs[0]).square().mean()

    report = metaoptim.explain(meta_loss, verbose=True)(network(3, 2), numbers(100, 5, 3))
    assert "lines more ..." in str(report) and len(report.programs().splitlines()) < 130
    rolled = next(p["text"] for p in report.passes if p["name"] == "roll")
    assert all(f"xs[{t}]" in rolled for t in range(100))


def test_a_terminal_shows_tables(report: Report) -> None:
    console = pytest.importorskip("rich.console")
    shown = console.Console(width=160, record=True, file=io.StringIO())
    shown.print(report)
    text = shown.export_text()
    for part in ("12 inner steps in 14 calls", "canonicalize", "in all", "step_c"):
        assert part in text, part
    assert "loop 9 times" not in text
    shown.print(replace(report, verbose=True))
    text = shown.export_text()
    for part in ("12 inner steps in 14 calls", "after mode: no change", "loop 9 times", "xs[3 + t]"):
        assert part in text, part


def test_programs_print_with_operators_on_demand() -> None:
    fn = scanned()
    fn(*arguments(8))
    ((program,),) = fn._specializations.known.values()
    text = program.program.text(operators=True)
    assert str(program.program) == program.program.text() and len(text) > 2 * len(str(program.program))
    assert "aten.addmm.default" in text and "gradient(" in text
    first: Callable[..., Any] = program.program.text
    named = first({x: f"input_{i}" for i, x in enumerate(program.program.inputs)})
    assert "input_0" in named and "x0" not in named


def test_the_examples_of_the_documentation_run() -> None:
    """The Python blocks of docs/compile.md, one after the other, and the text that it shows."""
    document = (Path(__file__).parents[2] / "docs" / "compile.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    torch.set_default_dtype(torch.float32)
    try:
        for block in re.findall(r"```python\n(.*?)```", document, re.DOTALL):
            exec(compile(block, "docs/compile.md", "exec"), scope)
    finally:
        torch.set_default_dtype(torch.float64)
    (shown,) = re.findall(r"```\n(meta_loss\n.*?)```", document, re.DOTALL)
    assert str(scope["report"]).startswith(shown)


def test_the_stages_in_docs_architecture_are_those_printed(capsys: pytest.CaptureFixture) -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    live_optimizers.clear()  # of other pages: a capture looks at every optimizer that is alive
    torch.set_default_dtype(torch.float32)
    try:
        exec(compile(block, "docs/architecture.md", "exec"), {})
    finally:
        torch.set_default_dtype(torch.float64)
    printed = re.sub(r"  # docs.*", "", capsys.readouterr().out)
    stages = re.findall(r"```\n(58 calls.*?|part 0.*?|r0-r2.*?)```", page, re.DOTALL)
    assert len(stages) == 3
    for line in "".join(stages).splitlines():
        assert line.removesuffix(" ...").strip() in printed, line


@pytest.mark.parametrize(
    "options", [{}, {"slots": 3}, {"memory_budget": "128KiB"}, {"memory_budget": "1MiB"}]
)
def test_the_measured_peak_stands_beside_the_predicted_one(options: dict[str, Any]) -> None:
    net, log_lr = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.Linear(32, 2)), torch.tensor(-2.0)
    log_lr.requires_grad_()
    xs = numbers(30, 20, 8)

    @metaoptim.compile(backend="eager", **options)
    def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaAdam([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow() as window:
            for x in window.scan(xs):
                inner.step(net(x).square().mean())
            return net(xs[0]).square().mean()

    before = [t.clone() for t in (*net.parameters(), torch.get_rng_state())]
    report = metaoptim.explain(meta_loss, measure=True)(net, log_lr, xs)
    assert all(map(torch.equal, before, (*net.parameters(), torch.get_rng_state())))
    assert log_lr.grad is None
    assert report.measured_peak_bytes is not None and report.predicted_peak_bytes is not None
    assert report.measured_peak_bytes <= report.predicted_peak_bytes + 1024  # scalars
    assert report.measured_peak_bytes >= 0.8 * report.predicted_peak_bytes
    assert "measured peak" in str(report)
    if report.memory_budget is not None:
        assert report.measured_peak_bytes <= report.memory_budget
    with pytest.raises(metaoptim.WindowError, match="outside windows"), metaoptim.SlidingWindow():
        metaoptim.explain(meta_loss, measure=True)(net, log_lr, xs)
