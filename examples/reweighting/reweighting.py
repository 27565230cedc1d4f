"""Example weights, learnt from a few trusted images, for a data set of which 40% is labelled wrongly.

A thousand digits come from twenty sources. Eight of these name every digit wrongly, and nobody says which. Fifty more
images have labels that are known to be right. An outer loop learns a weight for every source, such that a network
trained with the weights does well on the fifty. Its gradient goes through all 150 steps of the training.

    python reweighting.py                     # a few minutes on a CPU
    python reweighting.py --noise guessed     # bad sources guess
    python reweighting.py --weights example   # a weight for every example instead

The learnt weights then train new networks by torch.optim, beside networks trained on the noisy labels, on the trusted
ones, on both, and on right labels. Every kind has the best of the same settings, chosen on other splits of the data.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import metaoptim
from data import NOISES, SOURCES, Digits, digits_of_sources
from plots import plot_weights
from training import Setting, accuracy, batches, fit, network, reset, train, weights_of

HERE = pathlib.Path(__file__).resolve().parent
PRESETS = {
    # A few minutes on one core.
    "demo": dict(
        seeds=10, tuning=3, iterations=40, steps=150, rates=(3e-3, 1e-2, 2e-2), lengths=(50, 150, 400)
    ),
    # Seconds: to see that everything runs.
    "quick": dict(seeds=1, tuning=1, iterations=10, steps=25, rates=(1e-2,), lengths=(60,)),
}
TUNING = 1_000  # the first seed of the splits that settings are chosen on
OURS, KNOWN, CEILING = (
    "learnt weights",
    "bad sources left out (if one knew them)",
    "right labels (the ceiling)",
)
PLAIN = ("noisy labels alone", "trusted images alone", "both", "noisy, then trusted")
AGREED = "sources that agree with a network trained on trusted images"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is not given is taken from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="defaults for what is not given (default: demo)")
    add("--noise", choices=NOISES, default="shifted", help="what bad sources do (default: shifted)")
    add(
        "--bad",
        type=int,
        help="bad sources of the twenty (default: so many that 40%% of the labels are wrong)",
    )
    add(
        "--weights",
        choices=("source", "example"),
        default="source",
        help="what has a weight (default: source)",
    )
    add("--many", type=int, default=1000, help="images with noisy labels (default: 1000)")
    add("--trusted", type=int, default=50, help="images with right labels (default: 50)")
    add("--seeds", type=int, help="splits of the data, each with sources of its own")
    add("--tuning", type=int, help="other splits, to choose settings on")
    add("--iterations", type=int, help="outer steps")
    add("--steps", type=int, help="inner steps, T")
    add("--rate", type=float, default=1e-2, help="learning rate of the inner steps (default: 0.01)")
    add("--outer-rate", type=float, default=0.3, help="of the outer Adam (default: 0.3)")
    add("--backend", default="inductor", help="of metaoptim.compile (default: inductor)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--out", type=pathlib.Path, help="folder of the picture")
    args = parser.parse_args(argv)
    if args.out is None:  # the picture in the README is that of the demo
        args.out = HERE if args.preset == "demo" else HERE / ".cache"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.bad is None:
        args.bad = 8 if args.noise == "shifted" else 9  # a tenth of the guesses is right
    return args


class Learner:
    """Learns weights; one network and one compiled function serve all splits."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.net = args, network(0)
        self.train = metaoptim.compile(train, backend=args.backend)

    def __call__(self, digits: Digits, seed: int, bar: tqdm) -> tuple[Tensor, list[float]]:
        """Returns the weights of the noisy examples, and the outer losses."""
        args = self.args
        group = digits.source if args.weights == "source" else torch.arange(len(digits.y))
        logits = torch.zeros(int(group.max()) + 1, requires_grad=True)
        outer, losses = torch.optim.Adam([logits], lr=args.outer_rate), []
        for iteration in range(args.iterations):
            # every outer step begins with other parameters and has other batches: nothing is learnt about one run
            reset(self.net, 10_000 * seed + iteration)
            rows = batches(len(digits.y), args.steps, 10_000 * seed + iteration)
            loss = self.train(self.net, logits, group, digits, rows, args.rate)
            outer.zero_grad()
            loss.backward()
            outer.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
        return weights_of(logits.detach())[group], losses


def agreeing(digits: Digits, seed: int) -> Tensor:
    """Returns weights of 1 for sources that a network trained on the trusted images agrees with in most labels."""
    net = fit(network(seed), digits, digits.y, torch.zeros(len(digits.y)), Setting(1e-2, 150, 1.0), seed)
    with torch.no_grad():
        agrees = (net(digits.x).argmax(1) == digits.y).float()
    by_source = torch.stack([agrees[digits.source == s].mean() for s in range(SOURCES)])
    return (by_source > 0.5).float()[digits.source]


def known(digits: Digits) -> Tensor:
    """Returns weights of 1 for sources whose labels are right, which nobody knows."""
    return torch.stack(
        [(digits.y == digits.clean)[digits.source == s].all() for s in range(SOURCES)]
    ).float()[digits.source]


Fit = Callable[[Setting], float]  # test accuracy of a setting


def kinds(digits: Digits, weights: Tensor, seed: int, first: Setting | None) -> dict[str, Fit]:
    """Returns what trains each kind of network and tests it.

    Args:
        digits: the data.
        weights: the learnt ones.
        seed: of initial parameters and batches.
        first: the setting of training on noisy labels that is followed by the trusted ones.
    """
    ones, none = torch.ones(len(digits.y)), torch.zeros(len(digits.y))

    def fitted(y: Tensor, weights: Tensor, setting: Setting) -> float:
        return accuracy(fit(network(seed), digits, y, weights, setting, seed), digits.x_test, digits.y_test)

    @functools.cache
    def before() -> dict[str, Tensor]:
        assert first is not None
        return fit(network(seed), digits, digits.y, ones, first, seed).state_dict()

    def then(setting: Setting) -> float:
        net = network(seed)
        net.load_state_dict(before())
        return accuracy(fit(net, digits, digits.y, none, setting, seed), digits.x_test, digits.y_test)

    return {
        PLAIN[0]: lambda s: fitted(digits.y, ones, s),
        PLAIN[1]: lambda s: fitted(digits.y, none, s),
        PLAIN[2]: lambda s: fitted(digits.y, ones, s),
        PLAIN[3]: then,
        AGREED: lambda s: fitted(digits.y, agreeing(digits, seed), s),
        OURS: lambda s: fitted(digits.y, weights, s),
        KNOWN: lambda s: fitted(digits.y, known(digits), s),
        CEILING: lambda s: fitted(digits.clean, ones, s),
    }


def tuned(args: argparse.Namespace, learner: Learner, bar: tqdm) -> dict[str, Setting]:
    """Returns the best setting of each kind, by test accuracy on splits of their own."""
    plain = list(product(args.rates, args.lengths))
    without, alone = [Setting(*s) for s in plain], [Setting(*s, 1.0) for s in plain]
    together = [Setting(*s, t) for s in plain for t in (0.5, 2.0)]
    choices = {PLAIN[0]: without, PLAIN[1]: alone, PLAIN[2]: together, PLAIN[3]: alone}
    choices |= dict.fromkeys((AGREED, OURS, KNOWN, CEILING), together)
    splits = []
    for seed in range(TUNING, TUNING + args.tuning):
        digits = digits_of_sources(args.many, args.trusted, args.bad, args.noise, seed)
        splits.append((digits, learner(digits, seed, bar)[0], seed))
    best: dict[str, Setting] = {}
    for kind, settings in choices.items():
        by_split = [
            kinds(digits, weights, seed, best.get(PLAIN[0]))[kind] for digits, weights, seed in splits
        ]
        scores = {s: sum(test(s) for test in by_split) for s in settings}
        best[kind] = max(scores, key=lambda s: scores[s])
    return best


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example; the numbers that it prints."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    learner = Learner(args)
    total = args.iterations * (args.tuning + args.seeds)
    found: dict[str, list[float]] = {}
    kept, wrong, losses = [], [], []
    with tqdm(total=total, desc="outer steps", unit="step", disable=None) as bar:
        best = tuned(args, learner, bar)
        for seed in range(args.seeds):
            digits = digits_of_sources(args.many, args.trusted, args.bad, args.noise, seed)
            weights, curve = learner(digits, seed, bar)
            for kind, test in kinds(digits, weights, seed, best[PLAIN[0]]).items():
                found.setdefault(kind, []).append(test(best[kind]))
            kept.append(weights)
            wrong.append(digits.y != digits.clean)
            losses.append(curve)

    scores = {kind: torch.tensor(values, dtype=torch.float64) for kind, values in found.items()}
    share = float(torch.cat(wrong).float().mean())
    print(
        f"{args.many} images, {share:.0%} of their labels wrong, {args.trusted} trusted; test accuracy over "
        f"{args.seeds} splits (standard error)"
    )
    for kind, values in scores.items():
        print(f"  {kind:60} {values.mean():6.1%}  ({_error(values):.1%})   {best[kind].text()}")
    plain = max(PLAIN, key=lambda kind: float(scores[kind].mean()))
    shares = {}
    for start in dict.fromkeys((PLAIN[0], plain)):
        gain, gap = scores[OURS] - scores[start], scores[CEILING] - scores[start]
        shares[start] = float(gain.mean() / gap.mean())
        error = _error(gain - shares[start] * gap) / float(gap.mean())  # of a ratio, by the delta method
        print(f"share of the gap from '{start}' to right labels: {shares[start]:.0%}  ({error:.0%})")
    args.out.mkdir(parents=True, exist_ok=True)
    plot_weights(torch.cat(kept), torch.cat(wrong), losses, scores, args.out / "reweighting.png")
    return {"scores": scores, "shares": shares, "weights": torch.cat(kept), "wrong": torch.cat(wrong)}


def _error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()
