"""Encoder-decoders of sound and images: inputs that are made up, masks that get shorter, PyTorch's tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin

from flora_fx.errors import ExportError
from flora_fx.export import Seq2Seq, export_onnx, load
from flora_fx.export.targets import trace
from flora_fx.export.trace import whole_numbers
from flora_fx.export.trace.example import resized
from flora_fx.export.trace.model import kind_of
from tests.export.exported_models import Exported

VOCAB = 97
_SIZES: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 80}
_LAYERS: dict[str, Any] = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def moonshine() -> Any:
    config = transformers.MoonshineConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=80,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        max_position_embeddings=64,
        decoder_start_token_id=1,
        **_TOKENS,
    )
    return transformers.MoonshineForConditionalGeneration(config)


def speech_to_text() -> Any:
    config = transformers.Speech2TextConfig(
        vocab_size=VOCAB,
        d_model=48,
        **_LAYERS,
        max_source_positions=60,
        max_target_positions=40,
        input_feat_per_channel=6,
        conv_channels=16,
        decoder_start_token_id=2,
        **_TOKENS,
    )
    return transformers.Speech2TextForConditionalGeneration(config)


def wav2vec_and_bert() -> Any:
    encoder = transformers.Wav2Vec2Config(vocab_size=32, **_SIZES, **_CONVOLUTIONS)
    decoder = transformers.BertConfig(
        vocab_size=VOCAB, **{**_SIZES, "hidden_size": 32}, max_position_embeddings=64, add_cross_attention=True
    )
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.SpeechEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 1, 0
    return model


def seamless() -> Any:
    config = transformers.SeamlessM4TConfig(
        vocab_size=VOCAB,
        t2u_vocab_size=VOCAB,
        hidden_size=48,
        **_LAYERS,
        speech_encoder_layers=1,
        speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=80,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feature_projection_input_dim=6,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        **_TOKENS,
    )
    return transformers.SeamlessM4TForSpeechToText(config)


def trocr() -> Any:
    encoder = transformers.ViTConfig(**_SIZES, image_size=24, patch_size=8)
    decoder = transformers.TrOCRConfig(
        vocab_size=VOCAB,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=80,
        max_position_embeddings=64,
        cross_attention_hidden_size=48,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 2, 1
    return model


def streaming() -> Any:
    sizes = {**_SIZES, "hidden_size": 64, "num_key_value_heads": 4}
    config = transformers.MoonshineStreamingConfig(vocab_size=VOCAB, **sizes, max_position_embeddings=64)
    return transformers.MoonshineStreamingForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "moonshine": (moonshine, (3, 3777)),
    "speech2text": (speech_to_text, (3, 33, 6)),
    "wav2vec2 and BERT": (wav2vec_and_bert, (3, 377)),
    "seamless": (seamless, (3, 33, 6)),
}
"""Models, and the shape of what they read: another length than that of an example that is made up."""

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("speech2text", "wav2vec2 and BERT", "seamless")]


def build(make: Callable[[], Any]) -> nn.Module:
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make(), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (0.2 if "lora" in name else 1.5) / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def sounding(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    cache: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in cache:
            model = build(MODELS[name][0])
            place = tmp_path_factory.mktemp("speech") / "out"
            cache[name] = Exported(model, export_onnx(model, place), load(place))
        return cache[name]

    return get


def by_pytorch(export: Exported, sound: Tensor, **options: Any) -> Tensor:
    core: Any = export.model.base_model.model  # type: ignore[union-attr]
    tokens: Tensor = GenerationMixin.generate(
        core, sound, do_sample=False, num_beams=1, max_new_tokens=10, eos_token_id=None, **options
    )
    return tokens


@pytest.mark.parametrize("name", ["moonshine", *SLOW])
def test_tokens_are_pytorchs(sounding: Callable[[str], Exported], name: str) -> None:
    export = sounding(name)
    assert isinstance(export.runner, Seq2Seq)
    assert export.result.report.fused
    assert export.result.greedy_tokens_equal
    for length in (MODELS[name][1][1], MODELS[name][1][1] * 2 - 3):  # neither is that of the capture
        sound = resized(torch.randn(MODELS[name][1]), 1, length)
        mask = torch.ones(len(sound), length, dtype=torch.int64)
        mask[1, length // 2 :] = 0
        for given in ({}, {"attention_mask": mask}):
            expected = by_pytorch(export, sound, **given)
            found = export.runner.generate(sound, **given, max_new_tokens=10, eos_token_id=[])
            assert torch.equal(found, expected)


def test_a_mask_matters(sounding: Callable[[str], Exported]) -> None:
    runner = sounding("moonshine").runner
    sound = torch.randn(2, 3777)
    mask = torch.ones(2, 3777, dtype=torch.int64)
    mask[1, 1500:] = 0
    start = torch.tensor([[1, 5], [1, 5]])
    whole, part = runner(sound, decoder_input_ids=start), runner(sound, mask, decoder_input_ids=start)
    torch.testing.assert_close(whole[0], part[0], rtol=1e-4, atol=1e-5)
    assert (whole[1] - part[1]).abs().max() > 1e-3
    assert torch.equal(runner(sound, torch.ones_like(mask), decoder_input_ids=start), whole)


def test_inputs_and_outputs(sounding: Callable[[str], Exported]) -> None:
    encoder = sounding("moonshine").runner.encoder
    assert {name: shape for name, (shape, _) in encoder.inputs.items()} == {
        "input_values": ("batch", "samples"),
        "attention_mask": ("batch", "samples"),
    }
    assert encoder.signature["encoder_attention_mask"] == (("batch", "encoded"), torch.int64)
    assert encoder.signature["cross_key_values.1.value"][0] == ("batch", 4, "encoded", 16)


@pytest.mark.slow
def test_inputs_that_are_features(sounding: Callable[[str], Exported]) -> None:
    features = sounding("speech2text").runner.encoder.inputs["input_features"][0]
    assert features == ("batch", "frames", 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.ones(2, 9, dtype=torch.int64),),
            TypeError,
            "Moonshine.* reads input_values; they must be a torch",
        ),
        ((torch.ones(2, 9, 3),), ValueError, r"input_values has shape \[2, 9, 3\]; it must be \[batch, samples\]"),
        ((torch.ones(2, 4000), torch.ones(2, 9)), TypeError, "attention_mask has dtype torch.float32"),
        (
            (torch.ones(2, 4000), torch.ones(2, 9, dtype=torch.int64)),
            ValueError,
            r"attention_mask has shape \[2, 9\]; it must be that of the lengths, \[2, 4000\]",
        ),
        (
            (torch.ones(2, 4000), torch.zeros(2, 4000, dtype=torch.int64)),
            ValueError,
            "row 0 of attention_mask is all 0: there is no input_values",
        ),
    ],
)
def test_bad_arguments(
    sounding: Callable[[str], Exported], arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sounding("moonshine").runner.generate(*arguments)


@pytest.mark.slow
def test_images(tmp_path: Any) -> None:
    model = build(trocr)
    assert kind_of(trocr()) == "seq2seq-lm"
    result = export_onnx(model, tmp_path / "out")
    export = Exported(model, result, load(tmp_path / "out"))
    for rows in (1, 3):
        images = torch.randn(rows, 3, 24, 24)
        found = export.runner.generate(images, max_new_tokens=10, eos_token_id=[])
        assert torch.equal(found, by_pytorch(export, images))
    with pytest.raises(TypeError, match="VisionEncoderDecoderModel takes no attention_mask: its features have one"):
        export.runner.generate(torch.randn(1, 3, 24, 24), torch.ones(1, 3))


@pytest.mark.slow
def test_a_mask_that_must_be_given(tmp_path: Any) -> None:
    """To this model, no mask is something else than a mask of ones."""
    model = build(streaming)
    result = export_onnx(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "flora_fx.json").read_text())["needs_mask"] is True
    export, sound = Exported(model, result, load(tmp_path / "out")), torch.randn(2, 6400)
    with pytest.raises(TypeError, match="computes something else without attention_mask; pass one, all ones where"):
        export.runner.generate(sound)
    mask = torch.ones(2, 6400, dtype=torch.int64)
    found = export.runner.generate(sound, mask, max_new_tokens=10, eos_token_id=[])
    assert torch.equal(found, by_pytorch(export, sound, attention_mask=mask))


def test_an_example_that_is_given() -> None:
    _, traced = trace(moonshine().eval(), "seq2seq-lm", {"input_values": torch.randn(1, 5000)})
    assert traced.encoder is not None
    assert traced.example["input_values"].shape == (2, 7500)
    assert traced.encoder.inputs == ("input_values", "attention_mask")
    with pytest.raises(ExportError, match="example_inputs has input_ids; this encoder-decoder takes input_values only"):
        trace(moonshine(), "seq2seq-lm", {"input_ids": torch.ones(2, 3)})
    with pytest.raises(
        ExportError,
        match=r"MoonshineForConditionalGeneration does not run on input_values \[2, 10\]: .*; pass example_inputs",
    ):
        trace(moonshine(), "seq2seq-lm", {"input_values": torch.randn(2, 10)})


def test_what_a_model_calls_int() -> None:
    from transformers.models.moonshine import modeling_moonshine

    names = vars(modeling_moonshine)
    assert "int" not in names
    with whole_numbers.symbolic_int(moonshine()):
        ours = names["int"]
        assert (ours("7"), ours(7.9), ours()) == (7, 7, 0)
        assert isinstance(3, ours)
        assert not isinstance(3.0, (ours, str))
        assert issubclass(bool, ours)
    assert "int" not in names
