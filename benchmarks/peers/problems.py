"""The inner loops that every peer runs, as numpy arrays: data, initial parameters, meta-parameters, settings.

An inner loop has one or more windows of T steps each. Offline, each window begins at the initial parameters, which
are meta-parameters too (one window: a long training run; several: the tasks of MAML). Online, the parameters and the
state of the optimizer run on from window to window, and only the others are meta-parameters. The sum of the outer
losses, one for each window, is what is differentiated. How losses are computed is written in torch_problems.py and in
jax_peer.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """An inner loop in numbers.

    Attributes:
        model: name of the network and its losses, "mlp", "actor_critic", "conv4" or "gpt".
        optimizer: "sgd" or "adam" (β = 0.9, 0.999).
        momentum: of SGD.
        eps: of Adam. The derivative of its step by a gradient near 0 is as large as 1/ε: with 1e-8, float32 and float64
            differ by 3% after 20 steps of the GPT, in every peer.
        online: whether parameters run on from window to window.
        heads: of attention.
        device: what torch's peers run it on.
        theta: initial parameters, by the names in torch's state dict. The first part of a name is the layer.
        meta: meta-parameters; among them "log_lr", the logarithm of each layer's learning rate.
        steps: inputs of inner steps, (windows, T, ...).
        outer: inputs of outer losses, (windows, ...).
    """

    model: str
    optimizer: str
    theta: Arrays
    meta: Arrays
    steps: Arrays
    outer: Arrays
    momentum: float = 0.0
    eps: float = 1e-5
    online: bool = False
    heads: int = 0
    device: str = "cpu"

    @property
    def layers(self) -> list[str]:
        """Groups of parameters, each with a learning rate."""
        return list(dict.fromkeys(layer_of(name) for name in self.theta))

    @property
    def windows(self) -> int:
        """How many windows one meta-gradient takes."""
        return len(next(iter(self.outer.values())))

    @property
    def horizon(self) -> int:
        """Inner steps in a window."""
        return next(iter(self.steps.values())).shape[1]

    def save(self, path: Path) -> None:
        """Write everything into one file."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        arrays = {f"{field}/{key}": a for field in _ARRAYS for key, a in fields.pop(field).items()}
        np.savez(path, settings=json.dumps(fields), **arrays)

    @classmethod
    def load(cls, path: Path) -> Problem:
        """Read what `save` has written."""
        fields: dict[str, Any] = {field: {} for field in _ARRAYS}
        with np.load(path) as file:
            for name in file.files:
                field, _, key = name.partition("/")
                if key:
                    fields[field][key] = file[name]
            return cls(**fields, **json.loads(str(file["settings"])))


_ARRAYS = ("theta", "meta", "steps", "outer")


def layer_of(name: str) -> str:
    """Which layer a parameter belongs to."""
    return name.partition(".")[0]


# -- the problems -----------------------------------------------------------------------------------------------------


def digits(optimizer: str, horizon: int, size: str) -> Problem:
    """An MLP 64-128-128-10 on scikit-learn's digits, batches of 64; a learnt weight for each of 1,280 examples."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    x, y = load_digits(return_X_y=True)
    x = (
        x / 16 - 0.5
    )  # no pixel is always 0: a gradient that is exactly 0 has no derivative under Adam in most peers
    width, batch, count = {"tiny": (8, 8, 64), "usual": (128, 64, 1280), "gpu": (1024, 256, 1280)}[size]
    index = rng.integers(count, size=(1, horizon, batch))
    theta: Arrays = {}
    for layer, (rows, columns) in {"0": (width, 64), "2": (width, width), "4": (10, width)}.items():
        theta |= _linear(rng, layer, rows, columns)
    return Problem(
        model="mlp",
        optimizer=optimizer,
        momentum=0.9 if optimizer == "sgd" else 0.0,
        theta=theta,
        meta=_log_lr(theta, 0.05 if optimizer == "sgd" else 0.002)
        | {"logit": _float(0.1 * rng.normal(size=count))},
        steps={"x": _float(x[index]), "y": y[index], "index": index},
        outer={"x": _float(x[None, count : count + 256]), "y": y[None, count : count + 256]},
    )


def actor_critic(horizon: int, size: str) -> Problem:
    """Actor and critic that learn from trajectories of 8 environments, in 20 online windows; learnt γ and λ.

    The trajectories are random numbers of the right kind, made beforehand: every peer shall see the same.
    """
    rng = np.random.default_rng(0)
    sizes = {"tiny": (3, 4, 2, 4), "usual": (20, 32, 8, 32), "gpu": (20, 128, 64, 256)}
    windows, length, envs, hidden = sizes[size]

    def trajectories(*leading: int) -> Arrays:
        shape = (*leading, length, envs)
        alive = rng.random(shape) > 0.05
        ended = np.cumsum(~alive, axis=-2) - ~alive  # falls before each step
        j, t = np.arange(length)[None, :, None], np.arange(length)[:, None, None]
        return {
            "observations": _float(rng.normal(size=(*leading, length + 1, envs, 4))),
            "actions": _float(rng.random(shape) > 0.5),
            "rewards": _float(rng.random(shape)),
            "alive": _float(alive),  # whether there is a value after the step
            # (t, j): whether step j comes in the episode of step t, and not before it
            "reaches": _float((j >= t) & (ended[..., None, :, :] == ended[..., :, None, :])),
        }

    theta: Arrays = {}
    for part in ("actor", "critic"):
        theta |= _linear(rng, f"{part}.0", hidden, 4) | _linear(rng, f"{part}.2", 1, hidden)
    return Problem(
        model="actor_critic",
        optimizer="adam",
        online=True,
        theta=theta,
        meta=_log_lr(theta, 0.003) | {"logit": _float(np.array([3.0, 2.0]))},  # of γ and λ
        steps=trajectories(windows, horizon),
        outer=trajectories(windows),
    )


def conv4(horizon: int, size: str) -> Problem:
    """MAML of four convolutions with batch norm: 4 tasks of five classes, 25 images of 28 by 28 pixels."""
    rng = np.random.default_rng(0)
    tasks, filters, pixels = {"tiny": (2, 4, 28), "usual": (4, 64, 28), "gpu": (4, 256, 28)}[size]
    prototypes = rng.normal(size=(tasks, 5, 1, pixels, pixels))
    labels = np.stack([rng.permutation(np.repeat(np.arange(5), 5)) for _ in range(2 * tasks)])
    support, query = labels[:tasks], labels[tasks:]

    def images(of: np.ndarray) -> np.ndarray:
        chosen = prototypes[np.arange(tasks)[:, None], of]
        return _float(chosen + rng.normal(size=chosen.shape))

    theta: Arrays = {}
    for block, channels in enumerate((1, filters, filters, filters)):
        kernel = rng.normal(size=(filters, channels, 3, 3)) / np.sqrt(9 * channels)
        theta[f"block{block}.0.weight"] = _float(kernel)
        theta[f"block{block}.1.weight"] = _float(np.ones(filters))
        theta[f"block{block}.1.bias"] = _float(np.zeros(filters))
    theta |= _linear(rng, "head", 5, 4 * filters)
    every_step = {"x": images(support), "y": support}
    return Problem(
        model="conv4",
        optimizer="sgd",
        theta=theta,
        meta=_log_lr(theta, 0.1),
        steps={key: np.repeat(a[:, None], horizon, axis=1) for key, a in every_step.items()},
        outer={"x": images(query), "y": query},
    )


def gpt(horizon: int, size: str) -> Problem:
    """A byte-level GPT, 2 layers, d = 128, 4 heads, on 8 sequences of 64 bytes of a licence; no biases, tied ends."""
    rng = np.random.default_rng(0)
    sizes = {"tiny": (16, 2, 8, 2), "usual": (128, 4, 64, 8), "gpu": (512, 8, 256, 16)}
    width, heads, length, batch = sizes[size]
    text = np.frombuffer((Path(__file__).resolve().parents[2] / "LICENSE").read_bytes(), np.uint8)
    starts = rng.integers(len(text) - length - 1, size=(1, horizon + 1, batch, 1))
    tokens = text[starts + np.arange(length + 1)].astype(np.int64)
    theta = {
        "embedding.weight": _float(0.02 * rng.normal(size=(256, width))),
        "position.weight": _float(0.02 * rng.normal(size=(length, width))),
    }
    for block in ("block0", "block1"):
        theta[f"{block}.norm1.weight"] = _float(np.ones(width))
        theta |= _linear(rng, f"{block}.qkv", 3 * width, width, bias=False)
        theta |= _linear(rng, f"{block}.out", width, width, bias=False)
        theta[f"{block}.norm2.weight"] = _float(np.ones(width))
        theta |= _linear(rng, f"{block}.up", 4 * width, width, bias=False)
        theta |= _linear(rng, f"{block}.down", width, 4 * width, bias=False)
    theta["norm.weight"] = _float(np.ones(width))
    return Problem(
        model="gpt",
        optimizer="adam",
        heads=heads,
        theta=theta,
        meta=_log_lr(theta, 0.001),
        steps={"x": tokens[:, :-1, :, :-1], "y": tokens[:, :-1, :, 1:]},
        outer={"x": tokens[:, -1, :, :-1], "y": tokens[:, -1, :, 1:]},
    )


#: How large problems are: for a rehearsal, for a CPU, for a GPU.
SIZES = ("tiny", "usual", "gpu")
# name -> (how it is made, T in the full benchmark, T in a rehearsal)
PROBLEMS: dict[str, tuple[Callable[[int, str], Problem], tuple[int, ...], int]] = {
    "digits-sgd": (lambda horizon, size: digits("sgd", horizon, size), (10, 100, 1000), 4),
    "digits-adam": (lambda horizon, size: digits("adam", horizon, size), (100, 1000), 4),
    "actor-critic": (actor_critic, (10,), 4),
    "conv4": (conv4, (5,), 2),
    "gpt": (gpt, (20, 100), 4),
}


def _float(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def _linear(rng: np.random.Generator, name: str, rows: int, columns: int, bias: bool = True) -> Arrays:
    made = {f"{name}.weight": _float(rng.normal(size=(rows, columns)) / np.sqrt(columns))}
    return made | ({f"{name}.bias": _float(np.zeros(rows))} if bias else {})


def _log_lr(theta: Arrays, lr: float) -> Arrays:
    layers = {layer_of(name) for name in theta}
    return {"log_lr": np.full(len(layers), np.log(lr), dtype=np.float32)}
