"""A small GPT that reads bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


class Block(nn.Module):
    """Causal attention and an MLP, each behind a layer norm and beside a residual (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)})
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns (batch, context, width) of the same."""
        batch, context, width = x.shape
        qkv = self.attention["qkv"](self.norm1(x)).view(batch, context, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
        seen = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, context, width)
        x = x + self.attention["out"](seen)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Logits of the byte that follows each.

    Args:
        layers: blocks.
        width: of the residual stream.
        heads: of each attention.
        context: longest text that is read.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)
        self.register_buffer("mask", torch.full((context, context), -torch.inf).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, context, 256) for bytes (batch, context)."""
        h = self.bytes(x) + self.places.weight
        for block in self.blocks:
            h = block(h, self.mask)
        return self.head(self.norm(h))

    def loss(self, text: Tensor) -> Tensor:
        """The mean cross-entropy, in nats for each byte, of texts (batch, context + 1)."""
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that share a schedule, by name of the group."""
        blocks = list(self.blocks)
        of = {
            "embeddings": [self.bytes, self.places],
            "attention": [b.attention for b in blocks],
            "mlp": [b.mlp for b in blocks],
            "norms": [self.norm, *(m for b in blocks for m in (b.norm1, b.norm2))],
            "head": [self.head],
        }
        return {name: [p for m in modules for p in m.parameters()] for name, modules in of.items()}


@torch.no_grad()
def reset(net: GPT, seed: int) -> None:
    """Draws the weights anew, in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, 0.1, generator=generator)
