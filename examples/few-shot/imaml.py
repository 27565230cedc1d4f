"""Implicit MAML beside MAML: a meta-gradient whose memory does not grow with the inner steps.

Implicit MAML (Rajeswaran, Finn, Kakade and Levine, 2019) lets the inner problem pull towards the initial parameters θ₀:
loss of the support images + λ/2 |θ - θ₀|². Of its solution the meta-gradient is a linear system in the place of a sweep
back through all steps, and the last step alone is kept, however many there are. θ₀ acts through the pull alone.

Exact MAML and first-order MAML (no pull) are trained on the same episodes, for as many outer steps.

    python imaml.py                    # some minutes on a CPU
    python imaml.py --steps 5 40       # other numbers of inner steps
"""

from __future__ import annotations

import argparse
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import metaoptim
from episodes import Episode, EpisodeSampler
from glyphs import load_glyphs
from model import accuracy
from plots import plot_methods

HERE = pathlib.Path(__file__).resolve().parent
PRESETS = {
    # Some minutes on one core.
    "demo": dict(steps=(5, 15), seeds=3, iterations=100, tasks=2, test_episodes=150),
    # Seconds: to see that everything runs.
    "quick": dict(steps=(4,), seeds=1, iterations=12, tasks=2, test_episodes=20),
}


class Method(NamedTuple):
    """How to come by a meta-gradient.

    Attributes:
        rate: of the inner gradient descent.
        pull: λ, how strongly the inner problem pulls towards θ₀.
        gradient: as of `metaoptim.SlidingWindow`.
    """

    rate: float
    pull: float
    gradient: Any


METHODS = {
    "MAML": Method(0.3, 0.0, "exact"),
    "first-order MAML": Method(0.3, 0.0, "first_order"),
    # As in the paper's few-shot experiments: λ = 2, and five iterations of conjugate gradients.
    "implicit MAML": Method(0.1, 2.0, metaoptim.Implicit("cg", iterations=5, tolerance=0.1, converged=0.1)),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is not given is taken from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="defaults for what is not given (default: demo)")
    add("--steps", type=int, nargs="+", help="inner steps, T; each is a run of its own")
    add("--seeds", type=int, help="runs of each kind")
    add("--iterations", type=int, help="outer steps")
    add("--tasks", type=int, help="episodes per outer step")
    add("--test-episodes", type=int, help="held-out episodes of the final test")
    add("--ways", type=int, default=5, help="characters per episode (default: 5)")
    add("--shots", type=int, default=1, help="support images per character (default: 1)")
    add("--queries", type=int, default=5, help="query images per character (default: 5)")
    add("--outer-lr", type=float, default=3e-3, help="learning rate of Adam on the initial parameters")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--out", type=pathlib.Path, metavar="DIR", help="folder for the picture")
    args = parser.parse_args(argv)
    if args.out is None:  # the picture in the README is that of the demo
        args.out = HERE if args.preset == "demo" else HERE / ".cache"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def network(ways: int) -> nn.Sequential:
    """Returns a small smooth network: where the loss has kinks, its solutions have no implicit derivative."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(196, 128),
        nn.Tanh(),
        nn.Linear(128, 64),
        nn.Tanh(),
        nn.Linear(64, ways),
    )


def inner_loss(net: nn.Module, start: Sequence[Tensor], episode: Episode, pull: float) -> Tensor:
    """Returns the loss on the support images, with the pull towards `start`."""
    loss = F.cross_entropy(net(episode.x_spt), episode.y_spt)
    if pull:
        loss = loss + pull / 2 * sum((p - q).square().sum() for p, q in zip(net.parameters(), start))
    return loss


def adapt(
    net: nn.Module, episode: Episode, method: Method, steps: int, explain: bool = False
) -> tuple[Tensor, Tensor, Any]:
    """Adapts the network to the support images of a task; after the window it is as it was.

    Args:
        net: the network.
        episode: the task.
        method: how to differentiate.
        steps: inner steps.
        explain: whether to ask the window what it keeps.

    Returns:
        Query loss of the adapted network, its query logits, and what the window says of itself.
    """
    start = list(net.parameters())  # taken before the window: θ₀, which the pull leads to
    inner = metaoptim.MetaSGD([net], lr=method.rate)
    with metaoptim.SlidingWindow(offline=True, gradient=method.gradient) as window:
        for _ in range(steps):
            inner.step(inner_loss(net, start, episode, method.pull))
        logits = net(episode.x_qry)
        report = window.explain() if explain else None
        return F.cross_entropy(logits, episode.y_qry), logits.detach(), report


def meta_train(
    net: nn.Module, sampler: EpisodeSampler, method: Method, steps: int, args: argparse.Namespace, bar: tqdm
) -> float:
    """Meta-trains in place; seconds of processor time for each outer step."""
    outer = torch.optim.Adam(net.parameters(), lr=args.outer_lr)
    begun = time.process_time()
    for _ in range(args.iterations):
        outer.zero_grad()
        total = 0.0
        for _ in range(args.tasks):
            loss, _, _ = adapt(net, sampler.draw(), method, steps)
            (loss / args.tasks).backward()
            total += float(loss.detach()) / args.tasks
        if not math.isfinite(total):
            raise FloatingPointError(f"the query loss is {total}; try a smaller rate than {method.rate}")
        outer.step()
        bar.set_postfix(loss=f"{total:.3f}")
        bar.update()
    return (time.process_time() - begun) / args.iterations


def test(net: nn.Module, sampler: EpisodeSampler, method: Method, steps: int, count: int) -> float:
    """Returns the query accuracy after adaptation, the mean over episodes."""
    scores = []
    for _ in range(count):
        episode = sampler.draw()
        scores.append(accuracy(adapt(net, episode, method, steps)[1], episode.y_qry))
    return sum(scores) / count


def main(argv: list[str] | None = None) -> dict[tuple[str, int], dict[str, Any]]:
    """Runs the example; by method and T: accuracies, seconds per outer step, kept states and bytes."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    train_set, test_set = load_glyphs(HERE / ".cache")
    shape = args.ways, args.shots, args.queries
    found: dict[tuple[str, int], dict[str, Any]] = {}
    total = len(METHODS) * len(args.steps) * args.seeds * args.iterations
    with tqdm(total=total, desc="outer steps", unit="it", disable=None) as bar:
        for steps in args.steps:
            for name, method in METHODS.items():
                of = found[name, steps] = {"accuracy": [], "before": [], "milliseconds": []}
                for seed in range(args.seeds):
                    torch.manual_seed(seed)
                    net = network(args.ways)
                    held_out = [EpisodeSampler(test_set, *shape, seed=1000 + seed) for _ in range(2)]
                    of["before"].append(test(net, held_out[0], method, steps, args.test_episodes))
                    sampler = EpisodeSampler(train_set, *shape, seed=seed)
                    of["milliseconds"].append(1e3 * meta_train(net, sampler, method, steps, args, bar))
                    of["accuracy"].append(test(net, held_out[1], method, steps, args.test_episodes))
                    _, _, report = adapt(net, sampler.draw(), method, steps, explain=True)
                    of["states"], of["bytes"] = report.kept_states, report.predicted_peak_bytes

    print(
        f"query accuracy on held-out alphabets, {args.ways}-way {args.shots}-shot, after {args.iterations} outer steps "
        f"of {args.tasks} episodes; {args.seeds} seeds"
    )
    print(
        f"  {'':18} {'T':>3}  before meta-training  after (standard error)  ms per outer step  states kept   peak"
    )
    for (name, steps), of in found.items():
        values = torch.tensor(of["accuracy"], dtype=torch.float64)
        error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
        before, milliseconds = (sum(of[key]) / args.seeds for key in ("before", "milliseconds"))
        print(
            f"  {name:18} {steps:>3}  {before:>20.1%}  {values.mean():>12.1%}  ({error:.1%})  "
            f"{milliseconds:>18.0f}  {of['states']:>11}  {of['bytes'] / 2**20:4.1f} MiB"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    plot_methods(found, 1 / args.ways, args.out / "imaml.png")
    return found


if __name__ == "__main__":
    main()
