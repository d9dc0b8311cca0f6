"""Layouts of checkpoints, written by the tests' own encoders."""

from __future__ import annotations

import pytest
import torch

from flora_fx.quantized.formats.awq import read_awq
from flora_fx.quantized.formats.compressed import bits_of, read_compressed
from flora_fx.quantized.formats.gptq import read_gptq
from flora_fx.quantized.formats.packing import container, unpack_words
from flora_fx.quantized.formats.refusal import InexactError

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
    with pytest.raises(InexactError, match="hold no 96 codes"):
        unpack_words(torch.zeros(4, 1, dtype=torch.int32), 4, 96)


def test_codes_wider_than_a_byte_are_refused() -> None:
    with pytest.raises(InexactError, match="1 to 8"):
        container(9)
