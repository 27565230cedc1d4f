"""Custom autograd Functions with arguments of any structure, in every form, against plain PyTorch's create_graph."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from forms import mlp, run_any_step, run_compiled
from metaoptim.compiler.ir.operators import Function
from oracle import Problem, agree, run_oracle, run_window
from problems import data

STEPS = 4
XS, YS = data(STEPS)
FORMS: dict[str, Callable[[Problem], dict]] = {
    "A": run_window,
    "A, two slots": lambda problem: run_window(problem, slots=2),
    "B": run_any_step,
    "C": run_compiled,
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
Loss = Callable[[Any, int, dict, dict], Tensor]


def inner_loop(loss: Loss, offline: bool = True) -> Problem:
    return Problem(
        build=mlp,
        optimizer="MetaSGD",
        steps=STEPS,
        offline=offline,
        loss=loss,
        outer=lambda net, metas: F.mse_loss(net(XS[STEPS]), YS[STEPS]),
        hyper=lambda metas: {"lr": metas["log_lr"].exp()},
        metas={"log_lr": torch.tensor(-2.0), "w": torch.tensor(0.8), "s": torch.tensor([0.7, 1.2])},
    )


def exact(form: str, loss: Loss, offline: bool = True) -> None:
    expected = run_oracle(inner_loop(loss, offline))
    assert all(expected[k] is not None and expected[k].abs().min() > 1e-6 for k in ("log_lr", "w", "s"))
    agree(FORMS[form](inner_loop(loss, offline)), expected, rtol=1e-9)


class Pair(NamedTuple):
    first: Any
    rest: Any


class MyList(list):
    pass


class MyTuple(tuple):
    pass


@dataclasses.dataclass
class Box:
    first: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter([self.first])


def weight(box: Any) -> Any:
    """A number or tensor that depends on every value in a container, and on what kind of container it is."""
    kind = type(box)
    if kind is list:
        return sum(2.0 * k * weight(b) for k, b in enumerate(box + [0.5], 1))
    if kind is Pair:
        return 0.3 * weight(box.first) - weight(box.rest)
    if kind is tuple:
        return sum(weight(b) / k for k, b in enumerate(box, 2))
    if isinstance(box, dict):
        return (len(kind.__name__) - 2) * sum(weight(v) * len(k) for k, v in box.items())
    if kind is deque:
        turned = box.copy()
        turned.rotate(1)
        return weight(turned.pop()) - weight(turned.popleft())
    if kind is torch.Size:
        return 0.1 * box.numel()
    if isinstance(box, torch.return_types.max):
        return box.values + 0.1 * box.indices
    if isinstance(box, Tensor):
        return box.sin()
    return {int: 1.0, bool: 1.7, float: 0.4}[kind] * (box if box else 0.2 + 0.1 * str(box).count("-"))


class Weighed(torch.autograd.Function):
    """x times the weight of a box; a straight-through estimator's backward, which reads the box again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, box: Any, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.box, ctx.scale = box, scale
        return (x * weight(box) * scale).round(decimals=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * weight(ctx.box) * ctx.scale * (1 + 0.2 * x.cos()), None, None


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (b, a),
    "named tuple": lambda a, b: Pair(a, rest=b),
    "dict": lambda a, b: {"bb": b, "a": a},
    "ordered dict": lambda a, b: OrderedDict(bb=b, a=a),
    "default dict": lambda a, b: defaultdict(list, bb=b, a=a),
    "deque": lambda a, b: deque([a, b]),
    "nested": lambda a, b: [Pair({"k": [a, -0.0]}, (b, 3)), [], {"n": (True, 0.25)}, a],
    "result of an operator": lambda a, b: (torch.stack([a, b.sum().expand(2)]).max(0), a, b),
    "size": lambda a, b: [a.shape, a, b],
}


@EVERY_FORM
@pytest.mark.parametrize("kind", CONTAINERS)
def test_container(kind: str, form: str) -> None:
    def loss(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
        h = net(XS[t])
        box = CONTAINERS[kind](h.mean(0) * metas["w"], metas["s"])
        return (Weighed.apply(h, box) - YS[t]).square().mean() + (h * metas["s"]).mean()

    exact(form, loss, offline=kind != "list")


def _alike(a: Any, b: Any) -> Loss:
    """Steps that differ in nothing but what stands beside the tensors."""

    def loss(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
        h = net(XS[0]) * metas["w"]
        return (Weighed.apply(h, (a if t % 2 else b)(metas["s"])) - YS[0]).square().mean()

    return loss


@EVERY_FORM
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (lambda s: [s, 1], lambda s: (s, 1)),
        (lambda s: Pair(s, 1), lambda s: (s, 1)),
        (lambda s: {"a": s}, lambda s: OrderedDict(a=s)),
        (lambda s: {"a": s}, lambda s: {"aa": s}),
        (lambda s: [s, 1], lambda s: [s, True]),
        (lambda s: [s, 1], lambda s: [s, 1.0]),
        (lambda s: [s, 0.0], lambda s: [s, -0.0]),
        (lambda s: [s, [2]], lambda s: [s, 2]),
    ],
)
def test_steps_that_differ_in_the_container_only(form: str, a: Any, b: Any) -> None:
    exact(form, _alike(a, b))


@EVERY_FORM
def test_steps_that_differ_in_grad_mode_only(form: str) -> None:
    def loss(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
        h = net(XS[0]) * metas["w"]
        with torch.set_grad_enabled(t % 2 == 0):
            y = Weighed.apply(h, [metas["s"]])
        return (y + h * metas["s"]).square().mean()

    exact(form, loss)


@EVERY_FORM
def test_keyword_and_default_arguments(form: str) -> None:
    class Scaled(Weighed):
        @staticmethod
        def forward(x: Tensor, box: Any, scale: float = 1.5) -> Tensor:  # type: ignore[override]
            return x * weight(box) * scale

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
            x, ctx.box, ctx.scale = inputs
            ctx.save_for_backward(x)

    def loss(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
        h = net(XS[t]) * metas["w"]
        return Scaled.apply(h, scale=0.5 + t, box=[metas["s"]]).square().mean() + Scaled.apply(h, {}).mean()

    exact(form, loss)


@EVERY_FORM
def test_function_of_a_parameter_that_was_just_overwritten(form: str) -> None:
    """Its value is settled before the Function reads it, as before an operator does."""

    def loss(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
        weights = [p for name, p in net.named_parameters() if name == "0.weight"]
        return Weighed.apply(weights[0], [metas["s"].sum() * metas["w"]]).square().mean() + net(XS[t]).mean()

    def overwritten(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
        if t == 1:
            with torch.no_grad():
                net[0].weight.mul_(1.3)
        return loss(net, t, metas, carried)

    exact(form, loss)
    problem = inner_loop(overwritten, offline=False)
    agree(FORMS[form](problem), run_window(problem, strategy="full_tape"), rtol=1e-9)


class Noting(torch.autograd.Function):
    """Puts a tensor into the list it is given, and reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, notes: list) -> Tensor:  # type: ignore[override]
        notes.append(x.square())
        ctx.save_for_backward(x, *notes)
        return x * notes[-1] * notes[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        x, first, *_, last = ctx.saved_tensors
        return grad * (x.sin() + first) * last, None


@EVERY_FORM
def test_function_that_changes_its_list(form: str) -> None:
    """In a window the list that changes is the user's own; in a replay it is a new one every time."""

    def loss(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
        h = net(XS[t]) * metas["w"]
        notes = [metas["s"]]
        y = Noting.apply(h, notes)
        assert len(notes) == 2
        return (y - YS[t]).square().mean()

    if form in "BC":
        with pytest.raises(metaoptim.CaptureError, match=r"Noting.forward changes a list"):
            FORMS[form](inner_loop(loss))
    else:
        exact(form, loss)


@EVERY_FORM
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda a: MyList([a]), "Weighed.apply is given a MyList"),
        (lambda a: [MyTuple((a,))], "given a MyTuple"),
        (lambda a: {"k": MyTuple(([1.0],))}, "given a MyTuple"),
        (lambda a: [a, {1.0}], "given a set"),
    ],
)
def test_containers_that_are_refused(form: str, make: Any, match: str) -> None:
    def loss(net: Any, t: int, metas: dict, carried: dict) -> Tensor:
        return Weighed.apply(net(XS[t]), make(metas["s"])).square().mean()

    with pytest.raises(metaoptim.CaptureError, match=match):
        FORMS[form](inner_loop(loss))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # by torch, faking one
@EVERY_FORM
@pytest.mark.parametrize("box", [Box, lambda a: UserList([a])])
def test_tensors_within_an_object_are_refused(form: str, box: Any) -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, box: Any) -> Tensor:  # type: ignore[override]
            ctx.box = box
            return x * weight([*box])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
            return grad * weight([*ctx.box]), None

    def loss(net: Any, t: int, metas: dict, carried: dict, scale: float | None = None) -> Tensor:
        inside = metas["s"] if scale is None else metas["s"] * scale
        return Hidden.apply(net(XS[t]), box(inside)).square().mean()

    with pytest.raises(metaoptim.CaptureError, match="requires grad but is none of its arguments"):
        FORMS[form](inner_loop(loss))
    if form in "BC":  # one that is symbolic while the function is captured
        with pytest.raises(
            metaoptim.CaptureError, match=r"an object with tensors in it.*a named tuple or a dict"
        ):
            FORMS[form](inner_loop(functools.partial(loss, scale=2.0)))


def test_containers_where_no_gradient_flows_are_the_users_own() -> None:
    """What a window does not record it does not refuse."""
    net, box = mlp(), MyList([1.0])
    inner = metaoptim.MetaSGD([net], lr=0.1)

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, given: Any) -> Tensor:  # type: ignore[override]
            assert given is box
            return x * given[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            raise AssertionError("no gradient flows here")

    with metaoptim.SlidingWindow(offline=True):
        inner.step(F.mse_loss(net(Kept.apply(XS[0], box)), YS[0]))
        F.mse_loss(net(XS[1]), YS[1]).backward()


def test_a_program_shows_what_a_function_is_given() -> None:
    net: nn.Module = mlp()
    inner = metaoptim.MetaSGD([net], lr=0.1)
    with metaoptim.SlidingWindow(offline=True) as window:
        inner.step(Weighed.apply(net(XS[0]), [torch.ones(2), 0.5], 2.0).square().mean())
        (step,) = {id(call.step): call.step for call, _ in window.program.counted()}.values()
    assert "Weighed(·, [·, 0.5], 2.0)(" in str(step)
    (node,) = [n for n in step.graph.nodes if isinstance(n.target, Function)]
    assert len(node.args) == 2
