"""The examples run, learn what they claim to, and give the same numbers compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import metaoptim

# -- long-horizon ------------------------------------------------------------------------------------------------------


def written_out(
    training: ModuleType, optimizer: str, log_rates: Tensor, logits: Tensor, digits, rows: Tensor
) -> Tensor:
    """The outer loss of the long-horizon example by hand, its whole graph on autograd's tape; no weight decay."""
    net = training.network(3).to(log_rates.dtype)
    theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    rate = dict(zip(theta, log_rates.exp().repeat_interleave(2)))  # weight and bias of each layer
    first = {name: torch.zeros_like(p) for name, p in theta.items()}
    second = {name: torch.zeros_like(p) for name, p in theta.items()}
    for t, i in enumerate(rows, start=1):
        loss = F.cross_entropy(functional_call(net, theta, (digits.x[i],)), digits.y[i], reduction="none")
        loss = (2 * logits[i].sigmoid() * loss).mean()
        grads = dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True)))
        for name, g in grads.items():
            if optimizer == "sgd":
                first[name] = update = 0.9 * first[name] + g
            else:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                scaled = second[name] / (1 - 0.999**t)
                # Some pixels are always zero; the root's derivative there is taken for 0.
                root = torch.where(scaled > 0, scaled, 1.0).sqrt().where(scaled > 0, 0.0)
                update = first[name] / (1 - 0.9**t) / (root + 1e-8)
            theta[name] = theta[name] - rate[name] * update
    return F.cross_entropy(functional_call(net, theta, (digits.x_val,)), digits.y_val)


@pytest.mark.parametrize("optimizer, gather", [("sgd", "step"), ("adam", "before")])
@pytest.mark.parametrize("form", ["window", "compiled"])
def test_the_gradient_through_the_training_is_that_of_the_full_tape(
    example: Callable[[str, str], ModuleType], form: str, optimizer: str, gather: str
) -> None:
    training, data = example("long-horizon", "training"), example("long-horizon", "digits")
    digits, _ = data.corrupted_digits(train=60, val=30, share=0.2, seed=0)
    digits = digits._replace(**{k: getattr(digits, k).double() for k in ("x", "x_val", "x_test")})
    rows = training.batches(60, 8, 9, seed=1)
    log_rates = torch.tensor([-2.0, -2.5, -3.0], dtype=torch.float64, requires_grad=True)
    logits = torch.linspace(-1, 1, 60, dtype=torch.float64).requires_grad_()
    torch.set_default_dtype(torch.float64)
    net = training.network(3)
    train = training.train
    if form == "compiled":
        train = metaoptim.compile(train, backend="eager")
    loss, _, test = train(net, optimizer, 0.0, log_rates, logits, digits, rows, gather, slots=3)
    expected = written_out(training, optimizer, log_rates, logits, digits, rows)
    torch.testing.assert_close(loss, expected)
    assert test.shape == (len(digits.x_test), 10) and not test.requires_grad
    wanted = torch.autograd.grad(expected, [log_rates, logits])
    for got, want in zip(torch.autograd.grad(loss, [log_rates, logits]), wanted, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)


def test_memory_curves(
    example: Callable[[str, str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    curves = example("long-horizon", "memory-curves")
    seen = []

    def measured(command: list[str], **options: Any) -> Any:
        """As a process of its own would."""
        kind, steps = command[command.index("--measure") + 1 :][:2]
        seen.append((kind, int(steps)))
        monkeypatch.setattr("sys.argv", ["memory-curves.py", *command[2:]])
        curves.main()
        return SimpleNamespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr(curves, "HORIZONS", (4, 8))
    monkeypatch.setattr(curves.subprocess, "run", measured)
    monkeypatch.setattr("sys.argv", ["memory-curves.py", "--out", str(tmp_path), "--jobs", "1"])
    curves.main()
    assert seen == [(kind, steps) for steps in (4, 8) for kind in curves.KINDS]
    assert (tmp_path / "memory-curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| 8 | " in capsys.readouterr().out


def test_time_curve(
    example: Callable[[str, str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is printed of every run: its peak is within its budget."""
    curve = example("long-horizon", "time-curve")
    command = ["--horizon", "300", "--steps", "12", "--points", "4", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["time-curve.py", *command])
    curve.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 6 and {row[0] for row in rows} >= {"| scheduled", "| tiered", "| all states"}
    assert all(float(peak) <= float(budget) for _, budget, peak, *_ in rows)
    assert (tmp_path / "time-curve.png").read_bytes().startswith(b"\x89PNG")


QUICK = ["--preset", "quick", "--steps", "24", "--iterations", "2"]


def test_long_horizon_tells_wrong_labels_from_right_ones(
    example: Callable[[str, str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = example("long-horizon", "learn-weights").main
    whole = main([*QUICK, "--out", str(tmp_path)])
    assert whole["auc"] > 0.75
    assert (tmp_path / "learnt-weights.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "AUC" in printed and "MiB" in printed and "s per meta-gradient" in printed

    # Stopped after the first outer step and gone on with from the checkpoint, compiled: the same.
    args = [*QUICK, "--checkpoint", str(tmp_path / "run.pt"), "--out", str(tmp_path)]
    part = main([*args, "--iterations", "1"])
    assert not torch.allclose(part["logits"], whole["logits"])
    resumed = main([*args, "--compile", "--backend", "eager"])
    assert "resumed after outer step 1" in capsys.readouterr().out
    torch.testing.assert_close(resumed["logits"], whole["logits"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(resumed["rates"], whole["rates"], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="optimizer: sgd there, adam here"):
        main([*args, "--optimizer", "adam", "--rate", "7e-3"])


# -- learned-optimizer -------------------------------------------------------------------------------------------------


def test_learned_optimizer(
    example: Callable[[str, str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few outer steps improve on the Adam that the rule begins as, on tasks held out."""
    module = example("learned-optimizer", "learned-optimizer")
    args = ["--preset", "quick", "--iterations", "6", "--outer-rate", "0.05", "--out", str(tmp_path)]
    found = module.main([*args, "--backend", "eager"])
    assert found["learned"] < 0.9 * found["began"]
    assert (tmp_path / "learned-optimizer.png").read_bytes().startswith(b"\x89PNG")
    assert "held out" in capsys.readouterr().out
    again = metaoptim.PerParameterRule(hidden=16)
    again.load_state_dict(torch.load(tmp_path / "rule.pt", weights_only=True))


# -- few-shot ----------------------------------------------------------------------------------------------------------


def test_few_shot_gives_the_same_compiled(
    example: Callable[[str, str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("few-shot", "maml-omniglot")
    glyphs = importlib.import_module("glyphs")
    images = torch.randint(0, 256, (12, 20, 28, 28), generator=torch.Generator().manual_seed(0))
    names = tuple(f"character {k}" for k in range(12))
    characters = glyphs.Characters(images.to(torch.uint8).numpy(), ("Noise",) * 12, names)
    monkeypatch.setattr(module, "load_glyphs", lambda cache: (characters, characters))
    trained = {}
    for form in ([], ["--compile", "--backend", "aot_eager"]):
        args = [
            *form,
            "--iterations",
            "2",
            "--tasks",
            "2",
            "--filters",
            "4",
            "--queries",
            "2",
            "--inner-steps",
            "2",
        ]
        args += ["--test-episodes", "2", "--curve-episodes", "2", "--out", str(tmp_path)]
        args += ["--checkpoint", str(tmp_path / f"{len(form)}.pt")]
        assert 0 <= module.main(args)["after"] <= 1
        trained[len(form)] = torch.load(tmp_path / f"{len(form)}.pt", weights_only=True)["state"]
    for name, value in trained[0]["net"].items():
        torch.testing.assert_close(trained[3]["net"][name], value, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "maml-accs-MetaOptim.png").exists() and (tmp_path / "episodes.png").exists()
