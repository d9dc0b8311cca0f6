"""Inputs of an encoder that have batches of their own: one image and several texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import peft
import pytest
import torch
import transformers
from torch import Tensor

from flora_fx.export import Encoder, export_onnx, load
from flora_fx.export.targets import trace
from flora_fx.export.trace.example import linked, other_sizes, padded, resized, tell_apart, varied
from tests.export.exported_models import Exported

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT: dict[str, Any] = {**TOWER, "vocab_size": 97, "max_position_embeddings": 24}
VISION: dict[str, Any] = {**TOWER, "image_size": 16, "patch_size": 8}


def clip() -> Any:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**TEXT, **tokens, "projection_dim": 16},
        vision_config={**VISION, "projection_dim": 16},
        projection_dim=16,
    )
    return transformers.CLIPModel(config)


def layout_lm() -> Any:
    return transformers.LayoutLMModel(transformers.LayoutLMConfig(**TEXT, max_2d_position_embeddings=50))


def texts(rows: int, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (rows, length))
    ids[:, -1] = 2
    mask = torch.ones_like(ids)
    mask[1:, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def zero_shot(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(clip(), lora).eval()
    place = tmp_path_factory.mktemp("clip") / "out"
    return Exported(model, export_onnx(model, place), load(place))  # its inputs are made up


@pytest.mark.parametrize(("images", "rows", "length"), [(1, 3, 7), (4, 2, 5), (3, 1, 9), (2, 2, 7)])
def test_images_and_texts_are_counted_apart(zero_shot: Exported, images: int, rows: int, length: int) -> None:
    inputs = {**texts(rows, length), "pixel_values": torch.randn(images, 3, 16, 16)}
    with torch.no_grad():
        expected = zero_shot.model(**inputs)
    found = zero_shot.encoder(**inputs)
    assert found["logits_per_image"].shape == (images, rows)
    for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_what_they_are_called(zero_shot: Exported) -> None:
    graph = onnx.load(str(zero_shot.directory / "model.onnx"), load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    images = "pixel_values_batch"
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "pixel_values": [images, 3, 16, 16],
        "logits_per_image": [images, "batch"],
        "logits_per_text": ["batch", images],
        "text_embeds": ["batch", 16],
        "image_embeds": [images, 16],
    }
    uneven = {**texts(3), "attention_mask": texts(2)["attention_mask"], "pixel_values": torch.randn(1, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 7\]; its batch must be 3, as in input_ids"):
        zero_shot.encoder(**uneven)


def test_an_example_of_one_image_and_three_texts() -> None:
    _, traced = trace(clip().eval(), "encoder", {"pixel_values": torch.randn(1, 3, 16, 16), **texts(3)})
    assert traced.axes["pixel_values"] == {0: "batch"}
    assert traced.axes["input_ids"] == {0: "input_ids_batch", 1: "sequence"}
    assert traced.axes["logits_per_image"] == {0: "batch", 1: "input_ids_batch"}
    rows = {name: len(value) for name, value in traced.example.items()}
    assert rows["input_ids"] == rows["attention_mask"] != rows["pixel_values"]


def test_boxes_go_with_their_tokens() -> None:
    corner = torch.randint(0, 20, (2, 7, 2))
    _, traced = trace(layout_lm().eval(), "encoder", {**texts(2), "bbox": torch.cat([corner, corner + 9], -1)})
    for name in ("input_ids", "attention_mask", "bbox", "last_hidden_state"):
        assert traced.axes[name] == {0: "batch", 1: "sequence"}
    assert traced.example["bbox"].shape == (3, 9, 4)


@pytest.mark.slow
def test_boxes_of_another_length(tmp_path: Any) -> None:
    model = layout_lm().eval()
    corner = torch.randint(0, 20, (3, 11, 2))
    inputs = {**texts(3, 11), "bbox": torch.cat([corner, corner + 9], -1)}
    export_onnx(model, tmp_path / "out", example_inputs={name: value[:1, :7] for name, value in inputs.items()})
    encoder = load(tmp_path / "out")
    assert isinstance(encoder, Encoder)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    torch.testing.assert_close(encoder(**inputs)["last_hidden_state"], expected, rtol=1e-4, atol=1e-5)


# What goes together


def two_towers(inputs: Mapping[str, Tensor]) -> Tensor:
    """Reads no mask that is all ones, nor rows of it that are too many, as transformers' masks."""
    ids, mask = inputs["ids"], inputs["mask"]
    if not bool(mask.all()):
        ids = ids * mask[torch.arange(len(ids))]
    return ids.sum(1)[:, None] + inputs["image"].sum((1, 2, 3)) + (inputs["other"] * inputs["image"].mean()).sum()


def one_batch(inputs: Mapping[str, Tensor]) -> Tensor:
    return inputs["ids"].sum(1) + inputs["image"].sum((1, 2, 3))


def test_inputs_are_linked_by_what_runs() -> None:
    ids, mask = torch.ones(2, 7), torch.ones(2, 7)
    mask[1, 4:] = 0
    inputs = {"mask": mask, "image": torch.ones(2, 3, 4, 4), "ids": ids, "other": torch.ones(2, 5, 1)}
    assert linked(two_towers, inputs) == [("mask", "ids"), ("image",), ("other",)]
    assert linked(one_batch, {"ids": ids, "image": inputs["image"]}) == [("ids", "image")]
    # Not by shape alone either: a mask [batch, 1, sequence] that has rows too many goes unnoticed.
    shaped = {**inputs, "mask": mask[:, None]}

    def run(given: Mapping[str, Tensor]) -> Tensor:
        return two_towers({**given, "mask": given["mask"][:, 0]})

    assert linked(run, shaped) == [("mask", "ids"), ("image",), ("other",)]


def test_sizes_that_tell_groups_apart() -> None:
    inputs = {"left": torch.ones(2, 7), "mask": torch.ones(2, 7), "right": torch.ones(2, 7), "box": torch.ones(2, 7, 4)}

    def run(given: Mapping[str, Tensor]) -> None:
        assert given["left"].shape == given["mask"].shape
        assert given["box"].shape[:2] == given["right"].shape

    apart = tell_apart(run, inputs, [("left", "mask"), ("right", "box")])
    assert [tuple(value.shape) for value in apart.values()] == [(2, 7), (2, 7), (3, 9), (3, 9, 4)]
    others = other_sizes(run, apart, [("left", "mask"), ("right", "box")])
    assert [tuple(value.shape) for value in others.values()] == [(3, 9), (3, 9), (4, 12), (4, 12, 4)]


def test_values_that_a_model_takes() -> None:
    ids = torch.arange(14).reshape(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image": torch.zeros(2, 3)}

    def run(given: Mapping[str, Tensor]) -> None:
        assert bool((given["input_ids"] < 14).all())

    assert padded(run, inputs)["attention_mask"].tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    values = varied(run, inputs, 10**6)
    assert torch.equal(values["input_ids"], ids), "it takes no others"
    assert not torch.equal(varied(lambda _: None, inputs, 10**6)["input_ids"], ids)
    assert values["image"].std() > 0
    assert resized(ids, 0, 3)[2].tolist() == ids[0].tolist()
