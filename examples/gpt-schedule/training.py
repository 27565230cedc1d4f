"""The training run that schedules are learnt through, and the same by torch.optim."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import metaoptim
from model import GPT

BETAS, DECAY = (0.9, 0.99), 0.01


def batches(text: Tensor, shape: tuple[int, ...], context: int, seed: int) -> Tensor:
    """Draws places in a text, (*shape, context + 1): each row is a piece with the byte that follows it."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context, shape, generator=generator)
    return starts.unsqueeze(-1) + torch.arange(context + 1)


def cosine(peak: float, warmup: float, final: float, steps: int) -> Tensor:
    """Returns a rate for each step: a line up to the peak, then half a wave down.

    Args:
        peak: the largest rate.
        warmup: the share of the steps that lead up to it.
        final: the last rate, as a fraction of the peak.
        steps: how many.
    """
    up = round(warmup * steps)
    t = torch.arange(steps)
    wave = (1 + torch.cos(math.pi * (t - up).clamp(min=0) / (steps - up))) / 2
    return peak * torch.where(t < up, (t + 1) / (up + 1), final + (1 - final) * wave)


def schedules(base: Tensor, knots: Tensor) -> Tensor:
    """Returns the rate of each group in each step: a schedule times exp of what is learnt.

    Args:
        base: a rate for each step, (steps,).
        knots: learnt; the same number for each group or for all, evenly over the steps, on lines between,
            (groups or 1, knots). Zeros leave the schedule as it is.
    """
    lines = F.interpolate(knots.unsqueeze(0), size=len(base), mode="linear", align_corners=True)
    return base * lines.squeeze(0).exp()


def train(net: GPT, rates: Tensor, text: Tensor, rows: Tensor, asked: Tensor) -> Tensor:
    """The outer loss: that of the network on texts it is asked about, after a step for each batch.

    Args:
        net: is put back.
        rates: of each group in each step, (groups, steps).
        text: bytes.
        rows: places of the batches in it, (steps, batch, context + 1).
        asked: texts, (texts, context + 1).
    """
    groups = [
        {"params": params, "lr": metaoptim.schedules.table(of_group)}
        for params, of_group in zip(net.groups().values(), rates.unbind())
    ]
    inner = metaoptim.MetaAdamW(groups, networks=[net], betas=BETAS, weight_decay=DECAY)
    with metaoptim.SlidingWindow(offline=True) as window:
        for i in window.scan(rows):
            inner.step(net.loss(text[i]))
        return net.loss(asked)


def by_torch(net: GPT, rates: Tensor, text: Tensor, rows: Tensor) -> list[float]:
    """Trains with torch.optim.AdamW, in place; the losses of its batches."""
    groups = [{"params": params} for params in net.groups().values()]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=DECAY)
    losses = []
    for i, now in zip(rows, rates.unbind(1)):
        for group, rate in zip(optimizer.param_groups, now.tolist()):
            group["lr"] = rate
        loss = net.loss(text[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
