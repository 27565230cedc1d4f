"""The LOLA example: its values, its meta-gradient, and what its learners come to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

Example = Callable[[str, str], ModuleType]
PAYOFF = {"CC": -1.0, "CD": -3.0, "DC": 0.0, "DD": -2.0}


def rounds(mine: Tensor, theirs: Tensor, gamma: float, count: int = 700) -> Tensor:
    """The value of one match by going through the rounds, outcome by outcome."""
    names = ("start", *PAYOFF)
    chance = {"start": torch.ones((), dtype=mine.dtype)}
    total = torch.zeros((), dtype=mine.dtype)
    for t in range(count):
        after: dict[str, Tensor] = {}
        for seen, p in chance.items():
            c, d = mine[names.index(seen)], theirs[names.index(seen if seen == "start" else seen[::-1])]
            for end, q in {
                "CC": c * d,
                "CD": c * (1 - d),
                "DC": (1 - c) * d,
                "DD": (1 - c) * (1 - d),
            }.items():
                after[end] = after.get(end, 0.0) + p * q
        chance = after
        total = total + gamma**t * sum(p * PAYOFF[end] for end, p in chance.items())
    return total


def test_values_are_those_of_the_rounds_played(example: Example) -> None:
    game = example("lola", "game")
    generator = torch.Generator().manual_seed(3)
    one, two = game.Policies(2, generator)(), game.Policies(2, generator)()
    for match in range(2):
        expected = rounds(one[match], two[match], game.GAMMA)
        torch.testing.assert_close(game.value(one, two)[match], expected)
    always = torch.ones(1, 5, dtype=torch.float64)
    averages = [(1 - game.GAMMA) * game.value(a, b) for a, b in ((always, always), (always, 0 * always))]
    torch.testing.assert_close(torch.cat(averages), torch.tensor([-1.0, -3.0], dtype=torch.float64))


@pytest.mark.parametrize("lookahead", [1, 3])
def test_the_gradient_is_that_of_the_full_tape(example: Example, lookahead: int) -> None:
    lola, game = example("lola", "lola"), example("lola", "game")
    generator = torch.Generator().manual_seed(5)
    me, them = game.Policies(3, generator), game.Policies(3, generator)
    found = torch.autograd.grad(lola.outer_loss(me, them, lola.Learner(lookahead, 0.7)), [me.logits])[0]
    learnt = them.logits
    for _ in range(lookahead):
        (gradient,) = torch.autograd.grad(
            game.value(learnt.sigmoid(), me()).sum(), [learnt], create_graph=True
        )
        learnt = learnt + 0.7 * gradient
    expected = torch.autograd.grad(-game.value(me(), learnt.sigmoid()).sum(), [me.logits])[0]
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    # without the meta-gradient: the other player moves, and I look at where she is then
    unaware = torch.autograd.grad(lola.outer_loss(me, them, lola.Learner(lookahead, 0.7, True)), [me.logits])[
        0
    ]
    expected = torch.autograd.grad(-game.value(me(), learnt.detach().sigmoid()).sum(), [me.logits])[0]
    torch.testing.assert_close(unaware, expected, rtol=1e-10, atol=1e-12)
    assert (found - unaware).abs().max() > 0.1


def test_lola_learners_cooperate_where_naive_ones_defect(
    example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = example("lola", "lola").main(["--preset", "quick", "--iterations", "40", "--out", str(tmp_path)])
    naive, unaware, lola = (found[name] for name in ("naive", "looks ahead only", "LOLA"))
    assert naive.row()[0] < -1.98 and unaware.row()[0] < -1.98
    assert lola.row()[0] > -1.2
    start, cc, cd, dc, dd = lola.policies.mean((0, 1))
    assert min(start, cc, dc) > 0.7 and max(cd, dd) < 0.4  # tit-for-tat
    assert (tmp_path / "lola.png").read_bytes().startswith(b"\x89PNG")
    assert "LOLA against naive" in capsys.readouterr().out
