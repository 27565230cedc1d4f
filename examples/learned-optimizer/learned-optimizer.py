"""An optimizer that is learned: a small network decides on every step, and is trained through whole training runs.

Its loss is what a network knows after T steps of it; the meta-gradient goes back through all of them. Afterwards it
trains networks on tasks held out, beside Adam with the best of nine learning rates.

    python learned-optimizer.py                       # a few minutes on one core
    python learned-optimizer.py --rule tensor         # a recurrent network that sets step sizes alone
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import metaoptim
from plots import plot_curves
from tasks import Digits, Task, network, reset

HERE = pathlib.Path(__file__).resolve().parent
RULES = {"entry": metaoptim.PerParameterRule, "tensor": metaoptim.PerTensorRule}
RATES = (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 2e-1, 3e-1)  # Adam's
PRESETS = {
    "demo": dict(iterations=80, steps=40, tasks=4, held_out=50),
    # Seconds: to see that everything runs.
    "quick": dict(iterations=2, steps=6, tasks=2, held_out=3),
}
TUNING, HELD_OUT = (
    1_000_000,
    2_000_000,
)  # the first seeds of tasks to choose Adam's rate by, and of those held out


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is not given is taken from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="defaults for what is not given (default: demo)")
    add("--rule", choices=RULES, default="entry", help="what is learned (default: entry)")
    add("--iterations", type=int, help="outer steps")
    add("--steps", type=int, help="inner steps, T")
    add("--tasks", type=int, help="tasks in an outer step")
    add("--held-out", type=int, help="tasks to compare on")
    add("--hidden", type=int, default=16, help="width of the rule (default: 16)")
    add(
        "--rate",
        type=float,
        default=1e-2,
        help="the rate of the Adam that the rule begins as (default: 0.01)",
    )
    add("--outer-rate", type=float, default=1e-2, help="of the outer Adam (default: 0.01)")
    add("--backend", default="inductor", help="of metaoptim.compile (default: inductor)")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, help="folder of the picture and of the rule's weights")
    args = parser.parse_args(argv)
    if args.out is None:  # the picture in the README is that of the demo
        args.out = HERE if args.preset == "demo" else HERE / ".cache"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def unroll(net: nn.Module, rule: nn.Module, rate: float, task: Task) -> tuple[Tensor, Tensor]:
    """The loss on the queries after a step by the rule for every batch, and the accuracy."""
    inner = metaoptim.MetaLearned([net], rule, lr=rate)
    with metaoptim.SlidingWindow(offline=True) as window:
        for x, y in window.scan(task.xs, task.ys):
            inner.step(F.cross_entropy(net(x), y))
        logits = net(task.xq)
        return F.cross_entropy(logits, task.yq), (logits.argmax(1) == task.yq).float().mean()


def learn(rule: nn.Module, digits: Digits, args: argparse.Namespace) -> list[float]:
    """Trains the rule, in place; the outer losses."""
    net, train = network(), metaoptim.compile(unroll, backend=args.backend)
    outer = torch.optim.Adam(rule.parameters(), lr=args.outer_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, args.iterations)
    seed, losses = args.seed * 100_000, []
    bar = tqdm(range(args.iterations), desc="outer steps", unit="step")
    for _ in bar:
        outer.zero_grad()
        losses.append(0.0)
        for _ in range(args.tasks):
            seed += 1
            reset(net, seed)
            loss, _ = train(net, rule, args.rate, digits.task(seed, args.steps, held_out=False))
            (loss / args.tasks).backward()
            losses[-1] += float(loss.detach()) / args.tasks
        nn.utils.clip_grad_norm_(rule.parameters(), 1.0)
        outer.step()
        schedule.step()
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def curve(inner: Any, net: nn.Module, task: Task) -> Tensor:
    """Loss and accuracy on the queries before the first step and after each, (steps + 1, 2)."""

    def now() -> list[float]:
        with torch.no_grad():
            logits = net(task.xq)
            right = (logits.argmax(1) == task.yq).float().mean()
            return [float(F.cross_entropy(logits, task.yq)), float(right)]

    found = [now()]
    for x, y in zip(task.xs, task.ys):
        loss = F.cross_entropy(net(x), y)
        if isinstance(inner, metaoptim.MetaOptimizer):
            inner.step(loss)
        else:
            inner.zero_grad()
            loss.backward()
            inner.step()
        found.append(now())
    return torch.tensor(found)


def by_adam(rate: float, tasks: Iterable[Task]) -> Tensor:
    """The curves of Adam's, (tasks, steps + 1, 2)."""
    curves = []
    for seed, task in enumerate(tasks):
        net = network()
        reset(net, seed)
        curves.append(curve(torch.optim.Adam(net.parameters(), lr=rate), net, task))
    return torch.stack(curves)


def by_rule(rule: nn.Module, rate: float, tasks: Iterable[Task]) -> Tensor:
    """The same of the rule's, in a window of one step at a time: nobody looks back."""
    curves = []
    for seed, task in enumerate(tasks):
        net = network()
        reset(net, seed)
        inner = metaoptim.MetaLearned([net], rule, lr=rate)
        with metaoptim.SlidingWindow(window=1):
            curves.append(curve(inner, net, task))
    return torch.stack(curves)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example; the numbers that it prints."""
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    digits, steps = Digits(), args.steps
    rule = RULES[args.rule](hidden=args.hidden)
    losses = learn(rule, digits, args)

    seeds = range(args.held_out)
    # twice as many steps as the rule was trained for: what becomes of it is shown, not only what it was trained to do
    held_out = [digits.task(HELD_OUT + k, 2 * steps, held_out=True) for k in seeds]
    tuning = [digits.task(TUNING + k, steps, held_out=False) for k in seeds]
    tuned = {rate: float(by_adam(rate, tuning)[:, -1, 0].mean()) for rate in tqdm(RATES, desc="Adam's rates")}
    rate = min(tuned, key=lambda r: tuned[r])
    adams = {r: by_adam(r, held_out) for r in tqdm(RATES, desc="Adam, held out")}
    best = min(adams, key=lambda r: float(adams[r][:, steps, 0].mean()))
    learned = by_rule(rule, args.rate, held_out)

    print(f"after {steps} steps on {args.held_out} tasks held out:   loss   accuracy")
    began = by_adam(args.rate, held_out)
    rows = {
        f"learned, through {args.iterations * args.tasks} training runs": learned,
        f"Adam, rate {rate:g}, best on training tasks": adams[rate],
        f"Adam, rate {best:g}, best on these very tasks": adams[best],
        f"Adam, rate {args.rate:g}, as the rule began": began,
    }
    for name, of in rows.items():
        loss, accuracy = of[:, steps].mean(0)
        print(f"  {name:44} {loss:.4f}   {accuracy:.1%}")
    gain = (learned - adams[rate])[:, steps, 0]
    error = gain.std() / len(gain) ** 0.5
    print(f"  learned less Adam's first row, over tasks    {gain.mean():+.4f} (standard error {error:.4f})")
    later = ", ".join(f"{of[:, -1, 0].mean():.4f}" for of in rows.values())
    print(f"after {2 * steps} steps, for which it was not trained: {later}")
    args.out.mkdir(parents=True, exist_ok=True)
    curves = {name: of[:, :, 0].mean(0) for name, of in rows.items()}
    plot_curves(curves, losses, steps, args.out / "learned-optimizer.png")
    torch.save(rule.state_dict(), args.out / "rule.pt")
    at_the_end = {"learned": learned, "adam": adams[rate], "began": began}
    return {name: float(of[:, steps, 0].mean()) for name, of in at_the_end.items()}


if __name__ == "__main__":
    main()
