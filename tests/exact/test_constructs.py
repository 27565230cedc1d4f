"""More constructs inside an inner loss than docs/constructs.md lists: each as eager would differentiate it, twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from constructs import CASES, STEPS, construct
from oracle import agree, run_window


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by torch.func.jvp
@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
@pytest.mark.parametrize("name", CASES)
def test_construct(name: str, offline: bool) -> None:
    case, expected = construct(name, offline)
    for slots in (None, 2):
        agree(run_window(case, slots=slots), expected, rtol=1e-9)
    if CASES[name][2] is not None:
        return
    agree(run_window(case, strategy="full_tape"), expected, rtol=1e-9)


def _against_tape(net: nn.Module, loss: Callable[[int, Tensor], Tensor]) -> None:
    """Gradients of a loss at theta_T, by ``w`` and theta_0, against the full tape's."""
    results = []
    own = list(net.parameters())
    for options in ({"strategy": "full_tape"}, {}, {"slots": 1}):
        w = torch.tensor(0.8, requires_grad=True)
        inner = metaoptim.MetaSGD([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True, **options):
            for t in range(STEPS):
                inner.step(loss(t, w))
            outer = loss(STEPS, torch.ones(()))
        results.append(torch.autograd.grad(outer, [w, *own]))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_transformer_layer(masked: bool, batch_first: bool) -> None:
    """What it makes of attention's result depends on how that lies in memory."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first)
    x = torch.randn(2, 5, 4)
    mask = nn.Transformer.generate_square_subsequent_mask(5 if batch_first else 2) if masked else None
    _against_tape(net, lambda t, w: (net(x * (1 + t), src_mask=mask) * w - x).square().mean())


def test_sequences_of_several_lengths() -> None:
    """Packed; the lengths change from step to step while their sum and their maximum stay."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "head": nn.Linear(4, 2)})
    x = torch.randn(5, 3, 3)

    def loss(t: int, w: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x * w, [5, 2, 2] if t % 2 else [5, 3, 1])
        states, _ = nn.utils.rnn.pad_packed_sequence(net["rnn"](packed)[0])
        return (net["head"](states) - 0.3).square().mean()

    _against_tape(net, loss)
