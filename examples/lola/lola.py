"""Players who reckon with the other one's learning (LOLA) find tit-for-tat; naive learners defect.

Two players learn policies for the iterated prisoner's dilemma, by gradients of their exact values. A naive learner
takes the other player as she is. A LOLA learner (Foerster et al. 2018, arXiv 1709.04326) maximizes what she gets after
the other player's next learning step, and differentiates through that step.

    python lola.py                      # a minute on one core
    python lola.py --lookahead 2        # through two learning steps of the other player
"""

from __future__ import annotations

import argparse
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import metaoptim
from game import GAMMA, MEMORIES, Policies, value
from plots import plot_learning

HERE = pathlib.Path(__file__).resolve().parent
PRESETS = {
    "demo": dict(matches=50, iterations=200, rates=(0.1, 0.3, 1.0, 3.0, 10.0)),
    # Seconds: to see that everything runs.
    "quick": dict(matches=10, iterations=60, rates=(1.0,)),
}

#: Matches whose two players get more than this a round, on average, count as cooperating: all would be -1.
COOPERATION = -1.1


class Learner(NamedTuple):
    """How a player learns.

    Attributes:
        lookahead: learning steps of the other player that are looked ahead; 0 for a naive learner.
        rate: of these steps.
        first_order: take them for constants, as if her own policy had no influence on them.
    """

    lookahead: int
    rate: float = 1.0
    first_order: bool = False


class Played(NamedTuple):
    """What two learners came to.

    Attributes:
        payoffs: of an average round, before the first outer step and after each, (iterations + 1, 2, matches).
        policies: the last probabilities to cooperate, (2, matches, 5).
    """

    payoffs: Tensor
    policies: Tensor

    def row(self) -> tuple[float, float, float, Tensor]:
        """The mean payoff, its standard error over matches, the share of matches that cooperate, the mean policy."""
        of_match = self.payoffs[-1].mean(0)
        error = of_match.std() / len(of_match) ** 0.5
        share = (of_match > COOPERATION).double().mean()
        return float(of_match.mean()), float(error), float(share), self.policies.mean((0, 1))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is not given is taken from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="defaults for what is not given (default: demo)")
    add("--matches", type=int, help="matches, each with initial policies of its own")
    add("--iterations", type=int, help="outer steps: learning steps of both players")
    add(
        "--lookahead",
        type=int,
        default=1,
        help="steps of the other player that LOLA looks ahead (default: 1)",
    )
    add("--rate", type=float, default=1.0, help="of everyone's learning steps (default: 1)")
    add("--rates", type=float, nargs="*", help="of the steps looked ahead, to compare")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, help="folder of the picture")
    args = parser.parse_args(argv)
    if args.out is None:  # the picture in the README is that of the demo
        args.out = HERE if args.preset == "demo" else HERE / ".cache"
    for name, chosen in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, chosen)
    return args


def outer_loss(me: Policies, them: Policies, learner: Learner) -> Tensor:
    """Minus my value, summed over matches, after the other player's learning steps; inside the window."""
    inner = metaoptim.MetaSGD([them], lr=learner.rate, first_order=learner.first_order)
    with metaoptim.SlidingWindow(offline=True):
        for _ in range(learner.lookahead):
            inner.step(
                -value(them(), me()).sum()
            )  # she learns against me: this is what I differentiate through
        return -value(me(), them()).sum()


def play(learners: tuple[Learner, Learner], args: argparse.Namespace, name: str) -> Played:
    """Lets two players learn against each other, in all matches at once."""
    generator = torch.Generator().manual_seed(args.seed)
    one, two = (Policies(args.matches, generator) for _ in range(2))
    payoffs = []

    def look() -> None:
        with torch.no_grad():
            payoffs.append((1 - GAMMA) * torch.stack([value(one(), two()), value(two(), one())]))

    look()
    bar = tqdm(range(args.iterations), desc=name, unit="step")
    for _ in bar:
        (mine,) = torch.autograd.grad(outer_loss(one, two, learners[0]), [one.logits])
        (theirs,) = torch.autograd.grad(outer_loss(two, one, learners[1]), [two.logits])
        with torch.no_grad():  # both at once
            one.logits -= args.rate * mine
            two.logits -= args.rate * theirs
        look()
        bar.set_postfix(payoff=f"{payoffs[-1].mean():.3f}")
    return Played(torch.stack(payoffs), torch.stack([one().detach(), two().detach()]))


def main(argv: list[str] | None = None) -> dict[str, Played]:
    """Runs the example; what the pairs of learners came to, by name."""
    args = parse_arguments(argv)
    naive, lola = Learner(0), Learner(args.lookahead, args.rate)
    unaware = lola._replace(first_order=True)
    pairs = {
        "naive": (naive, naive),
        "looks ahead only": (unaware, unaware),
        "LOLA": (lola, lola),
        "LOLA against naive": (lola, naive),
    }
    found = {name: play(pair, args, name) for name, pair in pairs.items()}
    by_rate = {}
    for rate in args.rates:
        shapes = lola._replace(rate=rate)
        by_rate[rate] = (
            play((shapes, shapes), args, f"LOLA, rate {rate:g}") if rate != args.rate else found["LOLA"]
        )

    print(
        f"{args.matches} matches after {args.iterations} steps; to cooperate: more than {COOPERATION} on average"
    )
    print(f"{'':24}  payoff  (error)  cooperate   P(C) after " + "  ".join(MEMORIES))
    for name, played in [*found.items(), *((f"LOLA, looks at rate {r:g}", p) for r, p in by_rate.items())]:
        mean, error, share, policy = played.row()
        print(
            f"{name:24}  {mean:6.3f}  ({error:.3f})  {share:9.0%}              "
            + "  ".join(f"{p:.2f}" for p in policy)
        )
    shaper, shaped = found["LOLA against naive"].payoffs[-1].mean(1)
    print(f"LOLA against naive: {shaper:.3f} for LOLA, {shaped:.3f} for the naive learner")
    args.out.mkdir(parents=True, exist_ok=True)
    plot_learning(
        {name: played.payoffs.mean(1) for name, played in found.items()},
        {name: found[name].policies.flatten(0, 1) for name in ("naive", "LOLA")},
        MEMORIES,
        {rate: played.payoffs[-1].mean(0) for rate, played in by_rate.items()},
        args.out / "lola.png",
    )
    return found


if __name__ == "__main__":
    main()
