"""Layouts of checkpoints, written by the tests' own encoders."""

from __future__ import annotations

import json

import pytest
import torch

from flora_fx.quantized.formats.awq import read_awq
from flora_fx.quantized.formats.bitsandbytes import read_serialized
from flora_fx.quantized.formats.compressed import bits_of, read_compressed
from flora_fx.quantized.formats.gptq import read_gptq
from flora_fx.quantized.formats.packing import container, unpack_words
from flora_fx.quantized.formats.refusal import InexactError
from flora_fx.quantized.weight import CODEBOOKS

from . import encoders


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v2", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq(bits: int, v2: bool, act_order: bool) -> None:
    parts, expected = encoders.gptq(64, 96, bits=bits, v2=v2, act_order=act_order)
    weight = read_gptq(**parts, bits=bits, group_size=32, v2=v2)
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert torch.equal(weight.dequantize(), expected.half())
    assert weight.bits == container(bits)
    assert (weight.order is not None) == act_order == ("act-order" in weight.source)


def test_gptq_of_one_group_a_row() -> None:
    parts, expected = encoders.gptq(64, 96, block=96)
    weight = read_gptq(**parts, bits=4, group_size=-1, v2=False)
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert weight.source == "GPTQ, 4 bits, one group a row"


@pytest.mark.parametrize("v2", [True, False])
def test_symmetric_zero_points_go_without_saying(v2: bool) -> None:
    parts, expected = encoders.gptq(64, 96, v2=v2, symmetric=True)
    weight = read_gptq(**parts, bits=4, group_size=32, v2=v2)
    assert weight.zeros is None
    assert torch.equal(weight.dequantize(torch.float32), expected)


def test_the_other_versions_zero_points_would_be_other_numbers() -> None:
    parts, expected = encoders.gptq(64, 96, v2=True)
    parts["qzeros"] = parts["qzeros"] & 0x77777777  # none is 15
    weight = read_gptq(**parts, bits=4, group_size=32, v2=False)
    assert not torch.equal(weight.dequantize(torch.float32), expected)


def test_a_zero_point_that_kernels_do_not_agree_on_is_refused() -> None:
    parts, _ = encoders.gptq(64, 96, v2=False)
    parts["qzeros"][0, 0] = -1
    with pytest.raises(InexactError, match="some kernels take it as 16"):
        read_gptq(**parts, bits=4, group_size=32, v2=False)
    assert read_gptq(**parts, bits=4, group_size=32, v2=True).shape == (64, 96)


def test_groups_of_unequal_size_are_refused() -> None:
    parts, _ = encoders.gptq(64, 96)
    parts["g_idx"][0] = 1
    with pytest.raises(InexactError, match="not all of 32"):
        read_gptq(**parts, bits=4, group_size=32, v2=False)


def test_a_scale_that_is_no_number_is_refused() -> None:
    parts, _ = encoders.gptq(64, 96)
    parts["scales"][0, 0] = torch.inf
    with pytest.raises(InexactError, match="NaN or infinite"):
        read_gptq(**parts, bits=4, group_size=32, v2=False)


def test_awq() -> None:
    parts, expected = encoders.awq(64, 96)
    weight = read_awq(**parts, bits=4, group_size=32)
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert weight.source == "AWQ, 4 bits, groups of 32"
    with pytest.raises(InexactError, match="3 bits"):
        read_awq(**parts, bits=3, group_size=32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_compressed_tensors(bits: int, symmetric: bool, act_order: bool) -> None:
    parts, expected = encoders.compressed(64, 96, bits=bits, symmetric=symmetric, act_order=act_order)
    weight = read_compressed(
        parts["weight_packed"],
        parts["weight_scale"],
        parts.get("weight_zero_point"),
        parts["weight_shape"],
        parts.get("weight_g_idx"),
        bits=bits,
    )
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert weight.scales.dtype == weight.dtype == torch.bfloat16
    assert bits_of(parts["weight_packed"], 96, {4, 8}) == bits


def test_bits_that_words_do_not_tell_are_refused() -> None:
    with pytest.raises(InexactError, match="no known bits"):
        bits_of(torch.zeros(4, 5, dtype=torch.int32), 96, {4, 8})
    with pytest.raises(InexactError, match=r"\[4, 8\] bits"):
        bits_of(torch.zeros(4, 1, dtype=torch.int32), 4, {4, 8})
    with pytest.raises(InexactError, match="do not hold 96 codes"):
        unpack_words(torch.zeros(4, 1, dtype=torch.int32), 4, 96)


@pytest.mark.parametrize(
    ("changes", "bits", "told"),
    [
        ({}, 5, "with 5 bits has no layout"),
        ({"weight_scale": torch.ones(64, 5)}, 4, "5 scales stand over 96 columns"),
        ({"weight_scale": torch.ones(64, 2)}, 4, "scales for"),
        ({"weight_zero_point": torch.full((64, 3), 20, dtype=torch.int8)}, 4, "none of its 16 codes"),
    ],
)
def test_parts_of_compressed_tensors_that_do_not_fit_are_refused(
    changes: dict[str, torch.Tensor], bits: int, told: str
) -> None:
    parts = encoders.compressed(64, 96, symmetric=False)[0] | changes
    given = [parts[f"weight_{name}"] for name in ("packed", "scale", "zero_point", "shape")]
    with pytest.raises(InexactError, match=told):
        read_compressed(*given, None, bits=bits)


def test_zero_points_and_scales_of_a_whole_tensor_are_those_of_each_row() -> None:
    parts, _ = encoders.compressed(64, 96, block=96)
    one = {"packed": parts["weight_packed"], "scale": torch.tensor([0.5]), "shape": parts["weight_shape"]}
    weight = read_compressed(**one, zero_point=torch.tensor([-3], dtype=torch.int8), g_idx=None, bits=4)
    assert torch.equal(weight.dequantize(), (weight.unpacked().float() - 5) * 0.5)


def _state(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    told = {"quant_type": "nf4", "blocksize": 16, "dtype": "float32", "shape": [4, 32]}
    parts: dict[str, torch.Tensor | None] = {
        "weight": torch.arange(64, dtype=torch.uint8).reshape(-1, 1),
        "weight.absmax": torch.linspace(1, 2, 8),
        "weight.quant_map": torch.tensor(CODEBOOKS["nf4"]),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8),
        **changes,
    }
    return {name: part for name, part in parts.items() if part is not None}


def test_a_serialized_state_of_bitsandbytes() -> None:
    weight = read_serialized(_state())
    assert (weight.kind, weight.block, weight.shape) == ("nf4", 16, (4, 32))
    assert weight.dequantize()[0, 0] == CODEBOOKS["nf4"][0]


@pytest.mark.parametrize(
    ("name", "part", "told"),
    [
        ("weight.absmax", None, "not complete"),
        ("weight.quant_state.bitsandbytes__nf4", None, "not complete"),
        ("weight.quant_map", torch.linspace(-1, 1, 16), "codebook is not that of NF4 or FP4"),
        ("weight.absmax", torch.full((8,), torch.inf), "NaN or infinite"),
    ],
)
def test_a_state_that_is_another_is_refused(name: str, part: torch.Tensor | None, told: str) -> None:
    with pytest.raises(InexactError, match=told):
        read_serialized(_state(**{name: part}))


def test_codes_wider_than_a_byte_are_refused() -> None:
    with pytest.raises(InexactError, match="1 to 8"):
        container(9)
