"""Modules taken apart and put together again do what `functional_call` does, and leave the user's own alone."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from metaoptim.compiler.ir.modules import take_apart

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight, self.again = self.a.weight, self.a
        self.register_parameter("none", None)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(0.5 + k)) for k in range(2)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.ones(4))})

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = torch.tanh(layer(x)) * scale + self.named["shift"]
        return x


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 3, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def _hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    net[0].register_forward_hook(lambda module, args, out: 2 * out)
    net[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return net


MODULES: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "lists": Lists,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "hooks": _hooked,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "batch norm": lambda: nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(4)).eval(),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_it_does_the_same_with_other_tensors(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    form, tensors = take_apart(module)
    assert {id(t) for t in tensors} == set(map(id, (*module.parameters(), *module.buffers())))
    moved = [(t.detach() * 1.1).requires_grad_(t.requires_grad) for t in tensors]
    by_id = {id(t): m for t, m in zip(tensors, moved, strict=True)}
    named = {n: by_id[id(t)] for n, t in (*module.named_parameters(), *module.named_buffers())}
    before = {n: t.clone() for n, t in module.state_dict().items()}
    learnt = [t for t in moved if t.requires_grad]
    made = form.module(moved)
    # of a copy: functional_call leaves a module that is in two places with the tensors it was given (torch 2.13)
    got, expected = made(X), functional_call(copy.deepcopy(module), named, (X,))
    assert torch.equal(got, expected)
    grads = [torch.autograd.grad(of.square().sum(), learnt, allow_unused=True) for of in (got, expected)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
    form.check_kept(made, moved)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert take_apart(module)[0] == form and hash(take_apart(module)[0]) == hash(form)


@dataclasses.dataclass
class Settings:
    """Settings in a class of their own."""

    k: float = 1.0
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.number, self.text = nn.Linear(2, 2), 1.5, "tanh"
        self.listed, self.named, self.both = [1, (2.0, [3])], {"a": [1]}, {1, 2}
        self.settings, self.space, self.act = Settings(), types.SimpleNamespace(k=[1]), torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return x


CHANGES: dict[str, Callable[[Any], Any]] = {
    "number": lambda m: setattr(m, "number", -1.5),
    "minus zero": lambda m: setattr(m, "number", -0.0),
    "text": lambda m: setattr(m, "text", "relu"),
    "list in a list": lambda m: m.listed[1][1].append(4),
    "dictionary": lambda m: m.named["a"].append(2),
    "set": lambda m: m.both.add(3),
    "dataclass": lambda m: setattr(m.settings, "k", 2.0),
    "list in a dataclass": lambda m: m.settings.names.append("b"),
    "namespace": lambda m: m.space.k.append(2),
    "function": lambda m: setattr(m, "act", torch.sin),
    "new attribute": lambda m: setattr(m, "more", 1),
    "mode": lambda m: m.eval(),
    "tying": lambda m: setattr(m.lin, "bias", m.lin.weight),
    "hook": lambda m: m.lin.register_forward_hook(lambda module, args, out: out),
    "hook with keywords": lambda m: m.lin.register_forward_hook(
        lambda module, args, kwargs, out: out, with_kwargs=True
    ),
    "no layer": lambda m: setattr(m, "lin", None),
}


def test_forms_tell_what_has_changed_and_keep_what_was() -> None:
    module = Plain()
    module.number = 0.0
    known = [take_apart(module)[0]]
    for change in CHANGES.values():
        change(module)
        form, _ = take_apart(module)
        assert form not in known
        known.append(form)
    # what was taken apart at first is still what it was
    _, tensors = take_apart(Plain())
    first = known[0].module(tensors)
    assert (first.listed, first.named, first.both) == ([1, (2.0, [3])], {"a": [1]}, {1, 2})
    assert (first.settings, first.space.k, first.training) == (Settings(), [1], True)
    assert first.number == 0.0 and not hasattr(first, "more")


def test_the_same_hook_before_and_after_is_not_the_same() -> None:
    def hook(*args: Any) -> None:
        pass

    before, after = Plain(), Plain()
    before.lin.register_forward_pre_hook(hook)
    after.lin.register_forward_hook(hook)
    assert take_apart(before)[0] != take_apart(after)[0]


def test_what_a_module_does_to_its_lists_stays_its_own() -> None:
    module = Plain()
    form, tensors = take_apart(module)
    form.module(tensors).listed.append(1)
    assert take_apart(module)[0] == form and len(form.module(tensors).listed) == 2
