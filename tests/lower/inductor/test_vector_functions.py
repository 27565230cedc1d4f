"""Functions of vectors of floats in inductor's C++."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import run_by_inductor


def ulps(got: Tensor, want: Tensor) -> float:
    """The largest error in units in the last place of the exact values."""
    near = want.float().abs()
    unit = torch.nextafter(near, torch.tensor(torch.inf)).double() - near.double()
    return float(((got.double() - want).abs() / unit).max())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")  # by inductor
def test_tanh_is_exact_to_one_and_a_half_units_in_the_last_place(tmp_path: Path) -> None:
    single = torch.cat(
        [
            *(torch.linspace(-s, s, 200_003) for s in (0.7, 12)),
            *(torch.logspace(-37, 2, 50_001) * s for s in (1, -1)),
        ]
    ).float()
    values = [torch.inf, -torch.inf, 0.0, -0.0, 3e38, -3e38, 1e-45, 0.625, -0.625, torch.nan]
    special = torch.tensor(values * 3, dtype=torch.float32)
    double = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    half = torch.linspace(-3, 3, 1001).bfloat16()
    inputs = single, special, double, half

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        return *(t.tanh() for t in tensors), tensors[0][:1].expand_as(tensors[1]).tanh() * tensors[1]

    got = run_by_inductor(f, inputs, tmp_path)
    assert 0.51 < ulps(got[0], single.double().tanh()) < 1.5  # more than Sleef's: this one it is
    torch.testing.assert_close(got[1], special.tanh(), rtol=2e-7, atol=0, equal_nan=True)
    assert torch.equal(got[1].signbit()[:9], special.tanh().signbit()[:9])
    torch.testing.assert_close(got[2], double.tanh(), rtol=1e-15, atol=0)
    torch.testing.assert_close(got[4], single[0].tanh() * special, equal_nan=True)
    torch.testing.assert_close(got[3], half.tanh(), rtol=1e-2, atol=0)
