"""Real models of timm, PEFT, PyTorch Geometric and diffusers, tiny ones, against the full tape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from models import Model, check, draw, gradients, made, numbers
from oracle import agree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),
]

_IMAGES, _CLASSES = draw(2, 3, 32, 32), numbers(0, 3, 2, seed=5)
_NODES, _OF_NODES = draw(5, 3), numbers(0, 3, 5)
_EDGES = torch.tensor([[0, 1, 2, 3, 4, 1, 2], [1, 2, 3, 4, 0, 0, 4]])


def library(name: str) -> Any:
    """The library, or the test is skipped."""
    return pytest.importorskip(name, reason="needs the extra 'models'", exc_type=ImportError)


def classes(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


# -- images -----------------------------------------------------------------------------------------------------------


def _resnet() -> nn.Module:
    resnet = library("timm").models.resnet
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(4, 4, 8, 8), stem_width=4)


def _vit() -> nn.Module:
    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return library("timm").models.VisionTransformer(num_classes=3, **shape)


def _convnext() -> nn.Module:
    return library("timm").models.ConvNeXt(
        depths=(1, 1, 1, 1), dims=(4, 4, 8, 8), patch_size=2, num_classes=3
    )


def _unet() -> nn.Module:
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
    widths = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
    return library("diffusers").UNet2DModel(down_block_types=down, up_block_types=up, **shape, **widths)


def _denoising(net: nn.Module, x: Tensor, times: Tensor) -> Tensor:
    return F.mse_loss(net(x, times).sample, x.roll(1, -1))


IMAGES = {
    "ResNet": Model(_resnet, classes, _IMAGES, _CLASSES),
    "ViT": Model(_vit, classes, _IMAGES, _CLASSES),
    "ConvNeXt": Model(_convnext, classes, _IMAGES, _CLASSES),
    "U-Net": Model(_unet, _denoising, draw(2, 1, 8, 8), numbers(0, 100, 2)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_model_of_images(name: str) -> None:
    check(IMAGES[name])


@pytest.mark.parametrize("name", ["ResNet", "ConvNeXt"])
def test_channels_last(name: str) -> None:
    """Weights and images whose channels lie side by side in memory."""
    model = IMAGES[name]
    xs = model.xs.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, model.xs.shape[:2])
    assert xs[0].is_contiguous(memory_format=torch.channels_last) and not xs[0].is_contiguous()
    net = made(model).to(memory_format=torch.channels_last)
    assert any(not p.is_contiguous() for p in net.parameters())
    check(
        model._replace(xs=xs), "ABC", modes=[True], wrapped=lambda n: n.to(memory_format=torch.channels_last)
    )


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_rank: None) -> None:
    """Wrapped, the network is what it is without; several ranks are in test_limits.py."""
    model, options = IMAGES["ResNet"], {"forward_sync_buffers": False}
    wrapped = functools.partial(nn.parallel.DistributedDataParallel, **options)
    check(model, "BC", modes=[True], wrapped=wrapped)
    alone, inside = gradients(model, "A"), gradients(model, "A", wrapped=wrapped)
    agree({name.removeprefix("module."): g for name, g in inside.items()}, alone)
    for others in ({}, {**options, "find_unused_parameters": True}):
        with pytest.raises(metaoptim.CaptureError, match=r"talks to other ranks.*ddp\.module"):
            gradients(model, "C", wrapped=functools.partial(nn.parallel.DistributedDataParallel, **others))


# -- graphs -----------------------------------------------------------------------------------------------------------


class _Graph(nn.Module):
    """Two convolutions over the edges of a graph, each with self-loops."""

    def __init__(self, convolution: Callable[[int, int], nn.Module], edges: Tensor) -> None:
        super().__init__()
        self.first, self.second = convolution(3, 4), convolution(4, 3)
        self.register_buffer("edges", edges)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.elu(self.first(x, self.edges)), self.edges)


def _graph(name: str, **options: Any) -> Model:
    """Self-loops that the layers would add themselves are in the graph."""
    convolution = getattr(library("torch_geometric.nn"), name)
    edges = torch.cat([_EDGES, torch.arange(5).expand(2, 5)], 1) if options else _EDGES
    return Model(lambda: _Graph(lambda i, o: convolution(i, o, **options), edges), classes, _NODES, _OF_NODES)


@pytest.mark.parametrize("name", ["GCNConv", "GATConv"])
def test_model_of_graphs(name: str) -> None:
    check(_graph(name, add_self_loops=False))
    check(_graph(name), "A")
    with pytest.raises(metaoptim.CaptureError, match="shape depends on values"):
        gradients(_graph(name), "C")  # removes the self-loops that it finds first


# -- adapters ---------------------------------------------------------------------------------------------------------


def _adapted() -> nn.Module:
    """GPT-2 that is fixed, with adapters of rank 2 that are trained."""
    transformers, peft = library("transformers"), library("peft")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 50}
    undropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(bos_token_id=1, eos_token_id=2, **shape, **undropped)
    adapters = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(transformers.GPT2LMHeadModel(config), adapters)


_ADAPTED = Model(_adapted, lambda net, x, y: net(input_ids=x, labels=x).loss, numbers(3, 50, 2, 7), _CLASSES)


def test_low_rank_adapters() -> None:
    """The inner parameters are the adapters, and these and the learning rate receive the meta-gradient."""
    check(_ADAPTED)
    got = gradients(_ADAPTED, "A")
    learnt = {name: g for name, g in got.items() if name not in ("loss", "log_lr")}
    assert len(learnt) == 4 and all("lora_" in name for name in learnt)
    assert all(g is not None and float(g.abs().max()) > 0 for g in learnt.values())


def test_only_adapters_are_trained() -> None:
    net = made(_ADAPTED)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    inner = metaoptim.MetaAdam([net])
    with metaoptim.SlidingWindow():
        for x, y in zip(_ADAPTED.xs, _ADAPTED.ys, strict=True):
            inner.step(_ADAPTED.loss(net, x, y))
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name
