"""MAML on few-shot character recognition, with metaoptim.

MAML (Finn, Abbeel and Levine, 2017) learns the initial parameters of a network so that a
few steps of gradient descent on a handful of labelled images ("support") make it
classify other images of the same new characters ("query"). The inner steps are ordinary
calls of an ordinary module; `metaoptim` differentiates the query loss through them, and
leaves the network where it was for the next task.

    python maml-omniglot.py                        # a few minutes on a CPU
    python maml-omniglot.py --omniglot images_background.zip images_evaluation.zip
    python maml-omniglot.py --compile              # each task as one compiled function

The characters come from real fonts unless Omniglot is given (see glyphs.py); the
alphabets of meta-training and meta-testing are disjoint.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import metaoptim
from episodes import Episode, EpisodeSampler
from glyphs import load_glyphs, load_omniglot
from model import ConvNet, accuracy
from plots import plot_accuracies, plot_episodes

HERE = pathlib.Path(__file__).resolve().parent

Adapt = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # `adapt`, compiled or not

PRESETS = {
    # A few minutes on a CPU.
    "demo": dict(
        filters=32, queries=5, inner_steps=1, test_inner_steps=3, inner_lr=0.4, outer_lr=3e-3,
        tasks=4, iterations=800, test_episodes=400, curve_points=10, curve_episodes=60,
    ),
    # Close to the MAML paper on 5-way Omniglot; meant for a GPU and many hours.
    "full": dict(
        filters=64, queries=15, inner_steps=1, test_inner_steps=3, inner_lr=0.4, outer_lr=1e-3,
        tasks=32, iterations=60_000, test_episodes=1000, curve_points=60, curve_episodes=200,
    ),
}  # fmt: skip


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is not given is taken from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--preset", choices=PRESETS, default="demo", help="defaults for all that is not given (default: demo)"
    )
    add("--omniglot", nargs="+", metavar="ZIP", help="images_background.zip [images_evaluation.zip]")
    add("--ways", type=int, default=5, help="characters per episode (default: 5)")
    add("--shots", type=int, default=1, help="support images per character (default: 1)")
    add("--queries", type=int, help="query images per character")
    add("--filters", type=int, help="channels of the convolutions")
    add("--inner-steps", type=int, help="inner steps in meta-training")
    add("--test-inner-steps", type=int, help="inner steps in meta-testing")
    add("--inner-lr", type=float, help="learning rate of the inner steps")
    add("--outer-lr", type=float, help="learning rate of Adam on the initial parameters")
    add("--tasks", type=int, help="episodes per outer step (meta batch)")
    add("--iterations", type=int, help="outer steps")
    add("--test-episodes", type=int, help="held-out episodes of the final test")
    add("--curve-points", type=int, help="evaluations during meta-training")
    add("--curve-episodes", type=int, help="held-out episodes of each of them")
    add("--first-order", action="store_true", help="drop second derivatives (FOMAML)")
    add("--rotate", action="store_true", help="quarter turns as more classes in meta-training")
    add("--compile", action="store_true", help="compile the adaptation to a task as one function")
    add(
        "--backend",
        default="inductor",
        help="of torch.compile: inductor, aot_eager, eager (default: inductor)",
    )
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    # Two threads gain little on images this small, and cost a factor of ten when anything
    # else runs on the same cores: each operation then waits for the thread that was put off.
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--checkpoint", type=pathlib.Path, metavar="PATH", help="save there, and resume from it if it exists")
    add("--fresh", action="store_true", help="ignore an existing checkpoint")
    add("--out", type=pathlib.Path, default=HERE, metavar="DIR", help="folder for the pictures")
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.omniglot and len(args.omniglot) > 2:
        parser.error("--omniglot takes one or two archives")
    for name in (
        "ways",
        "shots",
        "queries",
        "tasks",
        "iterations",
        "test_episodes",
        "curve_points",
        "curve_episodes",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def adapt(
    net: ConvNet,
    x_spt: torch.Tensor,
    y_spt: torch.Tensor,
    x_qry: torch.Tensor,
    y_qry: torch.Tensor,
    steps: int,
    lr: float,
    first_order: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adapts the network to the support images of a task; after the window it is as it was.

    Returns:
        Query loss of the adapted network, differentiable, and its query logits.
    """
    inner = metaoptim.MetaSGD([net], lr=lr, first_order=first_order)
    with metaoptim.SlidingWindow(offline=True):
        for _ in range(steps):
            inner.step(F.cross_entropy(net(x_spt), y_spt))
        logits = net(x_qry)
        return F.cross_entropy(logits, y_qry), logits.detach()


def meta_step(
    adapt: Adapt,
    net: ConvNet,
    outer: torch.optim.Optimizer,
    episodes: list[Episode],
    args: argparse.Namespace,
) -> tuple[float, float]:
    """Takes one outer step over a meta batch.

    Returns:
        Query loss and query accuracy after adaptation, both averaged over the episodes.
    """
    outer.zero_grad()
    total_loss = total_accuracy = 0.0
    for episode in episodes:
        loss, logits = adapt(net, *episode[:4], args.inner_steps, args.inner_lr, args.first_order)
        (loss / len(episodes)).backward()
        total_loss += loss.item()
        total_accuracy += accuracy(logits, episode.y_qry)
    outer.step()
    return total_loss / len(episodes), total_accuracy / len(episodes)


def predict(
    adapt: Adapt, net: ConvNet, episode: Episode, args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the query logits of an episode before and after adaptation."""
    with torch.no_grad():
        before = net(episode.x_qry)
    _, after = adapt(net, *episode[:4], args.test_inner_steps, args.inner_lr)
    return before, after


def evaluate(
    adapt: Adapt, net: ConvNet, sampler: EpisodeSampler, count: int, args: argparse.Namespace
) -> dict[str, float]:
    """Measures accuracy before and after adaptation, with half widths of 95% intervals."""
    scores: dict[str, list[float]] = {"before": [], "after": []}
    for _ in tqdm(range(count), desc="held-out episodes", unit="ep", leave=False, disable=None):
        episode = sampler.draw()
        for key, logits in zip(scores, predict(adapt, net, episode, args)):
            scores[key].append(accuracy(logits, episode.y_qry))
    result = {}
    for key, values in scores.items():
        column = torch.tensor(values, dtype=torch.float64)
        result[key] = column.mean().item()
        # Episodes are independent, queries within one are not: the sample is the episode.
        spread = column.std().item() if count > 1 else 0.0
        result[f"{key}_half"] = 1.96 * spread / math.sqrt(count)
    return result


class Run:
    """A meta-training run: network, outer optimizer, data and curves."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        torch.manual_seed(args.seed)
        cache = HERE / ".cache"
        if args.omniglot:
            self.train_set, self.test_set = load_omniglot(args.omniglot, cache)
        else:
            self.train_set, self.test_set = load_glyphs(cache)
        self.sampler = EpisodeSampler(
            self.train_set, args.ways, args.shots, args.queries,
            seed=args.seed, device=args.device, rotate=args.rotate,
        )  # fmt: skip
        self.net = ConvNet(args.ways, args.filters).to(args.device)
        self.outer = torch.optim.Adam(self.net.parameters(), lr=args.outer_lr)
        self.adapt: Adapt = metaoptim.compile(adapt, backend=args.backend) if args.compile else adapt
        self.curves: dict[str, list[float]] = {
            key: [] for key in ("iteration", "before", "before_half", "after", "after_half")
        }
        self.iteration = 0
        self.seconds = 0.0

    def test_sampler(self, seed: int) -> EpisodeSampler:
        """Returns a new sampler of held-out episodes: equal seeds, equal episodes."""
        args = self.args
        return EpisodeSampler(
            self.test_set, args.ways, args.shots, args.queries, seed=seed, device=args.device
        )

    def settings(self) -> dict[str, Any]:
        """Returns what two runs must share for one to go on from the other's checkpoint."""
        free = {"preset", "iterations", "test_episodes", "curve_points", "device", "threads"}
        free |= {"checkpoint", "fresh", "out", "compile", "backend"}
        settings = {key: value for key, value in vars(self.args).items() if key not in free}
        settings["omniglot"] = [os.path.basename(path) for path in self.args.omniglot or ()]
        return settings

    def save(self) -> None:
        """Writes the checkpoint, if there is to be one."""
        if self.args.checkpoint is None:
            return
        state = {
            "net": self.net.state_dict(),
            "outer": self.outer.state_dict(),
            "sampler": self.sampler.state(),
            "curves": self.curves,
            "iteration": self.iteration,
            "seconds": self.seconds,
        }
        checkpoint.save(self.args.checkpoint, self.settings(), state)

    def resume(self) -> None:
        """Goes on from the checkpoint, if there is one."""
        if self.args.checkpoint is None or self.args.fresh:
            return
        state = checkpoint.load(self.args.checkpoint, self.settings())
        if state is None:
            return
        self.net.load_state_dict(state["net"])
        self.outer.load_state_dict(state["outer"])
        self.sampler.restore(state["sampler"])
        self.curves, self.iteration, self.seconds = state["curves"], state["iteration"], state["seconds"]
        print(f"resumed after iteration {self.iteration} from {self.args.checkpoint} (--fresh starts over)")

    def train(self) -> None:
        """Meta-trains to the last iteration, adding to the curves on the way."""
        args = self.args
        every = max(1, args.iterations // args.curve_points)
        shown: dict[str, str] = {}
        started = time.monotonic() - self.seconds
        bar = tqdm(
            total=args.iterations, initial=self.iteration, desc="meta-training", unit="it", disable=None
        )
        while True:
            due = self.iteration % every == 0 or self.iteration == args.iterations
            if due and self.iteration not in self.curves["iteration"]:
                # Always the same episodes: the curve then shows the network change, not the draw.
                result = evaluate(
                    self.adapt, self.net, self.test_sampler(args.seed + 1), args.curve_episodes, args
                )
                for key, value in {"iteration": self.iteration, **result}.items():
                    self.curves[key].append(value)
                shown["held-out"] = f"{result['before']:.0%}->{result['after']:.0%}"
                self.seconds = time.monotonic() - started
                self.save()
            if self.iteration >= args.iterations:
                break
            loss, score = meta_step(
                self.adapt, self.net, self.outer, [self.sampler.draw() for _ in range(args.tasks)], args
            )
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"query loss is {loss} at iteration {self.iteration}; try a smaller --inner-lr"
                )
            self.iteration += 1
            self.seconds = time.monotonic() - started
            if self.iteration % 50 == 0:
                self.save()
            bar.set_postfix({"loss": f"{loss:.3f}", "acc": f"{score:.0%}", **shown}, refresh=False)
            bar.update()
        bar.close()

    def test(self) -> dict[str, float]:
        """Runs the final test, prints it and draws the pictures."""
        args = self.args
        result = evaluate(self.adapt, self.net, self.test_sampler(args.seed + 2), args.test_episodes, args)
        print(f"{args.test_episodes} test episodes, {args.ways}-way {args.shots}-shot, held-out alphabets")
        print(f"  before adaptation  {100 * result['before']:5.1f}% +- {100 * result['before_half']:.1f}")
        print(
            f"  after adaptation   {100 * result['after']:5.1f}% +- {100 * result['after_half']:.1f}"
            f"   ({args.test_inner_steps} inner steps)"
        )
        print(f"  chance             {100 / args.ways:5.1f}%")

        data = "Omniglot" if args.omniglot else "font glyphs"
        order = "first-order MAML" if args.first_order else "MAML"
        title = f"{order}, {args.ways}-way {args.shots}-shot {data}, mean and 95% interval"
        plot_accuracies(self.curves, 1 / args.ways, title, args.out / "maml-accs-MetaOptim.png")
        sampler = self.test_sampler(args.seed + 2)
        episodes = [sampler.draw() for _ in range(6)]
        predictions = [
            predict(self.adapt, self.net, episode, args)[1].argmax(1).tolist() for episode in episodes
        ]
        plot_episodes(episodes, predictions, self.test_set, args.out / "episodes.png")
        print(f"pictures: {args.out / 'maml-accs-MetaOptim.png'}, {args.out / 'episodes.png'}")
        return result


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the example; returns the accuracies of the final test."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    run = Run(args)
    print(f"meta-train: {run.train_set.summary()}")
    print(f"meta-test:  {run.test_set.summary()}")
    run.resume()
    run.train()
    result = run.test()
    print(f"{time.monotonic() - started:.0f} s in all, {run.seconds:.0f} s of them meta-training")
    return result


if __name__ == "__main__":
    main()
