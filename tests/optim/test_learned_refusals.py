"""Rules that are none, and rules that keep what no step would see: refused by name, and nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from edges import STEPS, loss_of, network


class Rule(nn.Module):
    """One that is right; what is wrong about others is put into a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.lin = nn.Parameter(torch.tensor(0.5)), nn.Linear(1, 1)
        self.register_buffer("count", torch.tensor(0.0))

    def init_state(self, param: Tensor) -> Any:
        return {"m": torch.zeros_like(param)}

    def forward(self, param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Any:
        m = 0.9 * state["m"] + grad
        return self.w * m, {"m": m}


def without(*names: str) -> type[nn.Module]:
    methods = {n: vars(Rule)[n] for n in ("init_state", "forward") if n not in names}
    return type("Without", (nn.Module,), methods)


def giving(**methods: Callable[..., Any]) -> type[nn.Module]:
    return type("Own", (Rule,), methods)


def with_attribute(name: str, value: Callable[[Rule], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        rule = Rule()
        setattr(rule, name, value(rule))
        return rule

    return make


class Dropping(Rule):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Any:
        return self.drop(self.w * grad), state


class Normalising(Rule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Any:
        return self.norm(self.w * grad.reshape(-1, 1)).reshape(param.shape), state


def _keeps(rule: Any, param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Any:
    rule.last = grad
    return rule.w * grad, state


def _counts(rule: Any, param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Any:
    rule.count += 1
    return rule.w * grad / rule.count, state


def _rebinds(rule: Any, param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Any:
    rule.count = rule.count + 1
    return rule.w * grad / rule.count, state


NO_RULES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a function": (lambda: lambda g: g, TypeError, "got <function .* as the rule, expected an nn.Module"),
    "a class": (lambda: Rule, TypeError, "got <class .* as the rule"),
    "no init_state": (without("init_state"), TypeError, r"Without has no method init_state\(param\)"),
    "no forward": (without("forward"), TypeError, r"Without has no method forward\(param, grad, state\)"),
    "compiled": (
        lambda: torch.compile(Rule(), backend="eager"),
        metaoptim.CaptureError,
        "made by torch.compile",
    ),
    "own forward": (
        with_attribute("forward", lambda rule: lambda *args: args),
        metaoptim.CaptureError,
        "forward of its own",
    ),
    "a tensor": (
        with_attribute("scale", lambda rule: torch.ones(2)),
        metaoptim.CaptureError,
        r"attribute 'scale' holds a tensor of shape \(2,\).*register_buffer",
    ),
    "modules in a list": (
        with_attribute("layers", lambda rule: [nn.Linear(1, 1)]),
        metaoptim.CaptureError,
        r"attribute 'layers' holds a module \(Linear\).*nn.ModuleList",
    ),
    "a bound method": (
        with_attribute("act", lambda rule: rule.init_state),
        metaoptim.CaptureError,
        r"attribute 'act' holds a method of a module",
    ),
}
WRONG: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "no result": (giving(forward=lambda *a: None), TypeError, "Own.forward: got None, expected two results"),
    "step alone": (
        giving(forward=lambda r, p, g, s: g),
        TypeError,
        r"Own.forward: got a tensor of shape \(4, 3\), expected two results: the step",
    ),
    "state forgotten": (
        giving(forward=lambda r, p, g, s: (r.w * g, {})),
        metaoptim.WindowError,
        "Own.forward: the new state has no 'm'",
    ),
    "state is a list": (
        giving(forward=lambda r, p, g, s: (r.w * g, [s["m"]])),
        TypeError,
        "expected two results.*dictionary of tensors by name",
    ),
    "state is a number": (
        giving(forward=lambda r, p, g, s: (r.w * g, {"m": 1.0})),
        TypeError,
        r"'m': 1.0.*torch.zeros\(\(\)\) for a count",
    ),
    "shape": (
        giving(forward=lambda r, p, g, s: (r.w * g.sum(), s)),
        metaoptim.WindowError,
        r"Own.forward: got a step of shape \(\) for a parameter of shape \(4, 3\)",
    ),
    "first state is a number": (
        giving(init_state=lambda r, p: {"t": 0}),
        TypeError,
        r"Own.init_state: got \{'t': 0\}, expected a dictionary of tensors",
    ),
    "first state is a list": (
        giving(init_state=lambda r, p: [p]),
        TypeError,
        "Own.init_state: got .* expected a dictionary of tensors",
    ),
    "state in place": (
        giving(forward=lambda r, p, g, s: (r.w * g, {"m": s["m"].add_(g)})),
        metaoptim.CaptureError,
        "changes its state in place",
    ),
    "gradient in place": (
        giving(forward=lambda r, p, g, s: (r.w * g.mul_(2), s)),
        metaoptim.CaptureError,
        "changes its gradient in place",
    ),
    "a buffer in place": (giving(forward=_counts), metaoptim.CaptureError, "buffer of a module .* in place"),
    "a buffer anew": (giving(forward=_rebinds), metaoptim.CaptureError, "Own sets its attribute 'count'"),
    "an attribute": (
        giving(forward=_keeps),
        metaoptim.CaptureError,
        "Own sets its attribute 'last'.*as state",
    ),
    "batch norm": (Normalising, metaoptim.CaptureError, "batch norm must be in evaluation mode"),
    "dropout": (Dropping, metaoptim.CaptureError, r"random numbers.*dropout must be in evaluation mode"),
}


def loop(net: nn.Module, rule: nn.Module, **options: Any) -> Tensor:
    inner = metaoptim.MetaLearned([net], rule, lr=0.1)
    with metaoptim.SlidingWindow(offline=True, **options):
        for t in range(STEPS):
            inner.step(loss_of(net, t))
        return loss_of(net, STEPS)


@pytest.mark.parametrize("name", NO_RULES)
def test_what_is_no_rule(name: str) -> None:
    make, error, match = NO_RULES[name]
    with pytest.raises(error, match=match):
        metaoptim.MetaLearned([network()], make())
    inner = metaoptim.MetaLearned([network()], Rule())
    with pytest.raises(error, match=match):
        inner.add_param_group({"params": network(), "rule": make()})
    assert len(inner.param_groups) == 1


# a full tape differentiates what dropout has drawn
FORMS = [(n, f) for n in WRONG for f in ("window", "tape", "compiled") if (n, f) != ("dropout", "tape")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_what_a_rule_must_not_do(name: str, form: str) -> None:
    make, error, match = WRONG[name]
    net, rule = network(), make()
    kept = copy.deepcopy([dict(m.state_dict()) for m in (net, rule)])
    with pytest.raises(error, match=match):
        if form == "compiled":
            metaoptim.compile(loop, backend="eager")(net, rule)
        else:
            loop(net, rule, **({"strategy": "full_tape"} if form == "tape" else {}))
    for before, m in zip(kept, (net, rule), strict=True):
        assert all(map(torch.equal, before.values(), m.state_dict().values()))
    assert "last" not in vars(rule)


@pytest.mark.parametrize("make", [Normalising, Dropping])
def test_modules_in_evaluation_mode(make: type[nn.Module]) -> None:
    grads = []
    for options in ({}, {"strategy": "full_tape"}):
        torch.manual_seed(0)
        rule = make().eval()
        loop(network(), rule, **options).backward()
        grads.append(rule.get_parameter("w").grad)
    assert float(grads[0].abs()) > 0
    torch.testing.assert_close(*grads)


def test_a_rule_that_is_in_the_network() -> None:
    net = network()
    net.add_module("rule", Rule())
    with pytest.raises(ValueError, match=r"'w' of the 'rule' is 'rule.w' of a network too"):
        metaoptim.MetaLearned([net], net.get_submodule("rule"))


def test_a_rule_taken_out_of_its_group() -> None:
    net = network()
    inner = metaoptim.MetaLearned([net], Rule())
    inner.param_groups[0]["rule"] = None
    with (
        pytest.raises(TypeError, match=r"param_groups\[0\]\['rule'\] is None, expected an nn.Module"),
        metaoptim.SlidingWindow(),
    ):
        inner.step(loss_of(net, 0))
