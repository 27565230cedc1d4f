"""The GPT example: its meta-gradient, its schedules, its training by torch.optim, and its quick preset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import metaoptim

Example = Callable[[str, str], ModuleType]
T, GROUPS = 5, 5
QUICK = ["--preset", "quick", "--outer-rate", "0.2"]


class _Loss(torch.nn.Module):
    """The network's loss as what it returns, for `functional_call`."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, text: Tensor) -> Tensor:
        return self.net.loss(text)


def written_out(
    net: Any, training: ModuleType, rates: Tensor, text: Tensor, rows: Tensor, asked: Tensor
) -> Tensor:
    """The outer loss by hand, the graph of all steps on autograd's tape."""
    loss, group = _Loss(net), {}
    for k, params in enumerate(net.groups().values()):
        group.update(dict.fromkeys(params, k))
    of = {name: group[p] for name, p in loss.named_parameters()}
    theta = {name: p.detach().clone().requires_grad_() for name, p in loss.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in theta.items()}
    second = {name: torch.zeros_like(p) for name, p in theta.items()}
    beta1, beta2 = training.BETAS
    for t, i in enumerate(rows):
        now = functional_call(loss, theta, (text[i],))
        gradients = torch.autograd.grad(now, list(theta.values()), create_graph=True)
        for (name, p), g in zip(list(theta.items()), gradients):
            rate = rates[of[name], t]
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g**2
            seen = second[name] > 0  # bytes that have not come up yet have a second moment of 0
            root = torch.where(seen, second[name] / (1 - beta2 ** (t + 1)), 1.0).sqrt().where(seen, 0.0)
            step = first[name] / (1 - beta1 ** (t + 1)) / (root + 1e-8)
            theta[name] = p - rate * training.DECAY * p - rate * step
    return functional_call(loss, theta, (asked,))


def problem(example: Example) -> tuple[Any, ModuleType, Tensor, Tensor, Tensor]:
    """In float64: a network, what trains it, a text, batches of it, and pieces to ask about."""
    model, training = example("gpt-schedule", "model"), example("gpt-schedule", "training")
    torch.set_default_dtype(torch.float64)
    net = model.GPT(layers=1, width=8, heads=2, context=6)
    model.reset(net, 3)
    text = example("gpt-schedule", "text").splits()["train"][:2000]
    return net, training, text, training.batches(text, (T, 3), 6, 1), text[training.batches(text, (4,), 6, 2)]


@pytest.mark.parametrize("form", ["window", "compiled"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_is_that_of_the_full_tape(example: Example, form: str, shared: bool) -> None:
    net, training, text, rows, asked = problem(example)
    base = training.cosine(0.03, 0.4, 0.1, T)
    knots = torch.linspace(-0.5, 0.5, 3 if shared else 15).reshape(-1, 3).requires_grad_()
    train = training.train if form == "window" else metaoptim.compile(training.train, backend="eager")

    def rates() -> Tensor:
        return training.schedules(base, knots).expand(GROUPS, -1)

    loss = train(net, rates(), text, rows, asked)
    expected = written_out(net, training, rates(), text, rows, asked)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    (wanted,) = torch.autograd.grad(expected, [knots])
    assert wanted.abs().min() > 1e-5
    torch.testing.assert_close(torch.autograd.grad(loss, [knots])[0], wanted, rtol=1e-7, atol=1e-10)

    training.by_torch(net, rates().detach(), text, rows)
    torch.testing.assert_close(net.loss(asked), expected, rtol=1e-9, atol=0)


def test_schedules(example: Example) -> None:
    training = example("gpt-schedule", "training")
    rates = training.cosine(2.0, 0.5, 0.25, 8)
    torch.testing.assert_close(rates[:5], torch.tensor([0.4, 0.8, 1.2, 1.6, 2.0]))
    assert (rates[4:].diff() < 0).all() and 0.5 < rates[-1] < 0.8
    torch.testing.assert_close(training.cosine(2.0, 0.0, 1.0, 4), torch.full((4,), 2.0))
    torch.testing.assert_close(training.schedules(rates, torch.zeros(3, 4)), rates.expand(3, -1))
    learnt = training.schedules(rates, torch.tensor([[0.0, 1.0], [1.0, -1.0]]))
    torch.testing.assert_close(learnt[:, -1], rates[-1] * torch.tensor([1.0, -1.0]).exp())


def test_every_parameter_is_in_one_group(example: Example) -> None:
    net = example("gpt-schedule", "model").GPT(2, 8, 2, 6)
    listed = [p for params in net.groups().values() for p in params]
    assert len(listed) == len(list(net.parameters())) == len(set(listed)) and set(listed) == set(
        net.parameters()
    )


@pytest.mark.slow
def test_learnt_schedules_beat_the_cosine(
    example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On new runs, whose text was held out."""
    module = example("gpt-schedule", "gpt-schedule")
    found = module.main([*QUICK, "--backend", "eager", "--out", str(tmp_path)])
    less = found["learned"] - found["cosine, best of the grid"]
    assert less.max() < 0 and less.mean() < -0.015
    assert list(found["rates"]) == ["embeddings", "attention", "mlp", "norms", "head"]
    assert (tmp_path / "gpt-schedule.png").read_bytes().startswith(b"\x89PNG")
    assert "less the grid's best" in capsys.readouterr().out
