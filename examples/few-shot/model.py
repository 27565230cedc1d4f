"""The network of the few-shot example."""

from __future__ import annotations

import torch
from torch import nn


class ConvNet(nn.Sequential):
    """Four convolutions of stride two with batch norm and ReLU, then a linear layer.

    A 28x28 image shrinks to 14, 7, 4 and 2 pixels a side.

    Batch norm is *transductive*, as is usual with MAML: it keeps no running averages and
    normalises by the statistics of the batch at hand, in meta-testing too. The images
    of one episode are therefore classified jointly, never one at a time.

    Args:
        ways: number of classes.
        filters: channels of every convolution.
    """

    def __init__(self, ways: int, filters: int):
        layers: list[nn.Module] = []
        channels = 1
        for _ in range(4):
            layers += [
                # Batch norm subtracts whatever a bias would add.
                nn.Conv2d(channels, filters, 3, stride=2, padding=1, bias=False),
                # Running averages would mix the characters of one episode into the next.
                nn.BatchNorm2d(filters, track_running_stats=False),
                nn.ReLU(),
            ]
            channels = filters
        super().__init__(*layers, nn.Flatten(), nn.Linear(4 * filters, ways))


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the fraction of rows of `logits` whose largest entry is at the label."""
    return (logits.argmax(1) == labels).float().mean().item()
