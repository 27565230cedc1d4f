"""The two usage snippets of the original README, as written there but for the parts it elides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import MetaOptim


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).flatten(1))


def loader() -> Iterator[tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(4)
    while True:
        yield (
            torch.randn(2, 6, 1, 8, 8, generator=g),
            torch.arange(6).remainder(3).expand(2, 6),
            torch.randn(2, 6, 1, 8, 8, generator=g),
            torch.arange(6).remainder(3).expand(2, 6),
        )


def test_few_shot() -> None:
    torch.manual_seed(0)
    train_iters, num_tasks, inner_iters = 3, 2, 3
    net = Net()
    batches = loader()
    outer_optim = torch.optim.Adam(net.parameters())
    reference = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    reference_optim = torch.optim.Adam(reference.values())
    check = loader()

    for _train_iter in range(train_iters):
        x_spt, y_spt, x_qry, y_qry = next(batches)
        outer_optim.zero_grad()
        for task_iter in range(num_tasks):
            inner_optim = MetaOptim.MetaSGD([net])
            with MetaOptim.SlidingWindow(offline=True):
                for _inner_iter in range(inner_iters):
                    spt_logits = net(x_spt[task_iter])
                    spt_loss = F.cross_entropy(spt_logits, y_spt[task_iter])
                    inner_optim.step(spt_loss)
                qry_logits = net(x_qry[task_iter])
                qry_loss = F.cross_entropy(qry_logits, y_qry[task_iter])
                qry_loss.backward()
        outer_optim.step()

        x_spt, y_spt, x_qry, y_qry = next(check)
        reference_optim.zero_grad()
        for task in range(num_tasks):
            theta = reference
            for _ in range(inner_iters):
                loss = F.cross_entropy(functional_call(net, theta, (x_spt[task],)), y_spt[task])
                grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
                theta = {n: p - 1e-3 * g for (n, p), g in zip(theta.items(), grads, strict=True)}
            F.cross_entropy(functional_call(net, theta, (x_qry[task],)), y_qry[task]).backward()
        reference_optim.step()
    for n, p in net.named_parameters():
        torch.testing.assert_close(p, reference[n], rtol=1e-4, atol=1e-6)


# -- meta-gradient RL --------------------------------------------------------------------------------------------------


class Actor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


def env_interact(env: torch.Generator, actor: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    observations = torch.randn(7, 3, generator=env, dtype=torch.float64)
    actions = torch.multinomial(actor(observations).softmax(-1), 1, generator=env).squeeze(-1)
    rewards = observations[:, 0] * (2.0 * actions - 1.0) + 0.5
    return actions, observations, rewards, torch.zeros(7)


def compute_returns(rewards: Tensor, dones: Tensor, gamma: Tensor) -> Tensor:
    returns, value = [], torch.zeros((), dtype=torch.float64)
    for r in reversed(rewards):
        value = r + gamma * value
        returns.append(value)
    return torch.stack(returns[::-1])


def run(printed: bool, oracle: bool) -> tuple[Tensor | None, list[Tensor]]:
    torch.manual_seed(0)
    inner_iters = 3
    actor, critic = Actor().double(), Critic().double()
    gamma = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    env = torch.Generator().manual_seed(9)
    seen: dict[str, Tensor] = {}

    def critic_loss_fn(returns: Tensor, critic: Any) -> Tensor:
        return F.mse_loss(critic(seen["observations"]), returns)

    def actor_loss_fn(observations: Tensor, actor: Any, critic: Any) -> Tensor:
        logp = actor(observations).log_softmax(-1).gather(1, seen["actions"][:, None]).squeeze(1)
        return -(logp * (seen["returns"] - critic(observations))).mean()

    if oracle:
        theta = {n: p.detach().requires_grad_() for n, p in actor.named_parameters()}
        phi = {n: p.detach().requires_grad_() for n, p in critic.named_parameters()}
        update, init = MetaOptim.MetaAdam.update, MetaOptim.MetaAdam.init_state
        hyper = MetaOptim.MetaAdam([nn.Linear(1, 1)]).defaults
        states: list[dict] = [{n: init(p.detach(), hyper) for n, p in d.items()} for d in (theta, phi)]
        for k in range(inner_iters + 1):

            def act(x: Tensor, th: dict = theta) -> Tensor:
                return functional_call(actor, th, (x,))

            def value(x: Tensor, ph: dict = phi) -> Tensor:
                return functional_call(critic, ph, (x,))

            with torch.no_grad():
                seen["actions"], seen["observations"], rewards, dones = env_interact(env, act)
            seen["returns"] = compute_returns(rewards, dones, gamma)
            critic_loss = critic_loss_fn(seen["returns"], value)
            actor_loss = actor_loss_fn(seen["observations"], act, value)
            if k == inner_iters:
                return torch.autograd.grad(critic_loss + actor_loss, gamma)[0], [
                    *theta.values(),
                    *phi.values(),
                ]
            gc = torch.autograd.grad(critic_loss, list(phi.values()), create_graph=True)
            ga = torch.autograd.grad(actor_loss, list(theta.values()), create_graph=True)
            new = [update(p, g, states[1][n], hyper) for (n, p), g in zip(phi.items(), gc, strict=True)]
            phi, states[1] = (
                dict(zip(phi, (p for p, _ in new), strict=True)),
                dict(zip(phi, (s for _, s in new), strict=True)),
            )
            new = [update(p, g, states[0][n], hyper) for (n, p), g in zip(theta.items(), ga, strict=True)]
            theta, states[0] = (
                dict(zip(theta, (p for p, _ in new), strict=True)),
                dict(zip(theta, (s for _, s in new), strict=True)),
            )

    actor_optim = MetaOptim.MetaAdam([actor])
    critic_optim = MetaOptim.MetaAdam([critic])
    gamma_optim = torch.optim.Adam([gamma])
    with MetaOptim.SlidingWindow(offline=False):
        for _inner_iter in range(inner_iters):
            with torch.no_grad():
                actions, observations, rewards, dones = env_interact(env, actor)
                returns = compute_returns(rewards, dones, gamma)
            if not printed:
                returns = compute_returns(rewards, dones, gamma)
            seen.update(actions=actions, observations=observations, returns=returns)
            critic_loss = critic_loss_fn(returns, critic)
            actor_loss = actor_loss_fn(observations, actor, critic)
            critic_optim.step(critic_loss)
            actor_optim.step(actor_loss)

        with torch.no_grad():
            actions, observations, rewards, dones = env_interact(env, actor)
            returns = compute_returns(rewards, dones, gamma)
        if not printed:
            returns = compute_returns(rewards, dones, gamma)
        seen.update(actions=actions, observations=observations, returns=returns)
        critic_loss = critic_loss_fn(returns, critic)
        actor_loss = actor_loss_fn(observations, actor, critic)
        gamma_optim.zero_grad()
        critic_loss.backward(
            retain_graph=not printed
        )  # here `returns` is the user's own graph, shared by both losses
        actor_loss.backward()
        found = gamma.grad
        if found is not None:
            gamma_optim.step()
    return found, [p.detach() for m in (actor, critic) for p in m.parameters()]


def test_meta_gradient_rl_as_printed_tells_what_is_out_of_reach() -> None:
    with pytest.warns(MetaOptim.UnreachableWarning, match="'gamma' requires grad") as caught:
        found, _ = run(printed=True, oracle=False)
    assert found is None and len(caught) == 1


def test_meta_gradient_rl_corrected_equals_the_oracle() -> None:
    found, values = run(printed=False, oracle=False)
    expected, reference = run(printed=False, oracle=True)
    assert expected is not None and expected.abs() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    for v, w in zip(values, reference, strict=True):
        torch.testing.assert_close(v, w.detach())


ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks])
def test_a_page_runs_as_a_reader_would_paste_it(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python blocks, one after the other in a new interpreter's namespace, with nothing defined besides."""
    blocks = PAGES[page]
    monkeypatch.chdir(tmp_path)
    if any(".plot()" in block for block in blocks):
        pytest.importorskip("matplotlib").use("agg")
    torch.manual_seed(0)
    scope: dict[str, Any] = {"__name__": "__main__"}
    torch.set_default_dtype(torch.float32)
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page}, block {number}", "exec"), scope)
    finally:
        torch.set_default_dtype(torch.float64)
    if page == "README.md":
        gamma, outer = scope["gamma"], scope["outer_optim"]
        assert float(gamma.detach()) != 0.99 and outer.state  # the patterns have learnt something
