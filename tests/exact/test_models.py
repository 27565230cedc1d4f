"""Real models as they come: tiny ones of transformers, as text, image and sound models, against the full tape.

A few of them by default; all of them, each with eager attention and checkpointing too, with ``--whole-models``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metaoptim
from models import Model, check, draw, gradients, numbers

transformers = pytest.importorskip("transformers", reason="needs the extra 'models'", exc_type=ImportError)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),
]

_TOKENS, _IMAGES, _SOUNDS = numbers(3, 50, 2, 7), draw(2, 3, 8, 8), draw(2, 8, 12)
_CLASSES = numbers(0, 3, 2, seed=5)
_SHAPE = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
_TEXT = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}


def _gpt2(**options: str) -> nn.Module:
    undropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 50}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ends, **undropped, **options))


def _llama(**options: str) -> nn.Module:
    config = transformers.LlamaConfig(
        num_key_value_heads=2, max_position_embeddings=16, **_SHAPE, **_TEXT, **options
    )
    return transformers.LlamaForCausalLM(config)


def _bert(**options: str) -> nn.Module:
    config = transformers.BertConfig(max_position_embeddings=16, **_SHAPE, **_TEXT, **_UNDROPPED, **options)
    return transformers.BertForSequenceClassification(config)


def _t5(**options: str) -> nn.Module:
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = transformers.T5Config(decoder_start_token_id=0, **shape, **_TEXT, **options)
    return transformers.T5ForConditionalGeneration(config)


def _mamba() -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, **_TEXT)
    )


def _vit(**options: str) -> nn.Module:
    config = transformers.ViTConfig(image_size=8, patch_size=4, **_SHAPE, **_UNDROPPED, **options)
    return transformers.ViTForImageClassification(config)


def _whisper(**options: str) -> nn.Module:
    of_each = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
    shape = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in of_each.items()}
    lengths = {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16}
    config = transformers.WhisperConfig(
        d_model=16, dropout=0.0, decoder_start_token_id=1, **shape, **lengths, **_TEXT, **options
    )
    return transformers.WhisperForConditionalGeneration(config)


def _next_token(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return net(input_ids=x, labels=x).loss


def _classes(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return net(input_ids=x, attention_mask=(x > 8).long(), labels=y).loss


def _classes_of_images(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return net(pixel_values=x, labels=y).loss


def _words(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return net(input_features=x, labels=y).loss


GPT2 = Model(_gpt2, _next_token, _TOKENS, _CLASSES)
MODELS = {
    "gpt2": GPT2,
    "llama": Model(_llama, _next_token, _TOKENS, _CLASSES),
    "bert": Model(_bert, _classes, _TOKENS, _CLASSES),
    "t5": Model(_t5, _next_token, _TOKENS, _CLASSES),
    "vit": Model(_vit, _classes_of_images, _IMAGES, _CLASSES),
    "mamba": Model(_mamba, _next_token, _TOKENS, _CLASSES),
    "whisper": Model(_whisper, _words, _SOUNDS, _TOKENS),
}
ATTENTION = [name for name in MODELS if name != "mamba"]
CHECKPOINTED = [*((name, "sdpa") for name in ATTENTION), ("gpt2", "eager"), ("llama", "eager")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``name``: of a model; ``of_attention``: of one; ``checkpointed``: of one, and its attention."""
    whole = metafunc.config.getoption("--whole-models")
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", MODELS if whole else ["gpt2", "llama", "bert"])
    if "of_attention" in metafunc.fixturenames:
        metafunc.parametrize("of_attention", ATTENTION if whole else ["gpt2"])
    if "checkpointed" in metafunc.fixturenames:
        few = [("llama", "eager")]
        metafunc.parametrize("checkpointed", CHECKPOINTED if whole else few, ids="-".join)


def _with(name: str, attention: str) -> Model:
    """The model with this implementation of attention."""
    build: Callable[..., nn.Module] = MODELS[name].build
    return MODELS[name]._replace(build=lambda: build(attn_implementation=attention))


def _checkpointed(model: Model) -> Model:
    """The model with activations that are computed again when they are needed."""

    def build() -> nn.Module:
        net = model.build()
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return net.train()

    return model._replace(build=build)


def test_model(name: str) -> None:
    check(MODELS[name])


def test_model_with_eager_attention(of_attention: str) -> None:
    assert MODELS[of_attention].build().config._attn_implementation == "sdpa"  # what `test_model` takes
    check(_with(of_attention, "eager"), modes=[True])


def test_model_with_checkpointing(checkpointed: tuple[str, str]) -> None:
    """Activations that are computed again are the same: the tape is that of the model without."""
    model = _with(*checkpointed)
    check(_checkpointed(model), tape=model, modes=[True])


def test_compiled_step_of_a_model() -> None:
    check(GPT2, "B", modes=[True])


@pytest.mark.parametrize("form", "ABC")
def test_model_under_autocast(form: str) -> None:
    """Sums of bfloat16 in another order are other numbers: the order of the tape is not ours."""
    given = {"optimizer": metaoptim.MetaSGD, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    expected, got = gradients(GPT2, "tape", **given), gradients(GPT2, form, **given)
    scale = max(float(e.abs().max()) for e in expected.values() if e is not None)
    for key, e in expected.items():
        assert float((got[key] - e).abs().max()) < 0.1 * (float(e.abs().max()) + 0.02 * scale), key  # type: ignore
