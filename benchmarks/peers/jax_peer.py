"""JAX and optax: networks, losses, and the loop as a scan with and without rematerialisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from problems import Problem, layer_of

Arrays = dict[str, Array]
Gradient = Callable[[], dict[str, np.ndarray]]


# -- networks and losses ----------------------------------------------------------------------------------------------


def linear(theta: Arrays, name: str, x: Array) -> Array:
    """x Wᵀ + b."""
    x = x @ theta[f"{name}.weight"].T
    return x + theta[f"{name}.bias"] if f"{name}.bias" in theta else x


def mlp(problem: Problem, theta: Arrays, x: Array) -> Array:
    """Three layers."""
    return linear(theta, "4", jnp.tanh(linear(theta, "2", jnp.tanh(linear(theta, "0", x)))))


def conv4(problem: Problem, theta: Arrays, x: Array) -> Array:
    """Convolutions of stride two, batch norm by the statistics of the batch at hand, ReLU."""
    for block in range(4):
        x = jax.lax.conv_general_dilated(x, theta[f"block{block}.0.weight"], (2, 2), [(1, 1), (1, 1)])
        scale, bias = (theta[f"block{block}.1.{kind}"][:, None, None] for kind in ("weight", "bias"))
        mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        x = jax.nn.relu((x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias)
    return linear(theta, "head", x.reshape(len(x), -1))


def layer_norm(theta: Arrays, name: str, x: Array) -> Array:
    """Without a bias."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * theta[f"{name}.weight"]


def gpt(problem: Problem, theta: Arrays, tokens: Array) -> Array:
    """Bytes in, bytes out; the embedding is the last layer's weight too."""
    x = theta["embedding.weight"][tokens] + theta["position.weight"]
    for block in ("block0", "block1"):
        parts = jnp.split(linear(theta, f"{block}.qkv", layer_norm(theta, f"{block}.norm1", x)), 3, -1)
        q, k, v = (t.reshape(*t.shape[:2], problem.heads, -1).swapaxes(1, 2) for t in parts)
        scores = q @ k.swapaxes(-2, -1) / math.sqrt(q.shape[-1])
        past = jnp.tril(jnp.ones(scores.shape[-2:], dtype=bool))
        attended = jax.nn.softmax(jnp.where(past, scores, -jnp.inf), -1) @ v
        x = x + linear(theta, f"{block}.out", attended.swapaxes(1, 2).reshape(x.shape))
        up = linear(theta, f"{block}.up", layer_norm(theta, f"{block}.norm2", x))
        x = x + linear(theta, f"{block}.down", jax.nn.gelu(up, approximate=False))
    return layer_norm(theta, "norm", x) @ theta["embedding.weight"].T


def actor_critic_losses(theta: Arrays, played: Arrays, gamma: Any, lam: Any) -> tuple[Array, Array]:
    """Advantage actor-critic with generalised advantages."""
    seen = played["observations"]
    logits, values = (
        linear(theta, f"{part}.2", jnp.tanh(linear(theta, f"{part}.0", seen)))[..., 0]
        for part in ("actor", "critic")
    )
    logits, fixed = logits[:-1], jax.lax.stop_gradient(values)
    delta = played["rewards"] + gamma * played["alive"] * fixed[1:] - fixed[:-1]
    steps = jnp.arange(len(delta))
    gap = jnp.maximum(steps[None, :] - steps[:, None], 0).astype(delta.dtype)
    advantages = (((gamma * lam) ** gap)[..., None] * played["reaches"] * delta[None]).sum(1)
    taken = jnp.where(played["actions"] > 0, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits))
    error = advantages + fixed[:-1] - values[:-1]
    return -(taken * advantages).mean(), jnp.square(error).mean()


class Losses:
    """Inner and outer loss of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.net = {"mlp": mlp, "conv4": conv4, "gpt": gpt}.get(problem.model)

    def inner(self, theta: Arrays, meta: Arrays, batch: Arrays) -> Array:
        """What a step descends."""
        if self.net is None:
            gamma, lam = jax.nn.sigmoid(meta["logit"])
            return sum(actor_critic_losses(theta, batch, gamma, lam))
        entropies = self.cross_entropy(theta, batch)
        if "index" in batch:
            entropies = 2 * jax.nn.sigmoid(meta["logit"][batch["index"]]) * entropies
        return entropies.mean()

    def outer(self, theta: Arrays, batch: Arrays) -> Array:
        """What judges a window."""
        if self.net is None:
            return actor_critic_losses(theta, batch, 0.99, 0.95)[0]
        return self.cross_entropy(theta, batch).mean()

    def cross_entropy(self, theta: Arrays, batch: Arrays) -> Array:
        """Of each example."""
        logits = self.net(self.problem, theta, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


# -- the loop ---------------------------------------------------------------------------------------------------------


def scan(numbers: Problem, remat: str = "none") -> Gradient:
    """The inner loop as jax.lax.scan, jitted with its gradient.

    Args:
        numbers: the problem.
        remat: "none" keeps what a step needs for its derivative, "step" only the state before each step, "sqrt" only
            that before each of about √T segments (the largest divisor of T that is no larger).
    """
    losses = Losses(numbers)
    if numbers.optimizer == "adam":
        optimizer = optax.adam(1.0, eps=numbers.eps)
    else:
        optimizer = optax.sgd(1.0, momentum=numbers.momentum or None)
    horizon = numbers.horizon
    segment = max(k for k in range(1, math.isqrt(horizon) + 1) if horizon % k == 0)

    def window_loss(
        theta: Arrays, meta: Arrays, state: Any, steps: Arrays, outer: Arrays
    ) -> tuple[Array, tuple[Arrays, Any]]:
        by_layer = dict(zip(numbers.layers, jnp.exp(meta["log_lr"])))

        def step(carry: tuple[Arrays, Any], batch: Arrays) -> tuple[tuple[Arrays, Any], None]:
            theta, state = carry
            updates, state = optimizer.update(jax.grad(losses.inner)(theta, meta, batch), state, theta)
            return (
                {name: p + by_layer[layer_of(name)] * updates[name] for name, p in theta.items()},
                state,
            ), None

        one = step if remat == "none" else jax.checkpoint(step)
        if remat == "sqrt":
            steps = {key: a.reshape(-1, segment, *a.shape[1:]) for key, a in steps.items()}
            several = jax.checkpoint(lambda carry, part: jax.lax.scan(one, carry, part))
            carry, _ = jax.lax.scan(several, (theta, state), steps)
        else:
            carry, _ = jax.lax.scan(one, (theta, state), steps)
        return losses.outer(carry[0], outer), carry

    wanted = (1,) if numbers.online else (0, 1)
    differentiated = jax.jit(jax.value_and_grad(window_loss, argnums=wanted, has_aux=True))
    theta0, meta, steps, outer = (
        {key: jnp.asarray(a) for key, a in part.items()}
        for part in (numbers.theta, numbers.meta, numbers.steps, numbers.outer)
    )
    windows = [
        ({key: a[w] for key, a in steps.items()}, {key: a[w] for key, a in outer.items()})
        for w in range(numbers.windows)
    ]

    def gradient() -> dict[str, np.ndarray]:
        theta, state, total, gradients = theta0, optimizer.init(theta0), 0.0, None
        for steps, outer in windows:
            (loss, carry), new = differentiated(theta, meta, state, steps, outer)
            gradients = new if gradients is None else jax.tree.map(jnp.add, gradients, new)
            total += float(loss)
            if numbers.online:
                theta, state = carry
        assert gradients is not None
        merged = {name: np.asarray(g) for part in gradients for name, g in part.items()}
        return {"loss": np.array(total), **merged}

    return gradient
