"""The meta-gradient example: its advantages, its meta-gradient, its trajectories, and its quick preset."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

pytest.importorskip("gymnasium", reason="the examples extra is not installed")
pytest.importorskip("matplotlib", reason="the examples extra is not installed")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "meta-gradient-rl"
MODULES = ("mgrl-cartpole", "agent", "rollout", "training", "results", "plots", "timing")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the environment's own dependencies
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's modules by name; float32, as it is run. Other examples have modules of the same names."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    torch.set_default_dtype(torch.float32)
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        torch.set_default_dtype(torch.float64)
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def settings(example: Any, **changes: Any) -> Any:
    quick = {**example["mgrl-cartpole"].PRESETS["quick"], "gamma": 0.8, "lam": 0.9, "learn": True, "seed": 3}
    return example["training"].Settings(**{**quick, **changes})


def by_hand(
    rewards: Tensor, values: Tensor, alive: Tensor, goes_on: Tensor, gamma: Tensor, lam: Tensor
) -> Tensor:
    """The recursion A_t = δ_t + γλ A_{t+1}, cut where an episode ends."""
    advantages, following = [], torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * alive[t] * values[t + 1] - values[t]
        following = delta + gamma * lam * goes_on[t] * following
        advantages.append(following)
    return torch.stack(advantages[::-1])


def test_advantages_are_those_of_the_recursion(example: Any) -> None:
    g = torch.Generator().manual_seed(1)
    rewards = torch.randn(9, 4, generator=g, dtype=torch.float64)
    values = torch.randn(10, 4, generator=g, dtype=torch.float64)
    goes_on = (torch.rand(9, 4, generator=g) > 0.3).double()
    alive = torch.maximum(goes_on, (torch.rand(9, 4, generator=g) > 0.5).double())
    assert 0 < goes_on.mean() < alive.mean() < 1
    found = []
    for formula in (example["agent"].lambda_advantages, by_hand):
        gamma, lam = torch.tensor([0.9, 0.7], dtype=torch.float64).requires_grad_().unbind()
        advantages = formula(rewards, values, alive, goes_on, gamma, lam)
        grads = torch.autograd.grad((advantages**3).sum(), (gamma, lam))
        found.append([advantages.detach(), *grads])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_trajectories_are_those_of_the_environment(example: Any) -> None:
    """One environment, played again by gymnasium's own single CartPole from the same states."""
    import gymnasium

    env = example["rollout"].CartPole(3, seed=5)
    actor = example["agent"].network(8, last=1.0)
    played = env.play(actor, 60)
    assert not played.goes_on.all() and (played.valid == 0).any()
    single = gymnasium.make("CartPole-v1").unwrapped
    single.reset(seed=0)
    for n in range(3):
        for t in range(60):
            reset = t > 0 and not played.goes_on[t - 1, n]
            assert bool(played.valid[t, n]) is not reset
            if reset:
                assert played.rewards[t, n] == 0 and played.observations[t + 1, n].abs().max() <= 0.05
                continue
            single.state = played.observations[t, n].double().numpy()
            single.steps_beyond_terminated = None
            following, reward, fell, _, _ = single.step(int(played.actions[t, n]))
            np.testing.assert_allclose(played.observations[t + 1, n].numpy(), following, atol=1e-5)
            assert played.rewards[t, n] == reward and bool(played.alive[t, n]) is not fell
    assert env.steps == int(played.valid.sum())
    assert sum(env.finished) <= env.steps and len(env.finished) == int((played.goes_on == 0).sum())


def oracle(example: Any, agent: Any, trajectories: list[Any], last: Any) -> Tensor:
    """Gradient of the outer loss by the logits: explicit parameters and create_graph, as plain PyTorch would."""

    class Shown:
        def __init__(self, net: Any, theta: dict[str, Tensor]) -> None:
            self.net, self.theta = net, theta

        def __call__(self, x: Tensor) -> Tensor:
            return functional_call(self.net, self.theta, (x,))

    losses, s = example["agent"].losses, agent.settings
    optimizers = [agent.actor_optim, agent.critic_optim]
    nets = [
        Shown(n, {k: p.detach().requires_grad_() for k, p in n.named_parameters()})
        for n in (agent.actor, agent.critic)
    ]
    states = [
        {k: o.init_state(p, o.param_groups[0]) for k, p in net.theta.items()}
        for o, net in zip(optimizers, nets, strict=True)
    ]
    for played in trajectories:
        gamma, lam = agent.logits.sigmoid().unbind()
        for k, loss in enumerate(losses(*nets, played, gamma, lam, s.entropy)):
            net, optimizer = nets[k], optimizers[k]
            grads = torch.autograd.grad(loss, list(net.theta.values()), create_graph=True)
            new = {
                name: optimizer.update(p, g, states[k][name], optimizer.param_groups[0])
                for (name, p), g in zip(net.theta.items(), grads, strict=True)
            }
            nets[k] = Shown(net.net, {name: p for name, (p, _) in new.items()})
            states[k] = {name: state for name, (_, state) in new.items()}
    gamma, lam = torch.tensor([s.judge_gamma, s.judge_lam], dtype=torch.float64).unbind()
    outer = losses(*nets, last, gamma, lam, 0.0)[0]
    return torch.autograd.grad(outer, agent.logits)[0]


@pytest.mark.parametrize("backend", [None, "eager"])
def test_the_meta_gradient_is_that_of_the_full_tape(example: Any, backend: str | None) -> None:
    torch.set_default_dtype(torch.float64)
    agent = example["training"].Agent(settings(example, inner_steps=3), backend)
    twin = example["training"].Agent(settings(example, inner_steps=3), None)
    trajectories, play = [], agent.play

    def noted() -> Any:
        trajectories.append(play())
        return trajectories[-1]

    agent.play = noted
    agent.window()
    *inner, last = trajectories
    assert len(inner) == 3
    expected = oracle(example, twin, inner, last)
    assert expected.abs().min() > 1e-9
    torch.testing.assert_close(agent.logits.grad, expected, rtol=1e-9, atol=1e-15)
    assert not torch.equal(agent.logits, twin.logits)  # the outer step was taken


def test_quick_preset_in_both_forms(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Draws its pictures, agrees with ordinary steps, and does not run again what it has."""
    main = example["mgrl-cartpole"].main
    results = tmp_path / "runs" / "results.json"
    common = ["--preset", "quick", "--seeds", "1", "--results", str(results), "--out", str(tmp_path)]
    compiled = main(common)
    for picture in ("mgrl-learning.png", "mgrl-paths.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    ordinary = main([*common, "--no-compile"])
    assert len(compiled) == 3 and len(json.loads(results.read_text())) == 6
    for name, runs in compiled.items():
        assert len(runs) == 1 and len(runs[0]["steps"]) == 2
        for key, values in runs[0].items():
            np.testing.assert_allclose(values, ordinary[name][0][key], rtol=1e-4)
    learned, *fixed = (runs[0]["gamma"] for runs in compiled.values())
    assert learned[0] != learned[-1] and all(f[0] == f[-1] for f in fixed)

    def never(*_: Any) -> Any:
        raise AssertionError("a finished run was run again")

    example["mgrl-cartpole"].train = never
    assert main(common) == compiled
    assert "learned from γ=0.8, λ=0.9" in capsys.readouterr().out


def test_bad_options_are_refused(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--variants", "learn:1.5,0.9"], ["--envs", "0"], ["--actor-lr", "-1"]):
        with pytest.raises(SystemExit):
            example["mgrl-cartpole"].main(["--preset", "quick", *arguments])
        assert arguments[0].lstrip("-") in capsys.readouterr().err
    broken = tmp_path / "results.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="no file of results"):
        example["mgrl-cartpole"].main(["--preset", "quick", "--results", str(broken), "--out", str(tmp_path)])
