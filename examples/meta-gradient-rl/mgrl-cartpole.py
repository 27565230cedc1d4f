"""Meta-gradient reinforcement learning on CartPole, with metaoptim.

An actor and a critic learn while the discount γ and the trace decay λ that they learn with are learned too (Xu, van
Hasselt and Silver, 2018): a window of inner steps, then a trajectory of the agent that came out of them, judged by a
fixed yardstick. Its derivative by γ and λ, through the inner steps, moves these two.

    python mgrl-cartpole.py                     # some minutes on one CPU core
    python mgrl-cartpole.py --preset quick      # seconds

The inner step is one compiled program, called between steps of the environment; --no-compile runs it as ordinary
PyTorch, with the same result to rounding.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from typing import Any

import torch
from tqdm import tqdm

from plots import plot_learning, plot_paths
from results import Results
from training import Settings, train

HERE = pathlib.Path(__file__).resolve().parent

PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(
        env_steps=60_000, envs=8, length=32, inner_steps=2, hidden=32, actor_lr=3e-3, critic_lr=1e-2,
        meta_lr=0.1, entropy=0.01, judge_gamma=0.99, judge_lam=1.0, points=60,
    ),
    # To see that everything runs; nothing is learnt in it.
    "quick": dict(
        env_steps=400, envs=4, length=16, inner_steps=2, hidden=8, actor_lr=3e-3, critic_lr=1e-2,
        meta_lr=0.1, entropy=0.01, judge_gamma=0.99, judge_lam=1.0, points=2,
    ),
}  # fmt: skip
SEEDS = {"demo": 5, "quick": 2}
VARIANTS = ["learn:0.8,0.9", "fixed:0.8,0.9", "fixed:0.99,0.9"]


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """``learn:0.8,0.9`` or ``fixed:0.99,0.9`` -> its name in pictures, and what it means for `Settings`."""
    kind, _, numbers = text.partition(":")
    try:
        gamma, lam = map(float, numbers.split(","))
        if kind not in ("learn", "fixed") or not (0 < gamma < 1 and 0 < lam < 1):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected learn:GAMMA,LAMBDA or fixed:GAMMA,LAMBDA with numbers between 0 and 1"
        ) from None
    name = f"learned from γ={gamma:g}, λ={lam:g}" if kind == "learn" else f"fixed γ={gamma:g}, λ={lam:g}"
    return name, {"gamma": gamma, "lam": lam, "learn": kind == "learn"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is not given is taken from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--preset", choices=PRESETS, default="demo", help="defaults for all that is not given (default: demo)"
    )
    add("--seeds", type=int, help="runs of every variant (demo: 5)")
    add("--first-seed", type=int, default=0)
    add(
        "--variants", nargs="+", type=parse_variant, metavar="KIND:GAMMA,LAMBDA",
        default=[parse_variant(v) for v in VARIANTS], help=f"what to compare (default: {' '.join(VARIANTS)})",
    )  # fmt: skip
    add("--backend", default="eager", help="what the inner step is compiled with: eager, aot_eager, inductor")
    add("--no-compile", action="store_true", help="ordinary inner steps")
    for name, value in PRESETS["demo"].items():
        add(f"--{name.replace('_', '-')}", type=type(value), help=f"(demo: {value:g})")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add(
        "--results",
        type=pathlib.Path,
        metavar="JSON",
        help="keep finished runs there, and go on after a kill",
    )
    add("--fresh", action="store_true", help="ignore finished runs")
    add("--out", type=pathlib.Path, default=HERE, metavar="DIR", help="folder for the pictures")
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif not getattr(args, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    args.seeds = SEEDS[args.preset] if args.seeds is None else args.seeds
    for name in ("seeds", "env_steps", "envs", "length", "inner_steps", "hidden", "points"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def run_all(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Runs every variant with every seed; those already among the results are not run again."""
    backend = None if args.no_compile else args.backend
    results = Results(args.results, args.fresh)
    common = {name: getattr(args, name) for name in PRESETS["demo"]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in args.variants}
    total = len(args.variants) * args.seeds * args.env_steps
    with tqdm(total=total, unit="step", unit_scale=True, disable=None) as bar:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for name, variant in args.variants:
                settings = Settings(seed=seed, **variant, **common)
                run = results.find(settings, backend)
                if run is None:
                    bar.set_description(f"seed {seed}, {name}")

                    def progress(steps: int, curves: dict[str, list[float]]) -> None:
                        if curves["length"]:
                            last = {
                                "length": f"{curves['length'][-1]:.0f}",
                                "γ": f"{curves['gamma'][-1]:.3f}",
                            }
                            bar.set_postfix(last, refresh=False)
                        bar.update(steps)

                    run = train(settings, backend, progress)
                    results.add(settings, backend, run)
                else:
                    bar.update(args.env_steps)
                found[name].append(run)
    return found


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    """Prints means over seeds, with half widths of 95% intervals."""
    print(f"{'':28}  {'all episodes':>14}  {'last quarter':>14}  {'greedy at the end':>17}  γ, λ at the end")
    for name, runs in found.items():
        curves = [torch.tensor(run["length"], dtype=torch.float64) for run in runs]
        columns = [
            [c.mean().item() for c in curves],
            [c[-max(1, len(c) // 4) :].mean().item() for c in curves],
            [run["final"] for run in runs],
        ]
        shown = "  ".join(f"{_interval(c):>{w}}" for c, w in zip(columns, (14, 14, 17)))
        gamma, lam = (sum(run[key][-1] for run in runs) / len(runs) for key in ("gamma", "lam"))
        print(f"{name:28}  {shown}  {gamma:.3f}, {lam:.3f}")


def _interval(values: list[float]) -> str:
    column = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * column.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{column.mean().item():.0f} +- {half:.0f}"


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Runs the example; returns what `training.train` gave, by variant."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    found = run_all(args)
    report(found)
    title = f"CartPole, {args.seeds} seeds"
    plot_learning(found, f"{title}, mean and 95% interval", args.out / "mgrl-learning.png")
    plot_paths(found, title, args.out / "mgrl-paths.png")
    print(f"pictures: {args.out / 'mgrl-learning.png'}, {args.out / 'mgrl-paths.png'}")
    print(f"{time.monotonic() - started:.0f} s in all")
    return found


if __name__ == "__main__":
    main()
