"""Learning rates and example weights, learnt through a training run of 2,000 steps.

A fifth of the training labels of scikit-learn's digits is wrong. An outer loop learns a weight for every training
example and a learning rate for every layer, such that the network trained with them does well on a small clean
validation set. Its gradient goes through all the steps of the training, in the memory of a few of them.

    python learn-weights.py                  # a few minutes on a CPU
    python learn-weights.py --compile        # the same with the training captured whole and compiled
    python learn-weights.py --preset long --compile    # through 20,000 steps in 16 MiB

What was learnt is then used to train new networks, by torch.optim.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import metaoptim
from digits import corrupted_digits
from metaoptim.runtime.budget.meter import AllocatorMeter
from plots import plot_learnt
from training import accuracy, batches, layers, network, reset, retrain, train, weights_of

HERE = pathlib.Path(__file__).resolve().parent

PRESETS = {
    # A few minutes on one core.
    "demo": dict(steps=2000, iterations=10, train=800, val=500, batch=64, slots=45, repeats=3),
    # Ten times as many steps, in a budget of memory.
    "long": dict(steps=20_000, iterations=10, train=800, val=500, batch=64, memory_budget="16MiB", repeats=1),
    # Seconds: to see that everything runs.
    "quick": dict(steps=40, iterations=3, train=200, val=100, batch=32, slots=6, repeats=1),
}
OPTIMIZERS = {
    "sgd": dict(rate=7e-3, weight_decay=5e-3),
    "adam": dict(rate=5e-4, weight_decay=5e-3),
}
# Without weights the rate is chosen among these multiples of the initial one, so that the comparison is fair.
MULTIPLES = (0.25, 0.5, 1, 2, 4)
# Steps over which allocations are measured: the profiler behind it keeps megabytes for each.
PROFILED = 200


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is not given is taken from the preset and the optimizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="defaults for what is not given (default: demo)")
    add("--steps", type=int, help="inner steps, T")
    add("--iterations", type=int, help="outer steps")
    add("--train", type=int, help="training examples")
    add("--val", type=int, help="clean examples of the outer loss; the rest is the test set")
    add("--batch", type=int, help="examples in a batch")
    add("--repeats", type=int, help="new networks trained with what was learnt")
    add("--corrupt", type=float, default=0.2, help="share of the training labels made wrong (default: 0.2)")
    add(
        "--optimizer", choices=OPTIMIZERS, default="sgd", help="inner optimizer (default: sgd, with momentum)"
    )
    add("--rate", type=float, help="learning rate to begin with")
    add("--weight-decay", type=float, help="of the inner optimizer")
    add("--rate-step", type=float, default=0.1, help="outer Adam's rate on the log rates (default: 0.1)")
    add(
        "--weight-step",
        type=float,
        default=0.3,
        help="outer Adam's rate on the weights' logits (default: 0.3)",
    )
    add("--slots", type=int, help="states of the inner loop kept; 0 keeps all")
    add("--memory-budget", help="memory for a meta-gradient, such as 16MiB, instead of slots")
    add(
        "--gather",
        choices=("step", "before"),
        default="step",
        help="when batches are collected (default: step)",
    )
    add("--compile", action="store_true", help="compile the whole training")
    add(
        "--backend",
        default="inductor",
        help="of torch.compile: inductor, aot_eager, eager (default: inductor)",
    )
    add("--seed", type=int, default=0)
    # A second thread gains nothing on matrices this small.
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--checkpoint", type=pathlib.Path, metavar="PATH", help="save there, and resume from it if it exists")
    add("--fresh", action="store_true", help="ignore an existing checkpoint")
    add("--out", type=pathlib.Path, default=HERE, metavar="DIR", help="folder for the picture")
    args = parser.parse_args(argv)
    kept = {"slots", "memory_budget"}
    said = any(getattr(args, name) is not None for name in kept)
    for name, value in {**PRESETS[args.preset], **OPTIMIZERS[args.optimizer]}.items():
        if getattr(args, name) is None and not (said and name in kept):
            setattr(args, name, value)
    for name in ("steps", "iterations", "batch", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, expected at least 1")
    if args.slots is not None and args.memory_budget is not None:
        parser.error("--slots and --memory-budget: give one of the two")
    if (args.slots or 0) < 0:
        parser.error(f"--slots: got {args.slots}, expected a count, or 0 to keep every state")
    if not 0 < args.corrupt < 1:
        parser.error(f"--corrupt: got {args.corrupt}, expected a share between 0 and 1")
    return args


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drops what is written to standard error below Python: the profiler announces itself there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Run:
    """The outer loop: what is learnt, its optimizer, and curves of how it went."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.digits, self.wrong = corrupted_digits(args.train, args.val, args.corrupt, args.seed)
        self.net = network(args.seed)
        self.log_rates = torch.full((len(layers(self.net)),), math.log(args.rate), requires_grad=True)
        self.logits = torch.zeros(args.train, requires_grad=True)
        self.outer = torch.optim.Adam(
            [
                {"params": [self.log_rates], "lr": args.rate_step},
                {"params": [self.logits], "lr": args.weight_step},
            ]
        )
        self.train: Callable[..., Any] = train
        if args.compile:
            self.train = metaoptim.compile(train, backend=args.backend)
        self.curves: dict[str, list[Any]] = {
            key: [] for key in ("rates", "auc", "loss", "val", "test", "seconds", "processor")
        }

    def forward(
        self, iteration: int, steps: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Trains once with what is learnt so far; every iteration has initial parameters and batches of its own."""
        args = self.args
        # All randomness follows from the seed and the iteration, so a resumed run needs no state of a generator.
        seed = 1000 * (args.seed + 1) + iteration
        reset(self.net, seed)
        rows = batches(args.train, args.batch, steps or args.steps, seed)
        return self.train(
            self.net, args.optimizer, args.weight_decay, self.log_rates, self.logits, self.digits, rows,
            args.gather, slots=args.slots or None, memory_budget=args.memory_budget,
        )  # fmt: skip

    def learn(self) -> None:
        """Takes all outer steps that are left."""
        done = len(self.curves["loss"])
        with tqdm(
            total=self.args.iterations, initial=done, desc="outer steps", unit="it", disable=None
        ) as bar:
            for iteration in range(done, self.args.iterations):
                self.outer_step(iteration)
                now = {key: values[-1] for key, values in self.curves.items()}
                bar.set_postfix(
                    {"loss": f"{now['loss']:.3f}", "AUC": f"{now['auc']:.3f}", "test": f"{now['test']:.1%}"}
                )
                bar.update()
                self.save()

    def outer_step(self, iteration: int) -> None:
        """Trains, differentiates through the training, and moves rates and weights."""
        begun = time.perf_counter(), time.process_time()
        with metaoptim.progress() if self.args.steps > 5000 else contextlib.nullcontext():
            loss, val, test = self.forward(iteration)
            self.outer.zero_grad()
            loss.backward()
        seconds, processor = time.perf_counter() - begun[0], time.process_time() - begun[1]
        gradients = [self.log_rates.grad, self.logits.grad]
        if not all(g is not None and g.isfinite().all() for g in gradients):
            raise FloatingPointError(
                f"the meta-gradient of outer step {iteration} is not finite (validation loss {loss.item():.3g}); try a "
                f"smaller --rate than {self.args.rate:g}, or a smaller --rate-step than {self.args.rate_step:g}"
            )
        found = {
            "rates": self.log_rates.detach().exp().tolist(),
            "auc": self.auc(),
            "loss": loss.item(),
            "val": accuracy(val, self.digits.y_val),
            "test": accuracy(test, self.digits.y_test),
            "seconds": seconds,
            "processor": processor,
        }
        for key, value in found.items():
            self.curves[key].append(value)
        self.outer.step()

    def auc(self) -> float:
        """Returns the chance that a wrongly labelled example has less weight than a rightly labelled one."""
        return float(roc_auc_score(~self.wrong.numpy(), self.logits.detach().numpy()))

    def settings(self) -> dict[str, Any]:
        """Returns what two runs must share for one to go on from the other's checkpoint."""
        free = {
            "preset",
            "iterations",
            "repeats",
            "slots",
            "memory_budget",
            "gather",
            "compile",
            "backend",
            "threads",
        }
        free |= {"checkpoint", "fresh", "out"}
        return {key: value for key, value in vars(self.args).items() if key not in free}

    def save(self) -> None:
        """Writes the checkpoint, if there is to be one: the old one or the new one, never a part."""
        path = self.args.checkpoint
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        state = {"log_rates": self.log_rates, "logits": self.logits, "outer": self.outer.state_dict()}
        torch.save({"settings": self.settings(), "curves": self.curves, **state}, partial)
        os.replace(partial, path)

    def resume(self) -> None:
        """Goes on from the checkpoint, if there is one.

        Raises:
            ValueError: it belongs to a run with other settings.
        """
        path = self.args.checkpoint
        if path is None or self.args.fresh or not path.exists():
            return
        saved = torch.load(path, weights_only=True)
        ours, theirs = self.settings(), saved["settings"]
        different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if different:
            listed = ", ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in different)
            raise ValueError(f"{path} belongs to a run with other settings ({listed}); --fresh starts over")
        with torch.no_grad():
            self.log_rates.copy_(saved["log_rates"])
            self.logits.copy_(saved["logits"])
        self.outer.load_state_dict(saved["outer"])
        self.curves = saved["curves"]
        print(f"resumed after outer step {len(self.curves['loss'])} from {path} (--fresh starts over)")

    def peak(self) -> int:
        """Returns the bytes that a meta-gradient through `PROFILED` steps allocates at its peak."""
        with _quiet_stderr(), AllocatorMeter() as meter:
            loss, _, _ = self.forward(0, min(self.args.steps, PROFILED))
            torch.autograd.grad(loss, [self.log_rates, self.logits])
        return meter.peak

    def compare(self) -> dict[str, float]:
        """Trains new networks by torch.optim, with what was learnt and without it.

        Returns:
            Test accuracy by kind of training, the mean over new networks.
        """
        digits = self.digits
        rates, weights = self.log_rates.detach().exp(), weights_of(self.logits.detach())
        initial = torch.full_like(rates, self.args.rate)
        noisy, clean = (digits.x, digits.y), (digits.x_val, digits.y_val)
        both = torch.cat([digits.x, digits.x_val]), torch.cat([digits.y, digits.y_val])
        ones, more = torch.ones_like(weights), torch.ones(len(digits.x_val))
        kinds = {
            "no weights, initial rate": [(initial, ones, *noisy)],
            "no weights, best of five rates": [(multiple * initial, ones, *noisy) for multiple in MULTIPLES],
            "learnt weights and rates": [(rates, weights, *noisy)],
            "wrong labels left out, learnt rates": [(rates, (~self.wrong).float(), *noisy)],
            "validation images alone, learnt rates": [(rates, more, *clean)],
            "these added, learnt weights and rates": [(rates, torch.cat([weights, more]), *both)],
        }
        with tqdm(
            total=sum(map(len, kinds.values())) * self.args.repeats,
            desc="new networks",
            leave=False,
            disable=None,
        ) as bar:
            return {kind: self.best(choices, bar) for kind, choices in kinds.items()}

    def best(self, choices: list[tuple], bar: tqdm) -> float:
        """Returns the test accuracy of the choice that is best in validation."""
        args, digits = self.args, self.digits
        results = []
        for rates, weights, x, y in choices:
            val, test = [], []
            for repeat in range(args.repeats):
                seed = 1000 * (args.seed + 1) + 500 + repeat  # none that was learnt with
                rows = batches(len(x), args.batch, args.steps, seed)
                net = retrain(args.optimizer, args.weight_decay, rates, weights, x, y, rows, seed)
                with torch.no_grad():
                    val.append(accuracy(net(digits.x_val), digits.y_val))
                    test.append(accuracy(net(digits.x_test), digits.y_test))
                bar.update()
            results.append((statistics.fmean(val), statistics.fmean(test)))
        return max(results, key=lambda result: result[0])[1]

    def report(self) -> dict[str, Any]:
        """Prints what was learnt and what it cost, and draws it."""
        args, seconds, processor = self.args, self.curves["seconds"], self.curves["processor"]
        rates = self.log_rates.detach().exp().tolist()
        auc, compared = self.auc(), self.compare()
        print(f"AUC of the weights, wrong against right labels: {auc:.3f}")
        print("learning rates: " + ", ".join(f"{args.rate:g} -> {rate:.2g}" for rate in rates))
        print(f"test accuracy of networks trained anew ({args.repeats} each)")
        for kind, score in compared.items():
            print(f"  {kind:<38} {score:6.1%}")
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        peak = self.peak()  # the profiler behind it takes memory too
        form = f"compiled, {args.backend}" if args.compile else "eager window"
        kept = f"{args.slots} slots" if args.slots else args.memory_budget or "every state kept"
        print(f"{args.steps:,} inner steps, {form}, {kept}")
        print(
            f"  {statistics.median(seconds):.1f} s per meta-gradient, {statistics.median(processor):.1f} s of them "
            f"processor time (the first: {seconds[0]:.1f} and {processor[0]:.1f} s)"
        )
        print(
            f"  peak {peak / 2**20:.1f} MiB over {min(args.steps, PROFILED)} steps, by the allocator; "
            f"{resident:.0f} MiB resident, the whole process over {args.steps:,}"
        )
        path = args.out / "learnt-weights.png"
        curves = {**self.curves, "rates": [*self.curves["rates"], rates], "auc": [*self.curves["auc"], auc]}
        weights = weights_of(self.logits.detach())
        plot_learnt(curves, weights, self.wrong, compared, f"T = {args.steps:,} inner steps", path)
        print(f"picture: {path}")
        return {
            "auc": auc,
            "rates": rates,
            "logits": self.logits.detach(),
            "peak": peak,
            "compared": compared,
        }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example; returns what it prints."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    begun = time.perf_counter()
    run = Run(args)
    print(
        f"{args.train} training examples, {int(run.wrong.sum())} of them with a wrong label; {args.val} validation, "
        f"{len(run.digits.x_test)} test"
    )
    run.resume()
    run.learn()
    result = run.report()
    print(f"{time.perf_counter() - begun:.0f} s in all")
    return result


if __name__ == "__main__":
    main()
