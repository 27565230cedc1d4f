"""Reweighting, distillation and implicit MAML: their gradients are those written out by hand, and they learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim

Load = Callable[[str, str], ModuleType]


def adamw(
    net: nn.Module, losses: list[Callable[[dict[str, Tensor]], Tensor]], rate: float, decay: float
) -> dict:
    """The parameters after a step for each loss, on autograd's tape."""
    theta = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    first, second = ({n: torch.zeros_like(p) for n, p in theta.items()} for _ in range(2))
    for t, loss in enumerate(losses, start=1):
        grads = torch.autograd.grad(loss(theta), list(theta.values()), create_graph=True)
        for (n, p), g in zip(list(theta.items()), grads, strict=True):
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.999 * second[n] + 0.001 * g**2
            scaled = second[n] / (1 - 0.999**t)
            root = torch.where(scaled > 0, scaled, 1.0).sqrt().where(scaled > 0, 0.0)  # derivative 0 at 0
            theta[n] = p * (1 - rate * decay) - rate * first[n] / (1 - 0.9**t) / (root + 1e-8)
    return theta


def equal(found: list[Tensor], wanted: list[Tensor], within: float = 1e-12) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert want.abs().max() > 1e3 * within
        torch.testing.assert_close(got, want, rtol=1e-8, atol=within)


# -- reweighting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["source", "example"])
@pytest.mark.parametrize("form", ["window", "compiled"])
def test_the_gradient_of_the_weights_is_that_of_the_full_tape(example: Load, form: str, of: str) -> None:
    training, data = example("reweighting", "training"), example("reweighting", "data")
    digits = data.digits_of_sources(60, 20, 8, "shifted", seed=3)
    digits = digits._replace(**{k: getattr(digits, k).double() for k in ("x", "x_trusted", "x_test")})
    group = digits.source if of == "source" else torch.arange(150)
    logits = torch.linspace(-1, 1, int(group.max()) + 1, dtype=torch.float64).requires_grad_()
    rows = training.batches(60, 4, seed=1)[:, :16]
    torch.set_default_dtype(torch.float64)
    net = training.network(2)
    train = metaoptim.compile(training.train, backend="eager") if form == "compiled" else training.train
    loss = train(net, logits, group, digits, rows, 0.02)

    def step(i: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        weights = 2 * logits.sigmoid()[group[i]]
        return lambda theta: (
            weights
            * F.cross_entropy(functional_call(net, theta, (digits.x[i],)), digits.y[i], reduction="none")
        ).mean()

    theta = adamw(net, [step(i) for i in rows], 0.02, 0.1)
    expected = F.cross_entropy(functional_call(net, theta, (digits.x_trusted,)), digits.y_trusted)
    torch.testing.assert_close(loss, expected)
    equal(list(torch.autograd.grad(loss, [logits])), list(torch.autograd.grad(expected, [logits])))


def test_weights_of_bad_sources_go_down(
    example: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("reweighting", "reweighting")
    found = module.main(["--preset", "quick", "--backend", "eager", "--out", str(tmp_path)])
    weights, wrong, scores = found["weights"], found["wrong"], found["scores"]
    assert weights[wrong].max() < weights[~wrong].min()
    assert scores["learnt weights"] > max(scores[kind] for kind in module.PLAIN)
    assert (tmp_path / "reweighting.png").read_bytes().startswith(b"\x89PNG")
    assert "share of the gap" in capsys.readouterr().out


def test_sources_are_as_bad_as_said(example: Load) -> None:
    data = example("reweighting", "data")
    for noise, bad in (("shifted", 8), ("guessed", 9)):
        digits = data.digits_of_sources(1000, 50, bad, noise, seed=0)
        wrong = (digits.y != digits.clean).float()
        by_source = torch.stack([wrong[digits.source == s].mean() for s in range(20)])
        assert int((by_source > 0.5).sum()) == bad and int((by_source == 0).sum()) == 20 - bad
        assert abs(float(wrong.mean()) - 0.4) < 0.02
        assert digits.y_trusted.bincount().tolist() == [5] * 10 and len(digits.x_test) == 747
    with pytest.raises(ValueError, match="multiple of 10 trusted"):
        data.digits_of_sources(1000, 45, 8, "shifted", seed=0)


# -- distillation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["window", "compiled"])
def test_the_gradient_of_distilled_images_is_that_of_the_full_tape(example: Load, form: str) -> None:
    training = example("distillation", "training")
    digits, steps = training.split_digits(0), 4
    torch.set_default_dtype(torch.float64)
    x, y = digits.x[:50].double(), digits.y[:50]
    distilled = training.Distilled(
        training.one_of_each(digits, 1).double().requires_grad_(),
        torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        torch.tensor(-1.0, requires_grad=True),
    )
    net = training.network("tanh", 2)
    train = metaoptim.compile(training.train, backend="eager") if form == "compiled" else training.train
    loss = train(net, distilled, steps, x, y)
    theta = dict(net.named_parameters())
    for _ in range(steps):
        logp = functional_call(net, theta, (distilled.images,)).log_softmax(1)
        inner = -(distilled.labels.softmax(1) * logp).sum(1).mean()
        grads = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
        theta = {n: p - distilled.log_rate.exp() * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    expected = F.cross_entropy(functional_call(net, theta, (x,)), y)
    torch.testing.assert_close(loss, expected)
    equal(list(torch.autograd.grad(loss, distilled)), list(torch.autograd.grad(expected, distilled)))


def test_ten_distilled_images_teach_more_than_ten_real_ones(
    example: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("distillation", "distillation")
    found = module.main(["--preset", "quick", "--backend", "eager", "--out", str(tmp_path)])
    means = found["accuracies"]
    assert means[module.LEARNT] > means[module.REAL] + 0.05
    assert (tmp_path / "distillation.png").read_bytes().startswith(b"\x89PNG")
    assert "ten distilled images" in capsys.readouterr().out


# -- implicit MAML -----------------------------------------------------------------------------------------------------


def test_the_implicit_gradient_is_that_through_a_converged_loop(example: Load) -> None:
    module, episodes = example("few-shot", "imaml"), example("few-shot", "episodes")
    torch.set_default_dtype(torch.float64)
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(3)
    episode = episodes.Episode(
        torch.rand(3, 1, 28, 28, generator=g),
        labels,
        torch.rand(3, 1, 28, 28, generator=g),
        labels,
        [0, 1, 2],
    )
    torch.manual_seed(1)
    net = module.network(3)
    implicit = metaoptim.Implicit("cg", tolerance=1e-10, converged=1e-8)
    method = module.Method(0.1, 2.0, implicit)
    loss, _, _ = module.adapt(net, episode, method, 150)
    found = torch.autograd.grad(loss, list(net.parameters()))

    start = list(net.parameters())
    theta = {
        n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()
    }  # not by where it begins
    for _ in range(150):
        inner = F.cross_entropy(functional_call(net, theta, (episode.x_spt,)), labels)
        inner = inner + sum((p - q).square().sum() for p, q in zip(theta.values(), start, strict=True))
        grads = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
        theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    expected = F.cross_entropy(functional_call(net, theta, (episode.x_qry,)), labels)
    torch.testing.assert_close(loss, expected)
    equal(list(found), list(torch.autograd.grad(expected, start)), within=1e-10)  # of what converges


def test_implicit_maml_learns_and_keeps_its_last_step_alone(
    example: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, glyphs = example("few-shot", "imaml"), example("few-shot", "glyphs")
    g = torch.Generator().manual_seed(0)
    # What tells characters apart is in the upper half alone; below is noise, which has to be learnt to be ignored.
    shapes = F.interpolate(torch.rand(12, 1, 7, 14, generator=g), size=(14, 28)).expand(-1, 20, -1, -1)
    noise = F.interpolate(torch.rand(12, 20, 7, 14, generator=g), size=(14, 28))
    images = (torch.cat([shapes * 0.4, noise], dim=2) * 255).to(torch.uint8).numpy()
    characters = glyphs.Characters(images, ("Halves",) * 12, tuple(f"character {k}" for k in range(12)))
    monkeypatch.setattr(module, "load_glyphs", lambda cache: (characters, characters))
    found = module.main(["--preset", "quick", "--out", str(tmp_path)])
    for (name, steps), of in found.items():
        assert of["accuracy"][0] > of["before"][0] + 0.05, name
        assert of["states"] == (2 if name == "implicit MAML" else steps), name
    assert (tmp_path / "imaml.png").read_bytes().startswith(b"\x89PNG")
    assert "states kept" in capsys.readouterr().out
