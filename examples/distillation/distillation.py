"""Ten images that stand for 1,200: a data set distilled by gradients through training.

A network trained on ten images alone, one for each digit, is to know all digits. What is learnt are the images, their
soft labels and the learning rate. The outer loss is that of the trained network on the 1,200 real images, and its
gradient goes through all 20 steps of the training. Every outer step begins with other parameters, so the images serve
networks that they have never met (Wang et al. 2018, arXiv 1811.10959).

    python distillation.py                    # a few minutes on a CPU
    python distillation.py --labels fixed     # images and rate alone

Afterwards torch.optim trains new networks on the ten images, beside ten real ones and the means of the classes.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import metaoptim
from plots import plot_distilled
from training import (
    Digits,
    Distilled,
    accuracy,
    class_means,
    fit,
    hard_labels,
    network,
    one_of_each,
    reset,
    split_digits,
    train,
)

HERE = pathlib.Path(__file__).resolve().parent
PRESETS = {
    # A few minutes on one core.
    "demo": dict(seeds=5, iterations=1000, steps=20, networks=20),
    # Seconds: to see that everything runs.
    "quick": dict(seeds=1, iterations=30, steps=6, networks=3),
}
RATES = (0.03, 0.1, 0.3, 1.0)  # of gradient descent, where none is learnt
LONGER = (1, 10)  # real images and means may also take ten times as many steps
CHOOSING = 3  # networks that the rate is chosen by
NEW = 1_000_000  # the first seed of parameters that nothing has been learnt with
LEARNT, REAL, MEANS, ALL = (
    "ten distilled images",
    "ten real images",
    "the means of the classes",
    "all 1,200 images",
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is not given is taken from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="defaults for what is not given (default: demo)")
    add("--labels", choices=("learnt", "fixed"), default="learnt", help="of the images (default: learnt)")
    add("--seeds", type=int, help="data sets distilled, each from a split of its own")
    add("--iterations", type=int, help="outer steps")
    add("--steps", type=int, help="inner steps, T")
    add("--networks", type=int, help="new networks to try each data set with")
    add("--outer-rate", type=float, default=0.03, help="of the outer Adam, at first (default: 0.03)")
    add(
        "--rate-step",
        type=float,
        default=0.01,
        help="the same for the logarithm of the inner rate (default: 0.01)",
    )
    add("--rate", type=float, default=0.3, help="of gradient descent, at first (default: 0.3)")
    add("--backend", default="inductor", help="of metaoptim.compile (default: inductor)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--out", type=pathlib.Path, help="folder of the picture")
    args = parser.parse_args(argv)
    if args.out is None:  # the picture in the README is that of the demo
        args.out = HERE if args.preset == "demo" else HERE / ".cache"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


class Distiller:
    """Distils data sets; one network and one compiled function serve all of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.net = args, network("tanh", 0)
        self.train = metaoptim.compile(train, backend=args.backend)

    def __call__(self, digits: Digits, seed: int, bar: tqdm) -> tuple[Distilled, list[float]]:
        """Returns ten images that began as real ones, and the outer losses."""
        args = self.args
        began = one_of_each(digits, seed), hard_labels() / 2, torch.tensor(math.log(args.rate))
        distilled = Distilled(*(t.clone().requires_grad_() for t in began))
        learnt = [distilled.images, distilled.labels] if args.labels == "learnt" else [distilled.images]
        rate = {"params": [distilled.log_rate], "lr": args.rate_step}
        outer = torch.optim.Adam([{"params": learnt, "lr": args.outer_rate}, rate])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, args.iterations)
        losses = []
        for iteration in range(args.iterations):
            reset(self.net, 10_000 * seed + iteration)  # never the same network twice
            loss = self.train(self.net, distilled, args.steps, digits.x, digits.y)
            outer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            outer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
        return Distilled(*(t.detach() for t in distilled)), losses


def tried(distilled: Distilled, kind: str, steps: int, digits: Digits, first: int, networks: int) -> Tensor:
    """Returns the test accuracies of new networks trained on the images, one for each network."""
    nets = (fit(network(kind, NEW + first + k), distilled, steps) for k in range(networks))
    return torch.tensor([accuracy(net, digits.x_test, digits.y_test) for net in nets])


def best_tried(distilled: Distilled, kind: str, lengths: list[int], digits: Digits, networks: int) -> Tensor:
    """Returns the same at the rate and the number of steps that are best in the test, by other networks."""
    choices = [
        (distilled._replace(log_rate=torch.tensor(math.log(rate))), steps)
        for rate in RATES
        for steps in lengths
    ]
    scores = [float(tried(d, kind, n, digits, networks, CHOOSING).mean()) for d, n in choices]
    chosen, steps = choices[scores.index(max(scores))]
    return tried(chosen, kind, steps, digits, 0, networks)


def by_all(kind: str, digits: Digits, args: argparse.Namespace) -> Tensor:
    """Returns the same for all of the real images, by Adam; the ceiling."""
    found = []
    for k in range(min(args.networks, 3)):
        net = network(kind, NEW + k)
        optim = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(10 * args.steps):
            optim.zero_grad()
            F.cross_entropy(net(digits.x), digits.y).backward()
            optim.step()
        found.append(accuracy(net, digits.x_test, digits.y_test))
    return torch.tensor(found)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example; the numbers that it prints."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    distil = Distiller(args)
    found: dict[str, dict[str, list[Tensor]]] = {"tanh": {}, "relu": {}}
    first: tuple[Digits, Distilled] | None = None
    losses = []
    with tqdm(total=args.seeds * args.iterations, desc="outer steps", unit="step", disable=None) as bar:
        for seed in range(args.seeds):
            digits = split_digits(seed)
            distilled, curve = distil(digits, seed, bar)
            first = first or (digits, distilled)
            losses.append(curve)
            lengths = [n * args.steps for n in LONGER]
            unlearnt = hard_labels(), torch.zeros(())
            real, means = (Distilled(x, *unlearnt) for x in (one_of_each(digits, seed), class_means(digits)))
            for kind, of in found.items():
                if kind == "tanh":
                    own = tried(distilled, kind, args.steps, digits, 0, args.networks)
                else:  # the learnt rate is that of other networks
                    own = best_tried(distilled, kind, [args.steps], digits, args.networks)
                of.setdefault(LEARNT, []).append(own)
                of.setdefault(REAL, []).append(best_tried(real, kind, lengths, digits, args.networks))
                of.setdefault(MEANS, []).append(best_tried(means, kind, lengths, digits, args.networks))
                of.setdefault(ALL, []).append(by_all(kind, digits, args))

    assert first is not None
    print(
        f"test accuracy of networks trained anew, {args.seeds} x {args.networks} (their standard deviation)"
    )
    print(f"  {'':28} 64-64-10 tanh   64-128-128-10 ReLU, which nothing was learnt with")
    for name in found["tanh"]:
        columns = (torch.stack(found[kind][name]) for kind in found)
        print(f"  {name:28}" + "   ".join(f" {c.mean():5.1%}  ({c.std():.1%})" for c in columns))
    by_split = {name: torch.stack(of).mean(1) for name, of in found["tanh"].items()}
    each = ", ".join(f"{100 * v:.1f}" for v in by_split[LEARNT])
    print(f"  distilled, each split: {each}; rate learnt at the first: {first[1].log_rate.exp():.2f}")
    args.out.mkdir(parents=True, exist_ok=True)
    digits, distilled = first
    rows = {
        "began as": one_of_each(digits, 0) + digits.mean,
        "distilled": distilled.images + digits.mean,
        "means": class_means(digits) + digits.mean,
    }
    plot_distilled(rows, distilled.labels.softmax(1), losses, found, args.out / "distillation.png")
    return {"accuracies": by_split, "distilled": distilled, "losses": losses}


if __name__ == "__main__":
    main()
