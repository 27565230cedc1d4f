"""Random inner loops against the oracle, and the oracle against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracle import Problem, agree, leaves, outer_terms, run_oracle, run_window
from problems import NETWORKS, OPTIMIZERS, problem


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    network=st.sampled_from([n for n in NETWORKS if n != "lstm"]),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    steps=st.integers(0, 9),
    offline=st.booleans(),
    window=st.sampled_from([None, None, 1, 2, 4]),
    slots=st.sampled_from([None, 1, 2, 3, 4]),
    per_step=st.booleans(),
    carry=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::metaoptim.UnreachableWarning")
def test_random_inner_loops(
    network: str,
    optimizer: str,
    steps: int,
    offline: bool,
    window: int | None,
    slots: int | None,
    per_step: bool,
    carry: bool,
) -> None:
    if window is not None:
        carry = False  # what is carried has a history of its own: see test_carried_under_truncation
    if network == "dropout" and per_step and window is not None:
        per_step = False  # the oracle cannot replay masks of terms in between
    case = problem(network, optimizer, steps, offline, window, per_step=per_step, carry=carry)
    agree(run_window(case, slots=slots), run_oracle(case), rtol=1e-9)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", ["linear", "conv_bn", "tied"])
def test_finite_differences_confirm_the_oracle(network: str, optimizer: str) -> None:
    case = problem(network, optimizer, 4, False)
    expected = run_oracle(case)

    def value(**changed: Any) -> float:
        torch.manual_seed(3)
        net = case.build()
        return float(sum(outer_terms(case, net, leaves({**case.metas, **changed}))).detach())  # type: ignore[union-attr]

    for name, start in case.metas.items():
        g = torch.Generator().manual_seed(1)
        direction = torch.randn(start.shape, generator=g)
        slope = (value(**{name: start + 1e-5 * direction}) - value(**{name: start - 1e-5 * direction})) / 2e-5
        grad = expected[name]
        assert grad is not None and abs(slope) > 1e-7
        assert abs(float((grad * direction).sum()) - slope) <= 2e-5 * abs(slope) + 1e-8


def test_closed_form_quadratic() -> None:
    """Inner loss ½ a (θ - c)², SGD: θ_T - c = (1 - η a)^T (θ_0 - c), so every derivative is known."""
    a, c, eta, theta0, steps = 1.3, 0.4, 0.2, 2.0, 25

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = torch.nn.Parameter(torch.tensor(theta0))

    case = Problem(
        build=One,
        optimizer="MetaSGD",
        steps=steps,
        offline=True,
        hyper=lambda m: {"lr": m["eta"]},
        metas={"eta": torch.tensor(eta), "a": torch.tensor(a), "c": torch.tensor(c)},
        loss=lambda net, t, m, carried: 0.5 * m["a"] * (dict(net.named_parameters())["p"] - m["c"]).square(),
        outer=lambda net, m: dict(net.named_parameters())["p"] * 1.0,
    )
    rate = (1 - eta * a) ** steps
    expected = {
        "p": rate,
        "eta": -a * steps * (1 - eta * a) ** (steps - 1) * (theta0 - c),
        "a": -eta * steps * (1 - eta * a) ** (steps - 1) * (theta0 - c),
        "c": 1 - rate,
    }
    for slots in (None, 1, 4):
        agree(run_window(case, slots=slots), {k: torch.tensor(v) for k, v in expected.items()}, rtol=1e-12)
