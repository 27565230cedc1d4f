"""Learned optimizers: the weights of the rule get the gradient of the whole tape, in every form."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.func import functional_call

import metaoptim
from edges import XS, YS, leaf, network
from metaoptim.compiler.lower.library import library
from oracle import agree

T = 3


class Recurrent(nn.Module):
    """A user's own: an LSTM cell for every entry, with a learnt first state, a buffer, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out, self.again = nn.LSTMCell(2, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.again.weight = self.out.weight
        self.first = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))
        self.register_buffer("scale", torch.tensor([2.0, 0.5]))

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"h": self.first.expand(param.numel(), 3), "c": torch.zeros(param.numel(), 3)}

    def forward(self, param: Tensor, grad: Tensor, state: dict) -> tuple[Tensor, dict]:
        x = torch.stack([grad.reshape(-1), param.reshape(-1)], -1) * self.scale
        h, c = self.cell(x, (state["h"], state["c"]))
        step = self.again(torch.tanh(self.out(h))).sum(-1)
        return step.reshape(param.shape), {"h": h, "c": c}


RULES = {
    "entries": lambda: metaoptim.PerParameterRule(4),
    "tensors": lambda: metaoptim.PerTensorRule(4),
    "own": Recurrent,
}
WINDOWS: dict[str, dict[str, Any]] = {
    "all": {},
    "slots": {"slots": 1},
    "budget": {"memory_budget": "4MiB"},
    "tape": {"strategy": "full_tape"},
}


def made(kind: str) -> tuple[nn.Module, nn.Module]:
    """A network and a rule whose weights are nothing special."""
    rule = RULES[kind]()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return network(), rule


def of(net: nn.Module, rule: nn.Module, lr: Tensor) -> dict[str, Tensor | None]:
    """What the gradients are of, by name."""
    named = {**{f"rule.{n}": p for n, p in rule.named_parameters()}, **dict(net.named_parameters()), "lr": lr}
    grads = {name: p.grad for name, p in named.items()}
    for p in named.values():
        p.grad = None
    return grads


def outer_loss(net: Any, steps: int) -> Tensor:
    return F.mse_loss(net(XS[steps % 4]), YS[steps % 4])


def by_hand(kind: str, offline: bool, window: int | None = None) -> dict[str, Tensor | None]:
    """Plain PyTorch: the rule itself is called, with its own weights."""
    net, rule = made(kind)
    lr, states = leaf(0.2), dict[str, dict[str, Tensor]]()
    theta = {n: p if offline else p.detach().requires_grad_() for n, p in net.named_parameters()}
    for t in range(T):
        if window is not None and t == T - window:
            theta = {n: p.detach().requires_grad_() for n, p in theta.items()}
            states = {n: {k: v.detach() for k, v in s.items()} for n, s in states.items()}
        loss = outer_loss(lambda x: functional_call(net, theta, (x,)), t)  # noqa: B023
        for (n, p), g in zip(
            list(theta.items()),
            torch.autograd.grad(loss, list(theta.values()), create_graph=True),
            strict=True,
        ):
            step, states[n] = rule(p, g, states.get(n) or rule.init_state(p))
            theta[n] = p - lr * step
    outer_loss(lambda x: functional_call(net, theta, (x,)), T).backward()
    return of(net, rule, lr)


def inner_loop(
    net: nn.Module, rule: nn.Module, lr: Any, offline: bool, steps: int = T, **window: Any
) -> Tensor:
    inner = metaoptim.MetaLearned([net], rule, lr=lr)
    with metaoptim.SlidingWindow(offline=offline, **window):
        for t in range(steps):
            inner.step(outer_loss(net, t))
        return outer_loss(net, steps)


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
@pytest.mark.parametrize("kind", RULES)
def test_a_window_gives_what_plain_pytorch_gives(kind: str, offline: bool, options: dict[str, Any]) -> None:
    net, rule = made(kind)
    lr = leaf(0.2)
    inner_loop(net, rule, lr, offline, **options).backward()
    expected = by_hand(kind, offline)
    assert all(g is not None and float(g.abs().max()) > 1e-6 for k, g in expected.items() if k[:4] == "rule")
    agree(of(net, rule, lr), expected)


@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
@pytest.mark.parametrize("kind", RULES)
def test_a_truncated_window(kind: str) -> None:
    net, rule = made(kind)
    lr = leaf(0.2)
    inner_loop(net, rule, lr, True, window=2).backward()
    agree(of(net, rule, lr), by_hand(kind, True, 2) | {n: None for n, _ in net.named_parameters()})


@pytest.mark.parametrize("given", ["argument", "closure"])
@pytest.mark.parametrize("kind", RULES)
def test_a_compiled_function(kind: str, given: str) -> None:
    net, rule = made(kind)
    lr = leaf(0.2)

    def closed(lr: Tensor) -> Tensor:
        return inner_loop(net, rule, lr, True)

    if given == "argument":
        loss = metaoptim.compile(inner_loop, backend="eager", slots=1)(net, rule, lr, True)
    else:
        loss = metaoptim.compile(closed, backend="eager")(lr)
    loss.backward()
    agree(of(net, rule, lr), by_hand(kind, True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", RULES)
def test_a_compiled_step(kind: str, backend: str) -> None:
    net, rule = made(kind)
    lr = leaf(0.2)
    inner = metaoptim.MetaLearned([net], rule, lr=lr)

    @metaoptim.compile(backend=backend)
    def step(x: Tensor, y: Tensor) -> None:
        inner.step(F.mse_loss(net(x), y))

    with metaoptim.SlidingWindow(offline=True):
        for t in range(T):
            step(XS[t], YS[t])
        outer_loss(net, T).backward()
    agree(of(net, rule, lr), by_hand(kind, True))


class Small(nn.Module):
    """As little as there is."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, 1.3]))

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(param)}

    def forward(self, param: Tensor, grad: Tensor, state: dict) -> tuple[Tensor, dict]:
        m = self.w[0] * state["m"] + grad
        return torch.tanh(self.w[1] * m), {"m": m}


@inductor_config.patch({"cpp.simdlen": 1, "compile_threads": 1})  # plain loops compile faster
def test_inductor() -> None:
    grads = []
    for backend in ("inductor", None):
        net, rule = nn.Linear(3, 2, bias=False), Small()
        nn.init.constant_(net.weight, 0.2)
        inner = metaoptim.MetaLearned([net], rule, lr=0.2)

        def step(x: Tensor, y: Tensor) -> None:
            inner.step(F.mse_loss(net(x), y))  # noqa: B023

        if backend is not None:
            step = metaoptim.compile(step, backend=backend)
        with metaoptim.SlidingWindow(offline=True, strategy="auto" if backend else "full_tape"):
            for t in range(7):
                step(XS[t % 4], YS[t % 4])
            outer_loss(net, 0).backward()
        grads.append({"w": rule.w.grad})
    agree(grads[0], grads[1], rtol=1e-8)


@pytest.mark.parametrize("kind", RULES)
def test_finite_differences(kind: str) -> None:
    net, rule = made(kind)
    inner_loop(net, rule, 0.2, True).backward()
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in rule.parameters()]
    expected = sum(float((p.grad * d).sum()) for p, d in zip(rule.parameters(), direction, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(rule.parameters(), direction, strict=True):
                p.add_(sign * 1e-6 * d)
        values.append(float(inner_loop(net, rule, 0.2, True).detach()))
        with torch.no_grad():
            for p, d in zip(rule.parameters(), direction, strict=True):
                p.sub_(sign * 1e-6 * d)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["window", "compiled"])
def test_weights_are_read_anew_at_every_step_and_outer_steps_are_seen(form: str) -> None:
    net, rule = made("entries")
    other_net, other = made("entries")
    f = inner_loop if form == "window" else metaoptim.compile(inner_loop, backend="eager")
    optimizers = [torch.optim.SGD(r.parameters(), lr=0.1) for r in (rule, other)]
    for _ in range(3):
        f(net, rule, 0.2, True).backward()
        inner_loop(other_net, other, 0.2, True, strategy="full_tape").backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(rule.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    if form == "compiled":
        assert len(f._specializations.known) == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_outer_steps_inside_an_online_window() -> None:
    """Windows of two steps, with a step of the rule after each; by hand, as windows of their own."""
    found = []
    for whole in (True, False):
        net, rule = made("entries")
        inner, outer = metaoptim.MetaLearned([net], rule, lr=0.2), torch.optim.SGD(rule.parameters(), lr=0.1)

        def two(start: int) -> None:
            for t in (start, start + 1):
                inner.step(outer_loss(net, t))  # noqa: B023
            outer.zero_grad()  # noqa: B023
            outer_loss(net, start + 2).backward()  # noqa: B023
            outer.step()  # noqa: B023

        if whole:
            with metaoptim.SlidingWindow(window=2):
                two(0)
                two(2)
        else:
            for start in (0, 2):
                with metaoptim.SlidingWindow(strategy="full_tape"):
                    two(start)
        found.append([p.detach() for p in rule.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", RULES)
def test_clipped_and_first_order(kind: str) -> None:
    grads = []
    for options in ({"slots": 1}, {"strategy": "full_tape"}):
        net, rule = made(kind)
        max_norm = leaf(0.3)
        inner = metaoptim.MetaLearned([net], rule, lr=0.2, first_order=True)
        inner.reset_grad_normalizer(max_norm)
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(T):
                inner.step(outer_loss(net, t))
            outer_loss(net, T).backward()
        grads.append(of(net, rule, max_norm))
    assert float(grads[0]["lr"].abs()) > 0
    agree(grads[0], grads[1])


def test_threads_share_a_rule() -> None:
    """Each window has a network of its own; nobody's weights are put in the place of another's."""
    _, rule = made("entries")
    nets = [network() for _ in range(8)]

    def gradients(net: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(inner_loop(net, rule, 0.2, True), list(rule.parameters()))

    expected = gradients(nets[0])
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(gradients, nets):
            assert all(
                torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(found, expected, strict=True)
            )


def test_programs_do_not_depend_on_the_number_of_steps() -> None:
    counts = []
    for steps in (4, 7):
        library.clear()
        inner_loop(network(), Small(), 0.2, True, steps).backward()
        in_window = len(library.steps())
        library.clear()
        metaoptim.compile(inner_loop, backend="eager")(network(), Small(), 0.2, True, steps).backward()
        counts.append((in_window, len(library.steps())))
    assert counts[0] == counts[1]


def test_groups_have_rules_of_their_own() -> None:
    grads = []
    for options in WINDOWS.values():
        net, first = made("entries")
        _, second = made("own")
        groups = [{"params": net[0], "rule": second}, {"params": net[2], "lr": 0.5}]
        inner = metaoptim.MetaLearned(groups, first, lr=0.2)
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(T):
                inner.step(outer_loss(net, t))
            outer_loss(net, T).backward()
        grads.append(
            {f"{n} {k}": p.grad for k, r in enumerate((first, second)) for n, p in r.named_parameters()}
        )
    for other in grads:
        agree(other, grads[-1])


def test_a_state_dict_has_the_state_and_not_the_rule(tmp_path: Any) -> None:
    net, rule = made("tensors")
    inner = metaoptim.MetaLearned([net], rule, lr=0.2)
    with metaoptim.SlidingWindow():
        for t in range(T):
            inner.step(outer_loss(net, t))
    torch.save(inner.state_dict(), tmp_path / "inner.pt")
    loaded = torch.load(tmp_path / "inner.pt", weights_only=True)
    assert loaded["param_groups"] == [{"lr": 0.2, "params": [0, 1, 2, 3]}]
    again = metaoptim.MetaLearned([net], rule, lr=0.7)
    again.load_state_dict(loaded)
    assert again.param_groups[0]["rule"] is rule and again.param_groups[0]["lr"] == 0.2
    for p, state in inner.state.items():
        assert state.keys() == again.state[p].keys()
        assert all(torch.equal(state[name], again.state[p][name]) for name in state)
