"""Milliseconds per inner step: ordinary (form A), and compiled by each backend (form B).

python timing.py
"""

from __future__ import annotations

import argparse
import importlib
import time

import torch

import metaoptim
from training import Agent, Settings


def measure(backend: str | None, settings: Settings, steps: int) -> dict[str, float]:
    """Seconds for the first windows, all included; then milliseconds per step, and per step of the backward.

    Args:
        backend: None for form A.
        settings: of the agent.
        steps: inner steps of the window that is timed.
    """
    agent = Agent(settings, backend)
    played = agent.play()

    def window() -> tuple[float, float]:
        with metaoptim.SlidingWindow(offline=False):
            begun = time.process_time()
            for _ in range(steps):
                agent.inner_step(played)
            between = time.process_time()
            agent.outer_loss(played).backward()
            return between - begun, time.process_time() - between

    begun = time.perf_counter()
    window()  # the first step of all creates the optimizers' state: another program than the later ones
    window()
    first = time.perf_counter() - begun
    timed = [window() for _ in range(7)]
    forward, backward = (1e3 * sorted(column)[3] / steps for column in zip(*timed))
    return {"first": first, "forward": forward, "backward": backward}


def main() -> None:
    """Prints one line per way of running the step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="inner steps of a timed window (default: 40)")
    parser.add_argument("--backends", nargs="*", default=["eager", "aot_eager", "inductor"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    demo = importlib.import_module("mgrl-cartpole").PRESETS["demo"]
    settings = Settings(gamma=0.8, lam=0.9, learn=True, seed=0, **demo)
    print(f"{'':22}  first windows  ms per step  ms per step of backward")
    for backend in (None, *args.backends):
        found = measure(backend, settings, args.steps)
        name = "form A" if backend is None else f"form B, {backend}"
        print(
            f"{name:22}  {found['first']:11.1f} s  {found['forward']:11.2f}  {found['backward']:11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
