"""The learning rates of a small GPT, learnt for each group of parameters through whole training runs.

A byte-level GPT is trained on Python's own help texts for T steps of AdamW. A grid finds the best cosine schedule with
warm-up. From there, the meta-gradient of the loss after the last step learns a schedule for each of five groups:
embeddings, attention, MLP, norms, head. Both are then set against each other on text that was held out, from new
initial weights and with new batches.

    python gpt-schedule.py              # minutes on two cores
    python gpt-schedule.py --shared     # learns one schedule for all groups
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import metaoptim
from model import GPT, reset
from plots import plot_schedules
from text import splits
from training import batches, by_torch, cosine, schedules, train

HERE = pathlib.Path(__file__).resolve().parent
PRESETS = {
    "demo": dict(
        steps=200, iterations=80, tuning=2, guesses=150, runs=16, asked=400,
        peaks=(0.003, 0.006, 0.012, 0.024, 0.048), warmups=(0.0, 0.1, 0.3, 0.5), finals=(0.0, 0.1, 0.3, 1.0),
    ),
    # Seconds: to see that everything runs.
    "quick": dict(
        steps=20, iterations=4, tuning=1, guesses=2, runs=4, asked=64,
        peaks=(0.006, 0.024), warmups=(0.1,), finals=(0.1,),
    ),
}  # fmt: skip
# The first seeds of the runs that schedules are learnt through, and of those they are compared on.
LEARNING, TEST = 1_000_000, 2_000_000


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is not given is taken from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="defaults for what is not given (default: demo)")
    add("--steps", type=int, help="inner steps, T")
    add("--iterations", type=int, help="outer steps, one training run each")
    add("--outer-rate", type=float, default=0.1, help="of the outer Adam, on log rates (default: 0.1)")
    add("--knots", type=int, default=11, help="numbers learnt for each schedule (default: 11)")
    add("--shared", action="store_true", help="learn one schedule for all groups")
    add("--peaks", type=float, nargs="+", help="of the grid: largest rates")
    add("--warmups", type=float, nargs="+", help="of the grid: shares of the steps that lead up to them")
    add("--finals", type=float, nargs="+", help="of the grid: last rates as fractions of the largest")
    add("--tuning", type=int, help="runs for each point of the grid, and for each guess")
    add("--guesses", type=int, help="random factors of the groups to compare with")
    add("--runs", type=int, help="runs to compare on")
    add("--asked", type=int, help="pieces of text in an outer loss, and in a test")
    add("--layers", type=int, default=1)
    add("--width", type=int, default=32)
    add("--heads", type=int, default=2)
    add("--context", type=int, default=32, help="bytes that the network sees")
    add("--batch", type=int, default=8, help="pieces of text in a batch")
    add("--seed", type=int, default=0)
    add("--backend", default="inductor", help="of metaoptim.compile (default: inductor)")
    add("--out", type=pathlib.Path, help="folder of the picture")
    args = parser.parse_args(argv)
    if args.out is None:  # the picture in the README is that of the demo
        args.out = HERE if args.preset == "demo" else HERE / ".cache"
    for name, chosen in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, chosen)
    return args


class Runs:
    """Training runs: each has a seed, from which its initial weights and its batches follow."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.text = args, splits()
        self.net = GPT(args.layers, args.width, args.heads, args.context)
        self.train: Callable[..., Tensor] = metaoptim.compile(train, backend=args.backend)
        whole = self.text["test"].split(args.context + 1)[:-1]
        self.test = torch.stack(whole[:: len(whole) // args.asked][: args.asked])  # all over the text

    def validation(self, seed: int) -> Tensor:
        """Draws pieces of the text that schedules are learnt and chosen by."""
        of = self.text["validation"]
        return of[batches(of, (self.args.asked,), self.args.context, seed)]

    def begin(self, seed: int, steps: int) -> Tensor:
        """Draws the initial weights, and places of batches."""
        reset(self.net, seed)
        return batches(self.text["train"], (steps, self.args.batch), self.args.context, seed)

    def loss(self, rates: Tensor, seed: int, asked: Tensor) -> Tensor:
        """The loss on what is asked after a run with these rates, (groups, steps)."""
        return self.train(self.net, rates, self.text["train"], self.begin(seed, rates.shape[1]), asked)

    @torch.no_grad()
    def losses(self, rates: Tensor, seeds: Iterable[int], asked: Tensor) -> Tensor:
        """The same for several runs, without derivatives, (runs,)."""
        return torch.stack([self.loss(rates, seed, asked) for seed in seeds])

    def by_torch(self, rates: Tensor, seed: int, asked: Tensor) -> Tensor:
        """The same by torch.optim."""
        by_torch(self.net, rates, self.text["train"], self.begin(seed, rates.shape[1]))
        with torch.no_grad():
            return self.net.loss(asked)


def search(runs: Runs, args: argparse.Namespace) -> list[tuple[float, tuple[float, float, float]]]:
    """The grid's losses, the best first; all points see the same initial weights and batches."""
    asked, found = runs.validation(args.seed), []
    bar = tqdm(list(itertools.product(args.peaks, args.warmups, args.finals)), desc="grid", unit="schedule")
    for point in bar:
        rates = cosine(*point, args.steps).repeat(len(runs.net.groups()), 1)
        seeds = range(args.seed, args.seed + args.tuning)
        found.append((float(runs.losses(rates, seeds, asked).mean()), point))
        bar.set_postfix(best=f"{min(found)[0]:.3f}")
    return sorted(found)


def scatter(runs: Runs, base: Tensor, args: argparse.Namespace) -> Tensor:
    """What needs no meta-gradients: the schedule times a factor for each group, the best of random ones.

    Returns:
        The rates, (groups, steps).
    """
    generator = torch.Generator().manual_seed(args.seed)
    asked, seeds = runs.validation(args.seed), range(args.seed, args.seed + args.tuning)
    best = (float("inf"), base)
    bar = tqdm(range(args.guesses), desc="random factors", unit="guess")
    for _ in bar:
        factors = torch.randn(len(runs.net.groups()), 1, generator=generator).exp()
        rates = base * factors
        best = min(best, (float(runs.losses(rates, seeds, asked).mean()), rates), key=lambda found: found[0])
        bar.set_postfix(best=f"{best[0]:.3f}")
    return best[1]


def learn(runs: Runs, base: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Learns schedules, beginning with the given one.

    Returns:
        The rates, (groups, steps), and by how much each outer loss was less than that of the given schedule.
    """
    groups = len(runs.net.groups())
    knots = torch.zeros(1 if args.shared else groups, args.knots, requires_grad=True)
    outer = torch.optim.Adam([knots], lr=args.outer_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(outer, args.iterations)
    gains = []
    bar = tqdm(range(args.iterations), desc="outer steps", unit="step")
    for iteration in bar:
        seed = LEARNING * (args.seed + 1) + iteration
        asked = runs.validation(seed)
        before = runs.losses(base.repeat(groups, 1), [seed], asked)
        loss = runs.loss(schedules(base, knots).expand(groups, -1).contiguous(), seed, asked)
        outer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([knots], 0.1)  # most are half of that: one wild run shall not decide
        outer.step()
        decay.step()
        gains.append(float(before - loss.detach()))
        bar.set_postfix(gain=f"{sum(gains[-10:]) / len(gains[-10:]):+.3f}")
    return schedules(base, knots.detach()).expand(groups, -1).contiguous(), torch.tensor(gains)


def stretched(rates: Tensor, steps: int) -> Tensor:
    """Makes rates of another number of steps, on lines between the given ones."""
    return torch.nn.functional.interpolate(rates.unsqueeze(0), size=steps, mode="linear", align_corners=True)[
        0
    ]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example; the losses on the test text by schedule, (runs,), and the rates that were learnt."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)  # more gain nothing on matrices this small
    runs = Runs(args)
    grid = search(runs, args)
    base = cosine(*grid[0][1], args.steps)
    guessed = scatter(runs, base, args)
    learned, gains = learn(runs, base, args)

    seeds = range(TEST, TEST + args.runs)
    groups = len(learned)
    cosines = [cosine(*point, args.steps).repeat(groups, 1) for _, point in grid[:5]]
    rivals = [runs.losses(c, seeds, runs.test) for c in tqdm(cosines, desc="five cosines", unit="schedule")]
    best = min(range(len(rivals)), key=lambda k: float(rivals[k].mean()))
    mean = learned.log().mean(0).exp().repeat(groups, 1)
    found = {
        "learned": runs.losses(learned, seeds, runs.test),
        "cosine with random factors": runs.losses(guessed, seeds, runs.test),
        "cosine, best of the grid": rivals[0],
        "cosine, best on these very runs": rivals[best],
        "learned, groups averaged": runs.losses(mean, seeds, runs.test),
    }
    twice = [runs.losses(stretched(of, 2 * args.steps), seeds, runs.test) for of in (learned, cosines[0])]

    count = len(grid) * args.tuning
    print(
        f"grid of {len(grid)} cosine schedules, {count} runs; loss on validation, peak, warm-up, last/peak:"
    )
    for loss, point in grid[:5]:
        print(f"  {loss:.4f}  {point[0]:g}, {point[1]:g}, {point[2]:g}")
    print(
        f"loss on the test text (nats a byte) after {args.steps} steps, {args.runs} new runs, (standard error)"
    )
    for name, of in found.items():
        less = of - rivals[0]
        print(
            f"  {name:32} {of.mean():.4f}   less the grid's best {less.mean():+.4f} ({error(less):.4f}), "
            f"better in {int((less < 0).sum())} of {args.runs}"
        )
    less = found["learned"] - found["cosine with random factors"]
    print(
        f"learned less random factors: {less.mean():+.4f} ({error(less):.4f}), "
        f"better in {int((less < 0).sum())} of {args.runs}"
    )
    less = twice[0] - twice[1]
    print(
        f"stretched to {2 * args.steps} steps: learned {twice[0].mean():.4f}, cosine {twice[1].mean():.4f}, ",
        end="",
    )
    print(f"difference {less.mean():+.4f} ({error(less):.4f})")
    print(f"the first run by torch.optim.AdamW: {runs.by_torch(learned, TEST, runs.test):.4f}, ", end="")
    print(f"in a window {found['learned'][0]:.4f}")
    args.out.mkdir(parents=True, exist_ok=True)
    rates = dict(zip(runs.net.groups(), learned))
    plot_schedules(rates, base, gains, found, args.out / "gpt-schedule.png")
    return {**found, "rates": rates}


def error(values: Tensor) -> float:
    """The standard error of a mean."""
    return float(values.std() / len(values) ** 0.5)


if __name__ == "__main__":
    main()
