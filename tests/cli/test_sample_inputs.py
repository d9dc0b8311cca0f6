"""Inputs that `inspect` makes up are such that the model runs on them, with every adapter in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from flora_fx.commands.sample_inputs import sample_inputs
from flora_fx.errors import CaptureError

from .test_heads import TEXT, bert, made, qwen3_vl, spectrogram, vit, wav2vec2

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def t5() -> Any:
    return transformers.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)


def whisper() -> Any:
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    widths = {
        "d_model": 16,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.WhisperConfig(vocab_size=61, **widths, **layers, **ends)


def speech2text() -> Any:
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.Speech2TextConfig(
        vocab_size=61, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, input_feat_per_channel=8, **layers, **ends
    )


def clip() -> Any:
    return transformers.CLIPConfig(
        text_config={**TEXT, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**SIZES, "image_size": 8, "patch_size": 4},
    )


MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "BertModel": (bert, {"input_ids", "attention_mask"}),
    "ViTForImageClassification": (vit, {"pixel_values"}),
    "Wav2Vec2ForCTC": (wav2vec2, {"input_values"}),
    "ASTForAudioClassification": (spectrogram, {"input_values"}),
    "T5ForConditionalGeneration": (t5, {"input_ids", "attention_mask", "decoder_input_ids"}),
    "WhisperForConditionalGeneration": (whisper, {"input_features", "decoder_input_ids"}),
    "Speech2TextForConditionalGeneration": (speech2text, {"input_features", "decoder_input_ids"}),
    "CLIPModel": (clip, {"input_ids", "attention_mask", "pixel_values"}),
    "Qwen3VLForConditionalGeneration": (qwen3_vl, {"input_ids", "attention_mask"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_runs_on_them(name: str) -> None:
    config, names = MODELS[name]
    model = made(name, config())
    inputs = sample_inputs(model)
    assert inputs.keys() == names
    assert all(len(value) == 2 for value in inputs.values())
    with torch.no_grad():
        model(**inputs)


def test_floats_are_in_the_models_dtype() -> None:
    model = made("ViTForImageClassification", vit()).to(torch.bfloat16)
    assert sample_inputs(model)["pixel_values"].dtype is torch.bfloat16


@pytest.mark.parametrize("main", ["input_features", "pixel_values", "point_cloud"])
def test_what_a_config_does_not_tell(main: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("BertModel", bert())
    model.main_input_name = main
    with pytest.raises(
        CaptureError, match=f"BertModel reads '{main}', of which its config does not tell the sizes; pass"
    ):
        sample_inputs(model)
