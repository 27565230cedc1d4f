"""Real models as they come: tiny ones of transformers, with their default attention, against the full tape."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from oracle import agree

transformers = pytest.importorskip("transformers", reason="needs the extra 'models'", exc_type=ImportError)
pytestmark = pytest.mark.slow

STEPS = 3
_TOKENS = torch.randint(3, 50, (STEPS + 1, 2, 7), generator=torch.Generator().manual_seed(3))
_IMAGES = torch.randn(STEPS + 1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
_CLASSES = torch.randint(3, (STEPS + 1, 2), generator=torch.Generator().manual_seed(5))
_SHAPE = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
_TEXT = {
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}


class Model(NamedTuple):
    """How to build a model, its loss of one batch and its labels, and these of every step."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    xs: Tensor


def _gpt2() -> nn.Module:
    undropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=50, **ends, **undropped
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **_SHAPE, **_TEXT))


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**_SHAPE, **_TEXT, **_UNDROPPED)
    )


def _vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=8, patch_size=4, **_SHAPE, **_UNDROPPED)
    return transformers.ViTForImageClassification(config)


def _next_token(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return net(input_ids=x, labels=x).loss


MODELS = {
    "gpt2": Model(_gpt2, _next_token, _TOKENS),
    "llama": Model(_llama, _next_token, _TOKENS),
    "bert": Model(
        _bert, lambda net, x, y: net(input_ids=x, attention_mask=(x > 8).long(), labels=y).loss, _TOKENS
    ),
    "vit": Model(_vit, lambda net, x, y: net(pixel_values=x, labels=y).loss, _IMAGES),
}


def gradients(
    name: str, form: str, offline: bool, optimizer: Any = metaoptim.MetaAdam, autocast: Any = nullcontext
) -> dict[str, Tensor | None]:
    """The outer loss, and its gradients by a learnt learning rate and theta_0, in a form or by the tape."""
    model = MODELS[name]
    torch.manual_seed(0)
    net, log_lr = model.build(), torch.tensor(-5.0, requires_grad=True)
    net.to(torch.float64 if autocast is nullcontext else torch.float32)
    assert net.config._attn_implementation == "sdpa"
    for p in net.parameters():
        nn.init.normal_(p, mean=p.mean().item(), std=0.1)  # biases are zero at first
    inner = optimizer([net], lr=log_lr.exp())

    def step(x: Tensor, y: Tensor) -> None:
        with autocast():
            loss = model.loss(net, x, y)
        inner.step(loss, allow_unused=True)

    take = metaoptim.compile(step, backend="eager") if form == "B" else step

    def whole(xs: Tensor, ys: Tensor) -> Tensor:
        with metaoptim.SlidingWindow(offline=offline, strategy="full_tape" if form == "tape" else "auto"):
            for x, y in zip(xs[:STEPS], ys[:STEPS]):
                take(x, y)
            with autocast():
                return model.loss(net, xs[STEPS], ys[STEPS])

    outer = (metaoptim.compile(whole, backend="eager") if form == "C" else whole)(model.xs, _CLASSES)
    by = {"log_lr": log_lr, **(dict(net.named_parameters()) if offline else {})}
    grads = torch.autograd.grad(outer, list(by.values()), allow_unused=True)
    return {"loss": outer.detach(), **dict(zip(by, grads, strict=True))}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    for offline in (True, False):
        expected = gradients(name, "tape", offline)
        assert abs(float(expected["log_lr"])) > 1e-3  # type: ignore[arg-type]
        for form in "AC":
            agree(gradients(name, form, offline), expected, rtol=1e-9)


@pytest.mark.parametrize("form", "ABC")
def test_model_under_autocast(form: str) -> None:
    given = ("gpt2", True, metaoptim.MetaSGD, lambda: torch.autocast("cpu", torch.bfloat16))
    expected = gradients(given[0], "tape", *given[1:])
    got = gradients(given[0], form, *given[1:])
    scale = max(float(e.abs().max()) for e in expected.values() if e is not None)
    for key, e in expected.items():
        assert float((got[key] - e).abs().max()) < 0.1 * (float(e.abs().max()) + 0.02 * scale), key  # type: ignore
