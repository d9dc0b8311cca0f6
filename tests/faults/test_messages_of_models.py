"""Models that an export refuses for what they are, and arguments that a runner refuses; nothing is exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from flora_fx.errors import ExportError
from flora_fx.export import Sampling, Seq2Seq
from flora_fx.export.check.differences import Differences, same_tokens
from flora_fx.export.directory.manifest import Manifest
from flora_fx.export.targets import trace
from flora_fx.export.trace import seq2seq
from flora_fx.export.trace.model import kind_of

from .models import base
from .test_messages import odd


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertModel(config).eval()


def t5() -> Any:
    config = transformers.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config).eval()


def llama_as(forward: Callable[..., Any]) -> Any:
    """A Llama of another class, whose forward is ``forward(original, **kwargs)``."""

    class Odd(transformers.LlamaForCausalLM):
        def forward(self, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
            return forward(super().forward, position_ids=position_ids, **kwargs)

    model = base()
    model.__class__ = Odd
    return model


def failing(original: Any, **kwargs: Any) -> Any:
    raise RuntimeError("it is Monday\nand a long story")


def without_cache(original: Any, **kwargs: Any) -> Any:
    return original(**{**kwargs, "past_key_values": None, "use_cache": False})


def sounding() -> Any:
    model = bert()
    model.main_input_name = "input_values"
    return model


def clap() -> Any:
    text = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    audio = {"hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2]}
    config = transformers.ClapConfig(text_config={**text, "intermediate_size": 24}, audio_config=audio)
    return transformers.ClapModel(config).eval()


def spectral() -> Any:
    model = t5()
    model.main_input_name = "spectrogram"
    return model


def speaking() -> Any:
    model = t5()
    model.main_input_name = "input_values"
    return model


def florence() -> Any:
    model = t5()

    class Florence2ForConditionalGeneration(transformers.T5ForConditionalGeneration):
        pass

    model.__class__ = Florence2ForConditionalGeneration
    return model


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "no causal LM": (
        lambda: kind_of(llama_as(without_cache)),
        "^Odd is no causal language model; export_onnx takes a transformers causal language model",
    ),
    "no cache": (
        lambda: trace(llama_as(without_cache), "causal-lm", target="general"),
        "^Odd has no cache of keys and values; its decode cannot be exported",
    ),
    "a forward that fails": (
        lambda: trace(llama_as(failing), "causal-lm", target="general"),
        r"^Odd does not run on input_ids \[2, 3\], attention_mask \[2, 3\]: RuntimeError: it is Monday; its forward",
    ),
    "another input": (
        lambda: trace(bert(), "encoder", {"pixels": torch.ones(2, 3)}),
        r"^BertModel has no input pixels \(in example_inputs\)",
    ),
    "an example that fails": (
        lambda: trace(bert(), "encoder", {"input_ids": torch.full((2, 3), 97)}),
        r"^BertModel does not run on input_ids \[2, 3\]: IndexError: .*; example_inputs must be what the model itself",
    ),
    "an example without a batch": (
        lambda: trace(bert(), "encoder", {"input_ids": torch.tensor(3)}),
        r"^input_ids in example_inputs has shape \[\]; it must be a tensor with the batch in front",
    ),
    "an example that is no tensor": (
        lambda: trace(bert(), "encoder", {"input_ids": [[3]]}),  # type: ignore[dict-item]
        "^input_ids in example_inputs is a list; it must be a tensor",
    ),
    "an example that was made up wrongly": (
        lambda: trace(clap(), "encoder"),
        r"^ClapModel does not run on input_ids \[2, 7\], attention_mask \[2, 7\]: .*; these inputs were made up: "
        r"pass example_inputs=\{name: .*\}, of its own inputs input_ids, input_features, is_longer, attention_mask",
    ),
    "sound of which nothing is known": (
        lambda: trace(spectral(), "seq2seq-lm"),
        r"^T5ForConditionalGeneration reads 'spectrogram', of which no example can be made up; "
        r"pass example_inputs=\{'spectrogram': tensor with the batch in front\}, as its processor gives it",
    ),
    "sound that the model does not run on": (
        lambda: trace(speaking(), "seq2seq-lm"),
        r"^T5ForConditionalGeneration reads 'input_values', of which no example .* \(it runs on none of "
        r"input_values \[2, 4000\]; input_values \[2, 16000\]\); pass example_inputs=\{'input_values'",
    ),
    "text beside images": (
        lambda: kind_of(florence()),
        "^Florence2ForConditionalGeneration reads text beside its images, which is not exported; export_onnx takes",
    ),
    "no example": (
        lambda: trace(sounding(), "encoder"),
        r"^BertModel reads 'input_values', of which no example can be made up; pass example_inputs=\{name: tensor",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model(case: str) -> None:
    cause, message = MODELS[case]
    with pytest.raises(ExportError, match=message):
        cause()


def test_an_encoder_decoder_without_cross_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(torch.nn.Module):
        def __init__(self, *_: Any) -> None:
            super().__init__()

        def named(self, _: Any) -> tuple[Tensor, ...]:
            return ()

    monkeypatch.setattr(seq2seq, "_CrossAttention", Nothing)
    with pytest.raises(ExportError, match="T5ForConditionalGeneration keeps no keys and values of its encoder; it can"):
        trace(t5(), "seq2seq-lm")


def test_other_tokens_than_pytorchs() -> None:
    expected, found = torch.tensor([[7, 1, 2, 3], [7, 1, 2, 3]]), torch.tensor([[7, 1, 2, 3], [7, 1, 4, 4]])
    logits = [torch.zeros(2, 5) for _ in range(3)]
    logits[1][1, 2] = 0.25
    said = r"token 1 of row 1 is 4 instead of 2, whose logit is larger by 0\.25"
    with pytest.raises(ExportError, match=f"the export generates other tokens than PyTorch: {said}"):
        same_tokens(found, expected, logits, 1, Differences("float32"))
    logits[1][1, 2] = 0.0
    assert not same_tokens(found, expected, logits, 1, Differences("float32"))  # a tie: either may win


def whisper(start: int | None = None) -> Seq2Seq:
    """Its arguments are checked before a graph is run."""
    manifest = Manifest(
        kind="seq2seq-lm",
        architecture="Whisper",
        dtype="float32",
        inputs=["input_ids"],
        outputs=["logits"],
        vocab_size=97,
        decoder_start_token_id=start,
    )
    encoder = odd(inputs={"input_features": (("batch", 6, 24), torch.float32)})
    return Seq2Seq(encoder, odd(), manifest)


FEATURES, START = torch.ones(2, 6, 24), torch.tensor([[3], [3]])
ARGUMENTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "do_sample": (lambda: Sampling(do_sample=1), TypeError, "do_sample is 1; it must be True or False"),  # type: ignore[arg-type]
    "tokens as features": (
        lambda: whisper().generate(START),
        TypeError,
        r"Whisper reads input_features; they must be a torch\.Tensor of floats",
    ),
    "frames": (
        lambda: whisper().generate(FEATURES[:, :, :5]),
        ValueError,
        r"input_features has shape \[2, 6, 5\]; it must be \[batch, 6, 24\]",
    ),
    "a mask": (
        lambda: whisper().generate(FEATURES, START),
        TypeError,
        "Whisper takes no attention_mask: its features have one length",
    ),
    "no start": (
        lambda: whisper().generate(FEATURES),
        ValueError,
        "Whisper names no decoder_start_token_id: pass decoder_input_ids",
    ),
    "other rows": (
        lambda: whisper().generate(FEATURES, decoder_input_ids=START[:1]),
        ValueError,
        "decoder_input_ids has 1 rows and input_ids has 2",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument(case: str) -> None:
    cause, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        cause()
