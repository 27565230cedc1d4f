"""Backends and derivatives: compiled graphs are checked, mixed mode is exact, and what a compiler once got wrong."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config

import metaoptim
from forms import full_tape, run_compiled, run_step
from metaoptim.compiler.derive.graphs import peak_bytes
from metaoptim.compiler.derive.mixed import NotMixed, mixed_vjp_graph
from metaoptim.compiler.lower import backends
from metaoptim.compiler.lower.derivatives import derived
from metaoptim.compiler.lower.library import library
from oracle import Problem, agree, leaves, run_oracle
from problems import OPTIMIZERS, data, problem

torch.set_num_threads(1)


def gradients(problem: Problem, **options: Any) -> tuple[dict[str, Tensor | None], Any]:
    """The problem in form C: its gradients, and the compiled function."""
    torch.manual_seed(3)
    net, metas = problem.build(), leaves(problem.metas)

    @metaoptim.compile(**options)
    def meta_loss(net: nn.Module, metas: dict[str, Tensor]) -> Tensor:
        inner = problem.optimizer_class([net], **problem.hyper(metas), **problem.options)
        total: Any = 0.0
        with metaoptim.SlidingWindow(offline=problem.offline):
            for t in range(problem.steps):
                inner.step(problem.loss(net, t, metas, {}), allow_unused=problem.allow_unused)
            return total + problem.outer(net, metas)

    torch.manual_seed(11)
    meta_loss(net, metas).backward()
    grads = {**dict(net.named_parameters()), **metas}
    return {name: t.grad for name, t in grads.items()}, meta_loss


def steps_of(fn: Any) -> list[Any]:
    (programs,) = fn._specializations.known.values()
    return [s for s in programs[0].program.step_graphs if s.steps]


# -- mixed mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network, optimizer",
    [
        *itertools.product(["linear"], OPTIMIZERS),
        ("conv_bn", "adam"),
        ("tied", "momentum"),
        ("dropout", "rmsprop"),
    ],
)
def test_mixed_mode_agrees_with_the_oracle(network: str, optimizer: str) -> None:
    for offline in (True, False):
        case = problem(network, optimizer, 4, offline)
        got, fn = gradients(case, backend="eager", hvp="mixed")
        agree(got, run_oracle(case))
        assert all(s.derivatives["mixed"].startswith("mixed") for s in steps_of(fn))


def test_a_step_without_a_forward_derivative_is_refused_by_name_or_reversed_by_auto() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    case = problem("linear", "sgd", 3, True)
    plain = case.loss
    case.loss = lambda net, t, metas, carried: Twice.apply(plain(net, t, metas, carried))
    with pytest.raises(metaoptim.CaptureError, match=r"hvp='mixed'.*Functions.*hvp='auto'"):
        gradients(case, backend="eager", hvp="mixed")
    got, _ = gradients(case, backend="eager", hvp="auto")
    agree(got, run_oracle(case))
    with pytest.raises(ValueError, match="hvp: got 'forward'"):
        metaoptim.compile(hvp="forward")


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.gelu(self.a(self.norm(x))))


def test_mixed_mode_with_rematerialisation_takes_less_memory() -> None:
    """Live bytes, and what the allocator measures: the layers of a deep step are not all alive at once."""
    from metaoptim.runtime.budget.meter import AllocatorMeter

    torch.manual_seed(0)
    net = nn.Sequential(*[Residual(8) for _ in range(6)], nn.Linear(8, 3))
    log_lr, x, y = torch.tensor(-2.0, requires_grad=True), torch.randn(4, 64, 8), torch.randint(3, (256,))

    @metaoptim.compile(backend="eager", hvp="reverse")
    def meta_loss(net: nn.Module, log_lr: Tensor, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
        with metaoptim.SlidingWindow(offline=True) as window:
            for x in window.scan(xs):
                inner.step(F.cross_entropy(net(x).flatten(0, 1), y))
            return net(xs[0]).square().mean()

    with torch.no_grad():
        meta_loss(net, log_lr, torch.stack([x] * 5))
    step = steps_of(meta_loss)[-1]
    inputs = [p.spec.empty() for p in step.inputs] + [step.outputs[i].spec.empty() for i in step.cotangents]
    inputs = [t.normal_().mul_(0.3) if t.is_floating_point() else t.zero_() for t in inputs]
    results, peaks = [], []
    for hvp in ("reverse", "mixed"):
        graph = derived(step, hvp)
        with torch.no_grad(), AllocatorMeter() as meter:
            results.append(graph(*inputs))
        assert meter.peak == pytest.approx(peak_bytes(graph.graph), rel=0.1)
        peaks.append(meter.peak)
    for a, b in zip(*results):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert peaks[1] < 0.4 * peaks[0]


def test_the_graph_of_a_mixed_derivative_is_what_runs() -> None:
    """An operator of it replaced by another changes the result."""
    case = problem("linear", "sgd", 3, True)
    _, fn = gradients(case, backend="eager", hvp="mixed")
    step = steps_of(fn)[0]
    graph = step.derived.vjp["mixed"]
    inputs = [p.spec.empty() for p in step.inputs] + [step.outputs[i].spec.empty() for i in step.cotangents]
    inputs = [t.normal_() if t.is_floating_point() else t.zero_() for t in inputs]
    before = graph(*inputs)
    node = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.tanh.default)
    node.target = torch.ops.aten.sin.default
    vars(graph).pop("program")
    after = graph(*inputs)
    node.target = torch.ops.aten.tanh.default
    vars(graph).pop("program")
    assert any(a is not None and not torch.equal(a, b) for a, b in zip(before, after))


def test_what_is_not_mixed_says_why() -> None:
    case = problem("linear", "sgd", 2, True)
    _, fn = gradients(case, backend="eager", hvp="reverse")
    step = steps_of(fn)[0]
    step.opaque = True
    with pytest.raises(NotMixed, match="hooks, custom Functions"):
        mixed_vjp_graph(step)


# -- backends ---------------------------------------------------------------------------------------------------------


# Compiling C++ is what takes time: networks are tiny, and cases that differ in mode or plan only share step graphs.
SMALL: dict[str, Any] = {
    "line": lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.4), nn.Linear(3, 2)),
}
DOZEN: list[tuple[str, str, str, bool, dict[str, Any]]] = [
    ("C", "line", "momentum", True, {}),
    ("C", "line", "momentum", True, {"slots": 1}),
    ("C", "line", "momentum", False, {}),
    ("C", "line", "momentum", False, {"window": 1}),
    ("C", "line", "momentum", True, {"hvp": "mixed"}),
    ("B", "batch norm", "sgd", False, {"slots": 2}),
    ("C", "line", "sgd", True, {"scan": True}),
    ("B", "line", "adam", True, {"slots": 2}),
    ("B", "line", "adam", False, {"window": 2}),
    ("B", "dropout", "sgd", True, {"slots": 1}),
    ("B", "dropout", "sgd", False, {}),
    ("B", "dropout", "sgd", False, {"window": 1}),
]


def scanned(case: Problem, wrap: Callable[[Callable], Callable], kind: Any) -> dict[str, Tensor | None]:
    """The gradients of a problem's network trained by a scan."""
    torch.manual_seed(3)
    net, metas = case.build(), leaves(case.metas)
    xs, ys = (t.float() for t in data(case.steps))

    def meta_loss(net: nn.Module, metas: dict[str, Tensor]) -> Tensor:
        inner = metaoptim.MetaSGD([net], lr=metas["log_lr"].exp())
        with kind(offline=case.offline) as window:
            for x, y in window.scan(xs, ys):
                inner.step(F.mse_loss(net(x), y) * metas["weight"].sigmoid())
            return case.outer(net, metas)

    wrap(meta_loss)(net, metas).backward()
    return {n: t.grad for n, t in (*net.named_parameters(), *metas.items())}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@inductor_config.patch({"cpp.simdlen": 1, "compile_threads": 1})  # plain loops compile faster
@pytest.mark.parametrize("form, network, optimizer, offline, options", DOZEN)
def test_inductor(form: str, network: str, optimizer: str, offline: bool, options: dict[str, Any]) -> None:
    """In float32, as it is used; a RuntimeWarning of the check of compiled graphs is an error."""
    options = {"backend": "inductor", **options}
    window, scan = options.pop("window", None), options.pop("scan", False)
    case = problem("linear", optimizer, 4, offline, window, dtype=torch.float32)
    case = replace(case, build=lambda: SMALL[network]().float())
    if scan:
        wrap = metaoptim.compile(**options)
        got, expected = scanned(case, wrap, metaoptim.SlidingWindow), scanned(case, lambda f: f, full_tape)
    else:
        got, expected = (run_step if form == "B" else run_compiled)(case, **options), run_oracle(case)
    assert float(expected["weight"].abs()) > 1e-4  # type: ignore[union-attr]
    agree(got, expected, rtol=1e-4)


def test_a_broken_lowering_is_caught_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that turns every tanh into a sine: a warning, a reproduction, and the right gradient."""

    def broken(graph: fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.tanh.default:
                node.target = torch.ops.aten.sin.default
        graph.recompile()
        return graph.forward

    monkeypatch.setattr(backends, "lookup_backend", lambda name: broken)
    case = problem("linear", "rmsprop", 5, True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got, _ = gradients(case, backend="aot_eager", hvp="reverse")
    agree(got, run_oracle(case))
    (first, *_) = [str(w.message) for w in told if issubclass(w.category, RuntimeWarning)]
    assert "compiled a part of the inner loop wrongly: output" in first
    path = first.split("Please report it with ")[1].split(":")[0]
    saved = torch.load(path)
    assert "tanh" in saved["code"] and all(isinstance(t, Tensor) for t in saved["inputs"])
    wrong, _ = gradients(case, backend="aot_eager", hvp="reverse", self_check=False)
    with pytest.raises(AssertionError, match="off by"):
        agree(wrong, run_oracle(case))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend: got 'nonesuch', expected one of aot_eager"):
        metaoptim.compile(backend="nonesuch")


# -- a compiler that is wrong about saved tensors that are views of each other ----------------------------------------


def _unbound_rates(form: str) -> dict[str, Tensor]:
    """One step of training with learning rates that are views of one tensor, and per-example weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    log_lr = torch.full((2,), -2.0, requires_grad=True)
    weights = torch.linspace(-1, 1, 10).requires_grad_()
    x, y = torch.randn(10, 6), torch.randint(3, (10,))
    first, second = net[0], net[2]

    def inner_loss(weights: Tensor) -> Tensor:
        return (weights.sigmoid() * F.cross_entropy(net(x), y, reduction="none")).mean()

    def whole(weights: Tensor, log_lr: Tensor) -> Tensor:
        rates = log_lr.exp().unbind()
        inner = metaoptim.MetaSGD([{"params": first, "lr": rates[0]}, {"params": second, "lr": rates[1]}])
        step = metaoptim.compile(one_step, backend="aot_eager") if form == "B" else one_step
        with metaoptim.SlidingWindow(offline=True, strategy="full_tape" if form == "oracle" else "auto"):
            for _ in range(4):
                step(inner, weights)
            return F.cross_entropy(net(x), y)

    def one_step(inner: Any, weights: Tensor) -> None:
        inner.step(inner_loss(weights))

    fn = metaoptim.compile(whole, backend="aot_eager") if form == "C" else whole
    fn(weights, log_lr).backward()
    grads = {"weights": weights.grad, "log_lr": log_lr.grad, "theta": first.weight.grad}
    return {k: v for k, v in grads.items() if v is not None}


@pytest.mark.parametrize("form", ["A", "B", "C"])
def test_learning_rates_that_are_views_of_each_other(form: str) -> None:
    expected = _unbound_rates("oracle")
    agree(_unbound_rates(form), expected)  # type: ignore[arg-type]
    assert all(float(v.abs().max()) > 1e-4 for v in expected.values()) and len(expected) == 3


# -- what is compiled -------------------------------------------------------------------------------------------------


def backends_of(step: Any) -> set[str]:
    """What the graphs of a step run on."""
    return {key[1].backend_of(key[0]) for key in step.derived.lowered if key[0] != "loss"}


def test_what_runs_once_or_twice_a_call_is_not_compiled() -> None:
    library.clear()  # step graphs are shared, also with other tests' functions
    _, fn = gradients(problem("linear", "momentum", 6, True), backend="aot_eager", hvp="reverse")
    (program,) = next(iter(fn._specializations.known.values()))
    counts: Counter[int] = Counter()
    for call, count in program.program.counted():
        counts[id(call.step)] += count
    ran = {n: backends_of(s) for s in program.program.step_graphs if (n := counts[id(s)])}
    assert ran == {n: {"eager" if n <= 2 else "aot_eager"} for n in ran} and len(ran) > 1
    assert any("1 of" in r.done and r.name == "lower" for r in program.records)
    # where nothing repeats, there is no loop to prefer
    _, fn = gradients(problem("linear", "sgd", 1, True), backend="aot_eager", hvp="reverse")
    assert all(backends_of(s) == {"aot_eager"} for s in steps_of(fn))


def test_a_compiled_step_is_compiled_when_it_runs_a_third_time() -> None:
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    inner = metaoptim.MetaSGD([net], lr=0.1)
    step = metaoptim.compile(lambda: inner.step(net(x).square().mean()), backend="aot_eager")
    with metaoptim.SlidingWindow(offline=True):
        for _ in range(4):
            step()
        net(x).square().mean().backward()
    ((program,),) = step._specializations.known.values()
    assert backends_of(program.step.step) == {"eager", "aot_eager"}


@pytest.mark.parametrize(
    "options", [{"backend": "aot_eager", "hvp": "mixed"}, {"backend": "aot_eager"}, {"slots": 2}]
)
def test_an_integer_index_is_no_shape_that_depends_on_values(options: dict[str, Any]) -> None:
    """Of the labels, which differ from step to step; as a mask they would be."""
    xs, ys = torch.randn(4, 5, 3), torch.randint(2, (4, 5), generator=torch.Generator().manual_seed(1))

    def gradient(**options: Any) -> Tensor:
        torch.manual_seed(0)
        net, w = (
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
            torch.tensor(0.7, requires_grad=True),
        )
        inner = metaoptim.MetaSGD([net], lr=0.3)
        loss = lambda t: -(net(xs[t]) * w).log_softmax(-1)[torch.arange(5), ys[t]].mean()
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(3):
                inner.step(loss(t))
            (grad,) = torch.autograd.grad(loss(3), w)
        return grad

    torch.testing.assert_close(gradient(**options), gradient(strategy="full_tape"), rtol=1e-9, atol=1e-12)


def test_inductor_in_this_process_has_its_options_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the others: no asserts in every call."""
    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.append(torch._inductor.config.size_asserts)
        return graph.forward

    monkeypatch.setattr(backends, "lookup_backend", lambda name: backend)
    backends.call_backend("inductor", torch.fx.symbolic_trace(lambda x: x.sin()), [torch.ones(2)])
    assert seen == [False] and torch._inductor.config.size_asserts
